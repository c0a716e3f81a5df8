"""What the engine runs on the device: few programs, of shapes that do not depend on what is asked.

    prefill_chunk   positions of one prompt into its pages              one program a chunk length
    begin           a slot for a prompt that is read, its first token   greedy, or with all options
    decode          a few tokens of the first r slots                   the same for every r of 1, 2, 4, ...
    encode_some     a tile a device into the table                      one program

`prefill_chunk` and `encode_some` are those of `inference.prefill`, and `decode` is a loop of `inference.generate`.
Every program takes the pages' table as numbers, so that which sequence has which page compiles nothing.

S slots, r of them in a step, V vocabulary, D model width.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vl2_jax.inference.generate import (
    Alternatives,
    DecodeState,
    counted,
    decode_steps,
    likeliest_of,
    with_token,
)
from vl2_jax.inference.options import SamplingOptions
from vl2_jax.inference.prefill import matmul_precision
from vl2_jax.inference.sampling import Extras, Sampler, bias_of, choose
from vl2_jax.model.decoder import Cache, init_pages
from vl2_jax.model.vl2 import Params, VL2Model, apply
from vl2_jax.serving.requests import MOST_ALTERNATIVES


class Slots(NamedTuple):
    """What is known on the device about the answers that are being written."""

    seen: Bool[Array, "S V"]
    counts: Int[Array, "S V"]
    bias: Float[Array, "S V"]


class Rows(NamedTuple):
    """The first slots in a step, as the host knows them."""

    token: Int[np.ndarray, " r"]
    position: Int[np.ndarray, " r"]
    step: Int[np.ndarray, " r"]
    done: Bool[np.ndarray, " r"]
    eos: Int[np.ndarray, " r"]
    pages: Int[np.ndarray, "r per"]


@partial(jax.jit, static_argnums=(0, 1, 2))
def empty(model: VL2Model, pages: int, slots: int) -> tuple[Cache, Slots]:
    vocabulary = model.config.language_config.vocab_size
    shape, whole = (slots, vocabulary), model.layout.constrain
    numbers = (jnp.zeros(shape, bool), jnp.zeros(shape, jnp.int16), jnp.zeros(shape, jnp.float32))
    cache = init_pages(model.config.language_config, pages, model.dtype, model.layout, model.cache_kind)
    return cache, Slots(*(whole(each, None, None) for each in numbers))


@partial(jax.jit, static_argnums=(0, 9), donate_argnums=3)
def begin(
    model: VL2Model,
    params: Params,
    hidden: Float[Array, "1 D"],
    slots: Slots,
    slot: Int[Array, ""],
    seen: Bool[Array, " V"],
    counts: Int[Array, " V"],
    step: Int[Array, " 1"],
    sampler: Sampler,
    greedy: bool,
) -> tuple[Slots, Int[Array, " 1"], Float[Array, " 1"], Alternatives]:
    """A slot for an answer, and its next token after the row of all that is read.

    Args:
      seen, counts: ids of the prompt and the answer, and how often the answer holds them.
      step: tokens of the answer so far.
      sampler: with its extras, also where the program is the greedy one, which does not look at them.
    """
    assert sampler.extras is not None
    with matmul_precision(model.dtype):
        logits = apply(model, params, hidden, method="logits")
    plain = sampler._replace(extras=None) if greedy else sampler
    token, logprob = choose(logits, plain, seen[None], step, greedy, None if greedy else counts[None])
    own = (with_token(seen[None], token), _narrow(counts[None], token), sampler.extras.bias)
    slots = Slots(*(jax.lax.dynamic_update_slice_in_dim(a, b.astype(a.dtype), slot, 0) for a, b in zip(slots, own)))
    return *_whole(model, (slots, token, logprob)), _told(model, logits, greedy)


@partial(jax.jit, static_argnums=(0, 7), donate_argnums=(2, 3))
def decode(
    model: VL2Model,
    params: Params,
    cache: Cache,
    slots: Slots,
    rows: Rows,
    sampler: Sampler,
    steps: Int[Array, ""],
    greedy: bool,
) -> tuple[Cache, Slots, Int[Array, "r n"], Float[Array, "r n"], Int[Array, " r"], Alternatives]:
    """Up to `steps` tokens of the first slots.

    Args:
      sampler: its extras without `bias`, which lies in the slots.
    """
    count = len(rows.token)
    seen, counts, bias = (each[:count] for each in slots)
    if greedy:
        sampler = sampler._replace(extras=None)
    elif sampler.extras is not None:
        sampler = sampler._replace(extras=sampler.extras._replace(bias=bias))
    token, position, step, done = (jnp.asarray(each) for each in rows[:4])
    state = DecodeState(cache, token, position, step, done, seen)
    if not greedy:
        state = state._replace(counts=counts.astype(jnp.int32))
    state, *told = decode_steps(
        model, params, state, rows.done, steps, sampler, rows.eos, greedy, rows.pages,
        alternatives=_alternatives(greedy),
    )  # fmt: skip
    new = (state.seen, counts if greedy else state.counts, bias)
    slots = Slots(*(jax.lax.dynamic_update_slice_in_dim(a, b.astype(a.dtype), 0, 0) for a, b in zip(slots, new)))
    return state.cache, _whole(model, slots), *told


def sampler_of(options: SamplingOptions, vocabulary: int, eos: int) -> Sampler:
    """Options of one slot, without `bias`, which is as wide as the vocabulary."""
    return Sampler.of(options, vocabulary, 1)._replace(extras=Extras.of(options, 0, 1, eos))


def with_bias(sampler: Sampler, options: SamplingOptions, vocabulary: int) -> Sampler:
    """A slot's options as `begin` takes them."""
    assert sampler.extras is not None
    return sampler._replace(extras=sampler.extras._replace(bias=bias_of(options, vocabulary)[None]))


def _narrow(counts: Array, token: Array) -> Array:
    wide = counted(counts.astype(jnp.int32), token)
    assert wide is not None
    return wide


def _told(model: VL2Model, logits: Array, greedy: bool) -> Alternatives:
    return _whole(model, likeliest_of(logits, _alternatives(greedy)))


def _alternatives(greedy: bool) -> int:
    return 0 if greedy else MOST_ALTERNATIVES


def _whole(model: VL2Model, tree):
    """The same on every device."""
    return jax.tree.map(lambda x: model.layout.constrain(x, *[None] * x.ndim), tree)
