"""Prune single weights during training, by a schedule of steps (Zhu and Gupta, 2017, arXiv:1710.01878).

    job = sparsify.attached(config.sparsify, job, train.steps)

The zeros of a matrix are its mask, as in pruned artifacts. The training state contains the weights with these zeros, so
that a resumed run has the same masks. Between two changes of the mask, each step keeps the zeros
(`llmctl.train.step.hold_zeros`). The sparsity is computed from the step number within the compiled step, so nothing is
compiled again.

The score `magnitude` is |w|, and a zero stays zero. The score `movement` (Sanh et al., 2020, arXiv:2005.07683) is the
sum over steps of -w g. Zeros have gradients too. For a zero, w in this sum is the last nonzero value of the weight. If
the score of a zero rises, the zero gets this value back.

Shapes: L layers, I inputs, O outputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from llmctl.artifacts.artifact import Artifact
from llmctl.compress.pruning import prune
from llmctl.compress.pruning.masks import mask
from llmctl.compress.pruning.pattern import Pattern
from llmctl.compress.pruning.sparse_method import SparseMethod
from llmctl.config.errors import RequestError, WorkError
from llmctl.model import weights
from llmctl.train.job import Job, Params, State, Sums, split
from llmctl.train.sparsify_settings import SparsifyConfig

Named = dict[str, jax.Array]
ENTRY = "sparsify"
"""Key of the arrays that pruning keeps between steps, inside the entry "memory" of the training state."""


@dataclass(frozen=True)
class Schedule:
    """Compute the steps at which masks change, and the sparsity of the masks.

    >>> rising = Schedule("cubic", start=0, end=4, every=1)
    >>> [float(rising.fraction(step)) for step in (1, 2, 4)]
    [0.578125, 0.875, 1.0]
    """

    name: str
    """Name of the schedule in `SparsifyConfig`."""
    start: int
    """Step after which weights may become zero."""
    end: int
    """Step at which the masks change for the last time."""
    every: int
    """Number of steps between two changes of the masks."""

    @property
    def full_from(self) -> int:
        """Return the first step after which the sparsity has its final value."""
        return self.start + 1 if self.name == "constant" else self.end

    def fraction(self, step: Any) -> jax.Array:
        """Return the sparsity at a step as a fraction of the final sparsity: a scalar from 0 to 1."""
        if self.name != "cubic":
            return jnp.where(step > self.start, 1.0, 0.0)
        rest = jnp.clip((self.end - step) / (self.end - self.start), 0.0, 1.0)
        return jnp.asarray(1.0 - rest**3)

    def due(self, step: Any, settled: jax.Array) -> jax.Array:
        """Return whether the masks change after a step. `settled` is true if the last change was already made.

        If step `end` is skipped as a bad step, the last change is made after the next good step.
        """
        first = 1 if self.name == "constant" else self.every
        regular = (step > self.start) & ((step - self.start - first) % self.every == 0)
        return jnp.where(step >= self.end, ~settled, regular)


@dataclass(frozen=True)
class Sparsifier:
    """Set the weights with the lowest scores to zero while the model is trained.

    The methods `memory`, `after_step` and `state_metrics` are used as fields of a training job
    (`llmctl.train.job.Job`).
    """

    names: tuple[str, ...]
    """Names of the matrices, arrays [L, I, O]."""
    pattern: Pattern
    """Sparsity pattern of the result."""
    schedule: Schedule
    movement: bool = False
    """Whether weights are scored by movement instead of magnitude."""

    def memory(self, named: Params) -> dict[str, Any]:
        """Return the initial values of the arrays that are kept between steps.

        If the score is `movement`, the arrays include the scores, and the last values of weights that became zero.
        """
        own = {name: named[name] for name in self.names}
        found: dict[str, Any] = {"settled": jnp.zeros((), bool), "sparsity": _sparsity(own)}
        if self.movement:
            found |= {key: jax.tree.map(jnp.zeros_like, own) for key in ("scores", "last")}
        return {ENTRY: found}

    def after_step(self, state: State, step: jax.Array) -> State:
        """Return the state with updated scores. If the masks change after this step, the weights get new zeros.

        A moving average of the weights gets the same zeros.
        """
        memory = dict(state["memory"][ENTRY])
        if self.movement:
            memory["scores"] = self._scores(memory, state)
        kept = {"memory": memory} | {key: {n: state[key][n] for n in self.names} for key in self._keys(state)}
        due = self.schedule.due(step, memory["settled"])
        kept = jax.lax.cond(due, self._changed, lambda kept, step: kept, kept, step)
        arrays = {key: state[key] | kept[key] for key in self._keys(state)}
        return state | arrays | {"memory": state["memory"] | {ENTRY: kept["memory"]}}

    def state_metrics(self, state: State) -> Sums:
        """Return the sparsity of the matrices, counted at the last change."""
        return {"sparsity": state["memory"][ENTRY]["sparsity"]}

    def _keys(self, state: State) -> list[str]:
        return [key for key in ("params", "ema") if key in state]

    def _scores(self, memory: dict[str, Any], state: State) -> Named:
        """Return the movement scores after a step: the sums over steps of -w g.

        Here w is a weight before the step, and g is its gradient in the step.
        """
        found = {}
        for name in self.names:
            before = state["before"][name]
            dense = jnp.where(before == 0, memory["last"][name], before)
            more = -dense * state["dense_gradients"][name]
            found[name] = jnp.where(memory["settled"], memory["scores"][name], memory["scores"][name] + more)
        return found

    def _changed(self, kept: State, step: jax.Array) -> State:
        """Return the entries of the training state that change when masks change: weights, moving average and memory.

        The new masks have the sparsity that the schedule gives for this step.
        """
        memory, params = dict(kept["memory"]), kept["params"]
        fraction = self.schedule.fraction(step)
        dense, masks = {}, {}
        for name, w_LIO in params.items():
            dense[name] = jnp.where(w_LIO == 0, memory["last"][name], w_LIO) if self.movement else w_LIO
            score_LIO = memory["scores"][name] if self.movement else jnp.abs(w_LIO)
            # Zeros of a pruned parent come first, and never return.
            masks[name] = self.mask(jnp.where(dense[name] == 0, -jnp.inf, score_LIO), fraction)
        new = {name: jnp.where(masks[name], w, 0) for name, w in dense.items()}
        out: State = {"params": new}
        if "ema" in kept:
            returned = {n: jnp.where(params[n] == 0, new[n], a) for n, a in kept["ema"].items()}
            out["ema"] = {n: jnp.where(new[n] == 0, 0, a) for n, a in returned.items()}
        if self.movement:
            memory["last"] = {name: jnp.where(masks[name], 0, w) for name, w in dense.items()}
        return out | {"memory": memory | {"settled": step >= self.schedule.end, "sparsity": _sparsity(new)}}

    def mask(self, score_LIO: jax.Array, fraction: jax.Array) -> jax.Array:
        """Return masks [L, I, O], True for the weights to keep. Each layer has the same number of zeros.

        Args:
          score_LIO: scores; the lowest become zero.
          fraction: sparsity as a fraction of the final sparsity.
        """
        pattern, (inputs, outputs) = self.pattern, score_LIO.shape[1:]
        final = pattern.of - pattern.keep if pattern.of else pattern.count(inputs, outputs, "matrix")
        # float32 cannot represent all counts of large matrices, so the last count is not computed.
        count = jnp.where(fraction >= 1, final, jnp.round(fraction * final).astype(jnp.int32))
        # One layer at a time, because sorting needs several arrays of the size of its operand.
        return jax.lax.map(lambda score_IO: mask(score_IO, pattern, "matrix", count), score_LIO)


def _sparsity(named: Named) -> jax.Array:
    """Return the fraction of zeros among the entries of the arrays, a float32 scalar."""
    zeros = [jnp.sum(jnp.sum(a == 0, axis=-1), dtype=jnp.float32) for a in named.values()]
    return jnp.sum(jnp.stack(zeros)) / sum(a.size for a in named.values())


def check(asked: SparsifyConfig, params: Params, base: Artifact | None) -> None:
    """Check that the model can be pruned during training. The arrays may be abstract.

    Args:
      asked: the settings.
      params: initial parameters.
      base: artifact that is trained; None for a new model.

    Raises:
      RequestError: If the pattern does not fit a matrix. If a matrix is quantized. If the artifact already has this
        sparsity.
    """
    if not asked.active:
        return
    prune.check(params, SparseMethod("magnitude", asked.zeros))
    names = weights.zero_names(params)
    if other := sorted({m.path for m in weights.matrices(params, "block")} - names):
        raise RequestError(f"sparsify: {other[0]} is quantized or has an adapter, and its zeros cannot be trained")
    there = _counted(params) if base and not asked.zeros.of else 0.0
    if base and there >= asked.sparsity > 0:
        raise RequestError(
            f"{base.path}: its matrices are {there:.1%} zeros already; sparsify.sparsity = {asked.sparsity:g} changes "
            "nothing"
        )


def _counted(params: Params) -> float:
    """Return the fraction of zeros in the matrices of the layers. For abstract arrays, return 0."""
    concrete = all(isinstance(a, jax.Array) and not isinstance(a, Tracer) for a in jax.tree.leaves(params))
    return prune.sparsity(params) if concrete else 0.0


def attached(asked: SparsifyConfig, job: Job, steps: int) -> Job:
    """Return the job with pruning during its `steps` training steps. If the settings do not prune, return the job
    unchanged.

    Raises:
      RequestError: If a matrix of the layers is not trained in every step. If another function changes the state after
        each step.
    """
    if not asked.active:
        return job
    trained, names = split(job)[0], tuple(sorted(weights.zero_names(job.params)))
    late = [n for n in names if n not in trained or jnp.any(jnp.asarray(job.starts(n)) > 0)]
    if late or job.frozen_layers:
        raise RequestError("sparsify: needs all matrices of the layers to be trained in every step")
    if job.after_step or job.memory:
        raise RequestError("sparsify: not with a method that changes the weights after each step itself")
    start, end, every = asked.steps(steps)
    schedule = Schedule(asked.schedule, start, end, every)
    made = Sparsifier(names, asked.zeros, schedule, asked.score == "movement")
    held: Callable[[str], bool] = job.holds_zeros
    own = frozenset(names)
    return dataclasses.replace(
        job,
        holds_zeros=lambda name: name in own or held(name),
        memory=made.memory,
        after_step=made.after_step,
        state_metrics=made.state_metrics,
        best_from=max(job.best_from, schedule.full_from),
    )


def result_metrics(asked: SparsifyConfig, params: Params) -> dict[str, float]:
    """Return the counted sparsity of a training result as a metric. If the training did not prune, return {}.

    Raises:
      WorkError: If the matrices have fewer zeros than the settings request, because the last steps were skipped.
    """
    if not asked.active:
        return {}
    found, least = prune.sparsity(params), _least(asked.zeros, params)
    if found < least - 1e-6:
        raise WorkError(
            f"sparsify: the matrices have {found:.1%} zeros and not {least:.1%}, because the steps that prune had no "
            "finite loss; lower optim.learning_rate, or set an earlier sparsify.end"
        )
    return {"block_sparsity": found}


def _least(pattern: Pattern, params: Params) -> float:
    """Return the fraction of zeros in the layers' matrices if the pattern is applied to all these matrices."""
    zeros = entries = 0
    for m in weights.matrices(params, "block"):
        layers, inputs, outputs = m.weight.shape
        each = inputs // pattern.of * (pattern.of - pattern.keep) * outputs if pattern.of else None
        blocks = pattern.count(inputs, outputs, "matrix")
        zeros += layers * (blocks * pattern.block_inputs * pattern.block_outputs if each is None else each)
        entries += layers * inputs * outputs
    return zeros / max(entries, 1)
