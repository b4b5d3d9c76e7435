"""Write and read layers in the format `nvfp4-pack-quantized` of compressed-tensors.

A layer has three tensors:

- `weight_packed` [out, in / 2] uint8: two values per byte, the first value in the low half
- `weight_scale` [out, in / 16] float8_e4m3fn: one scale per block
- `weight_global_scale` [1]: the number by which all scales are divided
"""

from __future__ import annotations

from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from llmctl.config.errors import RequestError
from llmctl.convert import name_map
from llmctl.convert.lazy_tensors import Tensor
from llmctl.model import weights
from llmctl.model.weights.packed import FLOATS

BLOCK = 16
"""Number of inputs that share a scale."""


def written(module: str, w: weights.Packed, slot: name_map.Slot) -> dict[str, Tensor]:
    """Return one layer of an nvfp4 weight as tensors, by name.

    Args:
        module: Name of the layer.
        w: The weight.
        slot: Location of the layer in the weight.
    """
    inputs, outputs = slot.shape

    def part(a: jax.Array) -> np.ndarray:
        return name_map.host(a, slot.layer).T

    def whole() -> np.ndarray:
        return 1 / part(w.whole).reshape(1).astype(np.float32)

    packed = Tensor((outputs, inputs // 2), np.dtype(np.uint8), lambda: part(w.codes))
    scale = Tensor((outputs, inputs // BLOCK), np.dtype(jnp.float8_e4m3fn), lambda: part(w.scale))
    named = {"packed": packed, "scale": scale, "global_scale": Tensor((1,), np.dtype(np.float32), whole)}
    return {f"{module}.weight_{name}": t for name, t in named.items()}


def dense(where: str, name: str, packed: Tensor, scale: Tensor, whole: Tensor | None) -> Tensor:
    """Return a layer in dense form, float32 [out, in].

    Args:
        where: Name of the folder in error messages.
        name: Name of the dense tensor.
        packed: Packed codes.
        scale: Scales of blocks.
        whole: Number by which all scales are divided; None if the folder has no such number.

    Raises:
        RequestError: If the shapes do not fit.
    """
    shape = (packed.shape[0], 2 * packed.shape[-1])
    fits = scale.shape == (shape[0], shape[1] // BLOCK) and not shape[1] % BLOCK
    if len(packed.shape) != 2 or packed.dtype != np.uint8 or whole is None or whole.shape != (1,) or not fits:
        raise RequestError(f"{where}: {name}_packed {list(packed.shape)} does not fit its scales")

    def fetch() -> np.ndarray:
        stored = np.asarray(packed.read())
        codes = np.stack([stored & 15, stored >> 4], axis=-1).reshape(shape)
        level = np.where(codes >> 3, -1, 1) * np.array(FLOATS, np.float32)[codes & 7]
        each = np.asarray(scale.read()).astype(np.float32) / np.float32(np.asarray(cast(Tensor, whole).read())[0])
        return (level * np.repeat(each, BLOCK, axis=1)).astype(np.float32)

    return Tensor(shape, np.dtype(np.float32), fetch, rounded=True)
