"""The programs of `eval`: one scoring step an artifact, with the others' weights in memory where all are timed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llmctl.artifacts.artifact import Artifact
from llmctl.config.errors import RequestError
from llmctl.data.device_batches import Feed
from llmctl.distributed import mesh as meshes
from llmctl.evaluate import objectives, runner, tasks
from llmctl.evaluate.perplexity import row_nll
from llmctl.evaluate.setup import READ, Setup
from llmctl.model import attention_kernels, flops
from llmctl.model.config import ModelConfig
from llmctl.pipeline.stages import eval as evaluation
from llmctl.plan import analytic_memory
from llmctl.plan import dummy_rows as made_up
from llmctl.plan.training_programs import Plan, Program

STREAM = ("tokens", "targets", "weights", "segments", "positions")
"""What perplexity reads."""


def of_eval(config: evaluation.Config, chosen: dict[str, Artifact], mesh: Mesh) -> Plan:
    """`eval`: its scoring steps."""
    if not chosen:
        raise RequestError("eval: nothing to measure; say --from ARTIFACT, or name artifacts in `of`")
    return [_scoring(config, name, chosen, mesh) for name in chosen], None


def _scoring(config: evaluation.Config, name: str, chosen: dict[str, Artifact], mesh: Mesh) -> Program:
    model, params = chosen[name].model, chosen[name].params
    setup = runner.setup(config, mesh, Path(name), chosen[name].manifest)
    tasks.task(model, name)
    step, batch = step_of(model, setup.dtype), _batch(config, model, setup)
    tokens = sum(a.size for key, a in batch.items() if key in ("tokens", "encoder_tokens"))
    others = [other.params for other in chosen.values() if other.params is not params] if config.speed else []

    def trace() -> Any:
        with meshes.use(mesh), attention_kernels.use("auto"):
            return step.trace(params, batch)

    return Program(
        f"scoring of {name}",
        model,
        mesh,
        trace,
        flops=flops.of_rows(model, {key: a.shape[1:] for key, a in batch.items()}) * tokens,
        tokens=tokens,
        rows=setup.batch_size,
        seq_len=setup.seq_len,
        dtype=setup.dtype,
        parameters=[params, others],
        batch=batch,
        beside=others,
        setup=analytic_memory.Setup(
            model,
            {a: int(n) for a, n in mesh.shape.items()},
            setup.batch_size,
            setup.seq_len,
            setup.dtype,
            written=batch["tokens"].shape[1] if "encoder_tokens" in batch else 0,
        ),
    )


def step_of(model: ModelConfig, dtype: str) -> Any:
    """The compiled function that scores a batch: the task's own."""
    if (model.architecture, model.head) == ("decoder", "lm"):
        return row_nll(model, dtype)
    return objectives.scorer(model, dtype) if model.head == "lm" else tasks.predictor(model, dtype)


def _batch(config: evaluation.Config, model: ModelConfig, setup: Setup) -> dict[str, Any]:
    """A batch of the task, abstract, on the devices as `llmctl.evaluate.setup.place` puts it."""
    if (model.architecture, model.head) == ("decoder", "lm"):
        types = {key: np.float32 if key == "weights" else np.int32 for key in STREAM}
        shapes = {key: jax.ShapeDtypeStruct((setup.seq_len,), dtype) for key, dtype in types.items()}
    else:
        row = made_up.of_examples(model, config.data, setup.seq_len)[0]
        names = row if model.head == "lm" else [key for key in READ if key in row]
        shapes = {key: jax.ShapeDtypeStruct(row[key].shape, jnp.asarray(row[key]).dtype) for key in names}
    lies = Feed(setup.mesh, setup.batch_size, reading_order=True).lies
    return {
        key: jax.ShapeDtypeStruct((setup.batch_size, *a.shape), a.dtype, sharding=lies(len(a.shape) + 1))
        for key, a in shapes.items()
    }
