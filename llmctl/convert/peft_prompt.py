"""Read and write trained prompts in PEFT's format (prompt tuning; Lester et al., 2021, arXiv:2104.08691).

The vectors are one tensor [P, D] in the order of the text. PEFT puts the vectors before all token embeddings of a text,
special tokens included. llmctl stores the vectors as additional rows of the token embedding table. Every text begins
with the ids of these rows.

Shapes: P prompt vectors, D model width.
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
from llmctl.convert import architectures, name_map, parity, peft, safetensors
from llmctl.convert import hf_folder as folders
from llmctl.convert.lazy_tensors import Tensor, listed, of_array
from llmctl.evaluate.tasks import registry
from llmctl.model import weights
from llmctl.model.config import ModelConfig

TYPE = "PROMPT_TUNING"
"""Value of `peft_type` in the adapter_config.json of a trained prompt."""
PREFIX = "base_model."
"""Prefix of the names of a task head's tensors in the files of a trained prompt."""
VECTORS = "prompt_embeddings"
TABLE = "embed/prompt"


def is_prompt(folder: Path) -> bool:
    """Return True if a folder with an adapter in PEFT's format contains a trained prompt."""
    return folders.read_json(folder / peft.CONFIG).get("peft_type") == TYPE


def without_prompt(found: Artifact) -> Artifact:
    """Return the model without its trained prompt, with zeros for the weights of a task head.

    Because of the zeros, a comparison detects a trained head that the adapter's files lack.
    """
    model = found.model.model_copy(update={"prompt_tokens": 0})
    flat = {path: w for path, w in weights.flatten(found.params).items() if path != TABLE}
    flat |= {path: jnp.zeros(w.shape, jnp.float32) for path, w in flat.items() if weights.parse(path).task_head}
    manifest = found.manifest.model_copy(update={"model": model})
    return dataclasses.replace(found, manifest=manifest, params=weights.unflatten(flat))


def _head(cfg: ModelConfig) -> dict[str, name_map.TensorLayout]:
    """Return the tensors of the task head in the Hugging Face format, by name."""
    bridge, head = architectures.of(cfg)
    tensor_layouts = name_map.tensor_layouts(cfg, bridge, head, bare=cfg.head_kind.bare)
    return {name: j for name, j in tensor_layouts.items() if all(weights.parse(s.path).task_head for s in j.slots)}


def export(found: Artifact, folder: Path) -> float:
    """Write an artifact's trained prompt and its task head in PEFT's format, and read them back.

    Returns:
        The largest difference between outputs of the artifact and of the base with the written prompt.

    Raises:
        RequestError: If the artifact also has low-rank adapters, or if PEFT has no prompt tuning for the task.
    """
    cfg, base = found.model, without_prompt(found)
    if weights.adapted(found.params):
        raise RequestError(f"{found.path}: has a trained prompt and other adapters; PEFT's files hold one of the two")
    task_type = registry.of(found.manifest).peft_task_type(cfg)
    classifies = task_type == "SEQ_CLS" and cfg.architecture == "encoder"
    if task_type not in ("CAUSAL_LM", "SEQ_2_SEQ_LM") and not classifies:
        raise RequestError(
            f"{found.path}: PEFT's prompt tuning is for language models and for encoders that classify texts; use it "
            "with llmctl, or finetune its parent with method = 'lora'"
        )
    head = name_map.write(found.params, _head(base.model), np.dtype(np.float32))
    prompt_PD = np.asarray(found.params["embed"]["prompt"], np.float32)
    config = {
        "peft_type": TYPE,
        "task_type": task_type,
        "num_virtual_tokens": cfg.prompt_tokens,
        "token_dim": cfg.d_model,
        "num_transformer_submodules": 1,
        "num_attention_heads": cfg.heads,
        "num_layers": cfg.layers,
        "prompt_tuning_init": "RANDOM",
        "modules_to_save": sorted({name.rpartition(".")[0] for name in head}) or None,
        "base_model_name_or_path": "",
        "inference_mode": True,
    }
    (folder / peft.CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    out = {VECTORS: of_array(prompt_PD), **{PREFIX + name: t for name, t in head.items()}}
    safetensors.write_file(folder / peft.WEIGHTS, out)
    model, back = load(base, folder)
    batch = parity.prompted(cfg, parity.probe(cfg))
    return parity.prove(str(found.path), parity.answers(model, back, batch), parity.answers(cfg, found.params, batch))


def load(base: Artifact, folder: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """Load a trained prompt, and a task head if there is one.

    Returns:
        The config and the parameters of the base with the prompt.

    Raises:
        RequestError: If the prompt does not fit the base, or if a tensor has an unknown name.
    """
    config, file = folders.read_json(folder / peft.CONFIG), folder / peft.WEIGHTS
    if base.model.prompt_tokens:
        raise RequestError(f"{base.path}: has a trained prompt already; name an artifact without one")
    if not (base.tokenizer_dir / "llmctl_tokenizer.json").is_file():
        raise RequestError(f"{base.path}: has no tokenizer, which would begin texts with the prompt")
    stored = safetensors.read_file(file)
    count, cfg = vector_count(config, folder, base), base.model
    if VECTORS not in stored:
        raise RequestError(f"{file}: lacks {VECTORS}")
    prompt_PD = np.asarray(stored[VECTORS].read(), np.float32)
    # With two submodules the second half belongs to the decoder, and PEFT does not read it.
    if prompt_PD.shape not in ((count, cfg.d_model), (2 * count, cfg.d_model)):
        raise RequestError(
            f"{file}: {VECTORS} is {list(prompt_PD.shape)}, which does not fit {count} vectors of width {cfg.d_model:,}"
        )
    head = {PREFIX + name: name for name in _head(cfg)}
    if odd := sorted(stored.keys() - head.keys() - {VECTORS}):
        raise RequestError(f"{file}: tensors that are not understood: {listed(odd)}")
    flat = weights.flatten(base.params)
    tensors: dict[str, Tensor] = {peft.PREFIX + head[name]: t for name, t in stored.items() if name in head}
    peft.copy_full(cfg, tensors, flat, {name.removeprefix(peft.PREFIX) for name in tensors})
    flat[TABLE] = jnp.asarray(prompt_PD[:count])
    return cfg.model_copy(update={"prompt_tokens": count}), weights.unflatten(dict(sorted(flat.items())))


def vector_count(config: dict[str, Any], folder: Path, base: Artifact) -> int:
    """Return the number of trained vectors that an adapter's config declares.

    Raises:
        RequestError: If the number is missing, or if it leaves no positions for a text in the base's longest sequence.
    """
    count, longest = config.get("num_virtual_tokens"), base.model.max_seq_len
    if isinstance(count, bool) or not isinstance(count, int) or not 0 < count < longest:
        raise RequestError(
            f"{folder / peft.CONFIG}: num_virtual_tokens = {str(count)[:40]} is no number between 1 and the longest "
            f"sequence of {base.path} ({longest:,})"
        )
    return count
