"""Build the training job of finetuning: the model with its head and adapters, and the loss of the task."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import Mesh

from llmctl.config.errors import RequestError
from llmctl.evaluate.tasks.losses import Options
from llmctl.evaluate.tasks.registry import TASKS
from llmctl.model import weights
from llmctl.train import fake_quantize, learner, loop, sparsify, task_head
from llmctl.train.adapters import selection
from llmctl.train.adapters.registry import METHODS
from llmctl.train.robust import robust_job

if TYPE_CHECKING:
    from llmctl.artifacts.artifact import Artifact


def make_learner(
    config: Any, base: Artifact, labels: list[str], mesh: Mesh, counts: Sequence[int] = ()
) -> learner.Learner:
    """Return the initial parameters and options of the training, as a Learner.

    The parameters are the parent's, with a new task head and the adapters of the finetuning method.

    Args:
      config: config of the stage `finetune`.
      base: the parent.
      labels: names of the classes.
      mesh: the devices.
      counts: number of training examples of each class; empty if the examples are not counted.

    Raises:
      RequestError: If the settings do not fit the parent or the mesh.
    """
    task, method = TASKS[config.task], METHODS[config.method]
    if weights.adapted(base.params):
        raise RequestError(f"{base.path}: has unmerged low-rank pairs; finetune its parent with merge = true first")
    method.check(config, base)
    settings = getattr(config, task.section) if task.section else None
    options = Options(label_smoothing=config.train.label_smoothing, settings=settings)
    task.check_method(method.adapts, options)
    loop.check(base.model, config.train, mesh)
    model, params = task_head.with_head(config, base, labels, mesh)
    model = method.network(config, model)
    sparsify.check(config.sparsify, params, base)
    fake_quantize.check(config.fake_quantize, params)
    params = method.attach(config, model, params, jax.random.fold_in(jax.random.key(config.seed), 1), mesh)
    if config.calibrate and not (task.calibrates and all(map(weights.is_plain, params["head"]["out"].values()))):
        raise RequestError("calibrate: needs task = 'classify' and a head of plain arrays; leave it out")
    fields = {
        **selection.job_fields(config, method, model, params),
        "holds_zeros": base.zeros.__contains__,
        **learner.selection_fields(task, labels),
    }
    if task.reads_adapters(settings):
        beside = {n for n in weights.arrays(params) if fields["trains"](n)} - weights.adapter_names(params)
        if beside:
            raise RequestError(
                f"{task.section}: compares with the model without adapters, so nothing else may be trained, here "
                f"{min(beside)}; use method = 'lora', 'dora', 'adalora' or 'ia3', without lora.modules_to_save"
            )
    made = learner.Learner(
        model, params, task, config.dropout, temperature=config.temperature, settings=settings, labels=labels,
        job_fields=fields, step_fields=partial(selection.during, config, method, model),
    )  # fmt: skip
    return robust_job.attached(config, made, counts)
