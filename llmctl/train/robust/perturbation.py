"""Perturb token embeddings: add perturbations to a batch, measure sizes, and search for perturbations that increase the
loss.

Padding is never perturbed. Norms and steps are per row (sequence), so a row's result does not depend on other rows of
its batch.

Shapes: B rows, T tokens per row, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llmctl.distributed import mesh as meshes
from llmctl.model import weights
from llmctl.model.config import ModelConfig
from llmctl.model.transformer import Batch, Params

TINY = 1e-30


class Site(NamedTuple):
    """Describe the embeddings of a batch that are perturbed. If the model has an encoder, these are the embeddings of
    the encoder."""

    name: str
    """Name of the perturbation among the arrays of a batch. The model adds this array to its token embeddings."""
    mask_BT1: jax.Array
    """Mask of the positions to perturb: 1 at tokens, 0 at padding."""
    tokens_BT: jax.Array
    width: int
    entries_B11: jax.Array
    """Number of perturbed entries per row: the row's number of tokens times the model width."""

    def uniform(self, key: jax.Array) -> jax.Array:
        """Sample a perturbation [B, T, D] with entries uniform in [-1, 1], and zero at padding."""
        shape = (*self.tokens_BT.shape, self.width)
        return self.constrained(jax.random.uniform(key, shape, minval=-1.0, maxval=1.0) * self.mask_BT1)

    def zeros(self) -> jax.Array:
        """Return a perturbation [B, T, D] of zeros."""
        return self.constrained(jnp.zeros((*self.tokens_BT.shape, self.width)))

    def constrained(self, offset_BTD: jax.Array) -> jax.Array:
        """Return the perturbation with the sharding of the embeddings."""
        return meshes.constrain(offset_BTD, "batch", "seq", "act_embed")

    def added(self, batch: Batch, offset_BTD: jax.Array) -> Batch:
        """Return the batch with the perturbation added. If the batch already has a perturbation, the result has the sum
        of both perturbations.
        """
        return batch | {self.name: batch[self.name] + offset_BTD if self.name in batch else offset_BTD}

    def size(self, params: Params, norm: str) -> jax.Array:
        """Return the size of each row's token embeddings, [B, 1, 1].

        If the norm is "l2", the size is the Euclidean norm of the embeddings. If the norm is "linf", the size is the
        root mean square of the entries.
        """
        table = jax.tree.map(jax.lax.stop_gradient, params["embed"]["tokens"])
        x_BTD = weights.take(table, self.tokens_BT, jnp.float32, ("vocab_in", "embed_in")) * self.mask_BT1
        square_B11 = jnp.sum(jnp.square(x_BTD), axis=(1, 2), keepdims=True)
        return jnp.sqrt(square_B11 if norm == "l2" else square_B11 / self.entries_B11)


def site(cfg: ModelConfig, batch: Batch) -> Site:
    """Return a description of the embeddings that are perturbed in a batch."""
    side = "encoder_" if cfg.encoder_layers else ""
    mask_BT1 = (batch[f"{side}segments"] > 0).astype(jnp.float32)[..., None]
    entries_B11 = jnp.maximum(jnp.sum(mask_BT1, axis=(1, 2), keepdims=True), 1) * cfg.d_model
    return Site(f"{side}embedding_offset", mask_BT1, batch[f"{side}tokens"], cfg.d_model, entries_B11)


@dataclass(frozen=True)
class Search:
    """Search for a perturbation that increases the loss, by gradient ascent within a ball around the embeddings.

    `epsilon`, `step_size` and `start` are relative to the size of a row's embeddings. For "l2", the size is the
    Euclidean norm. For "linf", the size is the root mean square of the entries.
    """

    mask_BT1: Any
    size_B11: Any
    epsilon: float
    """Radius of the ball of allowed perturbations."""
    step_size: float
    norm: str = "l2"
    """Norm of a row's perturbation. "l2": Euclidean norm of all entries. "linf": largest absolute value of an entry."""
    steps: int = 1
    start: float = 0.0
    """Maximum norm of the random perturbation before the first step; 0 starts from zero."""
    weight: float = 1.0
    """Weight of the perturbed rows in the method's loss. The search itself does not read this value."""

    @classmethod
    def of(cls, options: Mapping[str, Any], at: Site, params: Params) -> Search:
        """Return the search for perturbations with the settings `options` of an adversarial method.

        If the method has no setting `step_size`, the step size is `epsilon`.
        """
        known = {k: options[k] for k in ("epsilon", "norm", "steps", "step_size", "start", "weight") if k in options}
        return cls(at.mask_BT1, at.size(params, known.get("norm", "l2")), **{"step_size": known["epsilon"], **known})

    def begin(self, at: Site, key: jax.Array) -> jax.Array:
        """Return the perturbation [B, T, D] before the first step. Its norm is at most `start`.

        Entries are uniform in an interval around zero.
        """
        if not self.start:
            return at.zeros()
        side_B11 = self.start * self.size_B11
        return at.uniform(key) * (side_B11 / jnp.sqrt(at.entries_B11) if self.norm == "l2" else side_B11)

    def ascend(self, offset_BTD: jax.Array, rises_BTD: jax.Array) -> jax.Array:
        """Return the perturbation after one step along `rises_BTD`, the gradient of the loss.

        The result is projected onto the ball.
        """
        rises_BTD = rises_BTD.astype(jnp.float32) * self.mask_BT1
        if self.norm == "linf":
            moved_BTD = offset_BTD + self.step_size * self.size_B11 * jnp.sign(rises_BTD)
            most_B11 = self.epsilon * self.size_B11
            return jnp.clip(moved_BTD, -most_B11, most_B11)
        # Divided by the largest entry first, because the square of a small gradient would be zero.
        largest_B11 = jnp.max(jnp.abs(rises_BTD), axis=(1, 2), keepdims=True)
        rises_BTD = rises_BTD / jnp.where(largest_B11 > 0, largest_B11, 1.0)
        moved_BTD = offset_BTD + self.step_size * self.size_B11 * rises_BTD / jnp.maximum(length(rises_BTD), TINY)
        return moved_BTD * jnp.minimum(1.0, self.epsilon * self.size_B11 / jnp.maximum(length(moved_BTD), TINY))


def length(x_BTD: jax.Array) -> jax.Array:
    """Return the Euclidean norm of all entries of each row, [B, 1, 1]."""
    return jnp.sqrt(jnp.sum(jnp.square(x_BTD), axis=(1, 2), keepdims=True))
