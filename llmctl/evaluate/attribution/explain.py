"""Explain the outputs of an artifact by attributions to the tokens of its input.

If the artifact quantizes activations, the explained model has the same weights, and activations in full precision.

Example:
    explainer = Explainer(artifact.load(Path("runs/demo/finetune")))
    found = explainer([{"text": "A fine film."}])
    found[0].target, found[0].difference, found[0].values_T
    ('pos', 3.1, array([0.2, 2.4, 0.5]))

Shapes: N inputs, R rows per call, T tokens per row, P scored positions per row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import numpy as np

from llmctl.artifacts.artifact import Artifact
from llmctl.config.base import hint
from llmctl.config.errors import RequestError
from llmctl.config.limits import check_memory
from llmctl.config.settings import MeshConfig
from llmctl.data import device_batches
from llmctl.data.source import Row
from llmctl.data.tokenizers import loading as tokenizers
from llmctl.distributed import host_arrays
from llmctl.distributed import mesh as meshes
from llmctl.evaluate.attribution import gradients, inputs, outputs, rollout
from llmctl.evaluate.attribution.gradients import Attribution
from llmctl.evaluate.attribution.inputs import TEXT, Input, Piece
from llmctl.evaluate.attribution.settings import ROLLOUT, AttributionConfig
from llmctl.evaluate.predict import check_columns, padded_length
from llmctl.evaluate.setup import ROW, prediction_length
from llmctl.evaluate.tasks.registry import of
from llmctl.model import functional, weights


class Unit(NamedTuple):
    """Store one token, or several tokens that share a character, with the sum of their attributions."""

    piece: Piece
    value: float


@dataclass(frozen=True)
class Explanation:
    """Store the attributions of one text."""

    pieces: list[Piece]
    texts: list[str]
    values_T: np.ndarray
    """Attribution of each token of `pieces`. It is 0 for special tokens, except in attention rollout."""
    target: str
    """Name of what is explained: a class, a predicted number, a choice or a continuation."""
    output: float
    """Output of the model for the text, in the unit of `outputs.unit`."""
    baseline: float | None = None
    """Output of the model if the embeddings are replaced by the baseline; None for attention rollout."""
    error: float | None = None
    """|sum of attributions - difference| / |difference| of integrated gradients; None for other methods."""
    steps: int = 0
    """Number of gradients that were computed."""

    @property
    def difference(self) -> float | None:
        """Return the output for the text minus the output at the baseline; None for attention rollout."""
        return None if self.baseline is None else self.output - self.baseline

    @property
    def units(self) -> list[Unit]:
        """Return the tokens with their attributions. Tokens that share characters are merged into one."""
        found: list[Unit] = []
        for piece, value in zip(self.pieces, map(float, self.values_T), strict=True):
            last = found[-1].piece if found else None
            if last and piece.kind == last.kind == TEXT and piece.part == last.part and piece.first < last.last:
                joined = self.texts[piece.part][last.first : max(last.last, piece.last)]
                merged = Piece(joined, TEXT, last.part, last.first, max(last.last, piece.last))
                found[-1] = Unit(merged, found[-1].value + value)
            else:
                found.append(Unit(piece, value))
        return found


class Explainer:
    """Explain rows with one artifact. One program is compiled per padded length."""

    def __init__(self, found: Artifact, config: AttributionConfig | None = None) -> None:
        """Check the artifact, and prepare its programs.

        Args:
            found: Artifact on all devices.
            config: Settings; None uses the defaults.

        Raises:
            RequestError: If the method does not suit the artifact, or if a batch does not fit into memory.
        """
        config = config or AttributionConfig()
        chosen = config.baseline or ("pad" if found.model.norm == "rms" else "zero")
        self.config = config.model_copy(update={"baseline": chosen})
        outputs.check(found)
        if self.config.method == ROLLOUT:
            rollout.check(found)
        params = jax.tree.map(  # rounded activations have no useful gradient
            lambda w: weights.as_node(w).without_activations(), found.params, is_leaf=weights.is_weight
        )
        self.found, self.task, self.model = replace(found, params=params), of(found.manifest), found.model
        self.unit = "share of the attention" if self.config.method == ROLLOUT else outputs.unit(found)
        self._tokenizer = tokenizers.load(found.tokenizer_dir)
        self._seq_len = prediction_length(found.manifest, self.config.seq_len, found.path)
        self._mesh = meshes.make(MeshConfig())
        self._size = -(-self.config.batch_size // self._mesh.size) * self._mesh.size
        check_memory(self._size * self._seq_len * ROW, f"--batch-size {config.batch_size}: its rows", "take fewer")
        pad = self._tokenizer.pad_id if self.config.baseline == "pad" else None
        self._step = gradients.program(found, pad, self.config.dtype)
        self._rollout = rollout.program(found, self.config.dtype)
        self._predict = _predictions(found, self.config.dtype)

    @property
    def _generates(self) -> bool:
        return self.model.head_kind.vocabulary and self.task.name != "choice"

    def check(self, row: Row, where: str) -> None:
        """Check that a row has the columns that the explainer reads. `where` is the location of the row.

        Raises:
            RequestError: If a column is missing, or has only white space.
        """
        if not self._generates:
            check_columns(self.task, row, where)
        elif not (row.get("prompt") or row.get("text", "")).strip():
            raise RequestError(f"{where}: no prompt or text; --column text=NAME names the column")

    def __call__(self, rows: Sequence[Row], target: str = "") -> list[Explanation]:
        """Explain the output for each row.

        Args:
            rows: Rows with the columns that the task reads. A language model reads the columns prompt or text, and
                scores the column completion, if the row has one.
            target: Class to explain, or number of a choice from 0; empty explains the prediction.

        Raises:
            RequestError: If a row lacks a column, or if the target is unknown.
            WorkError: If an output or gradient is not finite.
        """
        chosen = self.inputs(rows, target)
        found = [one for one, _, _ in chosen]
        made: list[Any] = [None] * len(found)
        with meshes.use(self._mesh):
            for width, index in self._buckets(found).items():
                group = [found[n] for n in index]
                batch = _stacked(group, np.array([chosen[n][1] for n in index]), width, self.model)
                for n, one in zip(index, self._attributed(batch, len(group), width), strict=True):
                    made[n] = self._explanation(found[n], chosen[n][2], one)
        return made

    def inputs(self, rows: Sequence[Row], target: str = "") -> list[tuple[Input, int, str]]:
        """Return (model inputs, index of the target class, name of the target) that `__call__` would use for each row.

        Raises:
            RequestError: If the target is unknown.
        """
        if self._generates:
            found = self._prompts(rows, target)
            told = [self._tokenizer.decode(map(int, one.arrays["targets"])) for one in found]
            return [(one, 0, text) for one, text in zip(found, told, strict=True)]
        found = inputs.of_task(self.found, rows, self._tokenizer, self._seq_len)
        if self.task.name == "choice":
            return self._choices(found, rows, target)
        if self.model.head_kind.scalar:
            if target:
                raise RequestError(f"--target {target}: {self.found.path} predicts a number; leave --target out")
            return [(one, 0, "value") for one in found]
        names = self.found.manifest.labels
        if target and target not in names:
            raise RequestError(f"--target {target}: no class{hint(target, names)} (classes: {', '.join(names)})")
        classes = [names.index(target)] * len(found) if target else [int(y.argmax()) for y in self._predicted(found)]
        return [(one, c, names[c]) for one, c in zip(found, classes, strict=True)]

    def _attributed(self, batch: dict[str, np.ndarray], count: int, width: int) -> list[Attribution]:
        """Return the attributions of `count` rows of one padded length.

        Attention rollout has no baseline, so the output at the baseline is then NaN.
        """

        def evaluate(row_M: np.ndarray, alpha_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            rows = {k: a[row_M] for k, a in batch.items()} | {"alpha": alpha_M.astype(np.float32)}
            y, dot = zip(*self._run(self._step, rows), strict=True)
            return np.concatenate(y), np.concatenate(dot)

        config = self.config
        if config.method == ROLLOUT:
            y_N, _ = evaluate(np.arange(count), np.ones(count))
            shares_NT = np.concatenate([*self._run(self._rollout, batch)])
            return [Attribution(a, float(y), math.nan, 0) for a, y in zip(shares_NT, y_N, strict=True)]
        if config.method == "gradient_input":
            return gradients.gradient_input(evaluate, count)
        return gradients.integrated(evaluate, count, width, config.tolerance, config.steps)

    def _explanation(self, made: Input, target: str, one: Attribution) -> Explanation:
        values_T = one.values_T[: len(made.pieces)]
        baseline = None if self.config.method == ROLLOUT else one.baseline
        complete = self.config.method == "integrated_gradients"
        return Explanation(
            made.pieces, made.texts, values_T, target, one.output, baseline,
            one.error if complete else None, one.steps,
        )  # fmt: skip

    def _run(self, step: Callable[..., Any], batch: dict[str, np.ndarray]) -> Any:
        """Call a program on `_size` rows at a time, and yield its outputs. Copies of a row fill up the last call."""
        count = len(batch["segments"])
        for first in range(0, count, self._size):
            at = np.minimum(np.arange(first, first + self._size), count - 1)
            placed = device_batches.place({k: a[at] for k, a in batch.items()}, self._mesh, reading_order=True)
            real = min(self._size, count - first)
            yield jax.tree.map(lambda a, n=real: host_arrays.read(a)[:n], step(self.found.params, placed))

    def _buckets(self, found: Sequence[Input]) -> dict[int, list[int]]:
        """Return the indices of the inputs by padded length."""
        buckets: dict[int, list[int]] = {}
        for n, one in enumerate(found):
            buckets.setdefault(padded_length(len(one.pieces), self._seq_len), []).append(n)
        return buckets

    def _predicted(self, found: Sequence[Input]) -> list[np.ndarray]:
        """Return the model's outputs for each input: logits of classes or of the next token, or a number."""
        made: list[Any] = [None] * len(found)
        with meshes.use(self._mesh):
            for width, index in self._buckets(found).items():
                batch = _stacked([found[n] for n in index], np.zeros(len(index)), width, self.model)
                for n, y in zip(index, np.concatenate([*self._run(self._predict, batch)]), strict=True):
                    made[n] = y
        return made

    def _prompts(self, rows: Sequence[Row], target: str) -> list[Input]:
        """Return the inputs of a language model. If a row has no completion, the most likely next token is scored."""
        texts = [row.get("prompt") or row.get("text", "") for row in rows]
        given = [target or row.get("completion", "") for row in rows]
        told = self._tokenizer.encode_batch(given)

        def build(continuations: Sequence[Sequence[int]]) -> list[Input]:
            return inputs.of_language_model(self.model, texts, continuations, self._tokenizer, self._seq_len)

        open_rows = [i for i, ids in enumerate(told) if not ids]
        if open_rows:
            # A row does not read its last target, so any token can stand for it.
            bare = build([ids or [0] for ids in told])
            for i, logits_V in zip(open_rows, self._predicted([bare[i] for i in open_rows]), strict=True):
                told[i] = [int(logits_V.argmax())]
        return build(told)

    def _choices(self, found: Sequence[Input], rows: Sequence[Row], target: str) -> list[tuple[Input, int, str]]:
        """Return the input of one choice per question: the choice `target`, or the choice with the highest score."""
        scores = self._predicted(found)
        chosen = []
        for row, question in enumerate(rows):
            own = [n for n, one in enumerate(found) if one.row == row]
            if target and not (target.isdecimal() and int(target) < len(own)):
                raise RequestError(f"--target {target}: must be the number of a choice, from 0 to {len(own) - 1}")
            at = int(target) if target else int(np.argmax([scores[n] for n in own]))
            chosen.append((found[own[at]], 0, question["choices"][at]))
        return chosen


def _predictions(found: Artifact, dtype: str) -> Any:
    """Return a compiled function that computes the model's outputs for each row.

    Its arguments are the parameters and a batch. The outputs are logits of classes [R, C], logits of the next token
    [R, V], or one number [R].
    """
    model, choice = found.model, of(found.manifest).name == "choice"

    @jax.jit
    def run(params: functional.Params, batch: dict[str, jax.Array]) -> jax.Array:
        x_RTD = functional.hidden(model, params, batch, dtype=dtype)
        if not model.head_kind.vocabulary:
            return functional.outputs(model, params, x_RTD, batch, dtype)
        if choice:
            return outputs.log_likelihood(model, params, x_RTD, batch, dtype)
        return outputs.scored_logits(model, params, x_RTD, batch, dtype)[:, 0]

    return run


def _stacked(group: Sequence[Input], target_N: np.ndarray, width: int, model: Any) -> dict[str, np.ndarray]:
    """Return the padded arrays of inputs [N, T], and their targets [N].

    T is `width` for arrays of the explained tokens. The lengths of all other arrays (scored positions, decoder tokens
    of an encoder-decoder) are the smallest sufficient power of two.
    """
    prefix = inputs.side(model)

    def stack(name: str) -> np.ndarray:
        # Rows without a second text have no segment types, which are zeros.
        arrays = [one.arrays.get(name, np.zeros(0, np.int32)) for one in group]
        described = name not in ("at", "targets", "weights") and name.startswith(prefix)
        length = width if described else 1 << (max(map(len, arrays)) - 1).bit_length()
        return np.stack([np.pad(a, (0, length - len(a))) for a in arrays])

    batch = {name: stack(name) for name in dict.fromkeys(name for one in group for name in one.arrays)}
    batch["explained"] = np.stack([np.pad(one.explained, (0, width - len(one.pieces))) for one in group])
    return batch | {"target": target_N.astype(np.int32)}
