"""From logits to the next token: repetition penalty, temperature, top-k, top-p, in that order (SPEC 6.3).

B rows of a batch, V vocabulary. Every option is an array, so that changing one does not recompile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vl2_jax.errors import RequestError

_SAMPLED_PENALTY = 1.1  # what the released entry points use when they sample; greedy decoding has none


@dataclass(frozen=True)
class SamplingOptions:
    """How an answer is chosen and where it ends.

    Attributes:
      max_tokens: at most this many new tokens.
      temperature: 0 takes the likeliest token each time; larger is more varied.
      top_p: sample from the likeliest tokens that together have this probability.
      top_k: sample from this many tokens at most; 0 is no limit.
      repetition_penalty: above 1 discourages ids that the prompt or the answer holds; `None` is 1.1 when sampling
        and 1 when not, as in the released code.
      seed: equal seeds give equal answers, whatever else is in the batch.
      ignore_eos: go on to `max_tokens` (for measuring).
      stop: the answer ends before any of these strings.
    """

    max_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 0.9
    top_k: int = 50
    repetition_penalty: float | None = None
    seed: int = 0
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, is_valid, expected in (
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "0 (greedy) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 (no limit) or more"),
            ("repetition_penalty", self.penalty > 0, "above 0 (1 is none)"),
            ("stop", all(self.stop), "a tuple of non-empty strings"),
        ):
            if not is_valid:
                raise RequestError(f"{name} is {getattr(self, name)!r}; expected {expected}.")

    @property
    def penalty(self) -> float:
        if self.repetition_penalty is not None:
            return self.repetition_penalty
        return _SAMPLED_PENALTY if self.temperature > 0 else 1.0


class Sampler(NamedTuple):
    """The options of a batch on the device."""

    temperature: Float[Array, ""]
    top_p: Float[Array, ""]
    top_k: Int[Array, ""]
    penalty: Float[Array, ""]
    key: Array

    @classmethod
    def of(cls, options: SamplingOptions, vocabulary: int) -> Sampler:
        return cls(
            jnp.float32(options.temperature),
            jnp.float32(options.top_p),
            jnp.int32(options.top_k or vocabulary),
            jnp.float32(options.penalty),
            jax.random.key(options.seed),
        )


def penalise_repetition(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: Float[Array, ""]
) -> Float[Array, "B V"]:
    """Ids that were seen: a positive logit is divided by the penalty, a negative one multiplied."""
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def keep_likeliest(logits: Float[Array, "B V"], top_k: Int[Array, ""], top_p: Float[Array, ""]) -> Float[Array, "B V"]:
    """-inf for all but the `top_k` likeliest ids, and of those for all past a cumulative probability of `top_p`."""
    order = jnp.argsort(-logits, axis=-1)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    ranked = jnp.where(jnp.arange(logits.shape[-1]) < top_k, ranked, -jnp.inf)
    probabilities = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    ranked = jnp.where(before < top_p, ranked, -jnp.inf)
    rows = jnp.arange(logits.shape[0])[:, None]
    return jnp.zeros_like(logits).at[rows, order].set(ranked)


def choose(
    logits: Float[Array, "B V"],
    sampler: Sampler,
    seen: Bool[Array, "B V"],
    step: Int[Array, " B"],
    greedy: bool,
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """The next ids and their log-probabilities under the model's own distribution.

    Args:
      seen: ids that stand in the prompt or the answer.
      step: tokens each row has generated, which with the seed decides its random numbers.
      greedy: temperature is 0; known when compiling, as it saves the sort.
    """
    adjusted = penalise_repetition(logits, seen, sampler.penalty)
    if greedy:
        ids = jnp.argmax(adjusted, axis=-1)
    else:
        kept = keep_likeliest(adjusted / sampler.temperature, sampler.top_k, sampler.top_p)
        keys = jax.vmap(lambda n: jax.random.fold_in(sampler.key, n))(step)
        ids = jax.vmap(jax.random.categorical)(keys, kept)
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    return ids.astype(jnp.int32), jnp.take_along_axis(logprobs, ids[:, None], axis=-1)[:, 0]
