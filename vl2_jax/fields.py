"""Frozen dataclasses whose fields are the keys of a JSON object: read with every value's kind checked, and written.

`source` keeps the JSON that was read: `to_hf` writes it back with the fields that were changed, and nothing else, so
that keys we do not know survive a round trip.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Mapping
from types import NoneType
from typing import Any, ClassVar, Self, get_args, get_origin, get_type_hints

from vl2_jax.errors import ConfigError, shown

_LARGEST = 2**31 - 1


def source_field() -> Any:
    return dataclasses.field(default_factory=dict, compare=False, hash=False, repr=False)


class ReleasedFields:
    """Reading and writing of one JSON object."""

    source: dict[str, Any]
    ALSO: ClassVar[Mapping[str, str]] = {}  # where newer tools write a field

    @classmethod
    def from_hf(cls, data: Mapping[str, Any]) -> Self:
        """From a JSON object; keys that are not known are kept and mean nothing.

        Raises:
          ConfigError: a value of another kind, or one that the model cannot have.
        """
        return cls(**_values(cls, cls.as_released(data)), source=copy.deepcopy(dict(data)))  # type: ignore[call-arg]

    @classmethod
    def as_released(cls, data: Mapping[str, Any]) -> Mapping[str, Any]:
        """The object as a released file would have it (`spellings`)."""
        return data

    def to_hf(self) -> dict[str, Any]:
        """The JSON object: the keys that were read, and every field that differs from what they say."""
        read = type(self).from_hf(self.source)
        names = [f.name for f in dataclasses.fields(self) if f.name != "source"]  # type: ignore[arg-type]
        changed = {name: getattr(self, name) for name in names if getattr(self, name) != getattr(read, name)}
        if outdated := {self.ALSO[name] for name in changed if name in self.ALSO} & self.source.keys():
            left = {key: value for key, value in self.source.items() if key not in outdated}
            return self.replace(source=left).to_hf()
        return copy.deepcopy(self.source) | {name: _thaw(value) for name, value in changed.items()}

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]


def require_positive(where: str, config: Any, *names: str) -> None:
    for name in names:
        if not (getattr(config, name) or 0) > 0:
            raise ConfigError(f"{where} {name} is {getattr(config, name)}; expected a number above 0.")


_hints = functools.cache(get_type_hints)


def _values(kind: Any, data: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a dataclass that `data` has."""
    hints = _hints(kind)
    names = [f.name for f in dataclasses.fields(kind) if f.name != "source" and f.name in data]
    # Null is a value where a field may be None, and says nothing elsewhere.
    given = [name for name in names if data[name] is not None or NoneType in get_args(hints[name])]
    return {name: _value(hints[name], data[name], name) for name in given}


def _value(hint: Any, value: Any, where: str) -> Any:
    options = get_args(hint) if NoneType in get_args(hint) else (hint,)
    if value is None and NoneType in options:
        return None
    kind: Any = options[0]
    if get_origin(kind) is tuple and isinstance(value, list | tuple):
        inner, *more = get_args(kind)
        if more == [...] or len(value) == 1 + len(more):
            return tuple(_value(inner, item, where) for item in value)
    if isinstance(value, Mapping) and hasattr(kind, "from_hf"):
        return kind.from_hf(value)
    if isinstance(value, Mapping) and dataclasses.is_dataclass(kind):
        known = [f.name for f in dataclasses.fields(kind)]
        if set(value) - set(known):
            raise ConfigError(f"{where} {shown(value)} is not understood; its keys are {', '.join(sorted(known))}.")
        record: Any = kind
        return record(**_values(kind, value))
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST
    if kind is float and is_number:
        return value
    if kind is int and is_number and value == int(value):
        return int(value)
    if kind in (str, bool) and isinstance(value, kind):
        return value
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
    raise ConfigError(f"{where} is {shown(value)}; expected {names.get(kind, 'what the released files have there')}.")


def _thaw(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_thaw(item) for item in value]
    if isinstance(value, ReleasedFields):
        return value.to_hf()
    is_record = dataclasses.is_dataclass(value) and not isinstance(value, type)
    return dataclasses.asdict(value) if is_record else value
