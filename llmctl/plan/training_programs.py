"""The programs of a stage, from its config and abstract arrays alone: the stage's own functions, nothing computed.

Arrays here are shapes with types and shardings on a mesh of devices that need not be attached.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

import jax
from jax.sharding import Mesh

from llmctl.artifacts.artifact import Artifact
from llmctl.config.errors import RequestError
from llmctl.data.config import DataConfig
from llmctl.data.pretraining.objective_rows import Objective
from llmctl.data.tokenizers import loading
from llmctl.data.tokenizers.byte_tokenizer import ByteTokenizer
from llmctl.distributed import context_parallel
from llmctl.distributed import mesh as meshes
from llmctl.model import attention_kernels, functional, pipeline_parallel, quantized_matmul, weights
from llmctl.model import flops as cost
from llmctl.model.config import ModelConfig
from llmctl.pipeline.stages import distill, finetune, pretrain
from llmctl.plan import abstract_artifact, analytic_memory
from llmctl.plan import dummy_rows as made_up
from llmctl.plan.analytic_memory import Setup
from llmctl.plan.hlo.counts import Counts
from llmctl.train import learner as trainer
from llmctl.train import step
from llmctl.train.learner import Learner

Tree = Any


@dataclass(frozen=True)
class Program:
    """One compiled function that a stage runs again and again, and what lies in memory while it does."""

    title: str
    """What it does: train step, prefill, …"""
    model: ModelConfig
    mesh: Mesh
    trace: Callable[[], Any] = field(repr=False)
    """The function traced with its arguments: to be lowered for the mesh's platform or another."""
    flops: float
    """Operations of the model that a run stands for, on all devices, as `llmctl.model.flops` counts them."""
    tokens: int
    """What a run reads, or writes, on all devices."""
    rows: int
    """Sequences a run."""
    seq_len: int
    dtype: str
    remat: str = "none"
    accumulate: int = 1
    steps: int = 0
    """How often the stage runs it; 0 where that is not settled."""
    parameters: Tree = ()
    """Arrays in memory while it runs, by class."""
    optimizer: Tree = ()
    batch: Tree = ()
    cache: Tree = ()
    beside: Tree = ()
    """Of these, what the program itself does not take."""
    setup: Setup | None = None
    """For the analytic model of whole passes."""
    guess: tuple[float, Counts] | None = None
    """Of what is smaller (`llmctl.plan.small_programs`): bytes beside what it takes, and its work."""


Plan = tuple[list[Program], Artifact | None]
"""The programs of a stage, and what it leaves behind for others."""


def batch_of(rows: Any, size: int, mesh: Mesh) -> dict[str, Any]:
    """A batch of `size` rows, abstract, split as the stages split it."""
    row = context_parallel.balanced({name: a[None] for name, a in rows[0].items()}, mesh.shape["context"])
    shardings = meshes.batch_shardings(row, mesh)
    return {
        name: jax.ShapeDtypeStruct((size, *a.shape[1:]), a.dtype, sharding=shardings[name]) for name, a in row.items()
    }


def training(config: Any, learner: Learner, rows: Any, mesh: Mesh) -> Program:
    """The optimizer step of a stage that trains."""
    train = config.train
    job = trainer.job(config, learner, rows, validate=None)
    runs = step.program(job, train, config.optim, mesh, config.seed)
    batch = batch_of(rows, train.batch_size, mesh)

    def trace() -> Any:
        with meshes.use(mesh), attention_kernels.use(train.attention), pipeline_parallel.use(train.microbatches):
            return runs.step.trace(runs.state, (runs.fixed, job.constants), batch)

    state = dict(runs.state)
    held = [state.pop("params"), state.pop("ema", ()), runs.fixed, job.constants]
    tokens = sum(a.shape[1] for name, a in batch.items() if name in ("tokens", "encoder_tokens")) * train.batch_size
    return Program(
        "train step",
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
        steps=train.steps,
        parameters=held,
        optimizer=state,
        batch=batch,
        setup=modelled(learner, runs, config, tokens, rows, mesh),
    )


def modelled(learner: Learner, runs: step.Program, config: Any, tokens: int, rows: Any, mesh: Mesh) -> Setup:
    """The step in the words of the analytic model."""
    sizes = [sum(math.prod(a.shape) for a in named.values()) for named in (runs.named, runs.fixed)]
    beside = cost.of_rows(learner.beside, trainer.shapes(rows)) * tokens if learner.beside else 0.0
    whole = analytic_memory.of_training(
        learner.model, config.train, config.optim, {a: int(n) for a, n in mesh.shape.items()}
    )
    row = trainer.shapes(rows)
    predicted = row["places"][-1] / row["tokens"][-1] if "places" in row else 1.0
    eight = in_eight_bits(config.train.matmuls, runs.named)
    written = row["tokens"][-1] if "encoder_tokens" in row else 0
    trained = sizes[0] / sum(sizes)
    return replace(whole, trained=trained, beside=beside, predicted=predicted, eight=eight, written=written)


def in_eight_bits(rules: dict[str, str], named: Tree) -> dict[str, float]:
    """Share of the entries of the layers' matrices whose products the rules put into each type."""
    matrices = {
        n.removesuffix("/kernel"): a.size for n, a in named.items() if "/blocks/" in n and n.endswith("/kernel")
    }
    found: dict[str, float] = {}
    with quantized_matmul.use(rules):
        for path, size in matrices.items():
            if kind := quantized_matmul.kind_of(path):
                dtype = {"fp8": "float8"}.get(kind, kind)
                found[dtype] = found.get(dtype, 0.0) + size / sum(matrices.values())
    return found


def abstractly(mesh: Mesh, build: Callable[[Artifact | None], Learner], base: Artifact | None) -> Learner:
    """The learner that `build` makes of an artifact, with arrays that are shapes: what it computes is only traced."""
    made: list[Learner] = []

    def trace(params: Tree) -> Tree:
        made.append(build(base and replace(base, params=params)))
        return made[0].params

    shapes = jax.eval_shape(trace, base and base.params)
    return replace(made[0], params=functional.laid_out(made[0].model, shapes, mesh))


def of_pretrain(config: pretrain.Config, base: Artifact | None, mesh: Mesh) -> Plan:
    """`pretrain`: its step."""
    objective = pretrain.aim(config, base, mesh)
    learner = abstractly(mesh, lambda b: pretrain.make_learner(config, b, vocabulary(config, objective), mesh), base)
    rows = made_up.of_text(objective, config.train.seq_len, config.packing)
    left = abstract_artifact.left(config, abstract_artifact.masters(learner.params), learner.model, base=base)
    return [training(config, learner, rows, mesh)], left


def of_finetune(config: finetune.Config, base: Artifact, mesh: Mesh) -> Plan:
    """`finetune`: its step."""
    labels = classes(config.data, base) if config.task == "classify" else []
    learner = abstractly(mesh, lambda b: finetune.make_learner(config, cast(Artifact, b), labels, mesh), base)
    rows = made_up.of_examples(learner.model, config.data, config.train.seq_len)
    merges = config.method == "lora" and config.merge
    params = jax.eval_shape(weights.merge_adapters, learner.params) if merges else learner.params
    params = abstract_artifact.masters(functional.laid_out(learner.model, params, mesh))
    left = abstract_artifact.left(config, params, learner.model, base=base, labels=labels)
    return [training(config, learner, rows, mesh)], left


def of_distill(config: distill.Config, teacher: Artifact, student: Artifact | None, mesh: Mesh) -> Plan:
    """`distill`: its step, in which the teacher runs as well."""
    student = student if config.model is None else None
    learner = abstractly(mesh, lambda s: distill.make_learner(config, teacher, s, mesh), student)
    rows = made_up.of_examples(learner.model, config.data, config.train.seq_len)
    left = abstract_artifact.left(
        config,
        abstract_artifact.masters(learner.params),
        learner.model,
        base=student or teacher,
        labels=teacher.manifest.labels,
    )
    return [training(config, learner, rows, mesh)], left


def vocabulary(config: pretrain.Config, objective: Objective) -> int:
    """Tokens of the tokenizer, as far as it can be known before there is one."""
    given = pretrain.with_sentinels(config.tokenizer, objective, config.train.seq_len)
    if given.path:
        try:
            return loading.obtain((), given).vocab_size
        except RequestError:
            return config.model.vocab_size
    return ByteTokenizer.new(given.sentinels).vocab_size if given.kind == "bytes" else given.vocab_size


def classes(data: DataConfig, base: Artifact) -> list[str]:
    """The classes of the data, or the parent's, or two where nobody says."""
    return list(data.classes) or base.manifest.labels or ["no", "yes"]
