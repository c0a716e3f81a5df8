"""From logits to the next token: repetition penalty, temperature, top-k, top-p, in that order (SPEC 6.3).

B rows of a batch, V vocabulary. Every option is an array with a number a row, so that changing one does not recompile
and rows of one batch may differ in all of them.

Nothing is sorted, gathered or scattered over the vocabulary, which a TPU does in milliseconds. What is kept is found
by two thresholds, each by bisection over the bits of the logits: 32 passes of comparing and counting.

    logits        2.0   0.5   1.0   1.0   0.1   1.0     top_k = 3: the third largest is 1.0, two of three ties are in
    key >= 1.0     x           x     x           x      top_p: of what is left, the value where the mass is reached
    the kept       x           x     x                  ties at a threshold: those with the lowest ids
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from vl2_jax.inference.options import MOST_STOP_IDS, SamplingOptions


class Extras(NamedTuple):
    """Options that few requests have: programs without them do not make these passes over the vocabulary."""

    presence: Float[Array | np.ndarray, " B"]
    frequency: Float[Array | np.ndarray, " B"]
    min_p: Float[Array | np.ndarray, " B"]
    least: Int[Array | np.ndarray, " B"]  # tokens before any of `ends` may be chosen
    ends: Int[Array | np.ndarray, "B e"]  # -1 is none
    bias: Float[Array | np.ndarray, "B V"]

    @classmethod
    def of(cls, options: SamplingOptions, vocabulary: int, rows: int, eos: int) -> Extras:
        """The same options for every row; a `vocabulary` of 0 leaves the biases out."""
        ends = [-1 if options.ignore_eos else eos, *options.stop_token_ids]
        ends += [-1] * (1 + MOST_STOP_IDS - len(ends))
        return cls(
            np.full(rows, options.presence_penalty, np.float32),
            np.full(rows, options.frequency_penalty, np.float32),
            np.full(rows, options.min_p, np.float32),
            np.full(rows, options.min_tokens, np.int32),
            np.tile(np.asarray(ends, np.int32), (rows, 1)),
            np.tile(bias_of(options, vocabulary), (rows, 1)),
        )


def bias_of(options: SamplingOptions, vocabulary: int) -> Float[np.ndarray, " V"]:
    """What is added to each logit. Ids that are none of the vocabulary have no bias."""
    bias = np.zeros(vocabulary, np.float32)
    for id_, value in (options.logit_bias or {}).items():
        bias[id_ : id_ + 1] = value
    return bias


class Sampler(NamedTuple):
    """The options of a batch on the device, a number a row."""

    temperature: Float[Array | np.ndarray, " B"]  # 0 takes the likeliest
    top_p: Float[Array | np.ndarray, " B"]
    top_k: Int[Array | np.ndarray, " B"]
    penalty: Float[Array | np.ndarray, " B"]
    seeds: UInt32[Array | np.ndarray, "B 2"]  # upper and lower half of each
    extras: Extras | None = None

    @classmethod
    def of(cls, options: SamplingOptions, vocabulary: int, rows: int) -> Sampler:
        """The same options for every row, but for its seed."""
        seeds = [divmod(seed % 2**64, 2**32) for seed in options.seeds(rows)]
        return cls(
            np.full(rows, 0 if options.is_greedy else options.temperature, np.float32),
            np.full(rows, options.top_p, np.float32),
            np.full(rows, min(options.top_k or vocabulary, vocabulary), np.int32),
            np.full(rows, options.penalty, np.float32),
            np.asarray(seeds, np.uint32),
        )

    @classmethod
    def of_each(cls, each: Sequence[SamplingOptions], vocabulary: int, rows: int, eos: int = -1) -> Sampler:
        """So many rows of each of several options; with extras where any has some."""
        samplers = [cls.of(options, vocabulary, rows) for options in each]
        together = jax.tree.map(lambda *parts: np.concatenate(parts), *samplers)
        if not any(options.has_extras for options in each):
            return together
        extras = [Extras.of(options, vocabulary, rows, eos) for options in each]
        return together._replace(extras=jax.tree.map(lambda *parts: np.concatenate(parts), *extras))


def penalise_repetition(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: Float[Array, " B"]
) -> Float[Array, "B V"]:
    """Ids that were seen: a positive logit is divided by the penalty, a negative one multiplied."""
    penalty = penalty[:, None]
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def with_extras(
    logits: Float[Array, "B V"],
    extras: Extras,
    counts: Int[Array, "B V"],
    step: Int[Array, " B"],
) -> Float[Array, "B V"]:
    """Biases added, penalties of what the answer holds subtracted, ends forbidden while it is too short.

    Args:
      counts: how often the answer holds an id.
    """
    presence, frequency = (jnp.asarray(each)[:, None] for each in (extras.presence, extras.frequency))
    logits = logits + jnp.asarray(extras.bias) - presence * (counts > 0) - frequency * counts
    is_end = (jnp.arange(logits.shape[-1]) == jnp.asarray(extras.ends)[..., None]).any(axis=1)
    return jnp.where(is_end & (step < jnp.asarray(extras.least))[:, None], -jnp.inf, logits)


def keep_likeliest(
    logits: Float[Array, "B V"], top_k: Int[Array, " B"], top_p: Float[Array, " B"]
) -> Float[Array, "B V"]:
    """-inf for all but the `top_k` likeliest ids, and of those for all past a cumulative probability of `top_p`.

    Of ids with equal logits those with lower numbers come first. A `top_p` of 1 keeps all.
    """
    keys = _ordered_bits(logits)
    kth = _largest(lambda key: (keys >= key).sum(axis=-1) >= top_k, logits.shape[0])
    above = keys > kth[:, None]
    tied = top_k - above.sum(axis=-1)  # of the ids at the threshold, as many as top_k still has room for
    mass = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
    masses = jnp.where(above, mass, 0)
    wanted = jnp.where(top_p < 1, top_p, jnp.inf)
    wanted = wanted * (masses.sum(axis=-1) + tied * _at(kth, keys, mass))
    # No key of those above has a mass that is reached: then it is reached, or not at all, among the ties.
    cut = _largest(lambda key: jnp.where(keys >= key, masses, 0).sum(axis=-1) >= wanted, logits.shape[0])
    last = jnp.maximum(cut, kth)
    certain = keys > last[:, None]
    missing = wanted - jnp.where(certain, mass, 0).sum(axis=-1)
    at_last = keys == last[:, None]
    needed = jnp.ceil(missing / _at(last, keys, mass))  # ids at the threshold, of which each begins before `top_p`
    room = jnp.where(last == kth, tied, at_last.sum(axis=-1))
    needed = jnp.minimum(jnp.where(jnp.isnan(needed), jnp.inf, needed), room).astype(jnp.int32)
    return jnp.where(certain | _first_of(at_last, needed), logits, -jnp.inf)


def choose(
    logits: Float[Array, "B V"],
    sampler: Sampler,
    seen: Bool[Array, "B V"],
    step: Int[Array, " B"],
    greedy: bool,
    counts: Int[Array, "B V"] | None = None,
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """The next ids and their log-probabilities under the model's own distribution.

    Args:
      seen: ids that stand in the prompt or the answer.
      step: tokens each row has generated, which with the seed decides its random numbers.
      greedy: every temperature is 0; known when compiling, as it saves the thresholds.
      counts: how often the answer holds an id, where the sampler has extras.
    """
    adjusted, extras = logits, sampler.extras
    if extras is not None and counts is not None:
        adjusted = with_extras(logits, extras, counts, step)
    adjusted = penalise_repetition(adjusted, seen, jnp.asarray(sampler.penalty))
    ids = jnp.argmax(adjusted, axis=-1)
    if not greedy:
        temperature = jnp.asarray(sampler.temperature)
        # From the likeliest down, so that a small temperature makes minus infinities rather than both kinds.
        heated = (adjusted - adjusted.max(axis=-1, keepdims=True)) / temperature[:, None]
        if extras is not None:
            heated = jnp.where(heated < jnp.log(jnp.asarray(extras.min_p))[:, None], -jnp.inf, heated)
        kept = keep_likeliest(heated, jnp.asarray(sampler.top_k), jnp.asarray(sampler.top_p))
        keys = jax.random.wrap_key_data(jnp.asarray(sampler.seeds), impl="threefry2x32")
        keys = jax.vmap(jax.random.fold_in)(keys, step)
        ids = jnp.where(temperature > 0, jax.vmap(jax.random.categorical)(keys, kept), ids)
    chosen = jnp.arange(logits.shape[-1]) == ids[:, None]
    logprobs = jnp.where(chosen, jax.nn.log_softmax(logits, axis=-1), 0).sum(axis=-1)
    return ids.astype(jnp.int32), logprobs


def _ordered_bits(x: Float[Array, "B V"]) -> UInt32[Array, "B V"]:
    """Numbers that are in the order of `x`; both zeros are one."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.int32)
    return jax.lax.bitcast_convert_type(bits ^ ((bits >> 31) | jnp.int32(-(2**31))), jnp.uint32)


def _largest(holds: Callable[[Array], Array], rows: int, bits: int = 32) -> UInt32[Array, " B"]:
    """The largest number of each row that `holds`, which every smaller one does too; 0 where none does."""

    def with_bit(number: Array, found: Array) -> Array:
        more = found | (jnp.uint32(1) << (bits - 1 - number).astype(jnp.uint32))
        return jnp.where(holds(more[:, None]), more, found)

    return jax.lax.fori_loop(0, bits, with_bit, jnp.zeros(rows, jnp.uint32))


def _at(key: UInt32[Array, " B"], keys: UInt32[Array, "B V"], mass: Float[Array, "B V"]) -> Float[Array, " B"]:
    """The mass of any id with this key."""
    return jnp.where(keys == key[:, None], mass, 0).max(axis=-1)


def _first_of(ids: Bool[Array, "B V"], count: Int[Array, " B"]) -> Bool[Array, "B V"]:
    """As many of the ids of each row, from the lowest."""
    numbers = jnp.arange(ids.shape[-1], dtype=jnp.uint32)
    bits = ids.shape[-1].bit_length()
    end = _largest(lambda end: (ids & (numbers < end)).sum(axis=-1) <= count, ids.shape[0], bits)
    return ids & (numbers < end[:, None])
