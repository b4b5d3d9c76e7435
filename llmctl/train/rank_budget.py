"""Allocate ranks to matrices by importance while training (AdaLoRA; Zhang et al., 2023, arXiv:2303.10512).

A triplet is a singular value with its two singular vectors. The importance of a triplet is the importance of its
singular value, plus the mean importance of each vector's entries. The importance of an entry is its sensitivity |w*g|
times the uncertainty of the sensitivity. Sensitivity and uncertainty are moving averages over the training steps. As in
the authors' code, w is the weight after the optimizer's step.

Shapes: L layers, I inputs, O outputs, R initial rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from llmctl.model.weights import join

Named = dict[str, jax.Array]
State = dict[str, Any]


@dataclass(frozen=True)
class Budget:
    """Compute the number of singular values that all low-rank updates together may keep at a training step.

    The fields count triplets: singular values with their two singular vectors.
    """

    first: int
    """Number of triplets before the first removal."""
    last: int
    """Number of triplets after the last removal."""
    start: int
    """Last step with all triplets. Removals begin after this step."""
    settled: int
    """Step from which the number of triplets is `last`. From this step on, the set of kept triplets does not change."""
    interval: int
    """Number of steps between removals."""

    def at(self, step: Any) -> jax.Array:
        """Return the number of triplets at a step, int32 scalar. The number decreases by a cubic schedule."""
        rest = 1 - (step - self.start) / max(self.settled - self.start, 1)
        falling = jnp.floor((self.first - self.last) * jnp.clip(rest, 0.0, 1.0) ** 3 + self.last)
        return jnp.where(step <= self.start, self.first, falling).astype(jnp.int32)


@dataclass(frozen=True)
class Allocator:
    """Set the least important singular values of AdaLoRA's adapters to zero during training.

    The methods `memory` and `after_step` are used as fields of a training job (`llmctl.train.job.Job`).
    """

    shapes: Mapping[str, tuple[int, ...]]
    """Shape [L, 1, R] of the singular values of each adapter, by path of the adapter."""
    budget: Budget
    sensitivity: float
    """Decay rate of the moving average of the sensitivities |weight * gradient|."""
    uncertainty: float
    """Decay rate of the moving average of the uncertainties |sensitivity - moving average of the sensitivity|."""

    def memory(self, named: Named) -> State:
        """Return the initial values of the arrays that are kept between steps.

        The moving averages of sensitivity and uncertainty begin with 0. The masks of the singular values to keep begin
        with True.
        """
        entries = {join(path, part): named[join(path, part)] for path in self.shapes for part in ("a", "b", "e")}
        return {
            "sensitivity": jax.tree.map(jnp.zeros_like, entries),
            "uncertainty": jax.tree.map(jnp.zeros_like, entries),
            "kept": {path: jnp.ones(shape, bool) for path, shape in self.shapes.items()},
            "settled": jnp.zeros((), bool),
        }

    def after_step(self, state: State, step: jax.Array) -> State:
        """Return the state with updated moving averages and masks. The singular values of removed triplets become zero.

        A triplet is a singular value with its two singular vectors. The averages are those of sensitivity and
        uncertainty.
        """
        params, gradients, memory = state["params"], state["gradients"], state["memory"]
        budget = self.budget
        measures = step < budget.settled

        def averaged(decay: float, old: jax.Array, new: jax.Array) -> jax.Array:
            return jnp.where(measures, decay * old + (1 - decay) * new, old)

        now = {n: jnp.abs(params[n] * gradients[n]) for n in memory["sensitivity"]}
        mean = {n: averaged(self.sensitivity, a, now[n]) for n, a in memory["sensitivity"].items()}
        apart = {n: averaged(self.uncertainty, a, jnp.abs(now[n] - mean[n])) for n, a in memory["uncertainty"].items()}
        settles = (step >= budget.settled) & ~memory["settled"]  # if this step is skipped, a later one settles
        removes = (step > budget.start) & (step % budget.interval == 0) & measures | settles
        chosen = self.choose({n: mean[n] * apart[n] for n in mean}, budget.at(step))
        kept = {path: jnp.where(removes, chosen[path], old) for path, old in memory["kept"].items()}
        settled = memory["settled"] | settles
        out = state | {"memory": {"sensitivity": mean, "uncertainty": apart, "kept": kept, "settled": settled}}
        # Between two removals, removed values may grow again. Averages are cut once the choice is final.
        for key, masks in (("params", removes | settled), ("ema", settled)):
            if key in state:
                values = {join(path, "e"): state[key][join(path, "e")] for path in kept}
                cut = {n: jnp.where(masks & ~k, 0, values[n]) for n, k in zip(values, kept.values(), strict=True)}
                out[key] = state[key] | cut
        return out

    def choose(self, scores: Named, budget: jax.Array) -> dict[str, jax.Array]:
        """Return masks [L, 1, R] of the singular values to keep, by path of the adapter.

        Over all adapters, the `budget` most important singular values are kept.
        """
        importance = {path: self.importance(scores, path) for path in self.shapes}
        flat = jnp.concatenate([a.reshape(-1) for a in importance.values()])
        place = jnp.argsort(jnp.argsort(-flat, stable=True), stable=True)
        kept, first = {}, 0
        for path, a in importance.items():
            kept[path] = (place[first : first + a.size] < budget).reshape(a.shape)
            first += a.size
        return kept

    def importance(self, scores: Named, path: str) -> jax.Array:
        """Return the importance [L, 1, R] of each singular value of an adapter together with its singular vectors.

        Args:
          scores: importance of each entry of the adapters' arrays, by array name.
          path: path of the adapter.
        """
        a_LIR, b_LRO, e_L1R = (scores[join(path, part)] for part in ("a", "b", "e"))
        return e_L1R + a_LIR.mean(axis=-2, keepdims=True) + jnp.swapaxes(b_LRO.mean(axis=-1, keepdims=True), -1, -2)
