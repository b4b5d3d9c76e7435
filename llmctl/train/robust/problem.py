"""Split a task's training loss into its parts, for methods that compare the outputs of several forward passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax

from llmctl.config.errors import RequestError
from llmctl.evaluate.tasks.base import Task
from llmctl.evaluate.tasks.losses import Options
from llmctl.model import functional
from llmctl.model.config import ModelConfig
from llmctl.model.losses import Sums
from llmctl.model.transformer import Batch, Params

States = tuple[Params, jax.Array]
"""Pair (parameters of a network, hidden states [B, T, D] that the network computed). The output head reads the hidden
states."""


@dataclass(frozen=True)
class Problem:
    """Compute a task's training loss in three parts: prepare the batch, run the network, compute the loss."""

    task: Task
    model: ModelConfig
    """Config of the model in training."""
    options: Options
    """Options with which the task's loss is computed."""
    remat: str = "none"
    """Rematerialization policy: which activations the backward pass recomputes (the value of `train.remat`)."""
    prepare: Callable[[Batch, jax.Array], Batch] = lambda batch, key: batch
    """Function that adds the configured class weights, and the configured noise on embeddings, to a batch. Its
    arguments are the batch and a random key."""

    def batch(self, batch: Batch, key: jax.Array) -> Batch:
        """Apply `prepare` to a batch, and return the arrays that the network reads."""
        return self.task.model_inputs(self.prepare(batch, key))

    def hidden(self, params: Params, batch: Batch, key: jax.Array) -> jax.Array:
        """Run the network with dropout, and return the hidden states [B, T, D]. `batch` is the result of
        `Problem.batch`.
        """
        return functional.hidden(
            self.model, params, batch, train=True, rng=key, dtype=self.options.dtype, remat=self.remat
        )

    def loss(self, states: States, batch: Batch) -> tuple[jax.Array, Sums]:
        """Return (sum of losses, metric sums by name) of the outputs of a forward pass."""
        params, x_BTD = states
        return self.task.loss(self.model, params, x_BTD, batch, self.options)

    def divergence(self, one: States, other: States, batch: Batch) -> jax.Array:
        """Return the symmetric divergence between the outputs of two forward passes.

        The divergence is summed over the same tokens or examples as the loss.
        """
        return self.task.divergence((self.model, *one), (self.model, *other), batch, self.options.dtype)

    def check(self, setting: str) -> None:
        """Check that the task defines a divergence between two outputs. `setting` is the name of the setting in errors.

        Raises:
          RequestError: If the task has a loss function that cannot be split into parts, or defines no divergence.
        """
        own = type(self.task)
        compares = own.divergence is not Task.divergence or own.soft_score is not Task.soft_score
        if own.loss_of is not Task.loss_of or not compares:
            raise RequestError(f"{setting}: task {self.task.name!r} has no divergence between two outputs")
