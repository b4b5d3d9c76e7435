"""Select one of several choices as the right continuation of a prompt (multiple choice).

A language model scores a choice by its log-likelihood after the prompt. The model can therefore be measured without
training for the task (Brown et al., 2020, arXiv:2005.14165). An encoder gets a head with one output per pair of prompt
and choice.

Shapes: B questions, K choices per question, R = B * K rows, T tokens per row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmctl.artifacts.artifact import Artifact
from llmctl.artifacts.manifest import Manifest
from llmctl.config.errors import RequestError
from llmctl.data.examples.choices import ChoiceRows, SingleChoiceRows, prefix
from llmctl.data.source import Row
from llmctl.data.splits import Examples
from llmctl.data.tokenizers.base import Tokenizer
from llmctl.evaluate import likelihood
from llmctl.evaluate.metrics.calibration import softmax
from llmctl.evaluate.metrics.classification import wilson_interval
from llmctl.evaluate.setup import Batch, Held, Setup
from llmctl.evaluate.tasks.base import Task
from llmctl.evaluate.tasks.evaluation import Found, Scores
from llmctl.evaluate.tasks.likelihoods import interleaved, log_likelihood, loss_of_rows
from llmctl.evaluate.tasks.losses import Network, Options
from llmctl.evaluate.tasks.predictions import Outputs, new_examples, short
from llmctl.evaluate.tasks.rows import RowSettings
from llmctl.model import functional
from llmctl.model.config import ModelConfig
from llmctl.model.divergences import Divergence, SoftLoss, mean_logits
from llmctl.model.losses import Loss, Sums, class_sums, only, row_weight, soft_class_sums


class Choice(Task):
    """Train with cross-entropy over the choices of each question; measure accuracy."""

    name = "choice"
    head = "choice"
    title = "multiple choice"
    architectures = ("decoder", "encoder", "encoder_decoder")
    columns = ("prompt", "choices", "answer")
    columns_read = columns
    reads = ()
    answers = False
    asks = ("prompt", "choices")
    perturbs = ("prompt",)
    text_field = "answer"
    peft_type = "FEATURE_EXTRACTION"

    def head_for(self, model: ModelConfig) -> str:
        """Return "lm" for models that generate text, and "choice" for encoders."""
        return "choice" if model.architecture == "encoder" else "lm"

    def best(self, labels: Sequence[str] = ()) -> str:
        """Return "accuracy", the validation metric that selects the best checkpoint."""
        return "accuracy"

    def rows(self, model: ModelConfig, examples: Examples, tokenizer: Tokenizer, settings: RowSettings) -> ChoiceRows:
        """Return rows of one question each, with all choices of the question.

        Raises:
            RequestError: If the data has no questions.
        """
        if missing := [c for c in self.columns if c not in examples.columns]:
            raise RequestError(
                f"the data has no column {missing[0]!r}; map one in data.columns, or make questions with data.template "
                f"and data.words (it has: {', '.join(examples.columns)})"
            )
        return ChoiceRows(
            examples, tokenizer, settings.seq_len, model.architecture,
            truncate=settings.truncate, target_len=settings.target_len, **settings.order,
        )  # fmt: skip

    def reading_rows(self, model: ModelConfig, examples: Examples, tokenizer: Tokenizer, settings: RowSettings) -> Any:
        """Return rows for calibration, built as in training."""
        return self.rows(model, examples, tokenizer, settings)

    def model_inputs(self, batch: Batch) -> Batch:
        """Return the batch with the choices of each question as successive rows, [R, T]."""
        count = sum(name.endswith("segments") and "encoder" not in name for name in batch)
        return interleaved(batch, [prefix(k) for k in range(count)])

    def loss_of(self, cfg: ModelConfig, *, remat: str = "none", **options: Any) -> Loss:
        """Return the loss function, which returns (loss, metrics summed over the batch).

        The arguments of the loss function are the parameters, a batch, and a dropout key or None.

        The loss is the cross-entropy over the choices of each question. `options` are fields of `Options`.
        """
        settings = Options(**options)

        def loss(params: functional.Params, batch: Batch, key: jax.Array | None = None) -> tuple[jax.Array, Sums]:
            batch = self.model_inputs(batch)
            x_RTD = functional.hidden(
                cfg, params, batch, train=key is not None, rng=key, dtype=settings.dtype, remat=remat
            )

            def compute(score_R: jax.Array) -> tuple[jax.Array, Sums]:
                smoothing, z = settings.label_smoothing, settings.z_loss
                label_B, allowed_BK = batch["label"], allowed(batch, score_R)
                score_BK = score_R.reshape(allowed_BK.shape)
                return class_sums(score_BK, label_B, row_weight(batch, label_B), smoothing, z, allowed_BK)

            return loss_of_scores(cfg, params, x_RTD, batch, settings.dtype, compute)

        return loss

    def teacher_arrays(
        self, teachers: Sequence[Network], batch: Batch, dtype: Any, divergence: Divergence
    ) -> dict[str, jax.Array]:
        """Return {"teacher_outputs": [B, K]}, logits whose softmax is the teachers' mean probabilities."""
        scores = [choice_scores(*teacher, batch, dtype) for teacher in teachers]
        allowed_BK = allowed(batch, scores[0])
        each = [only(score_R.reshape(allowed_BK.shape), allowed_BK) for score_R in scores]
        return {"teacher_outputs": mean_logits(each, divergence.temperature)}

    def taught_loss(self, student: Network, batch: Batch, dtype: Any, how: SoftLoss) -> tuple[jax.Array, Sums]:
        """Return the distillation loss over the choices, and the metrics summed over the batch.

        The loss is the weighted sum of cross-entropy and divergence from the teachers.
        """
        label_B, taught_BK = batch["label"], batch["teacher_outputs"]

        def compute(score_R: jax.Array) -> tuple[jax.Array, Sums]:
            allowed_BK, weight_B = allowed(batch, score_R), row_weight(batch, label_B)
            return soft_class_sums(taught_BK, score_R.reshape(allowed_BK.shape), label_B, weight_B, how, allowed_BK)

        return loss_of_scores(*student, batch, dtype, compute)

    def taught_agreement(self, student: Network, batch: Batch, dtype: Any) -> Sums:
        """Return the sums "agreement" and "weight". The first divided by the second is the fraction of questions for
        which student and teachers prefer the same choice.
        """
        score_R = choice_scores(*student, batch, dtype)
        allowed_BK = allowed(batch, score_R)
        y_BK = only(score_R.reshape(allowed_BK.shape), allowed_BK)
        same_B = jnp.argmax(y_BK, axis=-1) == jnp.argmax(batch["teacher_outputs"], axis=-1)
        weight_B = row_weight(batch, batch["label"])
        return {"agreement": jnp.sum(same_B * weight_B), "weight": jnp.sum(weight_B)}

    def scorer(self, model: ModelConfig, dtype: str) -> Any:
        """Return a compiled function that computes the scores of choices, float32 [B, K, 2].

        Its arguments are the parameters and a batch. The last axis has the score of a choice and the number of its
        tokens.
        """

        @jax.jit
        def scores(params: functional.Params, batch: Batch) -> jax.Array:
            batch = self.model_inputs(batch)
            x_RTD = functional.hidden(model, params, batch, dtype=dtype)
            score_R = choice_scores(model, params, x_RTD, batch, dtype)
            tokens_R = batch["weights"].sum(-1) if model.head_kind.vocabulary else jnp.ones_like(score_R)
            allowed_BK = allowed(batch, score_R)
            score_BK = only(score_R.reshape(allowed_BK.shape), allowed_BK)
            return jnp.stack([score_BK, tokens_R.reshape(allowed_BK.shape)], axis=-1)

        return scores

    def measuring_step(self, model: ModelConfig, dtype: str) -> Any:
        """Return the compiled function that `outputs` runs.

        If the choices of a question can share its prompt (see `shares`), the function scores packed rows. Otherwise it
        is the result of `scorer`.
        """
        return likelihood.position_scores(model, dtype) if shares(model) else super().measuring_step(model, dtype)

    def outputs(
        self, artifact: Artifact, rows: ChoiceRows, setup: Setup, step: Any, folder: Path | None = None
    ) -> Found:
        """Yield the outputs of `scorer` for all questions, in their order.

        With a decoder, the choices of a question share the computation of its prompt.
        """
        if not shares(artifact.model):
            yield from super().outputs(artifact, rows, setup, step, folder)
            return
        queries = [rows.queries(i) for i in range(len(rows))]
        score = likelihood.Scorer(
            artifact.model, artifact.params, setup, rows.begin, step=step, what=artifact.path.name
        )
        at = [(i, k) for i, pairs in enumerate(queries) for k, (_, choice) in enumerate(pairs) if choice]
        scores = score([likelihood.Query(*queries[i][k]) for i, k in at])
        found_NK2 = np.zeros((len(queries), rows.max_choices, 2), np.float32)
        count_N = np.array([len(pairs) for pairs in queries])
        found_NK2[np.arange(rows.max_choices) >= count_N[:, None], 0] = -1e30
        for (i, k), found in zip(at, scores, strict=True):
            found_NK2[i, k] = found.log_likelihood, len(queries[i][k][1])
        yield {"label": rows.answers_N, "choices": count_N}, found_NK2

    def protocol(self, artifact: Artifact, held: Held, setup: Setup, rows: Any, metrics: dict[str, Any]) -> str:
        """Return a description of the measurement, with the number of truncated prompts if there are any."""
        cut = rows.truncated
        said = super().protocol(artifact, held, setup, rows, metrics)
        return f"{said}, {cut} prompts without their beginning" if cut else said

    def new_rows(
        self, model: ModelConfig, rows: Sequence[Row], tokenizer: Tokenizer, settings: RowSettings
    ) -> SingleChoiceRows:
        """Tokenize the questions of the user: one row per question and choice."""
        questions = [{"prompt": row["prompt"], "choices": row["choices"], "answer": 0} for row in rows]
        examples = new_examples(questions, self.columns)
        return SingleChoiceRows(examples, tokenizer, settings.seq_len, model.architecture, settings.truncate)

    def prediction_step(self, model: ModelConfig, dtype: str) -> Any:
        """Return a compiled function that computes the scores of rows, float32 [R].

        Its arguments are the parameters and a batch.
        """

        @jax.jit
        def run(params: functional.Params, batch: Batch) -> jax.Array:
            x_RTD = functional.hidden(model, params, batch, dtype=dtype)
            return choice_scores(model, params, x_RTD, batch, dtype).astype(jnp.float32)

        return run

    def predictions(self, count: int, rows: SingleChoiceRows, outputs: Outputs) -> list[Any]:
        """Return the probabilities of each question's choices, [K]: the softmax of the scores."""
        scores: list[dict[int, float]] = [{} for _ in range(count)]
        for index_R, batch, score_R in outputs:
            for i, question, score in zip(index_R, batch["question"], score_R, strict=True):
                scores[question][int(i)] = float(score)
        return [softmax(np.array([own[i] for i in sorted(own)])) for own in scores]

    def answer(self, row: Row, prediction: np.ndarray, manifest: Manifest, every: bool) -> dict[str, Any]:
        """Return the index and the text of the most likely choice, and its probability among the choices.

        If `every` is true, also return the probabilities of all choices, in their order.
        """
        best = int(prediction.argmax())
        found = {"choice": best, "answer": row["choices"][best], "probability": short(prediction[best])}
        return found | ({"probabilities": [short(p) for p in prediction]} if every else {})

    def metrics(self, artifact: Artifact, examples: Examples, rows: Any, found: Found) -> Scores:
        """Return the accuracy of selecting the choice with the highest score, its 95 % interval, and the accuracy of
        random guessing.

        For a language model, also return the accuracy with the mean log-likelihood per token as the score.
        """
        pairs = [(batch["label"], batch["choices"], outputs) for batch, outputs in found]
        label_N, count_N, scores_NK2 = (np.concatenate(part) for part in zip(*pairs, strict=True))
        total_NK, tokens_NK = scores_NK2[..., 0], np.maximum(scores_NK2[..., 1], 1)
        right_N = total_NK.argmax(-1) == label_N
        low, high = wilson_interval(int(right_N.sum()), len(right_N))
        metrics = {"accuracy": float(np.mean(right_N)), "accuracy_low": low, "accuracy_high": high}
        values = {"accuracy": right_N, "prediction": total_NK.argmax(-1)}
        if artifact.model.head_kind.vocabulary:
            values["accuracy_per_token"] = (total_NK / tokens_NK).argmax(-1) == label_N
            metrics |= {"accuracy_per_token": float(np.mean(values["accuracy_per_token"]))}
        return Scores(metrics | {"baseline_accuracy": float(np.mean(1 / count_N))}, values=values)


def shares(model: ModelConfig) -> bool:
    """Return whether the choices of a question can share the computation of the prompt."""
    return model.architecture == "decoder" and model.head_kind.vocabulary


def choice_scores(cfg: ModelConfig, params: functional.Params, x_RTD: jax.Array, batch: Batch, dtype: Any) -> jax.Array:
    """Return the score of each row, [R]: its log-likelihood in nats or, for an encoder, the output of the head."""
    if cfg.head_kind.vocabulary:
        return log_likelihood(cfg, params, x_RTD, batch, dtype)
    return functional.outputs(cfg, params, x_RTD, batch, dtype)


def loss_of_scores(
    cfg: ModelConfig,
    params: functional.Params,
    x_RTD: jax.Array,
    batch: Batch,
    dtype: Any,
    compute: Callable[[jax.Array], tuple[jax.Array, Sums]],
) -> tuple[jax.Array, Sums]:
    """Return (loss, metrics summed over the batch), which `compute` computes from the scores [R] of the rows.

    For a language model, the loss and its gradient are computed in chunks. The logits of all tokens are never stored.
    """
    if cfg.head_kind.vocabulary:
        return loss_of_rows(cfg, params, x_RTD, batch, dtype, compute)
    return compute(choice_scores(cfg, params, x_RTD, batch, dtype))


def allowed(batch: Batch, score_R: jax.Array) -> jax.Array:
    """Return a mask [B, K]: 1 for a choice of the question, 0 for a row that only fills the array."""
    count_B = batch["choices"]
    return (jnp.arange(score_R.shape[0] // count_B.shape[0]) < count_B[:, None]).astype(jnp.int32)


TASK = Choice()
