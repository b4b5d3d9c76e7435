"""Calibration data: a few texts, as the model was trained to read them, on the devices."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from jax.sharding import Mesh

from llmctl.data import prefetch, splits
from llmctl.data.config import DataConfig, Split, Truncate
from llmctl.data.device_batches import Feed
from llmctl.data.examples.task_rows import task_rows
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
    chosen = splits.examples(data, split).sample(examples)
    reads = cfg if cfg.head in ("lm", "span") else cfg.model_copy(update={"head": "classify"})
    if reads.head == "classify" and chosen.labels is None:
        chosen = replace(chosen, labels=np.zeros(len(chosen), np.int32))
    if cfg.head == "embed":  # reads the texts of a pair apart
        chosen = replace(chosen, columns=tuple(c for c in chosen.columns if c != "pair"))
    rows = task_rows(reads, chosen, tokenizer, seq_len, shuffle=False, truncate=truncate)
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    size = -(-min(batch_size, len(rows)) // ways) * ways
    feed = Feed(mesh, size)

    def place(batch: dict[str, np.ndarray]) -> dict[str, Any]:
        read = {k: batch[k] for k in READ if k in batch}
        filler = batch["row_weight"][:, None] == 0  # rows that only fill the last batch
        read |= {k: np.where(filler, 0, v) for k, v in read.items() if k.endswith("segments")}
        if cfg.encoder_layers and "encoder_tokens" not in read:
            read |= {f"encoder_{k}": v for k, v in read.items()}
        return feed.place(read)

    with prefetch.eval_batches(rows, size, place=place, spans=feed.spans) as batches:
        return [batch for _, batch in batches]
