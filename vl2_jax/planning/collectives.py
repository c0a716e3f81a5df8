"""The collectives of a compiled program: which, how many, how large, along which axes of the mesh."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

_KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|ragged-all-to-all"
_LINE = re.compile(rf"= (?P<shape>\(.*?\)|\S+) (?P<kind>{_KINDS})(?:-start)?\((?P<rest>.*)$")
_HEADING = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"(?:calls|to_apply|called_computations)=\{?%?([\w.\-]+)")
_LOOP = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_LIMIT = re.compile(r"s32\[\]\S* constant\((\d+)\)")
_ARRAY = re.compile(r"(?P<dtype>[a-z]+\d*)\[(?P<dims>[\d,]*)\]")
_BITS = {"pred": 8, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16}


class Collective(NamedTuple):
    """All collectives of one kind, along the same axes, of the same size."""

    kind: str
    axes: tuple[str, ...]
    size: int  # bytes of the largest array of one of them, on one device
    number: int  # of them, each as often as its loop goes round
    what: str  # the end of the name of what it belongs to, such as "routed_experts"

    @property
    def wire_bytes(self) -> float:
        """Bytes of all of them that a device sends, at least, where many take part."""
        return self.number * self.size * (2.0 if self.kind == "all-reduce" else 1.0)


def find_collectives(text: str, mesh: Mesh) -> list[Collective]:
    """Of the text of an optimised program; a loop whose length is not known counts once."""
    seen: dict[tuple, int] = {}
    channels: set[str] = set()
    times, inside = rounds(text), ""
    for line in text.splitlines():
        if heading := _HEADING.match(line):
            inside = heading["name"]
        match = _LINE.search(line) if "(" in line else None
        if match is None:
            continue
        rest = match["rest"]
        channel = re.search(r"channel_id=(\d+)", rest)
        if channel is not None:
            if channel[1] in channels:  # asynchronous ones stand there in several pieces
                continue
            channels.add(channel[1])
        size = max((_bytes(array) for array in _ARRAY.finditer(match["shape"])), default=0)
        if match["kind"] == "reduce-scatter":
            size *= len(next(iter(groups_of(rest)), [0]))
        name = re.search(r'op_name="([^"]*)"', rest)
        key = (match["kind"], axes_of(rest, mesh), size, part_of(name[1] if name else ""))
        seen[key] = seen.get(key, 0) + times.get(inside, 1)
    found = [Collective(kind, axes, size, count, what) for (kind, axes, size, what), count in seen.items()]
    return sorted(found, key=lambda c: (-c.wire_bytes, c))


def rounds(text: str) -> dict[str, int]:
    """How many times each computation of a program runs.

    A loop that counts from 0 to a constant has that constant in its condition, as scans and maps have.
    """
    calls: dict[str, list[tuple[str, str]]] = {}  # callee, condition if it is a loop's body
    limits: dict[str, list[int]] = {}
    entry = inside = ""
    for line in text.splitlines():
        if heading := _HEADING.match(line):
            inside = heading["name"]
            entry = inside if heading["entry"] else entry
        limits.setdefault(inside, []).extend(int(n) for n in _LIMIT.findall(line))
        found = [(body, condition) for condition, body in _LOOP.findall(line)]
        calls.setdefault(inside, []).extend(found or [(called, "") for called in _CALLED.findall(line)])
    counts: dict[str, int] = {}

    def visit(name: str, times: int) -> None:
        counts[name] = counts.get(name, 0) + times
        for called, condition in calls.get(name, []):
            limit = limits.get(condition, [])
            visit(called, times * limit[0] if len(limit) == 1 else times)

    visit(entry, 1)
    return counts


def part_of(name: str) -> str:
    """The part of the model that an operation stands in."""
    for part in ("routed_experts", "shared_experts", "self_attn", "mlp", "vision", "projector", "embed", "logits"):
        if f"/{part}" in name or f".{part}" in name:
            return part
    return "rest"


def axes_of(rest: str, mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes along which the groups of a collective lie; `("?",)` for any other grouping."""
    wanted = {tuple(sorted(group)) for group in groups_of(rest)}
    names = [name for name in mesh.axis_names if mesh.shape[name] > 1]
    numbers = np.arange(mesh.size).reshape(mesh.devices.shape)
    for count in range(len(names) + 1):
        for axes in itertools.combinations(names, count):
            kept = [i for i, name in enumerate(mesh.axis_names) if name not in axes]
            moved = [i for i, name in enumerate(mesh.axis_names) if name in axes]
            groups = numbers.transpose(*kept, *moved).reshape(-1, math.prod(mesh.shape[a] for a in axes))
            if wanted == {tuple(sorted(group)) for group in groups.tolist()}:
                return axes
    return ("?",) if wanted else tuple(names)


def groups_of(rest: str) -> Iterable[list[int]]:
    """`replica_groups={{0,1},{2,3}}`, `=[4,2]<=[8]`, `=[4,2]<=[2,4]T(1,0)`, or pairs of a permutation."""
    written = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}", rest)
    if written:
        return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", written[1])]
    counted = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest)
    if not counted:
        return []
    shape, dims = ([int(n) for n in counted[i].split(",")] for i in (1, 2))
    order = [int(n) for n in counted[3].split(",")] if counted[3] else list(range(len(dims)))
    return np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(shape).tolist()


def _bytes(array: re.Match[str]) -> int:
    count = math.prod(int(n) for n in array["dims"].split(",") if n)
    digits = re.sub(r"\D", "", array["dtype"])
    return count * _BITS.get(array["dtype"], int(digits or 32)) // 8
