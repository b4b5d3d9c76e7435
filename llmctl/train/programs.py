"""Describe the training step of a command, so that `llmctl plan` can estimate its cost. Nothing is computed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
from jax.sharding import Mesh

from llmctl.artifacts.artifact import Artifact
from llmctl.data.device_batches import DeviceBatches, row_shapes
from llmctl.model import flops as cost
from llmctl.model import functional, quantized_matmul, weights
from llmctl.model.program import Pass, Program, Tree
from llmctl.train import learner as training
from llmctl.train import step
from llmctl.train.learner import Learner


def train_step(config: Any, learner: Learner, rows: Any, mesh: Mesh, title: str = "train step") -> Program:
    """Return the training step as a Program: a function that JAX can trace and compile, with abstract arguments.

    Args:
      config: config of the training command, with `seed`, `train` and `optim`.
      learner: the model to train, with abstract arrays.
      rows: training rows. Only the shapes of the first row are used.
      mesh: the devices.
      title: name of the program.
    """
    train = config.train
    job = training.job(config, learner, rows, validate=None, steps=train.steps)
    runs = step.program(job, train, config.optim, mesh, config.seed)
    batch = DeviceBatches(mesh, train.batch_size).abstract(rows[0])

    def trace() -> Any:
        with step.context(mesh, train):
            return runs.step.trace(runs.state, (runs.fixed, job.constants), batch)

    state = dict(runs.state)
    held = [state.pop("params"), state.pop("ema", ()), runs.fixed, job.constants]
    tokens = sum(a.shape[1] for name, a in batch.items() if name.endswith("tokens")) * train.batch_size
    return Program(
        title,
        learner.model,
        mesh,
        trace,
        flops=job.flops * tokens,
        tokens=tokens,
        rows=train.batch_size,
        seq_len=train.seq_len,
        dtype=train.dtype,
        remat=train.remat,
        accumulate=train.accumulate,
        steps=0 if train.epochs else train.steps,
        parameters=held,
        optimizer=state,
        batch=batch,
        work=_work(learner, runs, config, tokens, rows, job.flops),
    )


def beside(step: Program, program: Program) -> Program:
    """Return a validation program whose memory also contains the arrays of a training step.

    Validation runs during training, while parameters and optimizer state of the training step stay in memory.

    Args:
        step: The training step.
        program: The program of validation.
    """
    return replace(
        program,
        parameters=[program.parameters, step.parameters],
        optimizer=step.optimizer,
        beside=[step.parameters, step.optimizer],
    )


def abstractly(mesh: Mesh, build: Callable[[Artifact | None], Learner], base: Artifact | None) -> Learner:
    """Return the Learner (model to train) that `build` makes from the artifact `base`, with abstract arrays.

    `build` is only traced, so that nothing is computed.

        learner = abstractly(mesh, lambda b: make_learner(config, b, labels, mesh), base)
    """
    made: list[Learner] = []

    def trace(params: Tree) -> Tree:
        made.append(build(base and replace(base, params=params)))
        return made[0].params

    shapes = jax.eval_shape(trace, base and base.params)
    return replace(made[0], params=functional.laid_out(made[0].model, shapes, mesh))


def _work(learner: Learner, runs: step.Program, config: Any, tokens: int, rows: Any, flops: float) -> Pass:
    """Describe a training step for the analytic cost model. `flops` is the number of FLOPs per token."""
    sizes = [sum(math.prod(a.shape) for a in named.values()) for named in (runs.named, runs.fixed)]
    row = row_shapes(rows)
    return Pass(
        optim=config.optim,
        attention=config.train.attention,
        trained=sizes[0] / sum(sizes),
        beside=(flops - 3 * cost.of_rows(learner.training_model, row)) * tokens,
        predicted=row["places"][-1] / row["tokens"][-1] if "places" in row else 1.0,
        written=row["tokens"][-1] if "encoder_tokens" in row else 0,
        eight=_in_eight_bits(config.train.matmuls, runs.named),
    )


def _in_eight_bits(rules: dict[str, str], named: Tree) -> dict[str, float]:
    """Return the fraction of the layers' matrix products that run in each 8-bit dtype (int8, float8), by dtype."""
    matrices = {weights.module_path(n): a.size for n, a in named.items() if weights.is_layer_matrix(n)}
    found: dict[str, float] = {}
    with quantized_matmul.use(rules):
        for path, size in matrices.items():
            if kind := quantized_matmul.kind_of(path):
                dtype = {"fp8": "float8"}.get(kind, kind)
                found[dtype] = found.get(dtype, 0.0) + size / sum(matrices.values())
    return found
