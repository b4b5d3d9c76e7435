"""Load calibration examples as batches of device arrays, in the same format as training batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh

from llmctl.artifacts.artifact import Artifact
from llmctl.compress.calibration.settings import CalibrationConfig
from llmctl.config.errors import RequestError
from llmctl.data import columns as mapping
from llmctl.data import splits
from llmctl.data.device_batches import DeviceBatches
from llmctl.data.examples import synthetic
from llmctl.data.splits import Examples
from llmctl.data.tokenizers import loading as tokenizers
from llmctl.data.tokenizers.loading import Tokenizer
from llmctl.evaluate.tasks.registry import of
from llmctl.evaluate.tasks.rows import RowSettings
from llmctl.model.config import ModelConfig

READ = ("tokens", "segments", "positions", "types", "encoder_tokens", "encoder_segments", "encoder_positions")
"""Names of the arrays of a batch that the model reads. Batches for gradients also have labels or targets."""


def load(config: CalibrationConfig, base: Artifact, mesh: Mesh, *, labels: bool = False) -> list[dict[str, Any]]:
    """Return batches of calibration examples for an artifact, as device arrays [B, seq_len] of one shape.

    Args:
      config: settings that select the examples and their length.
      base: artifact that is compressed. Its training length and truncation are the defaults.
      mesh: the devices.
      labels: whether batches contain labels or targets, as in training. Otherwise, batches contain only the model's
        inputs.

    Raises:
      RequestError: If the sequence length is unknown or too long. If the split has too few texts. If `labels` is true
        and the data has no labels.
    """
    talks = of(base.manifest).reads_conversations and (labels or mapping.holds_conversations(config.data))
    chosen = splits.examples(config.data, config.split, labels, talks).sample(config.examples)
    if "examples" in config.model_fields_set and len(chosen) < config.examples:  # the default is a maximum
        raise RequestError(
            f"examples: {config.examples:,} calibration examples are more than the {len(chosen):,} of split "
            f"{config.split!r}; set at most that many, or leave examples out to use up to "
            f"{type(config).model_fields['examples'].default}"
        )
    if labels and base.manifest.labels and list(chosen.classes) != base.manifest.labels:
        raise RequestError(f"data: classes {list(chosen.classes)} are not those of {base.path}, {base.manifest.labels}")
    rows = _rows(config, base, chosen, tokenizers.load(base.tokenizer_dir), labels)
    batches = DeviceBatches.for_one_pass(mesh, config.batch_size, len(rows))

    def place(batch: dict[str, np.ndarray]) -> dict[str, Any]:
        filler = batch["row_weight"][:, None] == 0  # rows that only fill the last batch
        read = _read(base.model, batch, labels)
        return batches.place(read | {k: np.where(filler, 0, v) for k, v in read.items() if k.endswith("segments")})

    with batches.once(rows, place=place) as steps:
        return [batch for _, batch in steps]


def abstract(
    config: CalibrationConfig, base: Artifact, mesh: Mesh, *, labels: bool = False
) -> tuple[dict[str, Any], int]:
    """Return (one calibration batch as abstract arrays, number of batches), without reading the data.

    Each example is assumed to give one sequence. `load` describes the arguments and the errors.
    """
    task, seq_len = of(base.manifest), sequence_length(config, base)
    batches = DeviceBatches.for_one_pass(mesh, config.batch_size, config.examples)
    columns = task.columns if labels else task.columns_read
    examples = synthetic.examples(config.data, columns, seq_len, base.manifest.labels)
    row = _rows(config, base, examples, synthetic.TOKENIZER, labels)[0]
    return batches.abstract(_read(base.model, row, labels)), -(-config.examples // batches.size)


def sequence_length(config: CalibrationConfig, base: Artifact) -> int:
    """Return the number of tokens per sequence: the configured number, or the training length.

    Raises:
      RequestError: If the sequence length is unknown or too long.
    """
    seq_len = config.seq_len or base.manifest.seq_len
    if not seq_len:
        raise RequestError(f"{base.path}: does not say how long its training texts were; say it with seq_len")
    if seq_len > base.model.max_seq_len:
        raise RequestError(
            f"{base.path}: seq_len {seq_len} is longer than its longest sequence ({base.model.max_seq_len})"
        )
    return seq_len


def _read(cfg: ModelConfig, batch: Mapping[str, Any], labels: bool) -> dict[str, Any]:
    """Return the arrays of a batch that the model reads. If `labels` is true, add the arrays that the loss reads."""
    read = dict(batch) if labels else {k: batch[k] for k in READ if k in batch}
    if cfg.encoder_layers and "encoder_tokens" not in read:
        read |= {f"encoder_{k}": v for k, v in read.items() if k in READ}
    return read


def _rows(config: CalibrationConfig, base: Artifact, chosen: Examples, tokenizer: Tokenizer, labels: bool) -> Any:
    """Tokenize the chosen examples, and return one row of token ids per sequence.

    The rows contain labels or targets, as in training, only if `labels` is true.
    """
    task, seq_len = of(base.manifest), sequence_length(config, base)
    settings = RowSettings(seq_len, truncate=config.truncate or base.manifest.truncate or "tail")
    if labels:
        task.check_label_type(config.data)
        return task.rows(base.model, chosen, tokenizer, settings)
    return task.reading_rows(base.model, chosen, tokenizer, settings)
