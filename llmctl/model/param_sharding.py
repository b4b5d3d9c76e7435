"""Compute the sharding of every array in a parameter tree on a device mesh.

A weight may consist of several arrays: for example, a quantized weight has integers and scales.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from llmctl.config.errors import RequestError
from llmctl.distributed.mesh import RULES, sharding
from llmctl.model import weights


def shard_params(axes: dict[str, Any], params: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    """Return the sharding of every array in `params`.

    If a weight consists of several arrays, all of them have the logical axes of the weight. If an array is shorter than
    the weight along a dimension, the array is replicated along this dimension. Examples are scales with a single row,
    and low-rank factors.

    Args:
        axes: Logical axes of each weight, such as ("embed", "mlp").
        params: Arrays or abstract arrays.
        mesh: The device mesh.

    Raises:
        RequestError: If the size of a mesh axis does not divide the length of a dimension.
    """
    flat_axes = weights.flatten(axes)
    flat: dict[str, Any] = {}
    for path, w in weights.flatten(params).items():
        if path not in flat_axes:
            raise RequestError(f"{path}: no sharding rule names this parameter; is the artifact of another model?")

        def one(part: Any, path: str = path, shape: tuple[int, ...] = w.shape) -> NamedSharding:
            names = [n if part.shape[i] == shape[i] else None for i, n in enumerate(flat_axes[path])]
            _check_divides(path, part.shape, names, mesh)
            return sharding(names, mesh)

        flat[path] = jax.tree.map(one, w)
    return weights.unflatten(flat)


def _check_divides(path: str, shape: tuple[int, ...], names: Sequence[str | None], mesh: Mesh) -> None:
    for size, name in zip(shape, names, strict=True):
        axes = [a for a in (RULES[name] if name else ()) if mesh.shape[a] > 1]
        ways = math.prod(mesh.shape[a] for a in axes)
        if size % ways:
            raise RequestError(
                f"{path}: {name} of size {size} is not divisible by the mesh's {' x '.join(axes)} = {ways}"
            )
