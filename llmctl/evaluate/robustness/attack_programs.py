"""List the compiled programs of attacks for the cost model."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from llmctl.artifacts.artifact import Artifact
from llmctl.data.config import DataConfig
from llmctl.distributed import mesh as meshes
from llmctl.evaluate import programs
from llmctl.evaluate.robustness.settings import AttackConfig
from llmctl.evaluate.robustness.token_attack import flipper
from llmctl.evaluate.setup import Setup
from llmctl.evaluate.tasks.registry import of as task_of
from llmctl.model import attention_kernels, flops
from llmctl.model.program import Pass, Program


def of(name: str, artifact: Artifact, data: DataConfig, setup: Setup, settings: AttackConfig) -> list[Program]:
    """Return the program that scores a batch and, for HotFlip, the program that selects substitutions.

    Args:
        name: Name of the artifact.
        artifact: Artifact with abstract arrays.
        data: Data settings, which determine the columns of a batch.
        setup: Settings of the measurement.
        settings: Settings of the attack.
    """
    task, model = task_of(artifact.manifest), artifact.model
    scoring = programs.of_task(f"attack on {name}", artifact, data, setup, task)
    if "hotflip" not in settings.methods:
        return [scoring]
    batch, rows = programs.example_batch(data, task, model, setup), setup.batches()
    more = rows.abstract({"label": np.int32(0), "open": np.zeros(setup.seq_len, bool)})
    allowed = jax.ShapeDtypeStruct((model.vocab_size,), bool, sharding=meshes.replicated(setup.mesh))
    step = flipper(model, setup.dtype, settings.similarity)

    def trace() -> Any:
        with meshes.use(setup.mesh), attention_kernels.use("auto"):
            return step.trace(artifact.params, batch, more["label"], more["open"], allowed)

    tokens = setup.batch_size * setup.seq_len
    # The forward pass and the backward pass to the embeddings take twice the operations of a forward pass.
    passes = 2 * flops.of_rows(model, {key: a.shape[1:] for key, a in batch.items()})
    substitutes = 2 * model.d_model * model.vocab_size * (2 if settings.similarity else 1)
    found = Program(
        f"HotFlip on {name}",
        model,
        setup.mesh,
        trace,
        flops=tokens * (passes + substitutes),
        tokens=tokens,
        rows=setup.batch_size,
        seq_len=setup.seq_len,
        dtype=setup.dtype,
        parameters=[artifact.params],
        batch=batch,
        work=Pass(beside=tokens * (passes / 2 + substitutes)),
    )
    return [scoring, found]
