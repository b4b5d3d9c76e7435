"""Read and write adapters in PEFT's format: adapter_config.json and adapter_model.safetensors.

For each kind of adapter, a module reads and writes the tensors of one matrix (`FORMATS`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np

from llmctl.artifacts import fingerprint
from llmctl.artifacts.artifact import Artifact
from llmctl.config.errors import RequestError
from llmctl.convert import architectures, name_map, parity, peft_ia3, peft_lora, safetensors
from llmctl.convert import hf_folder as folders
from llmctl.convert.lazy_tensors import Tensor, listed, of_array
from llmctl.evaluate.tasks import registry
from llmctl.model import weights
from llmctl.model.config import ModelConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."

FORMATS = {"LORA": peft_lora, "ADALORA": peft_lora, "IA3": peft_ia3}
"""Modules that read and write adapters, by the value of `peft_type`."""


def is_adapter(folder: Path) -> bool:
    """Return True if the folder contains an adapter."""
    return (folder / CONFIG).is_file()


def _layers(cfg: ModelConfig) -> dict[str, tuple[name_map.Slot, ...]]:
    """Return the linear layers of the Hugging Face format with the slots of their matrices: {module name: slots}.

    A fused layer has several slots.
    """
    bridge, head = architectures.of(cfg)
    found = name_map.joints(cfg, bridge, head, bare=cfg.head_kind.bare)
    return {
        n.removesuffix(".weight"): j.slots
        for n, j in found.items()
        if weights.is_kernel(j.slots[0].path) and n.endswith(".weight")
    }


def _modules(cfg: ModelConfig) -> dict[str, name_map.Slot]:
    """Return the linear layers of the Hugging Face format that are one matrix in llmctl: {module name: slot}."""
    return {module: slots[0] for module, slots in _layers(cfg).items() if len(slots) == 1}


def load(base: Artifact, folder: Path) -> dict[str, Any]:
    """Load an adapter: wrap the base's matrices in it, and replace the heads that were trained with it.

    Returns:
        The parameters of the base with the adapter.

    Raises:
        RequestError: If the adapter is of an unknown kind, is an unsupported variant, or does not fit the base.
    """
    config = folders.read_json(folder / CONFIG)
    kind = config.get("peft_type")
    if kind not in FORMATS:
        raise RequestError(f"{folder / CONFIG}: peft_type = {kind!r}: only {', '.join(FORMATS)} are supported")
    form = FORMATS[kind]
    odd = [f"{k} = {config[k]!r}" for k, ok in form.NEUTRAL.items() if config.get(k) not in (None, [], {}, *ok)]
    if odd:
        raise RequestError(f"{folder / CONFIG}: {listed(odd)}: only plain LoRA is supported")
    stored = safetensors.read_file(folder / WEIGHTS)
    flat = weights.flatten(base.params)
    found: dict[str, dict[int, Any]] = {}
    left = {n.removeprefix(PREFIX) for n in stored}
    if missing := [n for n in stored if not n.startswith(PREFIX)]:
        raise RequestError(f"{folder / WEIGHTS}: tensors that are not understood: {listed(missing)}")
    for module, slots in _layers(base.model).items():
        names = {suffix: f"{module}.{suffix}" for suffix in form.suffixes(config)}
        absent = [suffix for suffix, name in names.items() if name not in left]
        if len(absent) == len(names):
            continue
        if absent:
            raise RequestError(f"{folder / WEIGHTS}: {module} has an adapter without {listed(absent)}")
        left -= set(names.values())
        tensors = {k: np.asarray(stored[PREFIX + name].read(), np.float32) for k, name in names.items()}
        try:
            parts = form.read(config, module, tensors, slots[0].shape[0], slots)
        except RequestError as e:
            raise RequestError(f"{folder / WEIGHTS}: {e}") from None
        for slot, part in zip(slots, parts, strict=True):
            found.setdefault(slot.path, {})[slot.layer] = part
    left -= _heads(base.model, stored, flat, left)
    if left:
        raise RequestError(f"{folder / WEIGHTS}: tensors that are not understood: {listed(sorted(left))}")
    if not found:
        raise RequestError(f"{folder / WEIGHTS}: holds no pair for this base")
    for path, layers in found.items():
        if weights.as_node(flat[path]).has_adapter:
            raise RequestError(f"{path}: the base has a low-rank pair already; merge it first")
        flat[path] = form.node(flat[path], layers)
    return weights.unflatten(flat)


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
    """Write an artifact's adapters in PEFT's format, read them back, and compare outputs.

    Returns:
        The largest difference between outputs with the original and the written adapter.

    Raises:
        RequestError: If the artifact has no adapters, if matrices with adapters share a tensor in the Hugging Face
            format, or if the artifact differs from its base in weights that an adapter cannot store.
    """
    cfg, flat = found.model, weights.flatten(found.params)
    adapters = weights.adapted(found.params)
    if not adapters:
        raise RequestError(f"{found.path}: has no low-rank pairs; finetune with method = 'lora' and merge = false")
    form = _format_of(found.path, {w.kind for w in adapters.values()})
    modules = {m: s for m, s in _modules(cfg).items() if s.path in adapters}
    if homeless := sorted(adapters.keys() - {s.path for s in modules.values()}):
        raise RequestError(f"{listed(homeless)}: shares a tensor with others there; merge the pairs and export --to hf")
    nodes = {m: _layer(adapters[slot.path], slot.layer) for m, slot in modules.items()}
    tensors = {m: made for m, w in nodes.items() if (made := form.write(w))}
    out = {f"{PREFIX}{m}.{suffix}": of_array(a) for m, made in tensors.items() for suffix, a in made.items()}
    trained = _trained(found)
    for ours, theirs in trained.items():
        array = np.asarray(weights.dense(flat[ours]), np.float32)
        out[PREFIX + theirs] = of_array(array.T if weights.is_kernel(ours) else array)
    saved = {theirs.rpartition(".")[0] for theirs in trained.values()}
    config = {
        **form.settings(nodes, tensors, _modules(cfg)),
        "task_type": registry.of(found.manifest).peft_task_type(cfg),
        "base_model_name_or_path": "",
        "modules_to_save": sorted(saved) or None,
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    safetensors.write_file(folder / WEIGHTS, out)
    back = load(Artifact(found.path, found.manifest, base_of(found)), folder)
    batch = parity.probe(cfg)
    return parity.prove(str(found.path), parity.answers(cfg, back, batch), parity.answers(cfg, found.params, batch))


def _format_of(path: Path, kinds: set[str]) -> ModuleType:
    """Return the format module for these kinds of weight nodes.

    Raises:
        RequestError: If no format stores them.
    """
    for form in FORMATS.values():
        if len(kinds) == 1 and kinds <= {*form.KINDS}:
            return form
    raise RequestError(f"{path}: PEFT has no adapter for {', '.join(sorted(kinds))}; merge and export --to hf")


def _layer(w: Any, layer: int) -> Any:
    return w if layer < 0 else weights.layer_of(w, layer)


def base_of(found: Artifact) -> dict[str, Any]:
    """Return the parameters of the base without adapters, and with zeros in place of trained heads.

    With these zeros, a comparison detects a head that the adapter's files lack.
    """
    base = weights.flatten(weights.without_adapters(found.params))
    base |= {path: jnp.zeros(base[path].shape, jnp.float32) for path in _trained(found)}
    return weights.unflatten(base)


def _trained(found: Artifact) -> dict[str, str]:
    """Return the weights of trained heads, {parameter path: name in the Hugging Face format}.

    Finetuning trains only task heads. An imported adapter may also have a language-model head.

    Raises:
        RequestError: If an imported artifact differs from its base, and has no head that could be the difference.
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
