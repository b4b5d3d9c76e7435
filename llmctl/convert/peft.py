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
from llmctl.convert import architectures, name_map, parity, peft_ia3, peft_lora, peft_table, safetensors
from llmctl.convert import hf_folder as folders
from llmctl.convert.lazy_tensors import Tensor, listed, of_array
from llmctl.evaluate.tasks import registry
from llmctl.model import weights
from llmctl.model.config import ModelConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
FULL = "trained_in_full"
"""Key in the manifest's config of an imported adapter. The value lists the paths of the weights that the adapter
replaces."""

FORMATS = {"LORA": peft_lora, "ADALORA": peft_lora, "IA3": peft_ia3}
"""Map from a kind of adapter (a value of `peft_type`) to the module that reads and writes adapters of this kind."""


def is_adapter(folder: Path) -> bool:
    """Return True if the folder contains an adapter."""
    return (folder / CONFIG).is_file()


def _tensor_layouts(cfg: ModelConfig) -> dict[str, name_map.TensorLayout]:
    """Return the model's tensors in the Hugging Face format, by name."""
    bridge, head = architectures.of(cfg)
    return name_map.tensor_layouts(cfg, bridge, head, bare=cfg.head_kind.bare)


def _layers(cfg: ModelConfig) -> dict[str, tuple[name_map.Slot, ...]]:
    """Return the linear layers of the Hugging Face format: {module name: Slots of its matrix}.

    Each Slot is a matrix of llmctl. A fused layer, such as one for queries, keys and values, has several Slots.
    """
    return {
        n.removesuffix(".weight"): j.slots
        for n, j in _tensor_layouts(cfg).items()
        if weights.is_kernel(j.slots[0].path) and n.endswith(".weight")
    }


def _modules(cfg: ModelConfig) -> dict[str, name_map.Slot]:
    """Return the linear layers of the Hugging Face format that are not fused: {module name: Slot of its matrix}."""
    return {module: slots[0] for module, slots in _layers(cfg).items() if len(slots) == 1}


def load(base: Artifact, folder: Path) -> dict[str, Any]:
    """Load an adapter onto a base.

    Each adapted matrix gets its low-rank matrices (LoRA) or its factors ((IA)^3). Modules that were trained in full
    replace modules of the base.

    Returns:
        The parameters of the base with the adapter.

    Raises:
        RequestError: If the adapter is of an unknown kind, is an unsupported variant, or does not fit the base.
    """
    config = folders.read_json(folder / CONFIG)
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in FORMATS:
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
    table = peft_table.of(base.model, _tensor_layouts(base.model))
    pair, used = peft_table.read(table, config, stored, PREFIX, flat[table.path].shape)
    if pair:
        found[table.path] = {-1: pair}
    left -= used
    left -= copy_full(base.model, stored, flat, left)
    left -= _of_base(base, stored, left)
    if left:
        raise RequestError(f"{folder / WEIGHTS}: tensors that are not understood: {listed(sorted(left))}")
    if not found:
        raise RequestError(f"{folder / WEIGHTS}: holds no pair for this base")
    for path, layers in found.items():
        if weights.as_node(flat[path]).has_adapter:
            raise RequestError(f"{path}: the base has a low-rank pair already; merge it first")
        flat[path] = form.node(flat[path], layers)
    return weights.unflatten(flat)


def copy_full(cfg: ModelConfig, stored: Mapping[str, Tensor], flat: dict[str, Any], left: set[str]) -> set[str]:
    """Copy the modules that were trained in full into the parameters, and return the names of their tensors.

    Args:
        cfg: Config of the base.
        stored: Tensors of the adapter's files, by name.
        flat: Parameters of the base by path. The copied modules replace entries of this dictionary.
        left: Names of tensors that are not read yet, without PEFT's prefix.

    Raises:
        RequestError: If a tensor does not fit the base.
    """
    tensor_layouts = _tensor_layouts(cfg)
    table = peft_table.of(cfg, tensor_layouts)
    used = {name for name in tensor_layouts if name in left}
    for name in used:
        array = np.asarray(stored[PREFIX + name].read())
        if array.shape != tensor_layouts[name].shape:
            raise RequestError(f"{name} is {list(array.shape)}, the base's {list(tensor_layouts[name].shape)}")
        for slot in tensor_layouts[name].slots:
            old, ours = flat[slot.path], array.T if slot.transposed else array
            if not weights.is_plain(old):
                raise RequestError(f"{name}: is trained in full, and the base's {slot.path} is no plain array")
            ours = jnp.asarray(ours[..., slot.first : slot.first + slot.shape[-1]]).astype(old.dtype)
            flat[slot.path] = ours if slot.layer < 0 else jnp.asarray(old).at[slot.layer].set(ours)
    twin = f"{table.output}.weight"
    if twin in left and f"{table.module}.weight" in used:
        first, second = (np.asarray(stored[PREFIX + name].read()) for name in (twin, f"{table.module}.weight"))
        if not np.array_equal(first, second):
            raise RequestError(f"{table.module} and {table.output} are one weight in the base, and differ here")
        used.add(twin)
    return used


def _of_base(base: Artifact, stored: Mapping[str, Tensor], left: set[str]) -> set[str]:
    """Return the names of tensors that are copies of the base's weights.

    PEFT saves such copies together with the adapter of a token embedding table. Only the tensors named in `left`, which
    were not read yet, are searched.

    Raises:
        RequestError: If a copy differs from the base's weight.
    """
    theirs = {n.replace(".base_layer.", "."): n for n in left if ".base_layer." in n}
    wanted = {n: j for n, j in _tensor_layouts(base.model).items() if n in theirs}
    for name, ours in name_map.write(base.params, wanted, np.dtype(np.float32)).items():
        array = np.asarray(stored[PREFIX + theirs[name]].read(), np.float32)
        if array.shape != ours.shape or not np.array_equal(array, ours.read()):
            raise RequestError(f"{theirs[name]} differs from the weight of the base {base.path}")
    return {theirs[name] for name in wanted}


def export(found: Artifact, folder: Path) -> float:
    """Write an artifact's adapters in PEFT's format, read them back, and compare the outputs with the artifact's.

    Returns:
        The largest difference between outputs with the artifact's adapters and with the written adapters.

    Raises:
        RequestError: If the artifact has no adapters. If matrices with adapters share a tensor in the Hugging Face
            format. If the artifact differs from its base in weights that an adapter cannot store.
    """
    cfg = found.model
    adapters = weights.adapted(found.params)
    if not adapters:
        raise RequestError(f"{found.path}: has no low-rank pairs; finetune with method = 'lora' and merge = false")
    form = _format_of(found.path, {w.kind for w in adapters.values()})
    modules = {m: s for m, s in _modules(cfg).items() if s.path in adapters}
    tensor_layouts, full = _tensor_layouts(cfg), full_paths(found)
    table = peft_table.of(cfg, tensor_layouts)
    if cfg.encoder_layers and table.path in {*adapters, *full}:
        raise RequestError(f"{found.path}: its token table is three modules there; merge the pairs and export --to hf")
    if homeless := sorted(adapters.keys() - {s.path for s in modules.values()} - {table.path}):
        raise RequestError(f"{listed(homeless)}: shares a tensor with others there; merge the pairs and export --to hf")
    nodes = {m: _layer(adapters[slot.path], slot.layer) for m, slot in modules.items()}
    nodes |= peft_table.nodes(table, adapters[table.path]) if table.path in adapters else {}
    tensors = {m: made for m, w in nodes.items() if (made := form.write(w))}
    names = {table.module: peft_table.NAMES}
    out = {
        f"{PREFIX}{m}.{names.get(m, {}).get(suffix, suffix)}": of_array(a)
        for m, made in tensors.items()
        for suffix, a in made.items()
    }
    whole = {n: j for n, j in tensor_layouts.items() if {s.path for s in j.slots} <= full}
    if homeless := sorted(full - {s.path for j in whole.values() for s in j.slots}):
        raise RequestError(f"{listed(homeless)}: shares a tensor with others there; merge the pairs and export --to hf")
    arrays = name_map.write(found.params, whole, np.dtype(np.float32))
    if table.output and table.path in full:
        arrays[f"{table.output}.weight"] = arrays[f"{table.module}.weight"]
    out |= {PREFIX + n: t for n, t in arrays.items()}
    saved = {n.rpartition(".")[0] for n in arrays}
    config = {
        **form.settings(nodes, tensors, {*_modules(cfg), table.module, *filter(None, [table.output])}),
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
    """Return the module of `FORMATS` that writes adapters of the given kinds, such as LoRA and DoRA.

    Raises:
        RequestError: If PEFT's format has no such adapters, or if no module writes all the kinds.
    """
    for form in FORMATS.values():
        if len(kinds) == 1 and kinds <= {*form.KINDS}:
            return form
    raise RequestError(f"{path}: PEFT has no adapter for {', '.join(sorted(kinds))}; merge and export --to hf")


def _layer(w: Any, layer: int) -> Any:
    return w if layer < 0 else weights.layer_of(w, layer)


def base_of(found: Artifact) -> dict[str, Any]:
    """Return an artifact's parameters without adapters, with zeros for weights that were trained in full.

    Because of the zeros, a comparison detects a trained head that the adapter's files lack.
    """
    base = weights.flatten(weights.without_adapters(found.params))
    base |= {path: jnp.zeros(base[path].shape, jnp.float32) for path in full_paths(found)}
    return weights.unflatten(base)


def full_paths(found: Artifact) -> set[str]:
    """Return the paths of the weights that were trained in full, in addition to the adapters.

    After finetuning, these weights are the task head and the modules in `lora.modules_to_save`. After an import, the
    config records the paths. Older imports have no record. If an older import differs from its base, the result is the
    paths of the head.

    Raises:
        RequestError: If an older import differs from its base, and has no head that could be the difference.
    """
    flat, parent, config = weights.flatten(found.params), found.manifest.parent, found.manifest.config
    if FULL in config:
        return {*config[FULL]}
    if found.manifest.stage == "import" and parent is not None:
        if fingerprint.digest(weights.flatten(weights.without_adapters(found.params))) == parent.digest:
            return set()
        heads = {ours for ours in architectures.of(found.model)[1].names if ours in flat}
        if not heads:
            raise RequestError(
                f"{found.path}: differs from its base in more than low-rank pairs and its head, which an adapter "
                "cannot hold; merge the pairs and export --to hf"
            )
        return heads
    saved = config.get("lora", {}).get("modules_to_save", [])
    names = {path: weights.parse(path) for path in flat}
    return {path for path, name in names.items() if name.task_head or any(name.belongs(m) for m in saved)}


def replaced(base: Artifact, params: dict[str, Any]) -> list[str]:
    """Return the paths of the base's weights that `load` replaced by weights from the adapter's files."""
    before, after = weights.flatten(base.params), weights.flatten(weights.without_adapters(params))
    return sorted(path for path, w in after.items() if w is not before[path])
