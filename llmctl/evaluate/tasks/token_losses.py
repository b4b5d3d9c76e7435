"""Compare networks at the predicted tokens of a batch. All language-modelling tasks inherit `TokenLosses`.

Shapes: B rows, T tokens per row, P predicted positions per row, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from llmctl.evaluate.setup import Batch
from llmctl.evaluate.tasks.losses import Network, TokenCrossEntropy, predicted, project
from llmctl.model import chunked_divergence, functional
from llmctl.model.config import ModelConfig
from llmctl.model.divergences import Divergence, Listed, SoftLoss, mean_logits
from llmctl.model.losses import Sums, row_weight, soft_class_sums


class TokenLosses(TokenCrossEntropy):
    """Compute the loss over tokens, the distillation loss, and the divergence of two networks."""

    def soft_loss(
        self, student: Network, teachers: Sequence[Network], batch: Batch, dtype: Any, how: SoftLoss
    ) -> tuple[jax.Array, Sums]:
        """Return the distillation loss, and the metrics summed over the batch.

        The loss is a weighted sum of divergence and cross-entropy, summed over tokens. If all networks predict
        next-sentence labels, the loss also sums over these labels.
        """
        cfg, _, x_BTD = student
        _, targets_BP, weights_BP = predicted(batch, x_BTD)
        found = chunked_divergence.distillation(
            _side(student, batch, dtype),
            [_side(teacher, batch, dtype) for teacher in teachers],
            targets_BP,
            weights_BP,
            cfg.vocab_size,
            how,
        )
        if not self._follows([cfg, *(own for own, *_ in teachers)], batch):
            return _named(found, how)
        soft = [functional.outputs(*network, batch, dtype) for network in teachers]
        taught_B2 = mean_logits(soft, how.divergence.temperature)
        return self._with_next_sentence(_named(found, how), student, batch, taught_B2, targets_BP.shape[1], dtype, how)

    def teacher_arrays(
        self, teachers: Sequence[Network], batch: Batch, dtype: Any, divergence: Divergence
    ) -> dict[str, jax.Array]:
        """Return the `divergence.top_k` most probable tokens of the teachers at every predicted position.

        The arrays are "teacher_ids" [B, T, k], "teacher_log_p" [B, T, k] and "teacher_rest" [B, T] (see `Listed`). The
        batch may have an array `places` [B, P] of predicted positions. The shapes are then [B, P, k] and [B, P], and
        the names begin with "places_". If all teachers predict next-sentence labels, their logits are
        "teacher_next_sentence" [B, 2].
        """
        vocab, temperature = teachers[0][0].vocab_size, divergence.temperature
        sides = [_side(teacher, batch, dtype) for teacher in teachers]
        listed = chunked_divergence.listed_tokens(sides, vocab, divergence.top_k, temperature)
        found = {_stored(name, batch): a for name, a in zip(Listed._fields, listed, strict=True)}
        if self._follows([cfg for cfg, *_ in teachers], batch):
            outputs = [functional.outputs(*network, batch, dtype) for network in teachers]
            found["teacher_next_sentence"] = mean_logits(outputs, temperature)
        return found

    def taught_loss(self, student: Network, batch: Batch, dtype: Any, how: SoftLoss) -> tuple[jax.Array, Sums]:
        """Return the distillation loss and the summed metrics. The batch contains the teachers' outputs
        (`teacher_arrays`)."""
        cfg, _, x_BTD = student
        _, targets_BP, weights_BP = predicted(batch, x_BTD)
        found = chunked_divergence.listed_distillation(
            _side(student, batch, dtype), _listed(batch), targets_BP, weights_BP, cfg.vocab_size, how
        )
        taught_B2 = batch.get("teacher_next_sentence")
        if taught_B2 is None or not self._follows([cfg], batch):
            return _named(found, how)
        return self._with_next_sentence(_named(found, how), student, batch, taught_B2, targets_BP.shape[1], dtype, how)

    def agreement(self, student: Network, teachers: Sequence[Network], batch: Batch, dtype: Any) -> Sums:
        """Return the sums "agreement" and "weight" of `taught_agreement`. For a single teacher, also return
        "acceptance".

        The acceptance, sum(min(p, q)), is the probability that the teacher accepts a token of the student in
        speculative decoding. The result of an encoder has no acceptance, because an encoder does not generate text.
        """
        found = super().agreement(student, teachers, batch, dtype)
        if len(teachers) > 1 or student[0].architecture == "encoder":
            return found
        sides = [_side(network, batch, dtype) for network in (student, *teachers)]
        _, targets_BP, weights_BP = predicted(batch, student[2])
        vocab, how = student[0].vocab_size, SoftLoss(Divergence("total_variation"), 1.0, 0.0)
        sums = chunked_divergence.distillation(sides[0], sides[1:], targets_BP, weights_BP, vocab, how)[1]
        return found | {"acceptance": sums["weight"] - sums[how.divergence.metric]}

    def taught_agreement(self, student: Network, batch: Batch, dtype: Any) -> Sums:
        """Return the sums "agreement" and "weight". The first sum divided by the second is the fraction of tokens that
        student and teachers predict equally.

        Only predicted positions count.
        """
        own = chunked_divergence.listed_tokens([_side(student, batch, dtype)], student[0].vocab_size, 1, 1.0)
        weights_BP = predicted(batch, student[2])[2]
        same_BP = own.ids[..., 0] == _listed(batch).ids[..., 0]
        return {"agreement": jnp.sum(same_BP * weights_BP), "weight": jnp.sum(weights_BP)}

    def _follows(self, cfgs: Sequence[ModelConfig], batch: Batch) -> bool:
        """Return whether the batch has next-sentence labels, and all models predict such labels."""
        return "next_label" in batch and all(cfg.next_sentence for cfg in cfgs)

    def _with_next_sentence(
        self,
        found: tuple[jax.Array, Sums],
        student: Network,
        batch: Batch,
        taught_B2: jax.Array,
        places: int,
        dtype: Any,
        how: SoftLoss,
    ) -> tuple[jax.Array, Sums]:
        """Add the distillation loss of the next-sentence labels to the loss in `found`, and return the result.

        `found` and the result are (loss, metrics summed over the batch).

        The added loss is multiplied by `places`. The metrics of the labels get names that begin with "next_sentence_".
        """
        (total, sums), label_B = found, batch["next_label"]
        weight_B = row_weight(batch, label_B) * (label_B >= 0)
        y_B2 = functional.outputs(*student, batch, dtype)
        follows, more = soft_class_sums(taught_B2, y_B2, label_B, weight_B, how)
        return total + places * follows, sums | {f"next_sentence_{k}": v for k, v in more.items()}

    def divergence(self, one: Network, other: Network, batch: Batch, dtype: Any) -> jax.Array:
        """Return the symmetric divergence of two networks at the predicted positions (see `Task.divergence`).

        It is computed in chunks.
        """
        (cfg, params, x_BTD), (other_cfg, other_params, other_BTD) = one, other
        x_BPD, _, weights_BP = predicted(batch, x_BTD)
        heads = functional.head_params(cfg, params), functional.head_params(other_cfg, other_params)
        other_BPD = predicted(batch, other_BTD)[0]
        return chunked_divergence.symmetric_divergence(
            project(cfg, dtype), heads, x_BPD, other_BPD, weights_BP, cfg.vocab_size
        )


def _side(network: Network, batch: Batch, dtype: Any) -> chunked_divergence.Side:
    """Return the output projection of a network, its parameters, and the hidden states at the predicted positions."""
    cfg, params, x_BTD = network
    return project(cfg, dtype), functional.head_params(cfg, params), predicted(batch, x_BTD)[0]


def _stored(field: str, batch: Batch) -> str:
    """Return the name of a batch array that stores a field of `Listed` (a teacher's most probable tokens). The name
    shows whether the second axis is the sequence, which a mesh may shard.
    """
    return f"places_teacher_{field}" if "places" in batch else f"teacher_{field}"


def _listed(batch: Batch) -> Listed:
    """Return the teachers' most probable tokens, which `TokenLosses.teacher_arrays` added to the batch."""
    return Listed(*(batch[_stored(name, batch)] for name in Listed._fields))


def _named(found: tuple[jax.Array, Sums], how: SoftLoss) -> tuple[jax.Array, Sums]:
    """Return (loss, sums), with the sums renamed to the names of the task's metrics."""
    total, sums = found
    metric = how.divergence.metric
    return total, {"loss": sums["nll"], metric: sums[metric], "accuracy": sums["correct"], "weight": sums["weight"]}
