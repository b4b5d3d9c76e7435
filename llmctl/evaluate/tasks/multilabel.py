"""Classify a text, or a pair of texts, into any number of classes per row, or into none.

A class is predicted if its probability is at least its threshold. The function `thresholds` chooses the threshold of
each class from the true classes and the predicted probabilities of validation rows.

Example:
    >>> truth_NC = np.array([[1, 1], [1, 0], [0, 0]])
    >>> thresholds(truth_NC, np.array([[0.9, 0.5], [0.3, 0.2], [0.1, 0.4]]))
    [0.2, 0.45]

Shapes: B rows per batch, N rows, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmctl.artifacts.artifact import Artifact, Manifest
from llmctl.data.source import Row
from llmctl.data.splits import Examples
from llmctl.evaluate.metrics.classification import Z_95, wilson_interval
from llmctl.evaluate.setup import Batch, Held, Setup, answers, label_map
from llmctl.evaluate.tasks.classify import Classify
from llmctl.evaluate.tasks.evaluation import Found, Scores
from llmctl.evaluate.tasks.losses import Options
from llmctl.evaluate.tasks.predictions import named
from llmctl.model import functional
from llmctl.model.config import ModelConfig
from llmctl.model.divergences import SoftLoss, mean_logits
from llmctl.model.hf_config import Keys
from llmctl.model.losses import Sums, row_weight

EVEN = 0.5
"""Probability threshold of classes that have no fitted threshold."""


class MultiLabel(Classify):
    """Train with binary cross-entropy on one sigmoid per class; measure F1 with one threshold per class.

    The loss of a row is the mean over its classes. The loss of a batch therefore equals transformers'
    `BCEWithLogitsLoss`. `z_loss` does not apply, because a sigmoid has no normalizer Z. The metric `exact_match` is the
    subset accuracy, the fraction of rows whose set of classes is exactly correct.
    """

    name = "multilabel"
    title = "multi-label classification"
    calibrates = False
    label_type = "set"
    text_field = "labels"
    problem_type = "multi_label_classification"

    def best(self, labels: Sequence[str] = ()) -> str:
        """Return "micro_f1", the validation metric that selects the best checkpoint. This F1 uses the probability
        threshold 0.5.
        """
        return "micro_f1"

    def score(self, y: jax.Array, batch: Batch, options: Options) -> tuple[jax.Array, Sums]:
        """Return the summed binary cross-entropy (nats) of logits [B, C], and the metrics summed over the batch."""
        truth_BC, weight_B = batch["label"].astype(jnp.float32), row_weight(batch, y)
        target_BC = truth_BC + options.label_smoothing * (EVEN - truth_BC)
        nll, loss = (
            jnp.sum(jnp.mean(jax.nn.softplus(y) - aim_BC * y, axis=-1) * weight_B) for aim_BC in (truth_BC, target_BC)
        )
        predicted_BC = (y > 0).astype(jnp.float32)
        hit_C = weight_B @ (truth_BC * predicted_BC)
        both_C = weight_B @ (truth_BC + predicted_BC)
        exact_B = jnp.all(truth_BC == predicted_BC, axis=-1)
        sums = {"loss": nll, "exact_match": jnp.sum(exact_B * weight_B), "weight": jnp.sum(weight_B)}
        sums |= {"micro_f1": 2 * jnp.sum(hit_C), "micro_weight": jnp.sum(both_C)}
        return loss, sums | {"macro_f1": 2 * hit_C, "macro_weight": both_C}

    def mean_output(self, outputs: Sequence[jax.Array], batch: Batch, temperature: float) -> jax.Array:
        """Return the logits [B, C] of the class probabilities at `temperature`, averaged over the teachers."""
        mean_BC2 = mean_logits([binary(y) for y in outputs], temperature)
        return mean_BC2[..., 0] - mean_BC2[..., 1]

    def decided(self, y: jax.Array, batch: Batch) -> Batch:
        """Return {"label": whether each class has a probability above 1/2}, from logits [B, C]."""
        return {"label": (y > 0).astype(jnp.int32)}

    def soft_score(self, teacher: jax.Array, y: jax.Array, batch: Batch, how: SoftLoss) -> tuple[jax.Array, Sums]:
        """Return the distillation loss of logits [B, C], the weighted sum of divergence and cross-entropy.

        Both terms are means over the classes. Each class is a binary distribution with the logits z and 0, for the
        output z of the model.
        """
        nll, sums = self.score(y, batch, Options())
        apart_BC = how.divergence.between(binary(teacher), binary(y))
        apart = jnp.sum(jnp.mean(apart_BC, axis=-1) * row_weight(batch, y))
        return how.combined(apart, nll), sums | {how.divergence.metric: apart}

    def fit(self, model: ModelConfig, params: functional.Params, rows: Any, setup: Setup) -> dict[str, Any]:
        """Return {"thresholds": {class: probability threshold}}. The thresholds maximize the F1 of each class on the
        rows."""
        found = answers(self.scorer(model, setup.dtype), params, rows, setup, self.reads)
        truth_NC, p_NC = map(np.concatenate, zip(*((b["label"], probabilities(y)) for b, y in found), strict=True))
        return {"thresholds": dict(zip(rows.classes, thresholds(truth_NC, p_NC), strict=True))}

    def prediction(self, y: jax.Array, batch: Batch) -> jax.Array:
        """Return the probability of each class, [B, C] in float32, from logits."""
        return jax.nn.sigmoid(y.astype(jnp.float32))

    def answer(self, row: Row, prediction: np.ndarray, manifest: Manifest, every: bool) -> dict[str, Any]:
        """Return the classes whose probability reaches the threshold of the class, with the probabilities.

        If `every` is true, return the probabilities of all classes.
        """
        chosen = manifest.fitted.get("thresholds", {})
        given = named(manifest.labels, prediction)
        labels = [n for n, p in zip(manifest.labels, prediction, strict=True) if p >= chosen.get(n, EVEN)]
        return {"labels": labels, "probabilities": given if every else {n: given[n] for n in labels}}

    def metrics(self, artifact: Artifact, examples: Examples, rows: Any, found: Found) -> Scores:
        """Return the metrics of predictions with the artifact's thresholds, and the true and predicted class names of
        each example.

        The class names of an example are a tuple.
        """
        names = artifact.manifest.labels
        pairs = [(batch["label"], probabilities(y)) for batch, y in found]
        given_NC, p_NC = map(np.concatenate, zip(*pairs, strict=True))
        truth_NC = np.zeros(p_NC.shape, bool)
        truth_NC[:, label_map(examples.classes, names, str(artifact.path))] = given_NC > 0
        chosen = artifact.manifest.fitted.get("thresholds", {})
        threshold_C = np.array([chosen.get(name, EVEN) for name in names])
        predicted_NC = p_NC >= threshold_C
        scored = scores(truth_NC, predicted_NC, names)
        for name, threshold in zip(names, threshold_C, strict=True):
            scored["per_class"][name]["threshold"] = float(threshold)
        truth, predicted = ([tuple(np.array(names)[row]) for row in sets_NC] for sets_NC in (truth_NC, predicted_NC))
        hit_N, both_N = (truth_NC & predicted_NC).sum(1), truth_NC.sum(1) + predicted_NC.sum(1)
        values = {
            "label": truth_NC,
            "prediction": predicted_NC,
            "micro_f1": np.stack([2 * hit_N, both_N], axis=1),
            "exact_match": (truth_NC == predicted_NC).all(1),
        }
        return Scores(scored, (truth, predicted), values=values)

    def protocol(self, artifact: Artifact, held: Held, setup: Setup, rows: Any, metrics: dict[str, Any]) -> str:
        """Return a description of the measurement, which names the data on which the thresholds were fitted."""
        manifest = artifact.manifest
        chosen = "thresholds chosen on validation"
        if not manifest.fitted:
            chosen = f"threshold {EVEN}"
        elif manifest.fitted_for:
            chosen += f" of {manifest.fitted_for}"
        elif manifest.stage == "import":
            chosen = "thresholds of the imported config.json"
        return f"{super().protocol(artifact, held, setup, rows, metrics)}, {chosen}"

    def hf_fields(self, model: ModelConfig, labels: Sequence[str], fitted: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of a classifier's config.json, with the fitted thresholds under the key `thresholds`."""
        chosen = {name: fitted[name] for name in ("thresholds",) if name in fitted}
        return super().hf_fields(model, labels, fitted) | chosen

    def fitted_of(self, keys: Keys, labels: Sequence[str]) -> dict[str, Any]:
        """Read the fitted thresholds from the key `thresholds` of a config.json, if the key exists."""
        found = keys.take("thresholds", {})
        if not found:
            return {}
        if not isinstance(found, dict) or set(found) != set(labels) or not all(map(_is_share, found.values())):
            keys.problems.append(f"thresholds = {found!r} is not one number from 0 to 1 for each class")
        return {"thresholds": found}


def _is_share(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1


def binary(logits_BC: jax.Array) -> jax.Array:
    """Return logits [B, C, 2] of a binary choice per class: the logit of the class, and 0."""
    return jnp.stack([logits_BC, jnp.zeros_like(logits_BC)], axis=-1)


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Compute the sigmoid of logits in float64, so that different large logits keep different probabilities."""
    return np.exp(-np.logaddexp(0, -np.asarray(logits, np.float64)))


def thresholds(truth_NC: np.ndarray, p_NC: np.ndarray) -> list[float]:
    """Return the threshold with the largest F1 for each class (Lipton et al., 2014, arXiv:1402.1892).

    Candidates are the midpoints of neighboring probabilities. Among equally good thresholds, the nearest to 0.5 is
    chosen. A class without true rows gets 0.5.

    Args:
        truth_NC: True classes, bool [N, C].
        p_NC: Predicted probabilities [N, C].
    """
    found = []
    for truth_N, p_N in zip(truth_NC.T, p_NC.T, strict=True):
        order_N = np.argsort(-p_N, kind="stable")
        p_N, hits_N = p_N[order_N], np.cumsum(truth_N[order_N], dtype=np.int64)
        below_N = np.append(p_N[1:], 0.0)
        f1_N = 2 * hits_N / (np.arange(1, len(p_N) + 1) + hits_N[-1]) * (p_N > below_N)
        middle_N = (p_N + below_N)[f1_N == f1_N.max()] / 2
        found.append(float(middle_N[np.abs(middle_N - EVEN).argmin()]) if hits_N[-1] else EVEN)
    return found


def scores(truth_NC: np.ndarray, predicted_NC: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """Return micro and macro F1, the subset accuracy, 95 % intervals, and the metrics of each class.

    The interval of micro F1 uses the delta method for a ratio of sums over independent rows. The interval is omitted if
    all rows have the same fraction of errors, because its width would be 0. The interval of the subset accuracy is
    Wilson's. Macro F1 is the mean over the classes that occur as a label or a prediction.

    Args:
        truth_NC: True classes, bool [N, C].
        predicted_NC: Predicted classes, bool [N, C].
        names: Class names.
    """
    hit_NC, both_NC = truth_NC & predicted_NC, truth_NC.astype(np.int64) + predicted_NC
    hit_C, support_C, predicted_C, both_C = (a.sum(0) for a in (hit_NC, truth_NC, predicted_NC, both_NC))
    f1_C = 2 * hit_C / np.maximum(both_C, 1)
    total, exact = max(both_C.sum(), 1), int((truth_NC == predicted_NC).all(1).sum())
    micro = float(2 * hit_C.sum() / total)
    half = Z_95 * float(np.sqrt(np.square(2 * hit_NC.sum(1) - micro * both_NC.sum(1)).sum())) / total
    low, high = wilson_interval(exact, len(truth_NC))
    return {
        "micro_f1": micro,
        **({"micro_f1_low": max(micro - half, 0.0), "micro_f1_high": min(micro + half, 1.0)} if half else {}),
        "macro_f1": float(f1_C[both_C > 0].mean()) if both_C.any() else 0.0,
        "exact_match": exact / len(truth_NC),
        "exact_match_low": low,
        "exact_match_high": high,
        "examples": len(truth_NC),
        "per_class": {
            name: {
                "precision": float(hit_C[c] / max(predicted_C[c], 1)),
                "recall": float(hit_C[c] / max(support_C[c], 1)),
                "f1": float(f1_C[c]),
                "support": int(support_C[c]),
            }
            for c, name in enumerate(names)
        },
    }


TASK = MultiLabel()
