"""Answer questions with a span of a context (SQuAD; Rajpurkar et al., 2016, arXiv:1606.05250).

Shapes: B rows, T tokens per row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmctl.artifacts.artifact import Artifact, Manifest
from llmctl.data.examples.extractive_qa import AnswerRows
from llmctl.data.source import Row
from llmctl.data.splits import Examples
from llmctl.data.tokenizers.base import Tokenizer
from llmctl.evaluate.metrics import squad
from llmctl.evaluate.setup import READ, Batch, Held, Setup
from llmctl.evaluate.tasks.base import Task
from llmctl.evaluate.tasks.evaluation import Found, Scores
from llmctl.evaluate.tasks.losses import Options
from llmctl.evaluate.tasks.predictions import Outputs, new_examples, short
from llmctl.evaluate.tasks.rows import RowSettings
from llmctl.model import functional
from llmctl.model.config import ModelConfig
from llmctl.model.divergences import SoftLoss, mean_logits
from llmctl.model.losses import Sums, class_sums, only, row_weight, soft_class_sums

LONGEST = 200
"""Maximum number of characters of an answer. A limit in tokens would differ between tokenizers."""

_COMPARISONS = {"exact_match": squad.exact, "answer_f1": squad.f1}


class Span(Task):
    """Train with cross-entropy on the first and the last token of the answer; measure exact match and word F1."""

    name = "span"
    head = "span"
    title = "answers"
    columns = ("context", "question", "answers")
    asks = ("context", "question")
    text_field = "answer"
    averages = False  # windows and scores belong to one tokenizer
    answers = False
    columns_read = columns
    reads = (*READ, "among", "first", "last")
    peft_type = "QUESTION_ANS"

    def rows(self, model: ModelConfig, examples: Examples, tokenizer: Tokenizer, settings: RowSettings) -> AnswerRows:
        """Return one row per question and window of its context. A long context has several windows."""
        return AnswerRows(examples, tokenizer, settings.seq_len, **settings.order)

    def reading_rows(
        self, model: ModelConfig, examples: Examples, tokenizer: Tokenizer, settings: RowSettings
    ) -> AnswerRows:
        """Return rows of questions and context windows for calibration; labels are not used."""
        return self.rows(model, examples, tokenizer, settings)

    def best(self, labels: Sequence[str] = ()) -> str:
        """Return "accuracy", the validation metric that selects the best checkpoint.

        This metric is the mean of two accuracies: that of the answer's first token, and that of its last token.
        """
        return "accuracy"

    def score(self, y: jax.Array, batch: Batch, options: Options) -> tuple[jax.Array, Sums]:
        """Return the cross-entropy of logits [B, T, 2], and the metrics summed over the batch.

        The softmax runs over the tokens at which an answer may begin or end.
        """
        smoothing, z = options.label_smoothing, options.z_loss
        return ends(lambda k, at, weight: class_sums(y[..., k], at, weight, smoothing, z, batch["among"]), batch)

    def mean_output(self, outputs: Sequence[jax.Array], batch: Batch, temperature: float) -> jax.Array:
        """Average the start and end probabilities of several models, and return the averages as logits [B, T, 2]."""
        allowed = [only(y.swapaxes(1, 2), batch["among"][:, None]) for y in outputs]
        return mean_logits(allowed, temperature).swapaxes(1, 2) if len(outputs) > 1 else outputs[0]

    def decided(self, y: jax.Array, batch: Batch) -> Batch:
        """Return {"start": most probable first token, "end": most probable last token}, from logits [B, T, 2]."""
        return {name: jnp.argmax(only(y[..., k], batch["among"]), axis=-1) for k, name in enumerate(("start", "end"))}

    def soft_score(self, teacher: jax.Array, y: jax.Array, batch: Batch, how: SoftLoss) -> tuple[jax.Array, Sums]:
        """Return the distillation loss of logits [B, T, 2], the weighted sum of divergence and cross-entropy."""

        def one(k: int, at: jax.Array, weight: jax.Array) -> tuple[jax.Array, Sums]:
            return soft_class_sums(teacher[..., k], y[..., k], at, weight, how, batch["among"])

        return ends(one, batch)

    def scorer(self, model: ModelConfig, dtype: str) -> Any:
        """Return a compiled function that computes the result of `best_span`.

        Its arguments are the parameters and a batch.
        """

        @jax.jit
        def predict(params: functional.Params, batch: Batch) -> Any:
            x_BTD = functional.hidden(model, params, batch, dtype=dtype)
            return best_span(functional.outputs(model, params, x_BTD, batch, dtype), batch)

        return predict

    def new_rows(
        self, model: ModelConfig, rows: Sequence[Row], tokenizer: Tokenizer, settings: RowSettings
    ) -> AnswerRows:
        """Tokenize the questions of the user: one row per question and window of its context."""
        return AnswerRows(new_examples(rows, ("context", "question")), tokenizer, settings.seq_len, shuffle=False)

    def prediction(self, y: jax.Array, batch: Batch) -> tuple[jax.Array, ...]:
        """Return the best span of each row, as `best_span` does."""
        return best_span(y, batch)

    def predictions(self, count: int, rows: AnswerRows, outputs: Outputs) -> list[Any]:
        """Return the best span over all windows for each of `count` questions.

        A prediction is (score, score of no answer, (first character, last character + 1)).
        """
        return list(zip(*over_windows(count, ((batch, spans) for _, batch, spans in outputs)), strict=True))

    def answer(self, row: Row, prediction: Any, manifest: Manifest, every: bool) -> dict[str, Any]:
        """Return the text of the best span, its character positions, and its score minus the score of no answer."""
        score, none, (begin, end) = prediction
        text = row["context"][begin:end]
        return {"answer": text, "start": int(begin), "end": int(end), "over_no_answer": short(score - none)}

    def metrics(self, artifact: Artifact, examples: Examples, rows: AnswerRows, found: Found) -> Scores:
        """Return exact match and word F1 of the best span over all windows of a context.

        If the data has questions without an answer, the model may also give no answer. The model gives no answer if the
        score of no answer exceeds the score of the best span.
        """
        asked = list(examples)
        N = len(asked)
        best_N, none_N, span_N2 = over_windows(N, found)
        truth = [[text for text, _ in row["answers"]] for row in asked]
        impossible = sum(not t for t in truth)
        silent_N = (none_N > best_N) & (impossible > 0)
        given = ["" if silent_N[n] else row["context"][slice(*span_N2[n])] for n, row in enumerate(asked)]
        pairs = list(zip(given, truth, strict=True))
        values = {name: np.array([f(*pair) for pair in pairs]) for name, f in _COMPARISONS.items()}
        metrics = {
            **{name: float(np.mean(value_N)) for name, value_N in values.items()},
            "examples": N,
            "unanswerable": impossible,
            "windows": len(rows),
        }
        return Scores(metrics, values=values)

    def protocol(self, artifact: Artifact, held: Held, setup: Setup, rows: AnswerRows, metrics: dict[str, Any]) -> str:
        """Return a description of the measurement: windows, maximum answer length, and the rule for no answer."""
        none = metrics["unanswerable"]
        text = f"{held.split} split, {metrics['examples']} questions in {len(rows)} windows of {setup.seq_len} tokens "
        text += f"that overlap by half, spans of at most {LONGEST} characters, SQuAD's normalization, {setup.dtype}"
        return text + f", no answer where the first token scores more ({none} questions have none)" * (none > 0)


def over_windows(N: int, found: Found) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Select the best span for each of N questions from the best spans in the windows of its context.

    Returns:
      (score of the best span [N], lowest no-answer score over the windows [N], character range of the span [N, 2]).
      The range is (first character, last character + 1).
    """
    best_N, none_N, span_N2 = np.full(N, -np.inf), np.full(N, np.inf), np.zeros((N, 2), np.int64)
    for batch, spans in found:
        for n, score, begin, end, none in zip(batch["example"], *spans, strict=True):
            none_N[n] = min(none_N[n], none)
            if score > best_N[n]:
                best_N[n], span_N2[n] = score, (begin, end)
    return best_N, none_N, span_N2


def ends(one: Callable[..., tuple[jax.Array, Sums]], batch: Batch) -> tuple[jax.Array, Sums]:
    """Average the losses and summed metrics of the start and the end of the answer.

    Args:
        one: Function that returns (loss, summed metrics). Arguments: 0 (start) or 1 (end), target position [B], row
            weight [B].
        batch: Batch with "start" and "end".
    """
    weight_B = row_weight(batch, batch["start"])
    first, last = (one(k, batch[name], weight_B) for k, name in enumerate(("start", "end")))
    return jax.tree.map(lambda a, b: (a + b) / 2, first, last)


def best_span(logits_BT2: jax.Array, batch: Batch) -> tuple[jax.Array, ...]:
    """Return (score, first character, last character + 1, score of no answer) of each row's best span, all [B].

    A span begins and ends at tokens of the context. The end is not before the beginning. A span has at most LONGEST
    characters. The score of a span is the sum of its two logits. The score of no answer is the sum of both logits of
    the first token. If a row has no valid span, the score of its best span is -2e30.
    """
    start_BT, end_BT = (only(logits_BT2[..., k], batch["among"]) for k in (0, 1))
    first_BT, last_BT = batch["first"], batch["last"]
    T = first_BT.shape[1]
    length_BTT = last_BT[:, None, :] - first_BT[:, :, None]
    context_T = jnp.arange(T) > 0
    fits_BTT = (length_BTT <= LONGEST) & (jnp.arange(T)[:, None] <= jnp.arange(T)) & context_T[:, None]
    sums_BTT = jnp.where(fits_BTT, start_BT[:, :, None] + end_BT[:, None, :], -2e30)
    best_B = sums_BTT.reshape(len(sums_BTT), -1).argmax(1)
    rows_B = jnp.arange(len(best_B))
    score_B = sums_BTT.reshape(len(sums_BTT), -1)[rows_B, best_B]
    none_B = start_BT[:, 0] + end_BT[:, 0]
    return score_B, first_BT[rows_B, best_B // T], last_BT[rows_B, best_B % T], none_B


TASK = Span()
