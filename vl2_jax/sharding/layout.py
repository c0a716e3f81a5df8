"""A model spread over a mesh: arrays by the table of `rules`, experts where their weights are.

Expert parallelism is dropless: every device computes the tokens of its own experts, however many they are.

    ring      tokens of all devices along `expert` are gathered, each device's share of the sums is scattered back
    ragged    a token travels only to the devices that hold one of its experts, and its sums travel back

n tokens of one device, N of all devices along `expert`, D model width, E experts, e of them here, F expert width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from vl2_jax.model.layers import Axes, Layout
from vl2_jax.ops.expert_ffn.api import ExpertAdapters, expert_ffn
from vl2_jax.ops.narrow.kinds import Narrow
from vl2_jax.sharding.ragged import exchange_and_compute
from vl2_jax.sharding.rules import EXPERT, TENSOR, sharding_of, spec_of, specs_of

Dispatch = Literal["ring", "ragged"]

_MOST_TOKENS = 8192  # gathered on one device at a time; more take several rounds


@dataclass(frozen=True)
class MeshLayout(Layout):
    """A `Layout` over the axes of `rules`.

    Attributes:
      mesh: with all of `rules.AXES`.
      dispatch: how tokens reach their experts.
    """

    mesh: Mesh
    dispatch: Dispatch = "ring"

    def constrain(self, x: Array, *axes: str | None) -> Array:
        return jax.lax.with_sharding_constraint(x, sharding_of(self.mesh, x.shape, axes))

    def on_own_parts(
        self, function: Callable[..., tuple[Array, ...]], axes: Sequence[Axes], results: Sequence[Axes], *arrays: Array
    ) -> tuple[Array, ...]:
        common: dict[str | None, int] = {}
        for array, names in zip(arrays, axes, strict=True):
            for size, name in zip(array.shape, names, strict=True):
                common[name] = math.gcd(size, common.get(name, 0))
        specs = [spec_of(self.mesh, [common[name] for name in names], names) for names in (*axes, *results)]
        given, got = tuple(specs[: len(arrays)]), tuple(specs[len(arrays) :])
        return jax.shard_map(function, mesh=self.mesh, in_specs=given, out_specs=got, check_vma=False)(*arrays)

    def sum_over_sequences(self, function: Callable[..., Array], shared: Any, *rows: Array) -> Array:
        axes = _axes_of(spec_of(self.mesh, rows[0].shape, ("batch", *[None] * (rows[0].ndim - 1))), 0)
        if not axes:
            return function(shared, *rows)
        spread = PartitionSpec(axes)

        def on_one(shared: Any, *rows: Array) -> Array:
            # Gradients of what is shared are summed here in float32 and travel as they came.
            wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), shared)
            return function(wide, *rows)[None]

        return jax.shard_map(
            on_one,
            mesh=self.mesh,
            in_specs=(PartitionSpec(), *[spread] * len(rows)),
            out_specs=spread,
            axis_names=set(axes),
            check_vma=False,
        )(shared, *rows).sum()

    def on_devices(self) -> AbstractContextManager:
        return jax.set_mesh(self.mesh)

    @property
    def devices(self) -> int:
        return self.mesh.size

    def experts(
        self,
        x: Float[Array, "B T D"],
        gate: Float[Array, "E D F"] | Narrow,
        up: Float[Array, "E D F"] | Narrow,
        down: Float[Array, "E F D"] | Narrow,
        expert_ids: Int[Array, "B T k"],
        combine_weights: Float[Array, "B T k"],
        adapters: ExpertAdapters | None = None,
    ) -> Float[Array, "B T D"]:
        # A kernel's embed axis is gathered from `fsdp` here; its experts and their width stay where they are.
        rows = spec_of(self.mesh, x.shape, ("batch", None, None))
        wide = specs_of(self.mesh, gate, ("expert", None, "expert_mlp"))
        tall = specs_of(self.mesh, down, ("expert", "expert_mlp", None))
        lies = jax.tree.leaves(tall, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))[0]
        cut: str | None = "expert_mlp"
        if isinstance(gate, Narrow) and TENSOR not in _axes_of(lies, 1):  # as far as groups of rows of `down` allow
            cut, wide = None, specs_of(self.mesh, gate, ("expert", None, None))
        factors = None
        if adapters is not None:
            factors = tuple(self._specs_of(pair, n == 2, cut) for n, pair in enumerate(adapters))
        body = partial(
            _local_experts,
            experts=gate.shape[0],
            over=_axes_of(lies, 0),
            spread=EXPERT in _axes_of(rows, 0),
            width_split=TENSOR in _axes_of(lies, 1),
            sizes=dict(self.mesh.shape),
            dispatch=self.dispatch,
        )
        return jax.shard_map(
            body,
            mesh=self.mesh,
            in_specs=(rows, wide, wide, tall, rows, rows, factors),
            out_specs=rows,
            check_vma=False,  # loops and kernels inside do not say along which axes their results vary
        )(x, gate, up, down, expert_ids, combine_weights, adapters)

    def _specs_of(self, pair: tuple[Array, Array] | None, is_down: bool, cut: str | None) -> Any:
        """Of the factors of a projection of all experts: they lie as their kernel does, the rank whole.

        Args:
          cut: the name of the experts' width, where it is cut.
        """
        if pair is None:
            return None
        axes = ("expert", cut, None) if is_down else ("expert", None, None)
        other = ("expert", None, None) if is_down else ("expert", None, cut)
        return spec_of(self.mesh, pair[0].shape, axes), spec_of(self.mesh, pair[1].shape, other)


def _axes_of(spec: PartitionSpec, position: int) -> tuple[str, ...]:
    part: Any = spec[position] if position < len(spec) else None
    return (part,) if isinstance(part, str) else part or ()


def _local_experts(
    x, gate, up, down, expert_ids, combine_weights, adapters, *, experts, over, spread, width_split, sizes, dispatch
):  # fmt: skip
    """One device's part: its experts on the tokens that chose them.

    Args:
      over: mesh axes that the experts are spread over, in order.
      spread: whether tokens differ along `expert`; if not, all devices have all of them and only sums travel.
      width_split: whether each expert's width is cut along `tensor`.
    """
    batch, length, width = x.shape
    rows = [a.reshape(batch * length, -1) for a in (x, expert_ids, combine_weights)]
    first = _place_along(over, sizes) * gate.shape[0]
    compute = partial(_compute, gate=gate, up=up, down=down, first=first, experts=experts, adapters=adapters)
    # Devices along `tensor` have the same tokens, and other experts or another part of each expert's width.
    add_over = (TENSOR,) if width_split or TENSOR in over else ()
    travels = EXPERT in over and spread

    def one_round(rows: list[Array]) -> Array:
        if travels and dispatch == "ragged":
            held = gate.shape[0] * (sizes[TENSOR] if TENSOR in over else 1)  # experts of one place along `expert`
            tokens, ids, weights = rows
            return exchange_and_compute(tokens, ids, weights, compute, EXPERT, sizes[EXPERT], held)
        if not travels:
            return compute(*rows)
        tokens, ids, weights = rows
        chosen = jnp.concatenate([ids.astype(jnp.float32), weights], axis=1)  # one journey for both
        tokens, chosen = (jax.lax.all_gather(a, EXPERT, tiled=True) for a in (tokens, chosen))
        ids, weights = jnp.split(chosen, 2, axis=1)
        return jax.lax.psum_scatter(compute(tokens, ids.astype(jnp.int32), weights), EXPERT, tiled=True)

    rounds = _rounds(batch * length, sizes[EXPERT] if travels else 1)
    if rounds == 1:
        out = one_round(rows)
    else:
        cut = [a.reshape(rounds, -1, a.shape[-1]) for a in rows]
        out = jax.lax.map(one_round, cut).reshape(-1, width)
    if EXPERT in over and not spread:
        add_over = (EXPERT, *add_over)
    out = jax.lax.psum(out, add_over) if add_over else out
    return out.reshape(x.shape)


def _compute(x, expert_ids, combine_weights, *, gate, up, down, first, experts, adapters):
    """The sums of the experts that are here."""
    here = (expert_ids >= first) & (expert_ids < first + gate.shape[0])
    ids = jnp.where(here, expert_ids - first, gate.shape[0])
    return expert_ffn(x, gate, up, down, ids, combine_weights, adapters=adapters, spread_over=experts)


def _place_along(axes: tuple[str, ...], sizes: dict[str, int]) -> Array | int:
    """This device's number among those that an array axis is spread over."""
    place: Array | int = 0
    for axis in axes:
        place = place * sizes[axis] + jax.lax.axis_index(axis)
    return place


def _rounds(tokens: int, gathered_from: int) -> int:
    """The fewest equal rounds in which a device holds no more than `_MOST_TOKENS` at a time."""
    least = math.ceil(tokens * gathered_from / _MOST_TOKENS)
    return next((n for n in range(least, tokens + 1) if tokens % n == 0), 1)
