"""Tokens to the devices that hold their experts, and the sums back: `jax.lax.ragged_all_to_all` in both directions.

    device 0 has tokens a b c        a -> 0 1    b -> 1    c -> 0 2         a token travels once to each device it needs
    device 1 receives                a b from 0, then what the others send

The room for what arrives is the worst case, all tokens of all devices, so nothing is dropped for any routing; what
crosses the network is only what is needed (top-6 of 64 experts over 8 devices: 55 % of all tokens to each).

n tokens of one device, P devices, N = n P, D model width, k experts a token.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def exchange_and_compute(
    x: Float[Array, "n D"],
    expert_ids: Int[Array, "n k"],
    combine_weights: Float[Array, "n k"],
    compute: Callable[[Array, Array, Array], Array],
    axis: str,
    devices: int,
    held: int,
) -> Float[Array, "n D"]:
    """The sums of all experts of this device's tokens; to be called inside of `jax.shard_map`.

    Args:
      compute: (rows, ids, weights) to the sums of the experts that this device holds, zero for a row that has none.
      axis: mesh axis along which tokens travel; `devices` is its size.
      held: experts a device, by number: device p holds those from `p * held` on.
    """
    tokens = x.shape[0]
    wanted = (expert_ids[:, :, None] // held == jnp.arange(devices)).any(axis=1)  # [n, P]
    sent = wanted.sum(axis=0, dtype=jnp.int32)  # rows to each device
    # Rows in order of the device they go to; a row that goes nowhere (there are n P places) points at token 0.
    order = jnp.argsort(~wanted.T.ravel(), stable=True)
    place = jnp.where(jnp.arange(tokens * devices) < sent.sum(), order % tokens, 0)
    every = jax.lax.all_gather(sent, axis)  # [from, to]
    mine = jax.lax.axis_index(axis)
    starts = jnp.cumsum(every, axis=0) - every  # where the rows of `from` begin on `to`
    there = starts[mine]  # my rows' places on each device
    here = jnp.cumsum(sent) - sent  # their places in what I send
    arrived = every[:, mine]
    arrived_at = starts[:, mine]
    back_at = (jnp.cumsum(every, axis=1) - every)[:, mine]  # where each sender keeps the rows it sent me

    def travel(rows: Array) -> Array:
        room = jnp.zeros((tokens * devices, rows.shape[1]), rows.dtype)
        return ragged_all_to_all(rows[place], room, here, sent, there, arrived, axis=axis)

    exists = (jnp.arange(tokens * devices) < arrived.sum())[:, None]
    ids = jnp.where(exists, travel(expert_ids), -1)
    sums = compute(travel(x), ids, travel(combine_weights))
    room = jnp.zeros((tokens * devices, x.shape[1]), sums.dtype)
    returned = ragged_all_to_all(sums, room, arrived_at, arrived, back_at, sent, axis=axis)
    # A device's rows stand in the order of the devices they went to: the sums of one token are added up.
    valid = (jnp.arange(tokens * devices) < sent.sum())[:, None]
    wide = jnp.where(valid, returned.astype(jnp.float32), 0)
    return jnp.zeros(x.shape, jnp.float32).at[place].add(wide).astype(x.dtype)


def ragged_all_to_all(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis):
    """`jax.lax.ragged_all_to_all`; on other platforms than TPU, which lack it, by gathering everything."""
    arguments = (operand, output, input_offsets, send_sizes, output_offsets, recv_sizes)

    def native(*arguments):
        return jax.lax.ragged_all_to_all(*arguments, axis_name=axis)

    def gathered(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes):
        del recv_sizes
        everyone = jax.lax.all_gather(operand, axis)  # [from, rows, D]
        mine = jax.lax.axis_index(axis)
        begins, sizes, to = (jax.lax.all_gather(a, axis)[:, mine] for a in (input_offsets, send_sizes, output_offsets))
        row = jnp.arange(output.shape[0])
        for sender in range(everyone.shape[0]):
            within = row - to[sender]
            taken = everyone[sender, jnp.clip(begins[sender] + within, 0, operand.shape[0] - 1)]
            output = jnp.where(((within >= 0) & (within < sizes[sender]))[:, None], taken, output)
        return output

    return jax.lax.platform_dependent(*arguments, tpu=native, default=gathered)
