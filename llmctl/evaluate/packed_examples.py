"""Run a model with one output per text on packed rows: several examples per row, each in a segment of its own.

All rows have one length, so one program is compiled, and few positions are padding. If a folder is
given, outputs are saved regularly, and an interrupted measurement continues with the remaining rows.

Shapes: B rows per batch, T tokens per row, E examples per row, N examples.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llmctl.artifacts.artifact import Artifact
from llmctl.data.device_batches import Rows
from llmctl.distributed import mesh as meshes
from llmctl.distributed import processes
from llmctl.evaluate import nonfinite
from llmctl.evaluate.batch_sizes import balanced
from llmctl.evaluate.setup import READ, Batch, Setup, answers
from llmctl.evaluate.sliding_window import pack
from llmctl.model import functional
from llmctl.model.config import ModelConfig

CHUNK = 1024
"""Number of examples whose rows are built together."""
SAVE_SECONDS = 20.0
"""Minimum time between two saves of the outputs, in seconds."""


def supports(model: ModelConfig) -> bool:
    """Return whether several texts can be packed into one row.

    A model with trained keys (prefix tuning) is not supported if its positions are relative or absent. The distance
    between a token and these keys would be counted from the start of the row. It must be counted from the start of the
    text.
    """
    return not model.encoder_layers and not (model.prefix_tokens and model.positions in ("relative", "none"))


def step(model: ModelConfig, dtype: str) -> Any:
    """Return a compiled function that computes the outputs of the task head, [B, E, ...].

    Its arguments are the parameters and a batch of `PackedExamples`.
    """

    @jax.jit
    def run(params: functional.Params, batch: Batch) -> jax.Array:
        inputs = {name: batch[name] for name in READ if name in batch}
        x_BTD = functional.hidden(model, params, inputs, dtype=dtype)
        return functional.segment_outputs(model, params, x_BTD, batch["segments"], batch["example"].shape[1], dtype)

    return run


class PackedExamples:
    """Build rows of several examples each.

    A batch has the arrays `tokens`, `segments`, `positions` and, for some models, `types`, all [B, T]. The array
    `example` [B, E] has the index of each example, and -1 at entries that only fill a row.
    """

    reads = (*READ, "example")

    def __init__(self, rows: Any, model: ModelConfig) -> None:
        """Pack the examples, and choose the row length with the least estimated cost.

        Args:
            rows: Rows of one example each, with the methods `batch` and `__len__`.
            model: Config of the model. The model width determines the relative cost of attention.
        """
        self._rows = rows
        lengths = np.concatenate([(b["segments"] > 0).sum(-1) for _, b in chunks(rows)])
        unit = 128 if meshes.device().platform == "tpu" else 16  # the fused kernel of TPUs needs multiples of 128
        longest = -(-max(int(lengths.max()), unit) // unit) * unit
        fitting = [longest, *(n for n in (2 * longest, 256, 512) if n > longest and n <= 512)]
        packings = {T: pack(lengths.tolist(), T) for T in fitting}

        def cost(T: int) -> float:
            """Return the cost of all rows, in units of the cost of one token without attention."""
            return len(packings[T]) * T * (1 + T / (6 * model.d_model))

        self.length = min(fitting, key=cost)
        self.bins = packings[self.length]
        most = max(map(len, self.bins))
        self._count = 1 << (most - 1).bit_length()  # a power of two: similar data then share the program
        self.tokens = int(lengths.sum())

    def __len__(self) -> int:
        return len(self.bins)

    @property
    def digest(self) -> str:
        """Return a digest of the packing."""
        return hashlib.sha256(repr((self.length, self.bins)).encode()).hexdigest()

    def batch(self, rows_B: np.ndarray) -> dict[str, np.ndarray]:
        """Return the rows with the indices `rows_B` as int32 arrays."""
        members = [self.bins[i] for i in rows_B]
        alone = self._rows.batch(np.concatenate(members))
        names = [name for name in READ if name in alone]
        out = {name: np.zeros((len(rows_B), self.length), np.int32) for name in names}
        out["example"] = np.full((len(rows_B), self._count), -1, np.int32)
        source = 0
        for row, examples in enumerate(members):
            out["example"][row, : len(examples)] = examples
            first = 0
            for segment in range(1, len(examples) + 1):
                n = int((alone["segments"][source] > 0).sum())
                for name in names:
                    out[name][row, first : first + n] = alone[name][source, :n]
                out["segments"][row, first : first + n] = segment
                first, source = first + n, source + 1
        return out


class _Part:
    """Build the rows of a packing from the row `first` on."""

    def __init__(self, rows: PackedExamples, first: int) -> None:
        self._rows, self._first = rows, first

    def __len__(self) -> int:
        return len(self._rows) - self._first

    def batch(self, rows_B: np.ndarray) -> dict[str, np.ndarray]:
        return self._rows.batch(rows_B + self._first)


def chunks(rows: Rows) -> Iterator[tuple[np.ndarray, Batch]]:
    """Yield the indices of successive examples, and the batch of their rows."""
    for first in range(0, len(rows), CHUNK):
        index = np.arange(first, min(first + CHUNK, len(rows)))
        yield index, rows.batch(index)


def outputs(
    run: Any, artifact: Artifact, rows: Rows, setup: Setup, folder: Path | None = None
) -> Iterator[tuple[Batch, Any]]:
    """Yield (host batch of rows, outputs of the task head) in the order of the examples.

    Args:
        run: Result of `step`.
        artifact: Artifact whose parameters are used.
        rows: Rows of one example each.
        setup: Settings of the measurement. A batch has at most `setup.batch_size` * `setup.seq_len` tokens.
        folder: Folder for outputs from which an interrupted measurement continues; None saves none.

    Raises:
        WorkError: If an output is not a finite number.
    """
    packed = PackedExamples(rows, artifact.model)
    size = balanced(setup.mesh, max(setup.batch_size * setup.seq_len // packed.length, 1), len(packed))
    saved = _Saved(folder, artifact, setup, packed) if folder and processes.count() == 1 else None
    y_N, done = saved.read() if saved else (None, 0)
    part = _Part(packed, done)
    sized = setup.sized(size)
    found = answers(run, artifact.params, part, sized, packed.reads, what=artifact.path.name) if len(part) else ()
    for batch, y_BE in found:
        nonfinite.check(artifact.model, artifact.params, batch, y_BE, batch["example"] >= 0, setup.mesh, setup.dtype)
        y_N = np.zeros((len(rows), *y_BE.shape[2:]), y_BE.dtype) if y_N is None else y_N
        real_BE = batch["example"] >= 0
        y_N[batch["example"][real_BE]] = y_BE[real_BE]
        done += len(y_BE)
        if saved:
            saved.write(y_N, done)
    assert y_N is not None
    for index, batch in chunks(rows):
        yield batch, y_N[index]
    if saved:
        saved.file.unlink(missing_ok=True)


class _Saved:
    """Save the outputs of the rows that are done, at most once per `SAVE_SECONDS`."""

    def __init__(self, folder: Path, artifact: Artifact, setup: Setup, packed: PackedExamples) -> None:
        about: Sequence[Any] = (artifact.manifest.content or artifact.manifest.digest, setup.dtype, packed.digest)
        self.file = folder / f"outputs-{hashlib.sha256(repr(about).encode()).hexdigest()[:16]}.npz"
        self._last = time.monotonic()

    def read(self) -> tuple[np.ndarray | None, int]:
        """Return (outputs of all examples, number of rows that are done). If nothing was saved, return (None, 0)."""
        try:
            with np.load(self.file, allow_pickle=False) as found:
                return found["outputs"], int(found["done"])
        except (OSError, ValueError, KeyError):
            return None, 0

    def write(self, y_N: np.ndarray, done: int) -> None:
        """Save the outputs, unless the last save was a short time ago."""
        if time.monotonic() - self._last < SAVE_SECONDS:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        draft = self.file.with_suffix(".draft.npz")
        np.savez(draft, outputs=y_N, done=done)
        draft.replace(self.file)
        self._last = time.monotonic()
