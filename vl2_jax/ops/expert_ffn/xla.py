"""Plain XLA: rows ordered by expert, cut into blocks of one expert each, a loop over the blocks that exist.

See `ops.grouped_matmul.xla` for the blocks. Everything that is done with a block is done in one trip of the loop, so
that nothing as large as all rows is ever held.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vl2_jax.ops.grouped_matmul.xla import Blocks, block_rows, cut_into_blocks
from vl2_jax.ops.narrow.kinds import Narrow
from vl2_jax.ops.narrow.product import product


def expert_ffn(
    x: Float[Array, "N D"],
    gate: Float[Array, "E D F"] | Narrow,
    up: Float[Array, "E D F"] | Narrow,
    down: Float[Array, "E F D"] | Narrow,
    expert_ids: Int[Array, "N k"],
    combine_weights: Float[Array, "N k"],
    *,
    spread_over: int | None = None,
) -> Float[Array, "N D"]:
    k = expert_ids.shape[1]
    block, blocks, order = _blocks_of(expert_ids, gate.shape[0], spread_over)
    weights = combine_weights.astype(jnp.float32).ravel()

    def body(number, out):
        by_gate, by_up, by_down = _products(gate, up, down, blocks.group[number])

        def of_height(height, out):
            _, pair, token, valid = _rows_of_block(blocks, order, number, height, k)
            rows = x[token]
            hidden = jax.nn.silu(by_gate(rows)) * by_up(rows)
            result = by_down(hidden).astype(jnp.float32) * jnp.where(valid, weights[pair], 0)[:, None]
            return out.at[token].add(result)

        return _at_lowest_height(block, blocks.stop[number] - blocks.start[number], of_height, out)

    out = jax.lax.fori_loop(0, blocks.existing, body, jnp.zeros(x.shape, jnp.float32))
    return out.astype(x.dtype)


def backward(x, gate, up, down, expert_ids, combine_weights, dout, *, spread_over=None):
    """Gradients of all arguments but `expert_ids`, from the gradient of the result."""
    tokens, k = expert_ids.shape
    block, blocks, order = _blocks_of(expert_ids, gate.shape[0], spread_over)
    weights = combine_weights.astype(jnp.float32).ravel()
    dout = dout.astype(jnp.float32)

    def body(number, grads):
        dx, dgate, dup, ddown, dweights = grads
        g, u, d = _kernels(gate, up, down, blocks.group[number])

        def of_height(height, _):
            _, pair, token, valid = _rows_of_block(blocks, order, number, height, k)
            rows, drows = x[token], dout[token]
            hidden, hidden_vjp = jax.vjp(lambda a, b: jax.nn.silu(a) * b, rows @ g, rows @ u)
            weight = jnp.where(valid, weights[pair], 0)[:, None]
            # The weight's gradient is <hidden @ d, dout> = <hidden, dout @ d.T>, whose product is needed anyway.
            dhidden = (drows.astype(x.dtype) @ d.T).astype(jnp.float32)
            dgated, dupped = hidden_vjp((dhidden * weight).astype(x.dtype))
            dresult = (drows * weight).astype(x.dtype)
            drows = (dgated @ g.T + dupped @ u.T).astype(jnp.float32)
            dweight = (hidden.astype(jnp.float32) * dhidden).sum(-1)
            rest = block - height
            kernels = rows.T @ dgated, rows.T @ dupped, hidden.T @ dresult
            return jnp.pad(drows, ((0, rest), (0, 0))), *kernels, jnp.pad(dweight, (0, rest))

        rows = blocks.stop[number] - blocks.start[number]
        # The kernels' gradients are added to outside of the choice of a height: carried through it, they are copied.
        drows, dg, du, dd, dweight = _at_lowest_height(block, rows, of_height, None)
        expert, pair, token, valid = _rows_of_block(blocks, order, number, block, k)
        return (
            dx.at[token].add(drows),
            dgate.at[expert].add(dg.astype(jnp.float32)),
            dup.at[expert].add(du.astype(jnp.float32)),
            ddown.at[expert].add(dd.astype(jnp.float32)),
            dweights.at[jnp.where(valid, pair, tokens * k)].set(dweight, mode="drop"),
        )

    zeros = tuple(jnp.zeros(a.shape, jnp.float32) for a in (x, gate, up, down, weights))
    dx, dgate, dup, ddown, dweights = jax.lax.fori_loop(0, blocks.existing, body, zeros)
    return (
        dx.astype(x.dtype),
        dgate.astype(gate.dtype),
        dup.astype(up.dtype),
        ddown.astype(down.dtype),
        dweights.reshape(tokens, k).astype(combine_weights.dtype),
    )


def _at_lowest_height(block, rows, of_height, carried):
    """`of_height(height, carried)` of the lowest of a few heights that holds a block's rows.

    A block costs what its height costs, full or not.
    """
    if block < 64:
        return of_height(block, carried)  # without a choice, whose table of no heights crashes jax 0.11 on meshes
    heights = (block // 2, block * 3 // 4, block * 7 // 8, block)
    lowest = (rows > jnp.asarray(heights[:-1], jnp.int32)).sum()
    return jax.lax.switch(lowest, [partial(of_height, height) for height in heights], carried)


def _products(gate, up, down, expert):
    """Rows to their products with one expert's kernels."""
    if isinstance(gate, Narrow):
        return [partial(product, kernel=kernel, expert=expert) for kernel in (gate, up, down)]
    return [partial(product, kernel=kernel) for kernel in _kernels(gate, up, down, expert)]


def _kernels(gate, up, down, expert):
    """One expert's kernels.

    Narrow floats are taken out as integers: XLA:CPU would otherwise widen all experts to float32 ahead of the loop
    (64 experts of 1280 x 896 in bfloat16, one token: 0.32 s, against 0.17 s).
    """

    def take(kernels):
        if kernels.dtype.itemsize != 2:
            return kernels[expert]
        bits = jax.lax.bitcast_convert_type(kernels, jnp.uint16)[expert]
        return jax.lax.bitcast_convert_type(jax.lax.optimization_barrier(bits), kernels.dtype)

    return take(gate), take(up), take(down)


def _blocks_of(
    expert_ids: Int[Array, "N k"], experts: int, spread_over: int | None
) -> tuple[int, Blocks, Int[Array, " N*k"]]:
    """Rows in a block, the blocks, and the (token, slot) pairs sorted by expert; those of no expert come last."""
    pairs = expert_ids.size
    block = block_rows(pairs, spread_over or experts)
    counts = jnp.bincount(expert_ids.ravel(), length=experts)
    return block, cut_into_blocks(counts, pairs, block), jnp.argsort(expert_ids.ravel(), stable=True)


def _rows_of_block(blocks: Blocks, order: Array, number: Array, block: int, k: int):
    """The expert, the pairs, their tokens, and which of them exist; a pair past its expert's end is masked."""
    place = blocks.start[number] + jnp.arange(block)
    valid = place < blocks.stop[number]
    pair = order[jnp.minimum(place, order.shape[0] - 1)]
    return blocks.group[number], pair, pair // k, valid
