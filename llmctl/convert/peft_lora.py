"""Read and write low-rank adapters in PEFT's format: LoRA, rsLoRA, DoRA, and AdaLoRA, which is read as LoRA.

In PEFT's format, a pair of low-rank matrices belongs to one layer. llmctl stacks the pairs of all layers. Papers: LoRA
(Hu et al., 2021, arXiv:2106.09685), DoRA (Liu et al., 2024, arXiv:2402.09353), AdaLoRA (Zhang et al., 2023,
arXiv:2303.10512).

Shapes: I inputs, O outputs, R rank.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from llmctl.config.base import FLOAT32_MAX
from llmctl.config.errors import RequestError
from llmctl.convert.name_map import Slot
from llmctl.model import weights

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": ("none",), "lora_bias": (False,),
    "megatron_config": (), "trainable_token_indices": (), "target_parameters": (), "layer_replication": (),
    "alora_invocation_tokens": (), "use_qalora": (False,), "use_bdlora": (False,), "ensure_weight_tying": (False,),
    "arrow_config": (), "kasa_config": (), "monteclora_config": (),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}  # fmt: skip
"""Values of config keys that llmctl accepts, because they do not change the outputs. Other values may change the
outputs.

Other initializations (PiSSA, OLoRA, LoftQ, …) are not accepted, because they also change the matrices of the base.
Keys that only select modules (layers_to_transform, layers_pattern, exclude_modules) are not checked. The names of the
stored tensors already show which modules have an adapter. The key fan_in_fan_out is not checked, because the layout of
the low-rank matrices does not depend on its value.
"""
KINDS = ("low_rank", "dora")
"""Kinds of adapters that this module writes: names of llmctl's weight classes (`weights.Node.kind`)."""
MAGNITUDE = "lora_magnitude_vector"
SLOW = re.compile(r"\)[*+{]|(?:[*+}?].*){5}", re.DOTALL)
"""Pattern that finds slow regular expressions: a group is repeated, or there are more than four repetitions."""


class Pair(NamedTuple):
    """Store the low-rank adapter of one layer's matrix: two matrices, their scale, and DoRA's magnitude."""

    a_IR: np.ndarray
    b_RO: np.ndarray
    scale: float
    magnitude_O: np.ndarray | None


def suffixes(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the endings of the tensor names that PEFT stores for one adapted module."""
    if config["peft_type"] == "ADALORA":
        return "lora_A", "lora_B", "lora_E"
    return ("lora_A.weight", "lora_B.weight", *((MAGNITUDE,) if config.get("use_dora") else ()))


def read(
    config: Mapping[str, Any], module: str, tensors: Mapping[str, np.ndarray], inputs: int, slots: tuple[Slot, ...]
) -> list[Pair]:
    """Read the adapter of one module, and return one entry per matrix of llmctl.

    A fused module, such as one for queries, keys and values, has several matrices. The matrices share the first
    low-rank matrix [I, R].

    Args:
        config: Content of adapter_config.json.
        module: Name of the module, for error messages.
        tensors: Tensors of the module, by the ending of their names.
        inputs: Number of inputs of the module.
        slots: Matrices of the module.

    Raises:
        RequestError: If the tensors do not fit the base's matrix.
    """
    a, b, *_ = tensors.values()
    rank, outputs = (a.shape or (0,))[0], sum(s.shape[-1] for s in slots)
    if a.shape != (rank, inputs) or b.shape != (outputs, rank):
        raise RequestError(
            f"{module}.{next(iter(tensors))} is {list(a.shape)} and its pair {list(b.shape)}, which do not fit the "
            f"base's matrix [{outputs}, {inputs}]"
        )
    if not 0 < rank <= max(inputs, outputs):
        what = "more than the sides of its matrix" if rank else "and 1 is the least"
        raise RequestError(f"{module}.{next(iter(tensors))} has rank {rank:,}, {what}")
    if (values := tensors.get("lora_E")) is not None:  # singular values
        if values.shape != (rank, 1):
            raise RequestError(f"{module}.lora_E is {list(values.shape)}, and its pair has rank {rank}")
        # the scale is that of the initial rank, as PEFT computes it
        a, scale = a * values, _number(config, "lora_alpha") / (_number(config, "init_r", least=1) + 1e-5)
    else:
        scale = scale_of(config, module, rank)
    magnitude = tensors.get(MAGNITUDE)
    if magnitude is not None and magnitude.size != outputs:
        raise RequestError(
            f"{module}.{MAGNITUDE} is {list(magnitude.shape)}, and the base's matrix has {outputs} outputs"
        )

    def part(slot: Slot) -> Pair:
        rows = slice(slot.first, slot.first + slot.shape[-1]) if len(slots) > 1 else slice(None)
        return Pair(a.T, b[rows].T, scale, None if magnitude is None else magnitude.reshape(-1)[rows])

    return [part(slot) for slot in slots]


def scale_of(config: Mapping[str, Any], module: str, rank: int) -> float:
    """Return the factor by which a module's low-rank update is multiplied: alpha / rank, or alpha / sqrt(rank)."""
    patterns = config.get("alpha_pattern") or {}  # regular expressions that match the end of a name
    if not isinstance(patterns, dict):
        raise RequestError("adapter_config.json: alpha_pattern is no object")
    if slow := next((k for k in patterns if SLOW.search(k)), None):
        raise RequestError(f"adapter_config.json: alpha_pattern {slow[:40]!r} repeats too much; name the modules in it")
    try:
        found = (v for k, v in patterns.items() if re.fullmatch(rf"(.*\.)?({k})", module))
        alpha = next(found, config.get("lora_alpha", rank))
    except re.error as e:
        raise RequestError(f"adapter_config.json: alpha_pattern holds no regular expression ({e})") from None
    return _number({"lora_alpha": alpha}, "lora_alpha") / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _number(config: Mapping[str, Any], key: str, least: float = -FLOAT32_MAX) -> float:
    """Return the number that the key `key` of adapter_config.json contains.

    Raises:
        RequestError: If the value is not a finite number of at least `least`.
    """
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= FLOAT32_MAX:
        raise RequestError(f"adapter_config.json: {key} = {str(value)[:40]} is no finite number in range")
    return float(value)


def node(w: Any, layers: Mapping[int, Pair]) -> weights.LowRank:
    """Wrap the weight `w` in an adapter with the low-rank matrices of its layers.

    The keys of `layers` are layer indices, or -1 if the weight is not stacked over layers. Layers without an adapter
    get zeros. If scales differ between layers, the second matrix of each layer is multiplied by the layer's scale.
    """
    scales = {p.scale for p in layers.values()}
    scale, rank = (scales.pop() if len(scales) == 1 else 1.0), max(1, *(p.a_IR.shape[1] for p in layers.values()))
    shape = w.shape
    a = np.zeros((*shape[:-1], rank), np.float32)
    b = np.zeros((*shape[:-2], rank, shape[-1]), np.float32)
    for layer, pair in layers.items():
        at = layer if set(layers) != {-1} else ...
        r = pair.a_IR.shape[1]
        a[at][..., :r] = pair.a_IR
        b[at][..., :r, :] = pair.b_RO * (pair.scale / scale if scale else 1.0)
    low = jnp.asarray(a), jnp.asarray(b), scale
    if all(p.magnitude_O is None for p in layers.values()):
        return weights.LowRank(w, *low)
    made = weights.Dora.around(w, *low)
    magnitude = np.array(made.magnitude)
    for layer, pair in layers.items():
        magnitude[layer if set(layers) != {-1} else ...] = pair.magnitude_O
    return weights.Dora(w, *low, jnp.asarray(magnitude))


def write(w: Any) -> dict[str, np.ndarray]:
    """Return the tensors of one layer's adapter in PEFT's format, by the ending of their names.

    Column r of the first matrix and row r of the second matrix are omitted if both are zero. If everything is zero,
    return {}.
    """
    a, b = np.asarray(w.a, np.float32), np.asarray(w.b, np.float32)
    magnitude = {MAGNITUDE: np.asarray(w.magnitude, np.float32)[0]} if w.kind == "dora" else {}
    used = np.logical_or(a.any(axis=0), b.any(axis=1)).reshape(-1)
    if not used.any():
        if not magnitude:
            return {}
        used[:1] = True
    return {"lora_A.weight": a[:, used].T, "lora_B.weight": b[used].T, **magnitude}


def settings(
    nodes: Mapping[str, Any], tensors: Mapping[str, Mapping[str, np.ndarray]], every: Iterable[str]
) -> dict[str, Any]:
    """Return the entries of adapter_config.json for LoRA.

    Args:
        nodes: Weights with adapters, by module name.
        tensors: Written tensors of each module.
        every: Names of all modules of the model.
    """
    sizes = {m: (t["lora_A.weight"].shape[0], nodes[m].scale) for m, t in tensors.items()}
    (rank, scale), _ = Counter(sizes.values()).most_common(1)[0]
    leaves = {m.rpartition(".")[2] for m in sizes}
    all_of_them = {m for m in every if m.rpartition(".")[2] in leaves}
    odd = {m: s for m, s in sizes.items() if s != (rank, scale)}
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": _whole(scale * rank),
        "rank_pattern": {m: r for m, (r, _) in odd.items()},
        "alpha_pattern": {m: _whole(s * r) for m, (r, s) in odd.items()},
        "target_modules": sorted(leaves) if all_of_them == set(sizes) else sorted(sizes),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": any(w.kind == "dora" for w in nodes.values()),
        "init_lora_weights": True,
    }


def _whole(x: float) -> float | int:
    return round(x) if abs(x - round(x)) < 1e-9 else x
