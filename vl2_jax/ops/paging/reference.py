"""Pages taken apart into all rows of every sequence, and put together again: for tests."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vl2_jax.ops.paging.pages import PAGE, Pages, flat, full_table


def put_rows(
    pages: Pages,
    new: tuple[Float[Array, "B ... T W"], ...],
    table: Int[Array, "B per"] | None,
    positions: Int[Array, " B"],
) -> tuple[Pages, tuple[Float[Array, "B ... S W"], Float[Array, "B ... S W"]]]:
    """The pages with the new rows, and the rows of all slots of each sequence."""
    given, table, pages = pages, full_table(pages, table, positions.shape[0]), flat(pages, table)
    rows = type(pages)(*(array[table] for array in pages)).rows()
    slot = jnp.arange(table.shape[1] * PAGE)
    which = slot - positions[:, None]  # of the new rows belongs in a slot
    written = (which >= 0) & (which < new[0].shape[-2]) & (positions >= 0)[:, None]

    def put(old: Array, new: Array) -> Array:
        taken = jax.vmap(lambda rows, which: rows[..., which, :])(new, jnp.clip(which, 0, new.shape[-2] - 1))
        here = written.reshape(len(written), *[1] * (old.ndim - 3), -1, 1)
        return jnp.where(here, taken, old)

    rows = tuple(map(put, rows, pages.stored(new)))
    touched = written.reshape(*table.shape, PAGE).any(axis=-1)
    at = jnp.where(touched, table, pages[0].shape[0])  # past the end: dropped
    put_back = (a.at[at].set(b, mode="drop") for a, b in zip(pages, type(pages).of_rows(*rows)))
    wide = type(pages).of_rows(*rows).floats().rows()
    return type(pages)(*(new.reshape(old.shape) for new, old in zip(put_back, given))), wide


def attended(positions: Int[Array, " B"], shape: tuple[int, ...]) -> Bool[Array, "B 1 T S"]:
    """Which slots a query looks at, for scores `[B, H, T, S]`."""
    _, _, length, slots = shape
    return jnp.arange(slots) <= (positions[:, None] + jnp.arange(length))[:, None, :, None]
