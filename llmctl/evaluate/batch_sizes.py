"""Choose the number of rows per batch."""

from __future__ import annotations

from jax.sharding import Mesh


def balanced(mesh: Mesh, most: int, rows: int) -> int:
    """Return a batch size, such that all batches have about the same number of rows.

    The last batch is then not mostly padding. The size is a multiple of the number of devices over which rows are
    sharded.

    Args:
        mesh: The device mesh.
        most: Maximum number of rows per batch, before rounding to a multiple.
        rows: Number of all rows.
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    most = max(most // ways, 1) * ways
    each = -(-rows // max(-(-rows // most), 1))
    return max(-(-each // ways), 1) * ways
