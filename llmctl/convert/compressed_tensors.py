"""Convert quantized linear layers to and from the compressed-tensors format, which vLLM and transformers read.

`llmctl.convert.sparse_tensors` defines the formats of pruned layers that are not quantized.

Each format stores these tensors per layer:

- int-quantized (W8A8, W4A8): `weight` [out, in] int8 and `weight_scale` [out, groups].
- pack-quantized, for layers whose activations are not quantized: `weight_packed` [out, in * bits / 32] int32,
  `weight_scale` and `weight_shape`. Each int32 contains several values, the first value in the lowest bits. An offset
  makes the values unsigned. If the values are not symmetric around 0, `weight_zero_point` [out * bits / 32, groups]
  int32 has the zero points. The zero points are packed along outputs.
- float-quantized: `weight` [out, in] float8_e4m3fn and `weight_scale` [out, 1].
- nvfp4-pack-quantized: see `llmctl.convert.nvfp4_tensors`.

If activations have a static scale, the layer also has `input_scale` [1] float32.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llmctl.config.errors import RequestError
from llmctl.convert import architectures as bridge_names
from llmctl.convert import name_map, nvfp4_tensors, sparse_tensors
from llmctl.convert.lazy_tensors import Tensor, Tensors, listed, of_array
from llmctl.convert.packed_words import pack_words, packed_length, unpack_words
from llmctl.model import weights
from llmctl.model.config import ModelConfig

FLOAT8, NVFP4 = "float-quantized", "nvfp4-pack-quantized"
INTEGERS = ("pack-quantized", "int-quantized", "naive-quantized")


class Scheme(NamedTuple):
    """Describe how the weights of a layer are stored."""

    format: str
    """Name of the format in compressed-tensors."""
    type: str
    """Type of the stored values: int or float."""
    bits: int
    group: int = 0
    """Number of inputs per scale; 0 for one scale per output."""
    activations: str = ""
    """Name that llmctl uses for the data type of quantized activations; empty if activations are not quantized."""
    symmetric: bool = True
    """Whether the weights have no zero points."""
    static: bool = False
    """Whether all activations of a layer have one stored scale, in place of one scale per token."""


def scheme_of(w: Any) -> Scheme | None:
    """Return the Scheme of a weight; None if compressed-tensors cannot store the weight's numbers."""
    node = weights.as_node(w)
    if node.format_name == "nvfp4":
        return Scheme(NVFP4, "float", 4, nvfp4_tensors.BLOCK)
    if (stored := node.quantized()) is None:
        return None
    array, groups, inputs = stored.array, stored.array.scale.shape[-2], node.shape[-2]
    group, static = 0 if groups == 1 else inputs // groups, stored.input_scale is not None
    if array.qvalue.dtype == jnp.float8_e4m3fn:  # vLLM reads no groups of 8-bit floats
        return Scheme(FLOAT8, "float", 8, 0, stored.activations, static=static) if not group else None
    if stored.integers() is None:
        return None
    bits = 4 if array.qvalue.dtype == jnp.int4 else 8
    form = "int-quantized" if stored.activations else "pack-quantized"
    return Scheme(form, "int", bits, group, stored.activations, array.zero_point is None, static)


def pack(
    cfg: ModelConfig, params: dict[str, Any], dense: Mapping[str, Tensor], pruned: bool = False
) -> tuple[dict[str, Tensor], Any]:
    """Convert the quantized linear layers of a model to tensors of the format compressed-tensors.

    If no layer is quantized, pruned layers are converted to a sparse format. The quantized formats have no quantized
    embeddings, so embeddings are dequantized.

    Args:
        cfg: Config of the model.
        params: Parameters of the model.
        dense: All tensors of the model in dense form, by their Hugging Face names.
        pruned: Whether the layers were pruned.

    Returns:
        The tensors to write, and the `quantization_config` that describes them.

    Raises:
        RequestError: If nothing is quantized or pruned. If layers differ in bits or in group size. If the family has no
            linear layers.
    """
    bridge, head = bridge_names.of(cfg)
    if bridge.in_out:
        raise RequestError(f"{bridge.model_type} models have no linear layers that compressed-tensors could hold")
    flat = weights.flatten(params)
    out, untouched = dict(dense), []
    schemes: set[Scheme] = set()
    bare = cfg.head_kind.bare
    wanted = name_map.tensor_layouts(cfg, bridge, head, bare)
    # transformers constructs these layers although nothing is stored for them: a tied output layer, an unused pooler.
    built = [
        theirs.removesuffix(".weight")
        for ours, theirs in bridge.table(cfg, head, bare).items()
        if weights.is_kernel(ours) and "{}" not in theirs and theirs not in wanted
    ]
    for name, joint in wanted.items():
        slot = joint.slots[0]
        if not slot.transposed:
            continue
        module, w = name.removesuffix(".weight"), flat[slot.path]
        scheme = scheme_of(w)
        if scheme is None:
            untouched.append(module)
            continue
        schemes.add(scheme)
        del out[name]
        out |= nvfp4_tensors.written(module, w, slot) if scheme.format == NVFP4 else _layer(module, w, slot, scheme)
    plain = all(weights.is_plain(flat[joint.slots[0].path]) for joint in wanted.values())
    if not schemes and pruned and plain:
        sparse = [n for n, joint in wanted.items() if weights.parse(joint.slots[0].path).place == "block"]
        stems = {n.removesuffix(".weight") for n in sparse}
        return sparse_tensors.pack(sparse, out, [n for n in (*untouched, *built) if n not in stems])
    if not schemes and (kinds := {w.format_name for w in map(weights.as_node, flat.values()) if w.is_integer}):
        raise RequestError(
            f"compressed-tensors does not hold {listed(sorted(kinds))} weights; export --to hf writes floats"
        )
    if not schemes:
        raise RequestError("no linear layer is quantized; export --to hf writes it as it is")
    if len(schemes) > 1:
        kinds = sorted(str((s.bits, s.group, s.activations, s.symmetric, s.static)) for s in schemes)
        raise RequestError(f"linear layers differ in bits, groups or activations ({listed(kinds)})")
    return out, _config(schemes.pop(), [*untouched, *built])


def _layer(module: str, w: weights.Quantized, slot: name_map.Slot, scheme: Scheme) -> dict[str, Tensor]:
    (inputs, outputs), bits = slot.shape, scheme.bits
    groups = w.array.scale.shape[-2]

    def part(a: jax.Array) -> np.ndarray:
        return name_map.host(a, slot.layer).T

    out = {f"{module}.weight_scale": Tensor((outputs, groups), w.array.scale.dtype, lambda: part(w.array.scale))}
    if (fixed := w.input_scale) is not None:
        out[f"{module}.input_scale"] = Tensor((1,), np.dtype(np.float32), lambda: part(fixed).reshape(1))
    if scheme.format != "pack-quantized":
        kind = np.dtype(np.int8 if scheme.type == "int" else w.array.qvalue.dtype)
        values = Tensor((outputs, inputs), kind, lambda: part(w.array.qvalue).astype(kind))
        return out | {f"{module}.weight": values}
    packed = Tensor(
        (outputs, packed_length(inputs, bits)),
        np.dtype(np.int32),
        lambda: pack_words(part(w.array.qvalue).astype(np.int8), bits),
    )
    zero = w.array.zero_point
    if zero is not None:
        out[f"{module}.weight_zero_point"] = Tensor(
            (packed_length(outputs, bits), groups),
            np.dtype(np.int32),
            lambda: np.ascontiguousarray(pack_words(part(zero).astype(np.int8).T, bits).T),
        )
    return out | {
        f"{module}.weight_packed": packed,
        f"{module}.weight_shape": of_array(np.array([outputs, inputs], np.int64)),
    }


def _config(scheme: Scheme, untouched: list[str]) -> dict[str, Any]:
    common = {
        "num_bits": scheme.bits,
        "type": scheme.type,
        "symmetric": True,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
    }
    strategy = {"strategy": "channel", "group_size": None}
    if scheme.group:
        strategy = {"strategy": "tensor_group" if scheme.format == NVFP4 else "group", "group_size": scheme.group}
    weight = common | strategy | {"symmetric": scheme.symmetric, "observer": "minmax", "observer_kwargs": {}}
    inputs = None
    if scheme.activations:
        inputs = common | {"num_bits": 8, "dynamic": True, "strategy": "token", "group_size": None, "observer": None}
        if scheme.static:
            inputs |= {"dynamic": False, "strategy": "tensor", "observer": "minmax", "observer_kwargs": {}}
    group = {
        "targets": ["Linear"],
        "weights": weight,
        "input_activations": inputs,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": scheme.format,
        "config_groups": {"group_0": group},
        "ignore": sorted(untouched),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def has_zero_points(settings: dict[str, Any]) -> bool:
    """Return True if a `quantization_config` that `pack` returned describes weights with zero points."""
    return not all(group["weights"]["symmetric"] for group in settings.get("config_groups", {}).values())


def unpack(where: str, settings: Any, tensors: Tensors) -> dict[str, Tensor]:
    """Return the tensors of a model in dense form. Quantized layers are dequantized when they are read.

    Args:
        where: Name of the folder in error messages.
        settings: The `quantization_config` of the model.
        tensors: The stored tensors.

    Raises:
        RequestError: If the quantization method is not compressed-tensors. If a layer is stored in a format that this
            module does not read.
    """
    sparse = settings.get("sparsity_config") if isinstance(settings, dict) else None
    if isinstance(sparse, dict) and sparse.get("format") != "dense" and not settings.get("config_groups"):
        return sparse_tensors.unpack(where, sparse, tensors)
    schemes: list[Any] = []
    method, kind = (settings.get(k, "") if isinstance(settings, dict) else "" for k in ("quant_method", "format"))
    try:
        schemes = [g["weights"] for g in settings["config_groups"].values()]
        held = {FLOAT8: {("float", 8)}, NVFP4: {("float", 4)}} | {key: {("int", 4), ("int", 8)} for key in INTEGERS}
        known = method == "compressed-tensors" and kind in held
        known = known and all((s["type"], s["num_bits"]) in held[kind] for s in schemes)
        known = known and (kind == "pack-quantized" or all(s.get("symmetric") for s in schemes))
        known = known and not any(n.endswith("_g_idx") for n in tensors)
    except (KeyError, TypeError, AttributeError):
        known = False
    bits = {s["num_bits"] for s in schemes} if known else set()
    if not known or len(bits) != 1:
        raise RequestError(
            f"{where}: quantized by {method or 'an unnamed method'} {kind}, which is not supported (int8 and int4 of "
            "compressed-tensors are, with zero points if packed, and fp8 and nvfp4); import the model that it was made "
            "of"
        )
    width = bits.pop()
    out = {}
    for name, t in tensors.items():
        stem = re.sub(r"_(packed|scale|shape|zero_point)$", "", name)
        scale = tensors.get(f"{stem}_scale")
        if name.endswith("_packed") and scale and kind == NVFP4:
            out[stem] = nvfp4_tensors.dense(where, stem, t, scale, tensors.get(f"{stem}_global_scale"))
        elif name.endswith("_packed") and scale:
            stored_shape = tensors.get(f"{stem}_shape")
            outputs, inputs = map(int, stored_shape.read()) if stored_shape and stored_shape.shape == (2,) else (0, 0)
            if t.shape != (outputs, packed_length(inputs, width)):
                raise RequestError(f"{where}: {name} contradicts {stem}_shape")
            zero = tensors.get(f"{stem}_zero_point")
            if zero is not None and zero.shape != (packed_length(outputs, width), *scale.shape[1:]):
                raise RequestError(f"{where}: {stem}_zero_point contradicts {stem}_shape")
            out[stem] = _dense(
                where, stem, (outputs, inputs), scale, lambda t=t, n=inputs: unpack_words(t.read(), n, width),
                zero and (lambda z=zero, n=outputs: unpack_words(z.read().T, n, width).T),
            )  # fmt: skip
        elif name == stem and scale:
            out[stem] = _dense(where, stem, t.shape, scale, t.read)
        elif name == stem:
            out[name] = t
    return out


def _dense(where: str, name: str, shape: tuple[int, ...], scale: Tensor, read: Any, zeros: Any = None) -> Tensor:
    rows, groups = (*scale.shape, 1, 1)[:2]  # one scale per tensor, per output, or per group of inputs
    if len(shape) != 2 or len(scale.shape) > 2 or rows not in (1, shape[0]) or not groups or shape[1] % groups:
        raise RequestError(f"{where}: {name}_scale is {list(scale.shape)}, which does not fit {name} {list(shape)}")

    def fetch() -> np.ndarray:
        s = np.asarray(scale.read(), np.float32).reshape(rows, groups, 1)
        unit = np.asarray(read(), np.float32).reshape(shape[0], groups, -1)
        dense = (unit if zeros is None else unit - np.asarray(zeros(), np.float32).reshape(rows, groups, 1)) * s
        return dense.reshape(shape).astype(scale.dtype)

    return Tensor(shape, scale.dtype, fetch, rounded=True)
