"""LoRA adapters in PEFT's format: adapter_config.json and adapter_model.safetensors.

(Hu et al., 2021, arXiv:2106.09685)
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from llmctl.artifacts import fingerprint
from llmctl.artifacts.artifact import Artifact
from llmctl.config.errors import RequestError
from llmctl.convert import architectures, name_map, parity, safetensors
from llmctl.convert import hf_folder as folders
from llmctl.convert.lazy_tensors import Tensor, listed, of_array
from llmctl.evaluate.tasks import registry
from llmctl.model import weights
from llmctl.model.config import ModelConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",), "bias": ("none",), "use_dora": (False,), "lora_bias": (False,),
    "megatron_config": (), "trainable_token_indices": (), "target_parameters": (), "layer_replication": (),
    "alora_invocation_tokens": (), "use_qalora": (False,), "use_bdlora": (False,), "ensure_weight_tying": (False,),
    "arrow_config": (), "kasa_config": (), "monteclora_config": (),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}  # fmt: skip
"""Settings that change the computation, and the values under which they do not.

Other initializations (PiSSA, OLoRA, LoftQ, …) also change the matrices of the base. Settings that only select modules
(layers_to_transform, layers_pattern, exclude_modules) are not checked: the stored tensors name the selected modules.
Neither is fan_in_fan_out. It describes the layout of the base's matrix, and the pair has the same layout either way.
"""


def is_adapter(folder: Path) -> bool:
    """Return True if the folder holds an adapter."""
    return (folder / CONFIG).is_file()


def _layers(cfg: ModelConfig) -> dict[str, tuple[name_map.Slot, ...]]:
    """Return the linear layers of the other format with the matrices of ours that each holds: {module name: slots}."""
    bridge, head = architectures.of(cfg)
    found = name_map.joints(cfg, bridge, head, bare=cfg.head_kind.bare)
    return {
        n.removesuffix(".weight"): j.slots
        for n, j in found.items()
        if weights.is_kernel(j.slots[0].path) and n.endswith(".weight")
    }


def _modules(cfg: ModelConfig) -> dict[str, name_map.Slot]:
    """Return the linear layers of the other format that equal one of our matrices: {module name: our slot}."""
    return {module: slots[0] for module, slots in _layers(cfg).items() if len(slots) == 1}


def load(base: Artifact, folder: Path) -> dict[str, Any]:
    """Load an adapter: wrap the base's matrices in its low-rank pairs, and replace the heads that it trained.

    Returns:
        The parameters of the base with the adapter.

    Raises:
        RequestError: If the adapter is not LoRA, is an unsupported variant, or does not fit the base.
    """
    config = folders.read_json(folder / CONFIG)
    odd = [f"{k} = {config[k]!r}" for k, ok in NEUTRAL.items() if config.get(k) not in (None, [], {}, *ok)]
    if odd:
        raise RequestError(f"{folder / CONFIG}: {listed(odd)}: only plain LoRA is supported")
    stored = safetensors.read_file(folder / WEIGHTS)
    flat = weights.flatten(base.params)
    pairs: dict[str, dict[int, tuple[Tensor, Tensor, float]]] = {}
    left = {n.removeprefix(PREFIX) for n in stored}
    if missing := [n for n in stored if not n.startswith(PREFIX)]:
        raise RequestError(f"{folder / WEIGHTS}: tensors that are not understood: {listed(missing)}")
    for module, slots in _layers(base.model).items():
        a, b = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
        if a not in left or b not in left:
            continue
        left -= {a, b}
        pair = stored[PREFIX + a], stored[PREFIX + b]
        inputs, outputs = slots[0].shape[0], sum(s.shape[-1] for s in slots)
        rank = pair[0].shape[0]
        if pair[0].shape != (rank, inputs) or pair[1].shape != (outputs, rank):
            raise RequestError(
                f"{folder / WEIGHTS}: {a} is {list(pair[0].shape)} and its pair {list(pair[1].shape)}, which do not "
                f"fit the base's matrix [{outputs}, {inputs}]"
            )
        for slot in slots:  # the parts of a fused matrix share the inputs' side
            b_part = pair[1] if len(slots) == 1 else _rows(pair[1], slot.first, slot.shape[-1])
            pairs.setdefault(slot.path, {})[slot.layer] = (pair[0], b_part, _scale(config, module, rank))
    left -= _heads(base.model, stored, flat, left)
    if left:
        raise RequestError(f"{folder / WEIGHTS}: tensors that are not understood: {listed(sorted(left))}")
    if not pairs:
        raise RequestError(f"{folder / WEIGHTS}: holds no pair for this base")
    for path, layers in pairs.items():
        flat[path] = _pair(flat[path], path, layers)
    return weights.unflatten(flat)


def _rows(t: Tensor, first: int, count: int) -> Tensor:
    return Tensor((count, *t.shape[1:]), t.dtype, lambda: t.read()[first : first + count])


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    patterns = config.get("alpha_pattern") or {}  # regular expressions that match the end of a name
    try:
        found = (v for k, v in patterns.items() if re.fullmatch(rf"(.*\.)?({k})", module))
        alpha = next(found, config.get("lora_alpha", rank))
    except re.error as e:
        raise RequestError(f"{CONFIG}: alpha_pattern holds no regular expression ({e})") from None
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _pair(w: Any, path: str, layers: dict[int, tuple[Tensor, Tensor, float]]) -> weights.LowRank:
    if weights.as_node(w).has_adapter:
        raise RequestError(f"{path}: the base has a low-rank pair already; merge it first")
    scales = {s for _, _, s in layers.values()}
    ranks = {a.shape[0] for a, _, _ in layers.values()}
    stacked = set(layers) != {-1}
    # Layers without a pair get zeros, and differing scales are multiplied into b. The product stays the same.
    scale, rank = (scales.pop() if len(scales) == 1 else 1.0), max(ranks)
    shape = w.shape
    a = np.zeros((*shape[:-1], rank), np.float32)
    b = np.zeros((*shape[:-2], rank, shape[-1]), np.float32)
    for layer, (theirs_a, theirs_b, s) in layers.items():
        at = layer if stacked else ...
        r = theirs_a.shape[0]
        a[at][..., :r] = np.asarray(theirs_a.read(), np.float32).T
        b[at][..., :r, :] = np.asarray(theirs_b.read(), np.float32).T * (s / scale)
    return weights.LowRank(w, jnp.asarray(a), jnp.asarray(b), scale=scale)


def _heads(cfg: ModelConfig, stored: Mapping[str, Tensor], flat: dict[str, Any], left: set[str]) -> set[str]:
    """Copy fully trained heads into `flat`, and return the names of their tensors."""
    _, head = architectures.of(cfg)
    used = set()
    for ours, theirs in head.names.items():
        if theirs in left and ours in flat:
            array = np.asarray(stored[PREFIX + theirs].read())
            array = array.T if weights.is_kernel(ours) else array
            if array.shape != flat[ours].shape:
                raise RequestError(f"{theirs} is {list(array.shape)}, the base's {list(flat[ours].shape)}")
            flat[ours] = jnp.asarray(array).astype(flat[ours].dtype)
            used.add(theirs)
    return used


def export(found: Artifact, folder: Path) -> float:
    """Write an artifact's low-rank pairs as an adapter.

    Returns:
        The largest difference of outputs after the adapter is read back.

    Raises:
        RequestError: If the artifact has no pairs, has pairs on matrices that share a tensor in the other format, or
            differs from its base in weights that an adapter cannot hold.
    """
    cfg, flat = found.model, weights.flatten(found.params)
    pairs = weights.of_type(found.params, weights.LowRank)
    if not pairs:
        raise RequestError(f"{found.path}: has no low-rank pairs; finetune with method = 'lora' and merge = false")
    modules = {m: s for m, s in _modules(cfg).items() if s.path in pairs}
    if homeless := sorted(pairs.keys() - {s.path for s in modules.values()}):
        raise RequestError(f"{listed(homeless)}: shares a tensor with others there; merge the pairs and export --to hf")
    out: dict[str, Tensor] = {}
    for module, slot in modules.items():
        w = pairs[slot.path]
        one = w if slot.layer < 0 else weights.layer_of(w, slot.layer)
        out[f"{PREFIX}{module}.lora_A.weight"] = of_array(np.asarray(one.a, np.float32).T)
        out[f"{PREFIX}{module}.lora_B.weight"] = of_array(np.asarray(one.b, np.float32).T)
    trained = _trained(found)
    for ours, theirs in trained.items():
        array = np.asarray(weights.dense(flat[ours]), np.float32)
        out[PREFIX + theirs] = of_array(array.T if weights.is_kernel(ours) else array)
    saved = [theirs.rpartition(".")[0] for theirs in trained.values()]
    settings = {m: (pairs[s.path].a.shape[-1], pairs[s.path].scale) for m, s in modules.items()}
    config = _config(cfg, registry.of(found.manifest).peft_task_type(cfg), settings, sorted(set(saved)))
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    safetensors.write_file(folder / WEIGHTS, out)
    back = load(Artifact(found.path, found.manifest, base_of(found)), folder)
    batch = parity.probe(cfg)
    return parity.prove(str(found.path), parity.answers(cfg, back, batch), parity.answers(cfg, found.params, batch))


def base_of(found: Artifact) -> dict[str, Any]:
    """Return the base for a proof: without pairs, and with zeros where the adapter must bring trained weights."""
    base = weights.flatten(weights.without_adapters(found.params))
    base |= {path: jnp.zeros(base[path].shape, jnp.float32) for path in _trained(found)}
    return weights.unflatten(base)


def _trained(found: Artifact) -> dict[str, str]:
    """Return the weights of the heads that were trained beside the pairs: {our path: name in the other format}.

    Finetuning trains task heads only. An imported adapter may also have brought a language-model head.
    """
    flat, names = weights.flatten(found.params), architectures.of(found.model)[1].names
    heads = {ours: theirs for ours, theirs in names.items() if ours in flat}
    parent = found.manifest.parent
    if found.manifest.stage == "import" and parent is not None:
        if fingerprint.digest(weights.flatten(weights.without_adapters(found.params))) == parent.digest:
            return {}
        if not heads:
            raise RequestError(
                f"{found.path}: differs from its base in more than low-rank pairs and its head, which an adapter "
                "cannot hold; merge the pairs and export --to hf"
            )
        return heads
    return {ours: theirs for ours, theirs in heads.items() if weights.parse(ours).task_head}


def _config(
    cfg: ModelConfig, task_type: str, settings: dict[str, tuple[int, float]], saved: list[str]
) -> dict[str, Any]:
    (rank, scale), _ = Counter(settings.values()).most_common(1)[0]
    leaves = {m.rpartition(".")[2] for m in settings}
    every = {m for m in _modules(cfg) if m.rpartition(".")[2] in leaves}
    odd = {m: s for m, s in settings.items() if s != (rank, scale)}
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": "",
        "r": rank,
        "lora_alpha": _whole(scale * rank),
        "rank_pattern": {m: r for m, (r, _) in odd.items()},
        "alpha_pattern": {m: _whole(s * r) for m, (r, s) in odd.items()},
        "target_modules": sorted(leaves) if every == set(settings) else sorted(settings),
        "modules_to_save": saved or None,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }


def _whole(x: float) -> float | int:
    return round(x) if abs(x - round(x)) < 1e-9 else x
