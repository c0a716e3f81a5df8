"""From logits to the next token: repetition penalty, temperature, top-k, top-p, in that order (SPEC 6.3).

B rows of a batch, V vocabulary. Every option is an array, so that changing one does not recompile.
"""

from __future__ import annotations

import operator
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from numbers import Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from vl2_jax.errors import RequestError, shown

_SAMPLED_PENALTY = 1.1  # what the released entry points use when they sample; greedy decoding has none
_PENALTIES = (0.01, 100.0)
_SMALLEST = float(np.finfo(np.float32).tiny)  # a smaller temperature is 0 on the device


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
      seed: equal seeds give equal answers, whatever else is in the batch. Row r of a batch has seed + r; a sequence
        holds a seed a row. `None` is another one each time.
      ignore_eos: go on to `max_tokens` (for measuring).
      stop: the answer ends before this string, or before any of these.

    Raises:
      RequestError: a value of another kind, or outside of its range.
    """

    max_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 0.9
    top_k: int = 50
    repetition_penalty: float | None = None
    seed: int | Sequence[int] | None = None
    ignore_eos: bool = False
    stop: str | Sequence[str] | None = ()

    def __post_init__(self) -> None:
        self._keep("max_tokens", _whole(self.max_tokens, 1), "a whole number of at least 1")
        self._keep("temperature", _number(self.temperature, 0, 1e30), "a number of 0 (greedy) or more")
        self._keep("top_p", _number(self.top_p, _SMALLEST, 1), "a number above 0 and at most 1")
        self._keep("top_k", _whole(self.top_k, 0), "a whole number of 0 (no limit) or more")
        if self.repetition_penalty is not None:
            expected = "a number from 0.01 to 100 (1 is none), or None"
            self._keep("repetition_penalty", _number(self.repetition_penalty, *_PENALTIES), expected)
        if self.seed is not None:
            expected = "a whole number from -2**63 to 2**63 - 1, one for each row, or None"
            self._keep("seed", _seeds(self.seed), expected)
        self._keep("ignore_eos", self.ignore_eos if isinstance(self.ignore_eos, bool) else None, "True or False")
        self._keep("stop", _strings(self.stop), "a string that is not empty, or several")

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> SamplingOptions:
        """From keyword arguments.

        Raises:
          RequestError: see `SamplingOptions`; or there is no such option.
        """
        names = [field.name for field in fields(cls)]
        for unknown in options.keys() - set(names):
            close = get_close_matches(unknown, names, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(names)}."
            raise RequestError(f"there is no option {shown(unknown)}; {hint}")
        return cls(**options)

    @property
    def is_greedy(self) -> bool:
        return self.temperature < _SMALLEST

    @property
    def penalty(self) -> float:
        if self.repetition_penalty is not None:
            return self.repetition_penalty
        return 1.0 if self.is_greedy else _SAMPLED_PENALTY

    @property
    def stops(self) -> tuple[str, ...]:
        assert isinstance(self.stop, tuple)
        return self.stop

    def seeds(self, rows: int) -> list[int]:
        """A seed for each row of a batch.

        Raises:
          RequestError: a sequence of seeds that are not as many as rows.
        """
        first = secrets.randbits(63) if self.seed is None else self.seed
        if isinstance(first, int):
            return [first + row for row in range(rows)]
        if len(first) != rows:
            raise RequestError(f"{len(first)} seeds were given for {rows} answers; give one for each, or one number.")
        return list(first)

    def _keep(self, name: str, value: Any, expected: str) -> None:
        if value is None:
            raise RequestError(f"{name} is {shown(getattr(self, name))}; expected {expected}.")
        object.__setattr__(self, name, value)


def _whole(value: Any, least: int, most: int | None = None) -> int | None:
    try:
        number = operator.index(value)
    except TypeError:
        return None
    is_valid = not isinstance(value, bool | np.bool) and number >= least and (most is None or number <= most)
    return number if is_valid else None


def _number(value: Any, least: float, most: float) -> float | None:
    try:
        number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else float("nan")
    except (OverflowError, ValueError):
        return None
    return number if least <= number <= most else None


def _seeds(value: Any) -> int | tuple[int, ...] | None:
    if isinstance(value, Sequence | np.ndarray) and not isinstance(value, str | bytes):
        seeds = tuple(_whole(seed, -(2**63), 2**63 - 1) for seed in value)
        return None if None in seeds else seeds  # type: ignore[return-value]
    return _whole(value, -(2**63), 2**63 - 1)


def _strings(value: Any) -> tuple[str, ...] | None:
    if value is None:
        return ()
    strings = (value,) if isinstance(value, str) else value
    if not isinstance(strings, Sequence | set | frozenset) or isinstance(strings, bytes):
        return None
    return tuple(strings) if all(isinstance(string, str) and string for string in strings) else None


class Sampler(NamedTuple):
    """The options of a batch on the device."""

    temperature: Float[Array, ""]
    top_p: Float[Array, ""]
    top_k: Int[Array, ""]
    penalty: Float[Array, ""]
    seeds: UInt32[Array | np.ndarray, "B 2"]  # upper and lower half of each

    @classmethod
    def of(cls, options: SamplingOptions, vocabulary: int, rows: int) -> Sampler:
        seeds = [seed % 2**64 for seed in options.seeds(rows)]
        return cls(
            jnp.float32(options.temperature),
            jnp.float32(options.top_p),
            jnp.int32(min(options.top_k or vocabulary, vocabulary)),
            jnp.float32(options.penalty),
            np.asarray([divmod(seed, 2**32) for seed in seeds], np.uint32),
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
        # From the likeliest down, so that a small temperature makes minus infinities rather than both kinds.
        heated = (adjusted - adjusted.max(axis=-1, keepdims=True)) / sampler.temperature
        kept = keep_likeliest(heated, sampler.top_k, sampler.top_p)
        keys = jax.vmap(jax.random.fold_in)(
            jax.random.wrap_key_data(jnp.asarray(sampler.seeds), impl="threefry2x32"), step
        )
        ids = jax.vmap(jax.random.categorical)(keys, kept)
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    return ids.astype(jnp.int32), jnp.take_along_axis(logprobs, ids[:, None], axis=-1)[:, 0]
