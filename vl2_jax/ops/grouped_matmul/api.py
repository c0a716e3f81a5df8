"""`grouped_matmul`: products of rows that are ordered by group, each group with its own matrix.

N rows, G groups, K depth, M width.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vl2_jax.ops.choice import Implementation, choose
from vl2_jax.ops.grouped_matmul import reference, xla
from vl2_jax.ops.narrow.kinds import Narrow


def grouped_matmul(
    lhs: Float[Array, "N K"],
    rhs: Float[Array, "G K M"] | Narrow,
    group_sizes: Int[Array, " G"],
    *,
    transpose_rhs: bool = False,
    implementation: Implementation | None = None,
) -> Float[Array, "N M"]:
    """`lhs[n] @ rhs[g]` for the group `g` of each row, as `jax.lax.ragged_dot`, whose cost it does not have.

    Differentiable in `lhs`, and in `rhs` if it is an array. Products accumulate in float32 and are rounded to the dtype
    of `lhs`.

    Args:
      lhs: rows, those of group 0 first.
      rhs: a matrix a group; `[G, M, K]` with `transpose_rhs`.
      group_sizes: rows of each group. Rows past the last group get anything.
      transpose_rhs: multiply with the transposed matrices.
      implementation: `None` is the kernel where the program is compiled for a TPU and the kernel takes it, else "xla".
    """
    if isinstance(rhs, Narrow):
        if transpose_rhs or implementation is not None:
            raise ValueError("narrow matrices are multiplied as they lie, in the way that suits the platform.")
        return _of_narrow(lhs, rhs, group_sizes)
    return _grouped_matmul(lhs, rhs, group_sizes, transpose_rhs, implementation)


def grouped_transposed_matmul(
    lhs: Float[Array, "N K"],
    rhs: Float[Array, "N M"],
    group_sizes: Int[Array, " G"],
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "G K M"]:
    """`lhs[rows of g].T @ rhs[rows of g]` for every group: the gradient of `grouped_matmul` in its matrices.

    A group without rows gets zeros. Arguments as in `grouped_matmul`.
    """
    if implementation == "reference":
        return reference.grouped_transposed_matmul(lhs, rhs, group_sizes)
    if implementation is None and not _kernels_support(lhs, lhs.shape[1], rhs.shape[1]):
        implementation = "xla"
    return choose(implementation, _transposed_kernel, xla.grouped_transposed_matmul)(lhs, rhs, group_sizes)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _grouped_matmul(lhs, rhs, group_sizes, transpose_rhs, implementation):
    return _forward(lhs, rhs, group_sizes, transpose_rhs, implementation)[0]


def _forward(lhs, rhs, group_sizes, transpose_rhs, implementation):
    def plain(lhs, rhs, group_sizes):
        module = reference if implementation == "reference" else xla
        return module.grouped_matmul(lhs, rhs.swapaxes(1, 2) if transpose_rhs else rhs, group_sizes)

    supported = implementation is not None or _kernels_support(lhs, *rhs.shape[1:])
    kernel = partial(_kernel, transpose_rhs=transpose_rhs)
    out = choose(implementation if supported else "xla", kernel, plain)(lhs, rhs, group_sizes)
    return out, (lhs, rhs, group_sizes)


def _backward(transpose_rhs, implementation, saved, dout):
    lhs, rhs, group_sizes = saved
    dlhs = _grouped_matmul(dout, rhs, group_sizes, not transpose_rhs, implementation)
    sides = (dout, lhs) if transpose_rhs else (lhs, dout)
    drhs = grouped_transposed_matmul(*sides, group_sizes, implementation=implementation)
    return dlhs, drhs.astype(rhs.dtype), None


_grouped_matmul.defvjp(_forward, _backward)


@jax.custom_vjp
def _of_narrow(lhs, rhs, group_sizes):
    return xla.grouped_matmul(lhs, rhs, group_sizes)


def _forward_of_narrow(lhs, rhs, group_sizes):
    return _of_many_rows(lhs, rhs, group_sizes, False), (rhs, group_sizes)


def _backward_of_narrow(saved, dout):
    rhs, group_sizes = saved
    return _of_many_rows(dout, rhs, group_sizes, True), None, None


def _of_many_rows(lhs, rhs, group_sizes, transpose_rhs):
    """In training, where all matrices have rows: on a TPU all of them are widened, for the kernel."""

    def kernel(lhs, rhs, group_sizes):
        # When their rows are there, and again for gradients: XLA would widen those of other layers too, and keep them.
        lhs, rhs = jax.lax.optimization_barrier((lhs, rhs))
        return _kernel(lhs, rhs.widened(lhs.dtype), group_sizes, transpose_rhs=transpose_rhs)

    plain = xla.grouped_matmul_with_transposes if transpose_rhs else xla.grouped_matmul
    supported = _kernels_support(lhs, *rhs.shape[1:])
    return choose(None if supported else "xla", kernel, plain)(lhs, rhs, group_sizes)


_of_narrow.defvjp(_forward_of_narrow, _backward_of_narrow)


# Pallas takes a third of a second to import, so it is imported where a kernel may be used.


def _kernels_support(lhs, *widths):
    if lhs.dtype != jnp.bfloat16:
        return False
    from vl2_jax.ops.grouped_matmul import pallas_tpu

    return pallas_tpu.supports(lhs, *widths)


def _kernel(*arguments, transpose_rhs):
    from vl2_jax.ops.grouped_matmul import pallas_tpu

    return pallas_tpu.grouped_matmul(*arguments, transpose_rhs=transpose_rhs)


def _transposed_kernel(*arguments):
    from vl2_jax.ops.grouped_matmul import pallas_tpu

    return pallas_tpu.grouped_transposed_matmul(*arguments)
