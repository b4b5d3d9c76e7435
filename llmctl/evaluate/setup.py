"""Prepare a measurement of an artifact: held-out examples, settings, and a loop over all rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from llmctl.artifacts.manifest import Manifest
from llmctl.config.errors import RequestError
from llmctl.data import device_batches
from llmctl.data.class_names import numbers_hint
from llmctl.data.config import Truncate
from llmctl.data.corpus import Corpus, cached
from llmctl.data.device_batches import DeviceBatches, Rows
from llmctl.data.label_values import one_spelling
from llmctl.data.splits import Examples
from llmctl.data.tokenizers.base import Tokenizer
from llmctl.distributed import host_arrays
from llmctl.evaluate import progress
from llmctl.evaluate.tasks.settings import GenerationConfig
from llmctl.model import functional

Batch = dict[str, Any]

KEPT = {"tail": "first", "head_tail": "first and last halves of"}
"""Map from truncation mode to the name of the kept part of a long text, for descriptions of a measurement."""


class Held:
    """Tokenize held-out examples once per tokenizer, and cache the tokens in a folder."""

    def __init__(self, examples: Examples, split: str, folder: Path, training: Examples | None = None) -> None:
        self.examples, self.split, self.folder = examples, split, folder
        self.training = training
        """Train split of the same data, for probes that read it."""
        self._corpora: dict[str, Corpus] = {}

    def sample(self, count: int) -> Held:
        """Return at most `count` of the examples, sampled by their hash (see `Examples.sample`)."""
        return Held(self.examples.sample(count), self.split, self.folder / f"sample{count}", self.training)

    def corpus(self, tokenizer: Tokenizer) -> Corpus:
        """Return the token ids of all texts, in the order of the examples."""
        if tokenizer.digest not in self._corpora:
            folder = self.folder / tokenizer.digest[:16]
            self._corpora[tokenizer.digest] = cached(folder, self.examples.texts(), self.examples.digest, tokenizer)
        return self._corpora[tokenizer.digest]

    def pairs(self, tokenizer: Tokenizer) -> tuple[list[list[int]], list[int]]:
        """Return the token ids of each prompt followed by its completion, and the number of tokens of each prompt.

        Prompts and completions are tokenized separately, as in training.
        """
        prompts = tokenizer.encode_batch(list(self.examples.texts("prompt")))
        completions = tokenizer.encode_batch(list(self.examples.texts("completion")))
        return [p + c for p, c in zip(prompts, completions, strict=True)], [len(p) for p in prompts]


@dataclass(frozen=True)
class Setup:
    """Store the settings for the measurement of one artifact."""

    mesh: Mesh
    seq_len: int
    stride: int
    batch_size: int
    truncate: Truncate
    dtype: str
    generation: GenerationConfig = field(default_factory=GenerationConfig)

    def batches(self) -> DeviceBatches:
        """Return a loader that shards batches over the mesh.

        Tokens stay in text order, even with context parallelism.
        """
        return DeviceBatches(self.mesh, self.batch_size, reading_order=True)

    def sized(self, batch_size: int) -> Setup:
        """Return the settings with another number of rows per batch."""
        return replace(self, batch_size=batch_size)


@dataclass(frozen=True)
class Measured:
    """Store the metrics of one artifact on one task, and functions whose speed can be measured."""

    task: str
    protocol: str
    metrics: dict[str, Any]
    single: Callable[[], object] | None = field(default=None, repr=False)
    """Function that runs the model on one example and blocks until the outputs are ready; None is not timed."""
    batched: Callable[[], object] | None = field(default=None, repr=False)
    """Function that runs the model on one batch and blocks until the outputs are ready; None is not timed."""
    units: dict[str, int] = field(default_factory=dict)
    """Number of examples or tokens per batch, by the name of the throughput metric: {"examples_per_second": 32}."""
    answers: tuple[Any, Any] | None = field(default=None, repr=False)
    """Pair (true labels, predictions) of all examples for `Metric.compute`, as class names or numbers. None if the task
    returns no predictions."""
    written: list[dict[str, Any]] | None = field(default=None, repr=False)
    """One record per example for predictions.jsonl; None if the task writes no records."""
    values: dict[str, np.ndarray] = field(default_factory=dict, repr=False)
    """Values per example, for intervals and comparisons (see `llmctl.evaluate.metrics.resampling.Values`)."""


def label_map(classes: tuple[str, ...], names: list[str], where: str) -> np.ndarray:
    """Return the artifact's class index for each class of the data; classes are matched by name.

    Args:
        classes: Class names of the data.
        names: Class names of the artifact.
        where: Beginning of an error message.

    Returns:
        An integer array [len(classes)].

    Raises:
        RequestError: If the data has no labels, or if the artifact lacks a class of the data.
    """
    if not classes:
        raise RequestError(f"{where}: is a classifier, and the data has no labels; map one in data.columns")
    known = one_spelling(classes, names)
    unknown = [c for c in classes if known[c] not in names]
    if unknown:
        raise RequestError(
            f"{where}: the data has a label {unknown[0]!r} that it does not know ({', '.join(names)})"
            f"{numbers_hint(classes, names)}"
        )
    return np.array([names.index(known[c]) for c in classes])


ROW = 16
"""Bytes of host memory per token of a batch: ids, segments and positions, and their copy during the transfer."""


def prediction_length(manifest: Manifest, seq_len: int, path: Path) -> int:
    """Return the maximum number of tokens per row in predictions of new rows.

    Args:
        manifest: Manifest of the artifact.
        seq_len: Number that the user set; 0 uses the value of training. If the value of training is unknown, as for
            imports, 0 uses 512, but at most the model's maximum.
        path: Folder of the artifact, for error messages.

    Raises:
        RequestError: If `seq_len` exceeds the model's maximum sequence length.
    """
    longest = manifest.model.max_seq_len
    if seq_len > longest:
        raise RequestError(f"{path}: --seq-len {seq_len} is longer than its longest sequence ({longest})")
    return seq_len or manifest.seq_len or min(512, longest)


READ = ("tokens", "segments", "positions", "types")
"""Names of the batch arrays that a model with a task head reads."""


def answers(
    step: Callable[[functional.Params, Batch], Any],
    params: functional.Params,
    rows: Rows,
    setup: Setup,
    reads: tuple[str, ...] = READ,
    what: str = "",
) -> Iterator[tuple[Batch, Any]]:
    """Run the compiled function `step` on all rows, and yield its outputs batch by batch.

    If `what` is not empty, a terminal shows a progress bar with this name.

    Each process builds only the rows of its own devices. Every process receives the outputs of all rows.

    Yields:
        (batch, outputs of `step`), both on the host. Each row occurs exactly once; padding rows are removed.
    """
    batches = setup.batches()

    def read(name: str) -> bool:
        return not reads or name in reads

    def place(batch: Batch) -> tuple[Batch, Batch]:
        return batch, batches.place({k: a for k, a in batch.items() if read(k) or batches.spans is not None})

    with batches.once(rows, place=place) as steps, progress.bar(what, -(-len(rows) // setup.batch_size)) as advance:
        for _, (batch, placed) in steps:
            found = step(params, {k: a for k, a in placed.items() if read(k) and k != "row_weight"})
            batch = batches.gather(batch, placed)
            real = batch["row_weight"] > 0
            yield {k: a[real] for k, a in batch.items()}, jax.tree.map(lambda a, r=real: host_arrays.read(a)[r], found)
            advance()


def first(rows: Rows, setup: Setup, reads: tuple[str, ...] = READ) -> Batch:
    """Return a batch for timing: the first `setup.batch_size` rows, or all rows if there are fewer.

    All rows are cut to one length: that of the longest row, rounded up to a power of two (see `trimmed`).
    """
    batch = rows.batch(np.arange(min(setup.batch_size, len(rows))))
    return trimmed({k: a for k, a in batch.items() if not reads or k in reads})


def trimmed(batch: Batch) -> Batch:
    """Cut the padding at the end of all arrays [B, T] of a batch.

    The new length is that of the longest row, rounded up to a power of two. T is the width of the array "segments".
    Arrays whose names contain "encoder_" are cut to a length of their own.
    """
    out = dict(batch)
    for encoder in (False, True):
        names = [name for name in batch if ("encoder_" in name) == encoder]
        segments = [batch[name] for name in names if name.endswith("segments")]
        if not segments:
            continue
        width = segments[0].shape[1]
        longest = max(int((a > 0).sum(-1).max()) for a in segments)
        short = min(1 << max(longest - 1, 15).bit_length(), width)
        out |= {name: batch[name][:, :short] for name in names if batch[name].shape[1:2] == (width,)}
    return out


def programs(
    step: Callable[..., Any], params: functional.Params, inputs: Batch, mesh: Mesh
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return two functions for timing: the first runs `step` on one row, the second on the full batch.

    Both functions block until the result is ready. The inputs are copied to the devices beforehand, so that the copy is
    not timed.
    """
    one, many = (
        device_batches.place({k: v[:n] for k, v in inputs.items()}, mesh, reading_order=True) for n in (1, None)
    )
    return lambda: jax.block_until_ready(step(params, one)), lambda: jax.block_until_ready(step(params, many))
