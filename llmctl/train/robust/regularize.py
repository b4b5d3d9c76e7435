"""Regularize finetuning by noise on embeddings (NEFTune), R-Drop, L2-SP, Mixout and class weights.

Shapes: B rows, T tokens per row, D model width, C classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmctl.config.base import hint
from llmctl.config.errors import RequestError
from llmctl.data.splits import Examples
from llmctl.model import weights
from llmctl.model.losses import Loss, Sums
from llmctl.model.transformer import Batch, Params
from llmctl.train.robust.perturbation import Site
from llmctl.train.robust.problem import Problem

NOISE = 0x0E
"""Constant that is folded into the dropout key. The resulting key is the random key of the noise."""


MIXED = 0x31
"""Constant that is folded into the dropout key. The resulting key is the random key of Mixout."""


def noise(alpha: float, where: Site, key: jax.Array) -> jax.Array:
    """Sample uniform noise [B, T, D] of at most alpha / sqrt(n * D) per entry.

    The noise is as in NEFTune (Jain et al., 2023, arXiv:2310.05914). In this bound, n is the number of tokens of the
    row without padding.
    """
    return where.uniform(jax.random.fold_in(key, NOISE)) * (alpha / jnp.sqrt(where.entries_B11))


def r_drop(problem: Problem, alpha: float) -> Loss:
    """Return the loss function of R-Drop (Liang et al., 2021, arXiv:2106.14448).

    The batch passes through the network twice, with different dropout. The loss is the mean of both losses, plus alpha
    times the divergence between the outputs. The paper adds both losses, so the paper's alpha is twice this alpha.
    """

    def loss(params: Params, batch: Batch, key: jax.Array, **_: Any) -> tuple[jax.Array, Sums]:
        batch = problem.batch(batch, key)
        one, other = ((params, problem.hidden(params, batch, k)) for k in jax.random.split(key))
        total, sums = jax.tree.map(lambda a, b: (a + b) / 2, problem.loss(one, batch), problem.loss(other, batch))
        return total + alpha * problem.divergence(one, other, batch), sums

    return loss


def toward_start(own: Loss, factor: float) -> Loss:
    """Return a loss function with a penalty on the distance from the weights before finetuning (L2-SP).

    The loss is `own` + factor / 2 * (squared distance). The training state keeps the weights before finetuning in its
    entry "memory", under the name "start". The penalty is from Li et al. (2018, arXiv:1802.01483).
    """

    def loss(params: Params, batch: Batch, key: jax.Array, *constants: Any, memory: Any, **more: Any) -> Any:
        total, sums = own(params, batch, key, *constants, memory=memory, **more)
        now = weights.arrays(params)
        apart = [jnp.sum(jnp.square(now[name] - start)) for name, start in memory["start"].items()]
        return total + sums["weight"] * (factor / 2) * sum(apart[1:], apart[0]), sums

    return loss


def mixout(own: Loss, rate: float) -> Loss:
    """Return a loss function that replaces some weights by their values before finetuning, and then computes the loss
    `own`.

    Each weight w is replaced by its value w0 before finetuning, with probability `rate`. The other weights become w0 +
    (w - w0) / (1 - rate). The expected value is therefore w. With w0 = 0 this is dropout of the weights. The training
    state keeps w0 in its entry "memory", under the name "start". The method is called Mixout (Lee et al., 2020,
    arXiv:1909.11299).
    """

    def loss(params: Params, batch: Batch, key: jax.Array, *constants: Any, memory: Any, **more: Any) -> Any:
        mixed, now = jax.random.fold_in(key, MIXED), weights.arrays(params)
        for i, (name, start) in enumerate(sorted(memory["start"].items())):
            keep = jax.random.bernoulli(jax.random.fold_in(mixed, i), 1 - rate, start.shape)
            # In this form a weight that did not move stays exactly, zeros of a pruned matrix among them.
            now[name] = start + jnp.where(keep, (now[name] - start) / (1 - rate), 0)
        return own(weights.rebuild(params, now), batch, key, *constants, memory=memory, **more)

    return loss


def from_parent(names: Collection[str], params: Params) -> list[str]:
    """Return the elements of `names` whose arrays existed before finetuning.

    The arrays of adapters, trained prompts, trained prefixes and the task's head are new, and are left out.
    """
    adapters = weights.adapter_names(params)

    def is_new(name: str) -> bool:
        parsed = weights.parse(name)
        return name in adapters or parsed.task_head or parsed.prompt or parsed.prefix or parsed.bottleneck

    return [name for name in names if not is_new(name)]


def class_counts(examples: Examples) -> list[int]:
    """Return the number of examples of each class. If each word has a class, return the number of words of each
    class."""
    if examples.labels is not None:
        return np.bincount(examples.labels, minlength=len(examples.classes)).tolist()
    found = Counter(tag for i in range(len(examples)) for tag in examples[i]["tags"])
    return [found[name] for name in examples.classes]


def class_weights(given: Any, labels: Sequence[str], counts: Sequence[int]) -> np.ndarray:
    """Return the weight of each class, float32 [C].

    If `given` is "balanced", the weight of class c is n / (C * n_c). Here n is the number of all examples, and n_c the
    number of examples of class c. C is the number of classes with examples. The mean weight of the examples is then 1.
    A class without examples has weight 1.

    Raises:
      RequestError: If a class is unknown.

    Example:
      >>> class_weights("balanced", ["no", "yes", "maybe"], [2, 1, 3]).tolist()
      [1.0, 2.0, 0.6666666865348816]
      >>> class_weights({"yes": 5.0}, ["no", "yes"], []).tolist()
      [1.0, 5.0]
    """
    if given == "balanced":
        n_C = np.array(counts, np.float64) if len(counts) else np.ones(len(labels))
        balanced_C = n_C.sum() / ((n_C > 0).sum() * np.maximum(n_C, 1))
        return np.where(n_C > 0, balanced_C, 1.0).astype(np.float32)
    table: Mapping[str, float] = given
    for name in table:
        if name not in labels:
            raise RequestError(
                f"regularize.class_weights: no class {name!r}{hint(name, list(labels))}; there are {', '.join(labels)}"
            )
    return np.array([table.get(name, 1.0) for name in labels], np.float32)
