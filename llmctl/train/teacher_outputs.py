"""Compute the teachers' outputs that a distillation loss reads, by a compiled forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from llmctl.data.device_batches import DeviceBatches, row_shapes
from llmctl.data.taught_rows import UntaughtRows
from llmctl.data.teacher_records import Layout
from llmctl.distributed import mesh as meshes
from llmctl.evaluate.tasks.base import Task
from llmctl.model import attention_kernels, flops, functional
from llmctl.model.config import ModelConfig
from llmctl.model.divergences import Divergence
from llmctl.model.program import Pass, Program
from llmctl.train import distillation

if TYPE_CHECKING:
    from llmctl.artifacts.artifact import Artifact
    from llmctl.train.learner import Learner


def outputs_of(task: Task, teachers: Sequence[ModelConfig], divergence: Divergence, train: Any) -> Any:
    """Return a compiled function that computes the teachers' outputs that the distillation loss reads.

    Its arguments are the parameters of each teacher, and the batch.

    Args:
      task: task of the teachers.
      teachers: configs of the teachers.
      divergence: divergence of the loss.
      train: settings of training. Only `dtype` is read.
    """
    dtype = jnp.dtype(train.dtype)

    def run(params: Sequence[Any], batch: dict[str, Any]) -> dict[str, jax.Array]:
        batch = task.model_inputs(batch)
        each = zip(teachers, params, strict=True)
        networks = [(cfg, own, functional.hidden(cfg, own, batch, dtype=dtype)) for cfg, own in each]
        return task.teacher_arrays(networks, batch, dtype, divergence)

    return jax.jit(run)


def layout(task: Task, teachers: Sequence[Artifact], divergence: Divergence, train: Any, rows: Any) -> Layout:
    """Return the names and shapes of the teachers' outputs for one row. Only the shapes of `rows` are read."""
    batch = {name: jax.ShapeDtypeStruct((1, *np.shape(a)), np.asarray(a).dtype) for name, a in rows[0].items()}
    params = [jax.eval_shape(lambda p: p, t.params) for t in teachers]
    found = outputs_of(task, [t.model for t in teachers], divergence, train).eval_shape(params, batch)
    return Layout({name: a.shape[1:] for name, a in found.items()}, teachers[0].model.vocab_size)


def program(
    config: Any, learner: Learner, teachers: Sequence[Artifact], rows: Any, mesh: jax.sharding.Mesh
) -> tuple[Program, UntaughtRows]:
    """Describe, for `llmctl plan`, the forward pass that computes the stored outputs of the teachers.

    Args:
      config: config of the stage `distill`.
      learner: the student.
      teachers: the teachers, with abstract arrays.
      rows: training rows. Only the shapes of the rows are read.
      mesh: the devices.

    Returns:
      The program, and rows with outputs of the right shapes. `Program.cache_bytes` is the size of the outputs for all
      training steps, if no row is repeated. It is 0 if `train.epochs` sets the number of steps.
    """
    train, how = config.train, distillation.divergence(config)
    models, params = [t.model for t in teachers], [t.params for t in teachers]
    batches = DeviceBatches(mesh, train.batch_size, reading_order=True)
    batch, row = batches.abstract(rows[0]), row_shapes(rows)
    stored = layout(learner.task, teachers, how, train, rows)

    def trace() -> Any:
        with meshes.use(mesh), attention_kernels.use(train.attention):
            return outputs_of(learner.task, models, how, train).trace(params, batch)

    tokens = sum(a.shape[1] for name, a in batch.items() if name.endswith("tokens")) * train.batch_size
    found = Program(
        "outputs of the teacher",
        models[0],
        mesh,
        trace,
        flops=sum(flops.of_rows(model, row) for model in models) * tokens,
        tokens=tokens,
        rows=train.batch_size,
        seq_len=train.seq_len,
        dtype=train.dtype,
        steps=0 if train.epochs else train.steps,
        parameters=params,
        batch=batch,
        cache_bytes=0 if train.epochs else train.steps * train.batch_size * stored.row_bytes(),
        work=Pass(
            attention=train.attention,
            beside=sum(flops.of_rows(model, row) for model in models[1:]) * tokens,
            predicted=row["places"][-1] / row["tokens"][-1] if "places" in row else 1.0,
            written=row["tokens"][-1] if "encoder_tokens" in row else 0,
        ),
    )
    return found, UntaughtRows(rows, stored)
