"""Train text embeddings, from text pairs or from similarity scores.

With text pairs, training makes the two vectors of a pair more similar than vectors of different pairs. With scores,
training makes the cosine of two vectors equal to the score of their texts.

Shapes: B rows, T tokens per row, N texts, M different candidates, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmctl.artifacts.artifact import Artifact, Manifest
from llmctl.config.errors import RequestError
from llmctl.data.examples.text_pairs import TwoTextRows
from llmctl.data.source import Row
from llmctl.data.splits import Examples
from llmctl.data.tokenizers.base import Tokenizer
from llmctl.distributed import mesh as meshes
from llmctl.evaluate.metrics import regression
from llmctl.evaluate.setup import KEPT, READ, Batch, Held, Setup
from llmctl.evaluate.tasks.base import Task
from llmctl.evaluate.tasks.evaluation import Found, Scores
from llmctl.evaluate.tasks.losses import Network, Options
from llmctl.evaluate.tasks.predictions import short
from llmctl.evaluate.tasks.rows import RowSettings
from llmctl.model import functional
from llmctl.model.config import ModelConfig
from llmctl.model.divergences import Divergence, SoftLoss
from llmctl.model.losses import (
    COSINE_TEMPERATURE,
    Sums,
    class_sums,
    number_sums,
    row_weight,
    soft_class_sums,
    soft_number_sums,
)

CHUNK = 1024
"""Number of texts that are compared with all candidates at a time, to limit memory."""


class Embed(Task):
    """Train with the contrastive loss over the text pairs of a batch (van den Oord et al., 2018, arXiv:1807.03748).

    If the data has similarity scores, the loss is the squared difference between the cosine and the score.
    """

    name = "embed"
    head = "embed"
    title = "embedding"
    columns = ("text", "pair")
    pooling = "mean"
    answers = False
    text_field = "embedding"
    averages = False  # vectors of different models have nothing in common
    reads = (*READ, *(f"pair_{name}" for name in READ))

    def rows(self, model: ModelConfig, examples: Examples, tokenizer: Tokenizer, settings: RowSettings) -> TwoTextRows:
        """Return rows of two texts each, tokenized separately."""
        return TwoTextRows(examples, tokenizer, settings.seq_len, truncate=settings.truncate, **settings.order)

    def reading_rows(self, model: ModelConfig, examples: Examples, tokenizer: Tokenizer, settings: RowSettings) -> Any:
        """Return rows of one text each for calibration; second texts are not used.

        In training, the two texts of a pair are also separate inputs of the network.
        """
        alone = replace(examples, columns=tuple(c for c in examples.columns if c != "pair"))
        return super().reading_rows(model, alone, tokenizer, settings)

    def model_inputs(self, batch: Batch) -> Batch:
        """Return the batch with the two texts of each row as successive rows, [2B, T]."""

        def both(name: str) -> jax.Array:
            two = jnp.stack([batch[name], batch.get(f"pair_{name}", batch[name])], axis=1)
            return meshes.constrain(two.reshape(-1, two.shape[-1]), "batch", "seq")

        return batch | {name: both(name) for name in ("tokens", "segments", "positions", "order") if name in batch}

    def score(self, y: jax.Array, batch: Batch, options: Options) -> tuple[jax.Array, Sums]:
        """Return the loss and the metrics, both summed over the batch, from unit vectors [2B, D].

        Vectors 2i and 2i + 1 belong to the first and the second text of row i.
        """
        near = similarities(y, batch)
        weight_B = row_weight(batch, near)
        if "label" in batch:
            return number_sums(near, batch["label"], weight_B)
        own, smoothing, z = jnp.arange(len(near)), options.label_smoothing, options.z_loss
        return class_sums(near / options.temperature, own, weight_B, smoothing, z, weight_B)

    def mean_output(self, outputs: Sequence[jax.Array], batch: Batch, temperature: float) -> jax.Array:
        """Concatenate the unit vectors of several teachers, and scale the results to length 1.

        The result is [2B, S], for the sum S of the vectors' widths.

        The similarity of two concatenated vectors is the mean of the teachers' similarities.
        """
        return jnp.concatenate(outputs, axis=-1) / len(outputs) ** 0.5 if len(outputs) > 1 else outputs[0]

    def teacher_arrays(
        self, teachers: Sequence[Network], batch: Batch, dtype: Any, divergence: Divergence
    ) -> dict[str, jax.Array]:
        """Return {"teacher_outputs": [B, 2, S]}, the result [2B, S] of `mean_output` for both texts of each row."""
        found = super().teacher_arrays(teachers, batch, dtype, divergence)
        return {name: y.reshape(-1, 2, y.shape[-1]) for name, y in found.items()}

    def taught_loss(self, student: Network, batch: Batch, dtype: Any, how: SoftLoss) -> tuple[jax.Array, Sums]:
        """Return the distillation loss and the summed metrics. The batch contains the teachers' outputs
        (`teacher_arrays`)."""
        vectors = batch["teacher_outputs"]
        flat = {"teacher_outputs": vectors.reshape(-1, vectors.shape[-1])}
        return super().taught_loss(student, batch | flat, dtype, how)

    def soft_score(self, teacher: jax.Array, y: jax.Array, batch: Batch, how: SoftLoss) -> tuple[jax.Array, Sums]:
        """Return the distillation loss of unit vectors [2B, D].

        The loss is the weighted sum of two terms. If the data has pairs, the terms are the divergence of the
        similarities and the contrastive loss. If the data has scores, both terms are squared errors.
        """
        taught, near = similarities(teacher, batch), similarities(y, batch)
        weight_B = row_weight(batch, near)
        if "label" in batch:
            return soft_number_sums(taught, near, batch["label"], weight_B, how)
        own = jnp.arange(len(near))
        return soft_class_sums(taught / COSINE_TEMPERATURE, near / COSINE_TEMPERATURE, own, weight_B, how, weight_B)

    def new_rows(self, model: ModelConfig, rows: Sequence[Row], tokenizer: Tokenizer, settings: RowSettings) -> Any:
        """Return rows of one text each for new rows of the user; a second text is ignored."""
        return super().new_rows(model, [{"text": row["text"]} for row in rows], tokenizer, settings)

    def answer(self, row: Row, prediction: np.ndarray, manifest: Manifest, every: bool) -> dict[str, Any]:
        """Format the prediction for one row as JSON data: {"embedding": unit vector as a list of D numbers}."""
        return {"embedding": [short(x) for x in prediction]}

    def check_examples(self, artifact: Artifact, examples: Examples) -> None:
        """Check that the data has the column "pair".

        Raises:
            RequestError: If the column is missing.
        """
        if "pair" not in examples.columns:
            raise RequestError(f"{artifact.path}: embeds texts, and the data has no pairs; map a second text to pair")

    def scorer(self, model: ModelConfig, dtype: str) -> Any:
        """Return a compiled function that computes the vectors of first texts and of second texts, each [B, D].

        Its arguments are the parameters and a batch.
        """

        @jax.jit
        def predict(params: functional.Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
            batch = self.model_inputs(batch)
            x_BTD = functional.hidden(model, params, batch, dtype=dtype)
            z_B2D = functional.outputs(model, params, x_BTD, batch, dtype).reshape(-1, 2, model.d_model)
            return z_B2D[:, 0], z_B2D[:, 1]

        return predict

    def metrics(self, artifact: Artifact, examples: Examples, rows: TwoTextRows, found: Found) -> Scores:
        """Return retrieval metrics: recall and mean reciprocal rank. Each first text retrieves its own second text
        among all second texts.

        If the data has scores, return the correlations between the scores and the cosines instead.
        """
        text_ND, pair_ND = map(np.concatenate, zip(*(vectors for _, vectors in found), strict=True))
        if examples.labels is not None:
            near_N = (text_ND * pair_ND).sum(-1)
            scored = regression.scores(examples.labels, near_N)
            values = {"label": examples.labels, "prediction": near_N}
            return Scores({k: scored[k] for k in ("spearman", "pearson", "examples")}, values=values)
        # Equal texts are one candidate, because no model can distinguish them.
        _, first_M, own_N = np.unique(list(examples.texts("pair")), return_index=True, return_inverse=True)
        rank_N = ranks(text_ND, pair_ND[first_M], own_N)
        values = {"recall_at_1": rank_N <= 1, "recall_at_10": rank_N <= 10, "mrr": 1 / rank_N}
        return Scores(scores(rank_N, len(first_M)), values=values)

    def protocol(self, artifact: Artifact, held: Held, setup: Setup, rows: TwoTextRows, metrics: dict[str, Any]) -> str:
        """Return a description of the measurement: split, number of pairs, truncation and kind of comparison."""
        text = f"{held.split} split, {len(held.examples)} pairs, {KEPT[setup.truncate]} {setup.seq_len} tokens, "
        if held.examples.labels is not None:
            return text + f"cosine against the score, {setup.dtype}"
        return text + f"cosine to {metrics['candidates']} candidates, {setup.dtype}"


def similarities(z_ND: jax.Array, batch: Batch) -> jax.Array:
    """Return the cosine similarities of all first texts with all second texts of the batch, [B, B].

    If the batch has scores, return only the cosine [B] between the two texts of each row. Second texts from all devices
    are used, so that each text is compared with the complete batch (arXiv:1807.03748, arXiv:1705.00652).

    Args:
        z_ND: Unit vectors [2B, D] of the first and the second text of each row, alternately.
        batch: The batch.
    """
    # not z_ND[::2]: XLA's partitioner compiles the gradient of such a slice wrongly
    text_BD, pair_BD = (z_ND.reshape(-1, 2, z_ND.shape[-1])[:, k] for k in (0, 1))
    if "label" in batch:
        return jnp.sum(text_BD * pair_BD, axis=-1)
    pair_BD = meshes.constrain(pair_BD, None, None)
    return jnp.matmul(text_BD, pair_BD.T, precision="highest")


def ranks(text_ND: np.ndarray, candidate_MD: np.ndarray, own_N: np.ndarray) -> np.ndarray:
    """Return the rank [N] of each text's own candidate among all candidates, by similarity; 1 is the best.

    If another candidate is equally similar, the other candidate is ranked first.

    Args:
        text_ND: Unit vectors of the texts [N, D].
        candidate_MD: Unit vectors of the candidates [M, D].
        own_N: Index of each text's own candidate [N].
    """
    out = []
    for a in range(0, len(text_ND), CHUNK):
        near_CM = text_ND[a : a + CHUNK] @ candidate_MD.T
        own_C1 = np.take_along_axis(near_CM, own_N[a : a + CHUNK, None], 1)
        out.append((near_CM >= own_C1).sum(1))
    return np.concatenate(out)


def scores(rank_N: np.ndarray, candidates: int) -> dict[str, float]:
    """Return retrieval metrics from the rank of each text's own candidate.

    Returns:
        recall_at_1, recall_at_10: Fraction of texts whose own candidate has rank 1, and rank 10 or better.
        mrr: Mean of 1 / rank.
        candidates, examples: Numbers of candidates and texts.
    """
    return {
        "recall_at_1": float(np.mean(rank_N <= 1)),
        "recall_at_10": float(np.mean(rank_N <= 10)),
        "mrr": float(np.mean(1 / rank_N)),
        "candidates": candidates,
        "examples": len(rank_N),
    }


TASK = Embed()
