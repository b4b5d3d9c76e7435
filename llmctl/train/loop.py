"""Run the training loop: compiled steps, validation, early stopping, checkpoints, resume, and shutdown at signals.

All randomness is derived from (seed, step), and row i of the data is a pure function of i. A resumed run therefore
equals the uninterrupted run bit for bit.

    job = Job(params, loss=loss_of(model), rows=rows, validate=Validation(...))
    params, metrics = fit(job, train, optim, mesh, ctx, seed=0, title="pretrain")
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from llmctl.config.errors import Interrupted, RequestError, WorkError
from llmctl.config.settings import OptimConfig, TrainConfig
from llmctl.data.device_batches import DeviceBatches
from llmctl.distributed import context_parallel, processes
from llmctl.model import attention_kernels, functional, pipeline_parallel
from llmctl.model.config import ModelConfig
from llmctl.train import preemption, throughput
from llmctl.train.best_parameters import BestParameters, is_minimized
from llmctl.train.checkpoints import Checkpoints
from llmctl.train.job import Batch, Job, Params, State, Sums, joined, split
from llmctl.train.profiling import Profile
from llmctl.train.run_log import Reporter
from llmctl.train.step import TOO_MANY_BAD, context, make_step, program
from llmctl.train.training_state import state_shardings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llmctl.artifacts.workspace import Context

__all__ = ["Job", "fit", "initialize", "make_step", "state_shardings"]


def initialize(cfg: ModelConfig, seed: int, mesh: jax.sharding.Mesh) -> Params:
    """Return randomly initialized parameters, sharded over the mesh. Each device computes its own shards."""
    shardings = functional.shardings(cfg, functional.abstract(cfg), mesh)
    return jax.jit(partial(functional.init, cfg), out_shardings=shardings)(jax.random.key(seed))


def fit(
    job: Job,
    train: TrainConfig,
    optim_config: OptimConfig,
    mesh: jax.sharding.Mesh,
    ctx: Context,
    seed: int,
    title: str,
    about: Sequence[str] = (),
) -> tuple[Params, dict[str, Any]]:
    """Train to the last step, starting from the last checkpoint if one exists, and return the parameters and metrics.

    The arrays that are trained are donated, so two copies are never in memory.

    Args:
      job: description of the training run: parameters, loss, rows and validation.
      train: settings for length, batches, validation, logging and checkpoints.
      optim_config: settings of the optimizer and its schedule.
      mesh: the devices.
      ctx: folders of the run. Checkpoints and the log are written to `ctx.work`.
      seed: seed of the dropout keys. The keys also depend on the step.
      title: name of the run in the log.
      about: lines to print before training.

    Returns:
      (parameters, metrics by name). If `optim.ema` is set, the returned parameters are the moving averages.

    Raises:
      Interrupted: If SIGTERM or Ctrl-C arrived. A checkpoint was written. If the same command is run again, it resumes.
      WorkError: If the run diverges or the disk is full. If the same command is run again, it resumes from the last
          checkpoint.
    """
    _check_batch(train, mesh)
    is_minimized(train.best_by or job.metric)  # reject an unknown metric before the first compilation
    runs, given = program(job, train, optim_config, mesh, seed), split(job)[0]
    job = dataclasses.replace(
        job, params=jax.eval_shape(lambda: job.params), extra=jax.eval_shape(lambda: dict(job.extra))
    )

    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(preemption.requests(mesh))
        stack.enter_context(context(mesh, train))
        say: list[str] = []
        checkpoints = stack.enter_context(Checkpoints(ctx.work / "checkpoints", train.keep, say.append))
        found = checkpoints.restore(runs.state)
        fresh = {"step": 0, "tokens": 0, "best": None, "best_step": None, "bad": 0}
        state, meta = found or (runs.begin(runs.named), fresh)
        for a in (*given.values(), *runs.named.values()):
            a.delete()
        report = stack.enter_context(
            Reporter(
                ctx.work,
                train.steps,
                title,
                train.tensorboard,
                start=meta["step"],
                lasting=ctx.logs or ctx.out.parent,
                wandb=train.wandb,
            )
        )
        facts = [attention_kernels.describe(job.model, train.seq_len, train.dtype)] if job.model else []
        facts += pipeline_parallel.describe(train.batch_size // train.accumulate, mesh, train.microbatches)
        for line in [*about, *say, *facts, *([f"going on from step {meta['step']}"] if found else [])]:
            report.say(line)
        loop = _Loop(job, train, runs.step, runs.fixed, checkpoints, report, stop, mesh)
        meta = loop.best.restored(_evaluated(state), meta)
        if job.flops and processes.first():
            loop.peak = throughput.peak(mesh.devices.flatten().tolist(), ctx.work / "peak.json")
        loop.profile = stack.enter_context(Profile(train.profile, report.events_folder))
        state, meta = loop.run(state, meta)
        named = _evaluated(state)
        if loop.best.keeps and meta["best"] is not None and meta["best_step"] != meta["step"]:
            named = checkpoints.restore_best(meta["best_step"], _evaluated(runs.state))
        params = joined(job, named | runs.fixed)
        metrics = {"steps": meta["step"], **{f"validation_{k}": v for k, v in job.validate(params).items()}}
        if loop.best.keeps:
            metrics |= {"best_step": meta["best_step"]}
        if (tokens := meta.get("tokens")) is not None:  # checkpoints of earlier versions have no such count
            metrics |= {"tokens": tokens}
        if skips := int(state["skips"]):
            metrics |= {"skipped_steps": skips}
        loop.raise_if_stopped()
        return params, metrics


def _evaluated(state: State) -> Params:
    """Return the arrays to validate and to save, by name.

    If `optim.ema` is set, these are the moving averages. Otherwise, these are the trained arrays.
    """
    return state.get("ema", state["params"])


def _token_count(batch: Batch) -> Any:
    """Return the number of tokens of a batch, without padding."""
    return sum((a != 0).sum() for name, a in batch.items() if name.endswith("segments"))


class _Loop:
    """Run the training steps that remain after the restored checkpoint."""

    peak: float | None = None
    profile: Profile

    def __init__(
        self,
        job: Job,
        train: TrainConfig,
        step: Any,
        fixed: Params,
        checkpoints: Checkpoints,
        report: Reporter,
        stop: preemption.Stop,
        mesh: jax.sharding.Mesh,
    ) -> None:
        self.job, self.train, self.step, self.fixed = job, train, step, fixed
        self.checkpoints, self.report, self.stop, self.mesh = checkpoints, report, stop, mesh
        self.best = BestParameters(job, train, checkpoints, report.say)
        self.skips = 0
        self.batches = DeviceBatches(mesh, train.batch_size)

    def run(self, state: State, meta: dict[str, Any]) -> tuple[State, dict[str, Any]]:
        """Run the remaining steps, and return the training state and the checkpoint metadata after the last step.

        The last step may be earlier than planned (early stopping).
        """
        train, done = self.train, meta["step"]
        self.skips = int(state["skips"])
        timer, compiled, alone = throughput.Timer(), False, processes.count() == 1
        if meta.pop("unvalidated", False):
            meta = self.validate(done, state, meta)
        with self.batches.training(self.job.rows, done, train.steps, self.place) as batches:
            while done < train.steps and not meta.get("stopped"):
                if train.profile:
                    self.profile.before(done + 1)
                _, (batch, tokens) = next(batches)
                begun = time.monotonic()
                if self.job.prepare:
                    given, batch = batch, self.job.prepare(state["params"] | self.fixed, batch, done)
                    tokens = tokens if batch is given else int(_token_count(batch))
                state, metrics = self.step(state, (self.fixed, self.job.constants), batch)
                if compiled:
                    timer.tokens, timer.steps = timer.tokens + tokens, timer.steps + 1
                else:  # the first step compiles, so its time is excluded
                    jax.block_until_ready(metrics)
                    timer.start += time.monotonic() - begun
                done, compiled = done + 1, True
                if train.profile:
                    self.profile.after(done, metrics)
                last = done == train.steps
                stops = self.stop.signalled.is_set() if alone else self.stop.requested(now=last)
                if done % train.log_every == 0 or last:
                    self.log(done, metrics, state, timer, batches.wait_seconds)
                meta = {**meta, "step": done}
                if "tokens" in meta:
                    meta["tokens"] += tokens
                if (train.eval_every and done % train.eval_every == 0) or (last and self.best.keeps):
                    try:
                        with timer.paused():
                            meta = {**meta, "unvalidated": True} if stops else self.validate(done, state, meta)
                    except preemption.StopRequested:
                        # The grace period is for the checkpoint. The resumed run validates first.
                        meta, stops = {**meta, "unvalidated": True}, True
                if done % train.checkpoint_every == 0 or last or stops or meta.get("stopped"):
                    with timer.paused():
                        self.raise_if_bad(state)
                        self.checkpoints.save(done, state, meta, wait=stops)
                if stops:
                    self.raise_if_stopped(done)
        return state, meta

    def raise_if_stopped(self, done: int | None = None) -> None:
        """Raise Interrupted if the run has to stop. The caller must first write the checkpoint of the last step."""
        if self.stop.requested(now=True):
            where = f"at step {done}" if done else "after the last step"
            raise Interrupted(f"{self.report.title}: stopped {where}; the same command goes on from there")

    def raise_if_bad(self, state: State) -> None:
        """Raise WorkError if too many consecutive steps were bad.

        A step is bad in three cases: its loss is not finite, its batch has no label, or its loss or gradient norm is an
        outlier. The training state counts the bad steps. It therefore suffices to call this function before log lines
        and checkpoints.
        """
        if int(state["skipped"]) >= TOO_MANY_BAD:
            raise WorkError(
                f"{TOO_MANY_BAD} steps in a row without a finite loss, without a label or outlying; "
                "the last good checkpoint is kept; a lower optim.learning_rate begins anew"
            )

    def place(self, batch: dict[str, np.ndarray]) -> tuple[Batch, int]:
        """Copy a batch of host arrays to the devices, and return (device arrays, number of tokens without padding)."""
        tokens = int(_token_count(batch))
        # Each process counts its own rows and extrapolates to the rows of the others.
        return self.batches.place(batch), tokens * self.train.batch_size // len(next(iter(batch.values())))

    def log(self, done: int, metrics: Sums, state: State, timer: throughput.Timer, waited: float) -> None:
        """Write the metrics of a step and the throughput since the last log line."""
        values = {k: float(v) for k, v in metrics.items()}
        skips = int(state["skips"])
        if skips > self.skips:
            self.report.say(
                f"step {done}: {skips - self.skips} steps since the last line had no finite loss, no label or an "
                f"outlying gradient, and left the weights unchanged ({skips} in all)"
            )
            self.skips = skips
        self.raise_if_bad(state)
        values |= timer.read(waited, self.job.flops, self.peak) | throughput.memory(
            self.mesh.devices.flatten().tolist()
        )
        self.report.log(done, values | ({"skipped": skips} if skips else {}))

    def validate(self, done: int, state: State, meta: dict[str, Any]) -> dict[str, Any]:
        """Validate the parameters, save the best parameters so far, and return the updated checkpoint metadata.

        Raises:
          RequestError: If the validation does not compute the metric that selects the best parameters.
        """
        named = _evaluated(state)
        found = self.job.validate(joined(self.job, named | self.fixed))
        self.report.log(done, {f"validation_{k}": v for k, v in found.items()})
        return self.best.updated(done, found, named, meta)


def check(model: ModelConfig, train: TrainConfig, mesh: jax.sharding.Mesh) -> None:
    """Check that the settings fit the model and the mesh, before any computation.

    Raises:
      RequestError: If the sequence length, the batch size or the mesh does not fit.
    """
    if train.seq_len > model.max_seq_len:
        raise RequestError(
            f"train.seq_len: {train.seq_len} tokens are more than model.max_seq_len = {model.max_seq_len}"
        )
    _check_batch(train, mesh)
    context_parallel.check(train.seq_len, mesh.shape["context"])
    functional.check_mesh(model, mesh)


def _check_batch(train: TrainConfig, mesh: jax.sharding.Mesh) -> None:
    batch, ways = train.batch_size // train.accumulate, mesh.shape["data"] * mesh.shape["fsdp"]
    if batch % ways:
        raise RequestError(f"train.batch_size: {batch} sequences a microbatch do not divide over data x fsdp = {ways}")
    if mesh.shape["pipeline"] > 1 and train.microbatches and (batch // ways) % train.microbatches:
        raise RequestError(
            f"train.microbatches: {train.microbatches} pieces do not divide the {batch // ways} sequences of a pipeline"
        )
