"""Calibration data: a few texts, as the model was trained to read them, on the devices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from jax.sharding import Mesh

from llmctl.data import prefetch, splits
from llmctl.data.config import DataConfig, Split, Truncate
from llmctl.data.device_batches import Feed
from llmctl.data.examples import made_up
from llmctl.data.examples.task_rows import COLUMNS, task_rows
from llmctl.data.splits import Examples
from llmctl.data.tokenizers.loading import Tokenizer
from llmctl.model.config import ModelConfig

READ = ("tokens", "segments", "positions", "types", "encoder_tokens", "encoder_segments", "encoder_positions")


def calibration_batches(
    cfg: ModelConfig,
    data: DataConfig,
    tokenizer: Tokenizer,
    mesh: Mesh,
    *,
    split: Split,
    examples: int,
    seq_len: int,
    batch_size: int,
    truncate: Truncate,
) -> list[dict[str, Any]]:
    """Batches of `examples` texts (those first by hash) as device arrays [B, seq_len], all of one shape.

    A language model reads them as it does in training (an encoder with masks, an encoder-decoder with spans missing),
    a model that answers questions a question and its context, any other head one a row; labels are not needed.

    Raises RequestError where the data has no texts in the split.
    """
    rows = _rows(cfg, splits.examples(data, split).sample(examples), tokenizer, seq_len, truncate)
    feed = Feed(mesh, _size(mesh, min(batch_size, len(rows))))

    def place(batch: dict[str, np.ndarray]) -> dict[str, Any]:
        filler = batch["row_weight"][:, None] == 0  # rows that only fill the last batch
        read = _read(cfg, batch)
        return feed.place(read | {k: np.where(filler, 0, v) for k, v in read.items() if k.endswith("segments")})

    with prefetch.eval_batches(rows, feed.size, place=place, spans=feed.spans) as batches:
        return [batch for _, batch in batches]


def abstract(
    cfg: ModelConfig,
    data: DataConfig,
    mesh: Mesh,
    *,
    examples: int,
    seq_len: int,
    batch_size: int,
) -> tuple[dict[str, Any], int]:
    """Return one batch as abstract arrays, and the number of batches, if every example gives one row.

    Args:
        cfg: the model.
        data: the texts, of which nothing is read.
        mesh: the devices.
        examples: texts to calibrate on.
        seq_len: tokens per row.
        batch_size: rows per batch at most.
    """
    feed = Feed(mesh, _size(mesh, min(batch_size, examples)))
    columns = COLUMNS[cfg.head] if cfg.head in ("lm", "span") else ()
    row = _rows(cfg, made_up.examples(data, columns, seq_len), made_up.TOKENIZER, seq_len, "tail")[0]
    return feed.abstract(_read(cfg, row)), -(-examples // feed.size)


def _size(mesh: Mesh, rows: int) -> int:
    """Return the rows of a batch, rounded up to what the mesh splits."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    return -(-rows // ways) * ways


def _read(cfg: ModelConfig, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arrays of a batch that the walk reads."""
    read = {k: batch[k] for k in READ if k in batch}
    if cfg.encoder_layers and "encoder_tokens" not in read:
        read |= {f"encoder_{k}": v for k, v in read.items()}
    return read


def _rows(cfg: ModelConfig, chosen: Examples, tokenizer: Tokenizer, seq_len: int, truncate: Truncate) -> Any:
    """Return the rows of the chosen examples."""
    reads = cfg if cfg.head in ("lm", "span") else cfg.model_copy(update={"head": "classify"})
    if reads.head == "classify" and chosen.labels is None:
        chosen = replace(chosen, labels=np.zeros(len(chosen), np.int32))
    if cfg.head == "embed":  # reads the texts of a pair apart
        chosen = replace(chosen, columns=tuple(c for c in chosen.columns if c != "pair"))
    return task_rows(reads, chosen, tokenizer, seq_len, shuffle=False, truncate=truncate)
