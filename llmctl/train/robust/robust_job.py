"""Add the settings `adversarial` and `regularize` to the training job of a finetuning.

    learner = robust_job.attached(config, learner, counts)

The loss is built in this order:

1. The batch gets noise on embeddings, and class weights.
2. The task's loss is computed, or the loss of two passes (R-Drop).
3. The adversarial method computes this loss on perturbed rows.
4. Before the loss reads the weights, Mixout replaces some weights by their values before finetuning.
5. A penalty on the distance from the weights before finetuning is added (L2-SP).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from llmctl.config.errors import RequestError
from llmctl.evaluate.tasks.base import Task
from llmctl.evaluate.tasks.losses import Options
from llmctl.model.config import ModelConfig
from llmctl.model.transformer import Batch
from llmctl.train.adapters.registry import METHODS
from llmctl.train.job import EXTRA, Job, Params, State, split
from llmctl.train.robust import perturbation, regularize
from llmctl.train.robust.problem import Problem
from llmctl.train.robust.registry import ADVERSARIES

if TYPE_CHECKING:
    from llmctl.train.learner import Learner


Kept = tuple[Callable[[Params], dict[str, Any]], Callable[[dict[str, Any], Params, jax.Array], dict[str, Any]]]
"""Two functions for arrays that are kept between steps. The first computes the initial kept arrays, by name, from the
trained arrays. The second computes the kept arrays after a step. Its arguments are the kept arrays, the trained arrays
and the step.
"""


def attached(config: Any, learner: Learner, counts: Sequence[int] = ()) -> Learner:
    """Return the learner with the losses that the sections `adversarial` and `regularize` set.

    Args:
      config: config of the stage, with `adversarial`, `regularize` and `train`.
      learner: the model, the task and the finetuning method, from which the training job is made.
      counts: number of training examples of each class, for `class_weights = "balanced"`. If empty, all classes have
        equal numbers.

    Raises:
      RequestError: If a setting does not suit the task or the model, or has no effect.
    """
    asks, named = config.regularize, config.adversarial.method
    if not named and asks == type(asks)():
        return learner
    check_classes(asks, learner.task)
    weight_C = None
    if asks.class_weights:
        weight_C = jnp.asarray(regularize.class_weights(asks.class_weights, learner.labels, counts))
    problem = Problem(
        learner.task,
        learner.training_model,
        Options(**learner.options(config.train)),
        config.train.remat,
        _preparation(learner.task, learner.training_model, asks.neftune, weight_C),
    )
    compares = [f"adversarial.method = {named!r}"] if named and ADVERSARIES[named].compares else []
    if asks.r_drop:
        compares.append("regularize.r_drop")
        if not learner.training_model.dropout:
            raise RequestError("regularize.r_drop: two passes are equal without dropout; set dropout, such as 0.1")
    if len(compares) > 1:
        raise RequestError(f"{' and '.join(compares)} both compare outputs: leave one of them out")
    for setting in compares:
        problem.check(setting)
        if learner.loss or learner.job_fields.get("extra"):
            raise RequestError(f"{setting}: not for method {config.method!r}, which has a loss of its own")
    return dataclasses.replace(learner, adapt_job=partial(_changed, config, problem))


def check_classes(asks: Any, task: Task) -> None:
    """Check that the settings `class_weights` and `balance` suit the task and each other.

    Args:
      asks: settings of the section `regularize`.
      task: task of the model.

    Raises:
      RequestError: If `class_weights` or `balance` does not suit the task, or if both settings would balance the
        classes.
    """
    single = task.classes and task.label_type == "class"
    if asks.class_weights and not single:
        raise RequestError(f"regularize.class_weights: not for task {task.name!r}, which has no single class")
    if asks.balance and not (single and type(task).rows is Task.rows):
        raise RequestError(f"regularize.balance: not for task {task.name!r}, whose rows have no single class")
    if asks.balance and asks.class_weights == "balanced":
        raise RequestError("regularize: balance and class_weights = 'balanced' correct the same: leave one of them out")


def _preparation(
    task: Task, model: ModelConfig, alpha: float, weight_C: jax.Array | None
) -> Callable[[Batch, jax.Array], Batch]:
    """Return a function that adds class weights and noise on embeddings to a batch.

    Its arguments are the batch and the random key of the noise.
    """

    def prepare(batch: Batch, key: jax.Array) -> Batch:
        if weight_C is not None:
            batch = task.weighted(batch, weight_C)
        if alpha:
            where = perturbation.site(model, task.model_inputs(batch))
            batch = where.added(batch, regularize.noise(alpha, where, key))
        return batch

    return prepare


def _changed(config: Any, problem: Problem, job: Job, steps: int) -> Job:
    """Return the job with the loss that the sections `adversarial` and `regularize` define.

    The job also gets the arrays that this loss keeps between steps, and the FLOPs per token of this loss.
    """
    asks, factor, plain = config.regularize, 1.0, job.loss

    def prepared(params: Params, batch: Batch, key: jax.Array, *constants: Any, memory: Any = None, **more: Any) -> Any:
        return plain(params, problem.prepare(batch, key), key, *constants, **more)

    loss: Any = prepared
    kept: list[Kept] = []
    if asks.r_drop:
        loss, factor = regularize.r_drop(problem, asks.r_drop), 2.0
    if config.adversarial.method:
        method = ADVERSARIES[config.adversarial.method]
        loss, factor = method.loss(config.adversarial, problem, loss), factor * method.cost(config.adversarial)
        if begins := method.memory(config.adversarial):
            kept.append((begins, partial(method.remember, config.adversarial, steps)))
    if asks.mixout and not METHODS[config.method].changes_base:
        raise RequestError(
            f"regularize.mixout: mixes the parent's weights into those that are trained, and method {config.method!r} "
            "freezes its matrices; use method = 'full', or dropout"
        )
    if asks.l2_start or asks.mixout:
        trained = [name for name in split(job)[0] if not name.startswith(EXTRA)]
        names = regularize.from_parent(trained, job.params)
        if not names:
            setting = "l2_start" if asks.l2_start else "mixout"
            raise RequestError(f"regularize.{setting}: method {config.method!r} trains no weights of the parent")
        loss = regularize.mixout(loss, asks.mixout) if asks.mixout else loss
        loss = regularize.toward_start(loss, asks.l2_start) if asks.l2_start else loss
        kept.append(
            (
                lambda named: {"start": {name: jnp.copy(named[name]) for name in names}},
                lambda memory, named, step: {"start": memory["start"]},
            )
        )
    changed = dataclasses.replace(job, loss=loss, flops=factor * job.flops)
    return remembering(changed, kept) if kept else changed


def remembering(job: Job, kept: Sequence[Kept]) -> Job:
    """Return the job with further arrays that are kept between steps, and that the loss reads.

    The new arrays are added to the entry "memory" of the training state. Arrays that the job kept before do not change.
    """

    def memory(named: Params) -> dict[str, Any]:
        found = dict(job.memory(named)) if job.memory else {}
        for begins, _ in kept:
            found |= begins(named)
        return found

    def after_step(state: State, step: jax.Array) -> State:
        found = job.after_step(state, step) if job.after_step else state
        after = found["memory"]
        for _, follows in kept:
            after = after | follows(state["memory"], found["params"], step)
        return found | {"memory": after}

    return dataclasses.replace(job, memory=memory, after_step=after_step, reads_memory=True)
