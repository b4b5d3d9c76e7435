"""Write a model as a Hugging Face folder: config.json and safetensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llmctl.convert import architectures, name_map, safetensors
from llmctl.convert.hf_folder import CONFIG
from llmctl.convert.lazy_tensors import Tensor, Tensors
from llmctl.evaluate.tasks.base import Task
from llmctl.model.config import ModelConfig
from llmctl.model.hf_config import Fields

SHARD_BYTES = 5_000_000_000
"""Maximum size of a safetensors file in bytes, by default."""


def config_of(
    model: ModelConfig,
    task: Task,
    labels: list[str],
    tokens: Fields,
    dtype: str,
    fitted: Mapping[str, Any] | None = None,
) -> Fields:
    """Return the content of a model's config.json.

    Args:
        model: Config of the model.
        task: Task that defines the meaning of the outputs.
        labels: Class names.
        tokens: Ids of special tokens ("bos_token_id", …).
        dtype: Name of the dtype of the weights.
        fitted: Values that were fitted on validation data after training, such as the decision threshold of each class.

    Raises:
        RequestError: If the family's format cannot express this config.

    Example:
        >>> from llmctl.evaluate.tasks import registry
        >>> model = ModelConfig(preset="llama-tiny")
        >>> config = config_of(model, registry.default(model), [], {"eos_token_id": 2}, "bfloat16")
        >>> config["architectures"], config["hidden_size"], config["eos_token_id"]
        (['LlamaForCausalLM'], 128, 2)
    """
    bridge, head = architectures.check(model)
    fields = {"architectures": [head.architecture], "model_type": bridge.model_type, **tokens, "dtype": dtype}
    return fields | {"torch_dtype": dtype, **bridge.to_config(model), **task.hf_fields(model, labels, fitted or {})}


def tensors_of(model: ModelConfig, params: dict[str, Any], dtype: np.dtype | None = None) -> dict[str, Tensor]:
    """Return the tensors of a model by their Hugging Face names. A tensor is copied to the host when it is read."""
    bridge, head = architectures.of(model)
    return name_map.write(params, name_map.tensor_layouts(model, bridge, head, bare=model.head_kind.bare), dtype)


def save(
    folder: Path,
    config: Fields,
    tensors: Tensors,
    shard_bytes: int = SHARD_BYTES,
    wrote: Callable[[int], None] = lambda _: None,
) -> None:
    """Write config.json and the tensors. One tensor at a time is in host memory."""
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.write_folder(folder, dict(sorted(tensors.items())), shard_bytes, wrote)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
