"""Compute the manifest fields that describe the weights, such as their digest, reading one weight at a time.

A weight is one parameter of the model. A weight may consist of several arrays, such as 4-bit integers and their scales.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

PRUNED = 0.01, 0.45
"""Fractions of zeros above which imported matrices count as pruned. The first is for floating-point matrices. The
second is for integers and dequantized integers. Training almost never produces exact zeros. Rounding to 4 bits alone
makes about a fifth of normally distributed weights zero."""


def digest(flat: Mapping[str, Any]) -> str:
    """Return the SHA-256 digest of all arrays as hex digits. One weight at a time is copied to the host.

    If there are several processes, all processes must call this function.

    Args:
        flat: Weights of the model by their path in the parameter tree.
    """
    total = hashlib.sha256()
    for name in sorted(flat):
        _add(total, name, flat[name])
    return total.hexdigest()


def _add(total: Any, name: str, w: Any) -> None:
    """Update the hash `total` with the name, dtype, shape and values of each array that the weight `w` consists of."""
    import numpy as np

    from llmctl.distributed import host_arrays
    from llmctl.model import weights

    for part, a in sorted(weights.parts(w).items()):
        total.update(f"{name}:{part}:{np.dtype(a.dtype)}:{tuple(a.shape)}\n".encode())
        for piece in host_arrays.pieces(a):
            total.update(np.ascontiguousarray(piece).reshape(-1).view(np.uint8))  # bytes would be a copy


def type_bits(dtype: str) -> int:
    """Return the number of bits per value of the dtype called `dtype`: 4 for `int4`, 8 for `float8_e4m3fn`."""
    return int(found.group()) if (found := re.search(r"\d+", dtype)) else 8


def manifest_fields(flat: Mapping[str, Any], rounded: bool = False) -> dict[str, Any]:
    """Compute the manifest fields that describe the weights, in one pass.

    Args:
        flat: Weights of the model by their path in the parameter tree.
        rounded: Whether the floating-point arrays are dequantized integers. Such arrays contain zeros that come from
            rounding.

    Returns:
        The fields "digest", "parameters", "sparsity", "pruned", "bits", "weights" and "nonfinite" of `Manifest`.
        "pruned" is estimated from the fraction of zeros. The estimate is used only for imported weights.
    """
    import jax.numpy as jnp

    from llmctl.model import weights
    from llmctl.model.weights.names import join

    total, records, nonfinite = hashlib.sha256(), {}, []
    stored_bits = zeros = entries = parameters = 0
    counted = {False: [0, 0], True: [0, 0]}  # by whether the values are integers
    for name in sorted(flat):
        w = flat[name]
        _add(total, name, w)
        records[name] = weights.describe(w)
        parameters += weights.count({name: w})
        for part, a in weights.parts(w).items():
            stored_bits += a.size * type_bits(str(a.dtype))
            if jnp.issubdtype(a.dtype, jnp.floating) and not bool(jnp.isfinite(a).all()):
                nonfinite.append(join(name, part))
        if weights.is_kernel(name):
            bare = weights.as_node(w).bare()
            node = weights.as_node(bare)
            values = node.values()
            here = int(jnp.sum(jnp.sum(values == 0, axis=-1), dtype=jnp.float32))
            zeros, entries = zeros + here, entries + values.size
            if node.is_integer or weights.is_plain(bare):
                counts = counted[node.is_integer or rounded]
                counts[0], counts[1] = counts[0] + here, counts[1] + values.size
    return {
        "digest": total.hexdigest(),
        "parameters": parameters,
        "sparsity": zeros / max(entries, 1),
        "pruned": any(n > least * max(of, 1) for (n, of), least in zip(counted.values(), PRUNED, strict=True)),
        "bits": stored_bits / parameters,
        "weights": records,
        "nonfinite": nonfinite,
    }
