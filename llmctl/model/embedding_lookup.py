"""Look up embeddings in a table whose columns are sharded over the same devices as the tokens.

There are two methods. In the first, every device gathers the table. In the second, every device looks up its own
columns for the tokens of all devices. An all-to-all then sends each device the missing columns of its own tokens. The
method that sends fewer bytes per device is used. Embeddings and gradients are sent in the compute dtype. Each device
sums gradients in float32.

Shapes: V rows of the table, D width, B x T tokens; n devices shard the columns. On one device: N tokens [b, t], v rows,
d columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from llmctl.distributed import mesh as meshes


def take(table_VD: jax.Array, ids_BT: jax.Array, rows: str | None, dtype: Any) -> jax.Array:
    """Look up the embeddings of tokens in a table, which may be sharded.

    Args:
        table_VD: Embedding table. The logical axes of its rows and columns are `rows` and "embed_in".
        ids_BT: Token ids.
        rows: Logical axis of the table's rows.
        dtype: Dtype of the result.

    Returns:
        Embeddings [B, T, D].
    """
    if layout := _layout(table_VD.shape, ids_BT.shape, rows, jnp.dtype(dtype)):
        return cast(jax.Array, _take(table_VD, ids_BT, layout, jnp.dtype(dtype)))
    # Constrain the table to full rows. If tokens and table are sharded over the same devices, XLA gathers both.
    return jnp.take(meshes.constrain(table_VD, rows, None), ids_BT, axis=0).astype(dtype)


class _Layout(NamedTuple):
    """Describe the sharding of a table and of the tokens that are looked up."""

    mesh: Mesh
    tokens: PartitionSpec
    table: PartitionSpec
    column_axes: tuple[str, ...]
    """Mesh axes that shard both the columns of the table and the tokens."""
    token_axes: tuple[str, ...]
    """Mesh axes that shard the tokens but not the table. The table's gradient is summed over these axes."""
    row_axes: tuple[str, ...]
    """Mesh axes that shard the rows of the table."""
    exchange_columns: bool
    """Whether each device looks up its own columns for all tokens, followed by an all-to-all. This is the second method
    of the module docstring. If false, the first method is used."""


def _layout(table: tuple[int, ...], ids: tuple[int, ...], rows: str | None, dtype: Any) -> _Layout | None:
    """Return the sharding of a table and of the tokens, or None if a plain lookup is sufficient.

    A plain lookup is sufficient in two cases:
    - There is no mesh.
    - The columns are not sharded over devices with different tokens.

    Args:
        table: Shape of the table.
        ids: Shape of the token ids.
        rows: Logical axis of the table's rows.
        dtype: Dtype of the embeddings.
    """
    mesh = meshes.current()
    if mesh is None:
        return None
    tokens, table_spec = meshes.spec(("batch", "seq"), mesh, ids), meshes.spec((rows, "embed_in"), mesh, table)
    over, (split, column_axes) = meshes.axes_of(tokens), (tuple(meshes.axes_of(PartitionSpec(e))) for e in table_spec)
    if not column_axes or not set(column_axes) <= set(over):
        return None

    def ways(axes: Sequence[str]) -> int:
        return math.prod(mesh.shape[a] for a in axes)

    N, V, row = math.prod(ids) // ways(over), table[0] // ways(split), table[1] * dtype.itemsize
    exchange_columns = 2 * N * row + 4 * N * ways(column_axes) < 2 * V * row
    return _Layout(
        mesh, tokens, table_spec, column_axes, tuple(a for a in over if a not in column_axes), split, exchange_columns
    )


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _take(table_VD: jax.Array, ids_BT: jax.Array, layout: _Layout, dtype: Any) -> jax.Array:
    return _forward(table_VD, ids_BT, layout, dtype)[0]


def _forward(table_VD: jax.Array, ids_BT: jax.Array, layout: _Layout, dtype: Any) -> Any:
    def here(table_vd: jax.Array, ids_bt: jax.Array) -> jax.Array:
        table_vd, ids_N = table_vd.astype(dtype), ids_bt.reshape(-1)
        if layout.exchange_columns:
            x_nNd = _rows_of(table_vd, jax.lax.all_gather(ids_N, layout.column_axes), layout)
            x_ND = jax.lax.all_to_all(x_nNd, layout.column_axes, 0, 2, tiled=True)
        else:
            x_ND = _rows_of(jax.lax.all_gather(table_vd, layout.column_axes, axis=1, tiled=True), ids_N, layout)
        return x_ND.reshape(*ids_bt.shape, -1)

    run = meshes.per_device(here, layout.mesh, (layout.table, layout.tokens), layout.tokens)
    return run(table_VD, ids_BT), (table_VD, ids_BT)


def _backward(layout: _Layout, dtype: Any, saved: tuple[jax.Array, jax.Array], d_x_BTD: jax.Array) -> Any:
    table_VD, ids_BT = saved

    def here(table_vd: jax.Array, ids_bt: jax.Array, d_x_btD: jax.Array) -> jax.Array:
        ids_N, d_x_ND = ids_bt.reshape(-1), d_x_btD.reshape(-1, d_x_btD.shape[-1])
        if layout.exchange_columns:
            d_x_nNd = jax.lax.all_to_all(d_x_ND[None], layout.column_axes, 2, 0, tiled=True)
            d_vd = _table_gradient(jax.lax.all_gather(ids_N, layout.column_axes), d_x_nNd, len(table_vd), layout)
        else:
            d_vD = _table_gradient(ids_N, d_x_ND, len(table_vd), layout).astype(dtype)
            d_vd = jax.lax.psum_scatter(d_vD, layout.column_axes, scatter_dimension=1, tiled=True)
        d_vd = jax.lax.psum(d_vd.astype(dtype), layout.token_axes) if layout.token_axes else d_vd
        return d_vd.astype(table_vd.dtype)

    run = meshes.per_device(here, layout.mesh, (layout.table, layout.tokens, layout.tokens), layout.table)
    return run(table_VD, ids_BT, d_x_BTD), None


_take.defvjp(_forward, _backward)


def _rows_of(table_v: jax.Array, ids: jax.Array, layout: _Layout) -> jax.Array:
    """Return the embeddings [..., columns] of the tokens `ids` [...], from a table whose rows may be sharded."""
    if not layout.row_axes:
        return jnp.take(table_v, ids, axis=0)
    at, here = _local_index(ids, len(table_v), layout)
    return jax.lax.psum(jnp.where(here[..., None], jnp.take(table_v, at, axis=0), 0), layout.row_axes)


def _table_gradient(ids: jax.Array, d_x: jax.Array, rows: int, layout: _Layout) -> jax.Array:
    """Return the gradient of the local table, float32 [rows, columns], from token ids and gradients of embeddings."""
    d_x = d_x.astype(jnp.float32)
    if layout.row_axes:
        ids, here = _local_index(ids, rows, layout)
        d_x = jnp.where(here[..., None], d_x, 0)
    return jnp.zeros((rows, d_x.shape[-1]), jnp.float32).at[ids].add(d_x)


def _local_index(ids: jax.Array, rows: int, layout: _Layout) -> tuple[jax.Array, jax.Array]:
    """Return the index of each id among the `rows` local rows, and whether the row is local.

    If the row is on another device, the index is 0.
    """
    at = ids - rows * jax.lax.axis_index(layout.row_axes)
    here = (at >= 0) & (at < rows)
    return jnp.where(here, at, 0), here
