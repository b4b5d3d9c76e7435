"""Read and write trained prefixes in PEFT's format (prefix tuning; Li and Liang, 2021, arXiv:2101.00190).

A prefix consists of keys and values. In every layer, the prefix precedes the keys and values of a text. The files
contain one tensor [P, 2 * L * W]. Each row has the key and the value of the first layer, then of the second layer, and
so on.

Only the prefixes of decoder language models can be converted. In PEFT's format, the layers of an encoder-decoder share
vectors. llmctl does not support shared vectors. For an encoder, transformers has no class that reads a prefix.

Shapes: P vectors per layer, L layers, W total width of all key heads.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from llmctl.artifacts.artifact import Artifact
from llmctl.config.errors import RequestError
from llmctl.convert import hf_folder as folders
from llmctl.convert import parity, peft, peft_prompt, safetensors
from llmctl.convert.lazy_tensors import listed, of_array
from llmctl.evaluate.tasks import registry
from llmctl.model import functional, prefix, weights
from llmctl.model.config import ModelConfig

TYPE = "PREFIX_TUNING"
"""Value of `peft_type` in the adapter_config.json of a trained prefix."""


def is_prefix(folder: Path) -> bool:
    """Return True if a folder with an adapter in PEFT's format contains a trained prefix."""
    return folders.read_json(folder / peft.CONFIG).get("peft_type") == TYPE


def without_prefix(found: Artifact) -> Artifact:
    """Return the base of a trained prefix: the model without the prefix's parameters."""
    model = found.model.model_copy(update=prefix.removed(found.model))
    flat = {path: w for path, w in weights.flatten(found.params).items() if not weights.parse(path).prefix}
    manifest = found.manifest.model_copy(update={"model": model})
    return dataclasses.replace(found, manifest=manifest, params=weights.unflatten(flat))


def export(found: Artifact, folder: Path) -> float:
    """Write an artifact's trained prefix in PEFT's format, and read it back.

    Returns:
        The largest difference between outputs of the artifact and of the base with the written prefix.

    Raises:
        RequestError: If the artifact also has low-rank adapters, or is not a decoder language model.
    """
    cfg = found.model
    if weights.adapted(found.params):
        raise RequestError(f"{found.path}: has a trained prefix and other adapters; PEFT's files hold one of the two")
    task_type = registry.of(found.manifest).peft_task_type(cfg)
    _check(found, task_type)
    width, (k_LPW, v_LPW) = cfg.kv_heads * cfg.head_dim, _arrays(found.params).values()
    both = np.stack([np.asarray(k_LPW, np.float32), np.asarray(v_LPW, np.float32)], axis=2)  # L, P, 2, W
    config = {
        "peft_type": TYPE,
        "task_type": task_type,
        "num_virtual_tokens": cfg.prefix_tokens,
        "token_dim": width,
        "num_transformer_submodules": 1,
        "num_attention_heads": cfg.kv_heads,
        "num_layers": cfg.layers,
        "encoder_hidden_size": width,
        "prefix_projection": False,
        "base_model_name_or_path": "",
        "inference_mode": True,
    }
    (folder / peft.CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    flat_PX = np.ascontiguousarray(both.swapaxes(0, 1)).reshape(cfg.prefix_tokens, -1)
    safetensors.write_file(folder / peft.WEIGHTS, {peft_prompt.VECTORS: of_array(flat_PX)})
    model, back = load(without_prefix(found), folder)
    batch = parity.probe(cfg)
    return parity.prove(str(found.path), parity.answers(model, back, batch), parity.answers(cfg, found.params, batch))


def load(base: Artifact, folder: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """Load a trained prefix.

    Prefix tuning may train a network that computes the keys and values. The files then contain these keys and values,
    not the network.

    Returns:
        The config and the parameters of the base with the prefix.

    Raises:
        RequestError: If the prefix does not fit the base, or if the base is not a decoder language model.
    """
    config, file, cfg = folders.read_json(folder / peft.CONFIG), folder / peft.WEIGHTS, base.model
    if cfg.prefix_tokens:
        raise RequestError(f"{base.path}: has a trained prefix already; name an artifact without one")
    _check(base, config.get("task_type"))
    stored = safetensors.read_file(file)
    if {*stored} != {peft_prompt.VECTORS}:
        odd = listed(sorted({*stored} ^ {peft_prompt.VECTORS}))
        raise RequestError(f"{file}: must contain {peft_prompt.VECTORS} alone; missing or not understood: {odd}")
    count = peft_prompt.vector_count(config, folder, base)
    flat_PX, width = np.asarray(stored[peft_prompt.VECTORS].read(), np.float32), cfg.kv_heads * cfg.head_dim
    if flat_PX.shape != (count, 2 * cfg.layers * width):
        raise RequestError(
            f"{file}: {peft_prompt.VECTORS} is {list(flat_PX.shape)}, which does not fit {count} keys and values of "
            f"width {width:,} for {cfg.layers} layers"
        )
    if not np.isfinite(flat_PX).all():
        raise RequestError(f"{file}: {peft_prompt.VECTORS} contains NaN or infinity")
    model = cfg.model_copy(update=prefix.added(cfg, count))
    both = flat_PX.reshape(count, cfg.layers, 2, width).transpose(2, 1, 0, 3)  # 2, L, P, W
    paths = _arrays(functional.abstract(model))
    return model, weights.updated(base.params, {p: jnp.asarray(w) for p, w in zip(paths, both, strict=True)})


def _arrays(params: dict[str, Any]) -> dict[str, Any]:
    """Return {parameter path: array [L, P, W]} with the prefixes of keys and values, in this order."""
    return {path: w for path, w in sorted(weights.flatten(params).items()) if weights.parse(path).prefix}


def _check(found: Artifact, task_type: Any) -> None:
    cfg = found.model
    if cfg.architecture != "decoder" or task_type != "CAUSAL_LM" or cfg.positions == "relative":
        raise RequestError(
            f"{found.path}: a prefix in PEFT's format is for decoder language models; use the prefix with llmctl, or "
            "finetune its parent with method = 'lora'"
        )
