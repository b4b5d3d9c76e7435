"""The training loop of every stage: one compiled step, resume, validation, early stopping, a graceful end.

What is random comes from (seed, step), and row i of the data is a pure function of i, so a resumed run is the
uninterrupted one, bit for bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from llmctl.config.errors import Interrupted, RequestError, WorkError
from llmctl.config.settings import OptimConfig, TrainConfig
from llmctl.data.device_batches import DeviceBatches
from llmctl.distributed import context_parallel, processes
from llmctl.evaluate.metrics.base import METRICS
from llmctl.model import attention_kernels, functional, pipeline_parallel, weights
from llmctl.model.config import ModelConfig
from llmctl.train import preemption, throughput
from llmctl.train.checkpoints import Checkpoints
from llmctl.train.profiling import Profile
from llmctl.train.run_log import Reporter
from llmctl.train.step import (
    TOO_MANY_BAD,
    Batch,
    Job,
    Params,
    State,
    Sums,
    context,
    make_step,
    program,
    split,
    state_shardings,
)

if TYPE_CHECKING:
    from llmctl.artifacts.workspace import Context

__all__ = ["Job", "fit", "initialize", "make_step", "state_shardings"]


def initialize(cfg: ModelConfig, seed: int, mesh: jax.sharding.Mesh) -> Params:
    """Fresh parameters, each device computing its own part."""
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
) -> tuple[Params, dict[str, Any]]:
    """Trains to the end and returns (params, metrics); the parameters are the averaged ones where `optim.ema` is set.

    The arrays of `job.params` that are trained become the state's: they are deleted, so that there are never two sets.

    Raises Interrupted after a checkpoint when SIGTERM or Ctrl-C arrives, WorkError when the run diverges or the disk is
    full; either way the same command goes on from the last checkpoint.
    """
    _check_batch(train, mesh)
    runs, given = program(job, train, optim_config, mesh, seed), split(job)[0]
    job = dataclasses.replace(job, params=jax.eval_shape(lambda params=job.params: params))

    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(preemption.requests(mesh))
        stack.enter_context(context(mesh, train))
        say: list[str] = []
        checkpoints = stack.enter_context(Checkpoints(ctx.work / "checkpoints", train.keep, say.append))
        found = checkpoints.restore(runs.state)
        state, meta = found or (runs.begin(runs.named), {"step": 0, "best": None, "best_step": None, "bad": 0})
        for a in (*given.values(), *runs.named.values()):
            a.delete()
        report = stack.enter_context(
            Reporter(
                ctx.work,
                train.steps,
                title,
                train.tensorboard,
                start=meta["step"],
                lasting=ctx.out.parent,
                wandb=train.wandb,
            )
        )
        about = [attention_kernels.describe(job.model, train.seq_len, train.dtype)] if job.model else []
        about += pipeline_parallel.describe(train.batch_size // train.accumulate, mesh, train.microbatches)
        for line in [*say, *about, *([f"going on from step {meta['step']}"] if found else [])]:
            report.say(line)
        loop = _Loop(job, train, runs.step, runs.fixed, checkpoints, report, stop, mesh)
        meta = loop.with_best(state, meta)
        if job.flops and processes.first():
            loop.peak = throughput.peak(mesh.devices.flatten().tolist(), ctx.work / "peak.json")
        loop.profile = stack.enter_context(Profile(train.profile, report.events_folder))
        state, meta = loop.run(state, meta)
        named = _answer(state)
        if loop.keeps_best and meta["best"] is not None and meta["best_step"] != meta["step"]:
            named = checkpoints.restore_best(meta["best_step"], _answer(runs.state))
        params = weights.rebuild(job.params, named | runs.fixed)
        metrics = {"steps": meta["step"], **{f"validation_{k}": v for k, v in job.validate(params).items()}}
        if loop.keeps_best:
            metrics |= {"best_step": meta["best_step"]}
        if skips := int(state["skips"]):
            metrics |= {"skipped_steps": skips}
        loop.heed()
        return params, metrics


def _answer(state: State) -> Params:
    """The weights that are validated and saved."""
    return state.get("ema", state["params"])


class _Loop:
    """The steps between resume and end."""

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
        self.metric = train.best_by or job.metric
        self.keeps_best = job.keep_best or bool(train.best_by)
        self.skips = 0
        self.batches = DeviceBatches(mesh, train.batch_size)

    def with_best(self, state: State, meta: dict[str, Any]) -> dict[str, Any]:
        """A checkpoint's `meta` where the best parameters that it names are not there.

        A better step may have replaced them before the run died: it comes again, unless the run goes on where rounding
        is another (another mesh), so the best is looked for anew. Or the run died while they were written: then they
        may be the checkpoint's own.
        """
        best = meta["best_step"]
        if not self.keeps_best or best is None or self.checkpoints.has_best(best):
            return meta
        if best == meta["step"]:
            self.checkpoints.save_best(best, _answer(state))
            return meta
        self.report.say(f"the best parameters so far, of step {best}, are gone; the best is looked for from here on")
        return {**meta, "best": None, "best_step": None, "bad": 0}

    def run(self, state: State, meta: dict[str, Any]) -> tuple[State, dict[str, Any]]:
        train, done = self.train, meta["step"]
        self.skips = int(state["skips"])
        timer, compiled = throughput.Timer(), False
        if meta.pop("unvalidated", False):
            meta = self.validate(done, state, meta)
        with self.batches.training(self.job.rows, done, train.steps, self.place) as batches:
            while done < train.steps and not meta.get("stopped"):
                if train.profile:
                    self.profile.before(done + 1)
                with timer.waiting():
                    _, (batch, tokens) = next(batches)
                if compiled:
                    state, metrics = self.step(state, (self.fixed, self.job.constants), batch)
                    timer.count(tokens)
                else:  # what compiling takes says nothing about speed
                    with timer.paused():
                        state, metrics = self.step(state, (self.fixed, self.job.constants), batch)
                        jax.block_until_ready(metrics)
                done, compiled = done + 1, True
                if train.profile:
                    self.profile.after(done, metrics)
                last = done == train.steps
                stops = self.stop.asked(now=last)
                if done % train.log_every == 0 or last:
                    self.log(done, metrics, state, timer)
                meta = {**meta, "step": done}
                if (train.eval_every and done % train.eval_every == 0) or (last and self.keeps_best):
                    try:
                        with timer.paused():
                            meta = {**meta, "unvalidated": True} if stops else self.validate(done, state, meta)
                    except preemption.Asked:  # a grace period is for the checkpoint; whoever resumes validates first
                        meta, stops = {**meta, "unvalidated": True}, True
                if done % train.checkpoint_every == 0 or last or stops or meta.get("stopped"):
                    with timer.paused():
                        self.heed_bad(state)
                        self.checkpoints.save(done, state, meta, wait=stops)
                if stops:
                    self.heed(done)
        return state, meta

    def heed(self, done: int | None = None) -> None:
        """Raises where somebody asked for an end; the checkpoint has been written."""
        if self.stop.asked(now=True):
            where = f"at step {done}" if done else "after the last step"
            raise Interrupted(f"{self.report.title}: stopped {where}; the same command goes on from there")

    def heed_bad(self, state: State) -> None:
        """Raises where too many steps in a row were bad. The state keeps count: nobody need look at every step."""
        if int(state["skipped"]) >= TOO_MANY_BAD:
            raise WorkError(
                f"{TOO_MANY_BAD} steps in a row without a finite loss, without a label or outlying; "
                "the last good checkpoint is kept; a lower optim.learning_rate begins anew"
            )

    def place(self, batch: dict[str, np.ndarray]) -> tuple[Batch, int]:
        """Host rows -> device arrays split over the batch, and the number of real tokens."""
        tokens = sum(int(np.count_nonzero(batch[name])) for name in ("segments", "encoder_segments") if name in batch)
        # Of several processes each counts its own rows, and takes the others for alike.
        return self.batches.place(batch), tokens * self.train.batch_size // len(next(iter(batch.values())))

    def log(self, done: int, metrics: Sums, state: State, timer: throughput.Timer) -> None:
        values = {k: float(v) for k, v in metrics.items()}
        skips = int(state["skips"])
        if skips > self.skips:
            self.report.say(
                f"step {done}: {skips - self.skips} steps since the last line had no finite loss, no label or an "
                f"outlying gradient, and left the weights unchanged ({skips} in all)"
            )
            self.skips = skips
        self.heed_bad(state)
        values |= timer.read(self.job.flops, self.peak) | throughput.memory(self.mesh.devices.flatten().tolist())
        self.report.log(done, values | ({"skipped": skips} if skips else {}))

    def validate(self, done: int, state: State, meta: dict[str, Any]) -> dict[str, Any]:
        named = _answer(state)
        found = self.job.validate(weights.rebuild(self.job.params, named | self.fixed))
        self.report.log(done, {f"validation_{k}": v for k, v in found.items()})
        if self.metric not in found:
            raise RequestError(f"train.best_by: no metric {self.metric!r} here; there are {', '.join(sorted(found))}")
        value = found[self.metric]
        less = METRICS[self.metric].better == "minimize"
        better = meta["best"] is None or (value < meta["best"] if less else value > meta["best"])
        if better:
            if self.keeps_best:
                self.checkpoints.save_best(done, named)
            return {**meta, "best": value, "best_step": done, "bad": 0}
        bad = meta["bad"] + 1
        stopped = bool(self.train.patience) and bad >= self.train.patience
        if stopped:
            self.report.say(
                f"step {done}: {bad} validations without a better {self.metric} than {meta['best']:.4g}; stopping early"
            )
        return {**meta, "bad": bad, "stopped": stopped}


def check(model: ModelConfig, train: TrainConfig, mesh: jax.sharding.Mesh) -> None:
    """Raises RequestError, before any work, where the settings do not fit the model or the mesh."""
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
