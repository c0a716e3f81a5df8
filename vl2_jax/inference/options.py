"""How an answer is chosen and where it ends, as a caller says it; checked at the door (SPEC 6.3)."""

from __future__ import annotations

import operator
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from numbers import Real
from typing import Any, TypeVar

import numpy as np

from vl2_jax.errors import RequestError, shown

_SAMPLED_PENALTY = 1.1  # what the released entry points use when they sample; greedy decoding has none
_PENALTIES = (0.01, 100.0)
MOST_BIASES = 1024
MOST_STOP_IDS = 8
_SMALLEST = float(np.finfo(np.float32).tiny)  # a smaller temperature is 0 on the device

T = TypeVar("T")


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
      presence_penalty: subtracted from the logits of ids that the answer holds.
      frequency_penalty: likewise, once for each time that it does.
      min_p: sample only from tokens that are at least this much as likely as the likeliest.
      logit_bias: added to the logits of these ids.
      stop_token_ids: the answer ends with any of these.
      min_tokens: until there are so many, it neither ends by itself nor with one of `stop_token_ids`.

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
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    min_p: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    stop_token_ids: Sequence[int] = ()
    min_tokens: int = 0

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
        for name in ("presence_penalty", "frequency_penalty"):
            self._keep(name, _number(getattr(self, name), -2, 2), "a number from -2 to 2")
        self._keep("min_p", _number(self.min_p, 0, 1), "a number from 0 (no limit) to 1")
        self._keep("logit_bias", _biases(self.logit_bias), "numbers from -100 to 100 by token id, or None")
        self._keep("stop_token_ids", _ids(self.stop_token_ids), f"at most {MOST_STOP_IDS} token ids")
        self._keep("min_tokens", _whole(self.min_tokens, 0, self.max_tokens), "a whole number from 0 to max_tokens")

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
    def has_extras(self) -> bool:
        """Whether choosing a token needs more than the logits and the ids that were seen."""
        return bool(self.presence_penalty or self.frequency_penalty or self.min_p or self.logit_bias or self.min_tokens)

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
        return _all_of([_whole(seed, -(2**63), 2**63 - 1) for seed in value])
    return _whole(value, -(2**63), 2**63 - 1)


def _all_of(values: Sequence[T | None]) -> tuple[T, ...] | None:
    """The values, if all of them are valid."""
    valid = tuple(value for value in values if value is not None)
    return valid if len(valid) == len(values) else None


def _ids(value: Any) -> tuple[int, ...] | None:
    if not isinstance(value, Sequence | np.ndarray) or isinstance(value, str | bytes) or len(value) > MOST_STOP_IDS:
        return None
    return _all_of([_whole(id_, 0, 2**31 - 1) for id_ in value])


def _biases(value: Any) -> dict[int, float] | None:
    if value is None:
        return {}
    if not isinstance(value, Mapping) or len(value) > MOST_BIASES:
        return None
    ids = _all_of([_whole(id_, 0, 2**31 - 1) for id_ in value])
    biases = _all_of([_number(bias, -100, 100) for bias in value.values()])
    return None if ids is None or biases is None else dict(zip(ids, biases))


def _strings(value: Any) -> tuple[str, ...] | None:
    if value is None:
        return ()
    strings = (value,) if isinstance(value, str) else value
    if not isinstance(strings, Sequence | set | frozenset) or isinstance(strings, bytes):
        return None
    return tuple(strings) if all(isinstance(string, str) and string for string in strings) else None
