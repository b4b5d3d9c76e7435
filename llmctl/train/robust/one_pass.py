"""Compute the gradients of the weights and of a perturbation in one backward pass.

An adversarial method computes gradients with respect to the perturbation inside the loss function. If JAX
differentiated this loss function, every pass would run twice. This module therefore defines a custom derivative
(`jax.custom_vjp`). The forward rule runs the passes, and stores the gradients of the weights. The backward rule returns
these gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from llmctl.model.losses import Loss, Sums
from llmctl.model.transformer import Batch, Params
from llmctl.train.robust import perturbation
from llmctl.train.robust.perturbation import Search
from llmctl.train.robust.problem import Problem

Tree = Any
Found = tuple[jax.Array, Sums]
"""Result of a loss function for a batch: (sum of losses, sums of metrics by name)."""
Pull = Callable[[jax.Array], tuple[Found, Any, jax.Array]]
"""Function that runs one forward and backward pass with a perturbation [B, T, D]. The result is ((sum of losses, metric
sums), gradients of the trained arrays, gradient of the perturbation).
"""
Passes = Callable[[Search, jax.Array, Pull], tuple[Found, Any]]
"""Function such as `Adversary.passes`. Its arguments are the search, the initial perturbation, and a function
`pull`. It returns ((sum of losses, metric sums), gradients)."""

START = 0x0F
"""Constant that is folded into the dropout key. The resulting key is the random key of the initial perturbation."""


def wrapped(own: Loss, method: Passes, options: dict[str, Any], problem: Problem) -> Loss:
    """Return a loss function that applies an adversarial method to the loss `own` of the task.

    Args:
      own: loss of the task, without perturbations.
      method: function `passes` of the adversarial method.
      options: the method's settings, by name.
      problem: the task and the config of the model, which determine the embeddings that are perturbed.
    """

    def loss(params: Params, batch: Batch, key: jax.Array, *constants: Any, **more: Any) -> Found:
        def at(trained: Tree, offset_BTD: jax.Array, rest: Tree) -> Found:
            params, constants, more = trained
            batch, key = rest
            where = perturbation.site(problem.model, problem.task.model_inputs(batch))
            return own(params, where.added(batch, offset_BTD), key, *constants, **more)

        def passes(pull: Pull, trained: Tree, rest: Tree) -> tuple[Found, Tree]:
            batch, key = rest
            where = perturbation.site(problem.model, problem.task.model_inputs(batch))
            search = Search.of(options, where, trained[0])
            return method(search, search.begin(where, jax.random.fold_in(key, START)), pull)

        return with_gradients(at, passes, (params, constants, more), (batch, key))

    return loss


def with_gradients(
    loss: Callable[[Tree, jax.Array, Tree], Found],
    passes: Callable[[Pull, Tree, Tree], tuple[Found, list[jax.Array]]],
    trained: Tree,
    rest: Tree,
) -> Found:
    """Run `passes`, and return its (sum of losses, metric sums) as a result that JAX can differentiate.

    The derivative with respect to `trained` is the gradients that `passes` returns.

    Args:
      loss: loss function. Its arguments are `trained`, the perturbation and `rest`. It returns (sum of losses, metric
        sums).
      passes: function that returns ((sum of losses, metric sums), gradients). Its arguments are a function `pull`,
        `trained` and `rest`. It calls `pull` for each forward and backward pass of `loss`.
      trained: arrays that may get gradients. Only the gradients that the caller requests are computed.
      rest: other arguments of the loss, without gradients.
    """
    leaves, structure = jax.tree.flatten(trained)

    def run(leaves: list[Any], rest: Tree, chosen: list[int]) -> tuple[Found, list[jax.Array]]:
        def at(picked: list[Any], offset_BTD: jax.Array) -> Found:
            now = list(leaves)
            for i, leaf in zip(chosen, picked, strict=True):
                now[i] = leaf
            return loss(jax.tree.unflatten(structure, now), offset_BTD, rest)

        def pull(offset_BTD: jax.Array) -> tuple[Found, list[jax.Array], jax.Array]:
            both = jax.value_and_grad(at, argnums=(0, 1), has_aux=True)
            found, (gradients, rises_BTD) = both([leaves[i] for i in chosen], offset_BTD)
            return found, gradients, rises_BTD

        return passes(pull, jax.tree.unflatten(structure, leaves), rest)

    @jax.custom_vjp
    def value(leaves: list[Any], rest: Tree) -> Found:
        return run(leaves, rest, [])[0]

    def forward(leaves: list[Any], rest: Tree) -> tuple[Found, list[Any]]:
        chosen = [i for i, leaf in enumerate(leaves) if leaf.perturbed]
        leaves, rest = jax.tree.map(lambda a: a.value, (leaves, rest))
        found, gradients = run(leaves, rest, chosen)
        of = dict(zip(chosen, gradients, strict=True))
        return found, [of.get(i) for i in range(len(leaves))]

    def backward(gradients: list[Any], cotangent: Any) -> tuple[list[Any], None]:
        return [None if g is None else g * cotangent[0].astype(g.dtype) for g in gradients], None

    value.defvjp(forward, backward, symbolic_zeros=True)
    return value(leaves, rest)
