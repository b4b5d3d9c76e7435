"""Convert pruned linear layers to and from the sparse formats of compressed-tensors.

A layer `module` has three tensors:

- `module.compressed`: the values of the nonzero weights.
- `module.bitmask`: uint8, one bit per weight, the lowest bit first. Rows are padded to whole bytes.
- `module.shape`: the shape of the dense weight.

The two formats differ in the shape of the values:

- "sparse-bitmask": values in one dimension, row by row. `module.row_offsets` has the index of each row's first value.
- "sparse-24-bitmask": values [out, in / 2], because each row has two values of every four inputs.

Versions of compressed-tensors up to `LAST` read both formats. Later versions read only quantized layers.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from llmctl.config.errors import RequestError
from llmctl.convert.lazy_tensors import Tensor, Tensors, of_array

BITMASK, TWO_OF_FOUR = "sparse-bitmask", "sparse-24-bitmask"
LAST = "0.14.0"
"""Last version of compressed-tensors that reads the sparse formats."""
PARTS = ("compressed", "bitmask", "shape", "row_offsets")


def pack(
    names: Iterable[str], dense: Mapping[str, Tensor], ignored: Iterable[str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Convert the weights of linear layers to a sparse format.

    If all layers have 2:4 sparsity, the format is "sparse-24-bitmask"; otherwise "sparse-bitmask".

    Args:
        names: Names of the layers' weights [out, in], such as `model.layers.0.mlp.up_proj.weight`.
        dense: All tensors of the model by name.
        ignored: Names of linear modules that stay dense.

    Returns:
        The tensors to write, and the `quantization_config` that describes them.
    """
    names = sorted(names)
    masks = {name: _summary(dense[name]) for name in names}
    two_of_four = all(fits for _, _, fits in masks.values())
    out = {name: t for name, t in dense.items() if name not in masks}

    @functools.lru_cache(maxsize=1)  # the parts of a layer are written one after the other
    def parts(name: str) -> dict[str, np.ndarray]:
        return encode(dense[name].read(), two_of_four)

    for name, (count, _, _) in masks.items():
        module, (rows, columns) = name.removesuffix(".weight"), dense[name].shape
        shapes = {"compressed": (rows, columns // 2) if two_of_four else (count,), "bitmask": (rows, -(-columns // 8))}
        shapes |= {} if two_of_four else {"row_offsets": (rows,)}
        for part, shape in shapes.items():
            kind = {"compressed": dense[name].dtype, "bitmask": np.dtype(np.uint8)}.get(part, np.dtype(np.int64))
            out[f"{module}.{part}"] = Tensor(shape, kind, lambda name=name, part=part: parts(name)[part])
        out[f"{module}.shape"] = of_array(_shape(dense[name].shape, two_of_four))
    weights = sum(of for _, of, _ in masks.values())
    config = {
        "format": TWO_OF_FOUR if two_of_four else BITMASK,
        "sparsity_structure": "2:4" if two_of_four else "unstructured",
        "global_sparsity": 1 - sum(count for count, _, _ in masks.values()) / max(weights, 1),
        "targets": ["Linear"],
        "ignore": sorted(ignored),
    }
    return out, {"quant_method": "compressed-tensors", "sparsity_config": config}


def encode(w_OI: np.ndarray, two_of_four: bool) -> dict[str, np.ndarray]:
    """Encode the weights of one layer as arrays, by the last component of their tensor names.

    The array `shape` is not included.

    Args:
        w_OI: Weights of the layer.
        two_of_four: Whether to use the format of 2:4 sparsity. The format stores two of every four
            weights. If fewer than two are nonzero, zeros are stored in their place.
    """
    mask_OI = _nonzero(w_OI)
    if two_of_four:
        mask_OG4 = mask_OI.reshape(len(w_OI), -1, 4)
        first_OG4 = np.argsort(~mask_OG4, axis=-1, kind="stable")[..., :2]
        mask_OG4 = np.zeros_like(mask_OG4)
        np.put_along_axis(mask_OG4, first_OG4, True, axis=-1)
        mask_OI = mask_OG4.reshape(w_OI.shape)
    bitmask = np.packbits(mask_OI, axis=-1, bitorder="little")
    values = w_OI[mask_OI]
    if two_of_four:
        return {"compressed": values.reshape(len(w_OI), -1), "bitmask": bitmask}
    each_O = mask_OI.sum(axis=1)
    return {"compressed": values, "bitmask": bitmask, "row_offsets": np.cumsum(each_O) - each_O}


def unpack(where: str, settings: Mapping[str, Any], tensors: Tensors) -> dict[str, Tensor]:
    """Return the tensors of a model in dense form. Sparse layers are expanded when they are read.

    Args:
        where: Name of the folder in error messages.
        settings: The `sparsity_config` of the model.
        tensors: The stored tensors.

    Raises:
        RequestError: If the format is not known, or the tensors of a layer contradict one another.
    """
    if settings.get("format") not in (BITMASK, TWO_OF_FOUR):
        raise RequestError(f"{where}: its sparse format {settings.get('format')!r} is not supported")
    stems = [name.removesuffix(".compressed") for name in tensors if name.endswith(".compressed")]
    own = {f"{stem}.{part}" for stem in stems for part in PARTS}
    out = {name: t for name, t in tensors.items() if name not in own}
    for stem in stems:
        out[f"{stem}.weight"] = _dense(where, stem, {p: tensors.get(f"{stem}.{p}") for p in PARTS})
    return out


def _dense(where: str, stem: str, parts: Mapping[str, Tensor | None]) -> Tensor:
    values, bitmask, shape = (parts[name] for name in ("compressed", "bitmask", "shape"))
    if values is None or bitmask is None or shape is None:
        missing = next(name for name in ("bitmask", "shape") if parts[name] is None)
        raise RequestError(f"{where}: {stem}.compressed has no {stem}.{missing}")
    sizes = tuple(int(n) for n in np.ravel(shape.read())) if shape.shape in ((2,), (2, 1)) else ()
    if len(sizes) != 2 or min(sizes) < 1 or bitmask.shape != (sizes[0], -(-sizes[1] // 8)):
        raise RequestError(f"{where}: {stem}.shape contradicts {stem}.bitmask")

    def fetch() -> np.ndarray:
        bits = np.unpackbits(np.asarray(bitmask.read()).view(np.uint8), axis=-1, bitorder="little")
        mask, found = bits[:, : sizes[1]].astype(bool), np.asarray(values.read()).reshape(-1)
        if int(mask.sum()) != len(found) or bits[:, sizes[1] :].any():
            marked = int(bits.sum())
            raise RequestError(
                f"{where}: {stem}.bitmask marks {marked:,} weights, and {len(found):,} are stored; damaged"
            )
        dense = np.zeros(sizes, found.dtype)
        dense[mask] = found
        return dense

    return Tensor(sizes, values.dtype, fetch)


def _summary(t: Tensor) -> tuple[int, int, bool]:
    """Return the number of nonzero weights, the number of weights, and whether the 2:4 format can store the layer."""
    mask_OI = _nonzero(t.read())
    fits = mask_OI.shape[1] % 4 == 0 and bool((mask_OI.reshape(len(mask_OI), -1, 4).sum(axis=-1) <= 2).all())
    return int(mask_OI.sum()), mask_OI.size, fits


def _nonzero(w_OI: np.ndarray) -> np.ndarray:
    """Return, for each weight, whether any bit is set. The number -0.0 therefore counts as nonzero."""
    return np.ascontiguousarray(w_OI).view(f"u{w_OI.dtype.itemsize}") != 0


def _shape(shape: tuple[int, ...], column: bool) -> np.ndarray:
    """Return a shape as a tensor. The format of 2:4 sparsity stores the shape as a column."""
    return np.array(shape, np.int64).reshape((-1, 1) if column else (-1,))
