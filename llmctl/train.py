"""The training loop of every stage: one compiled step, resume, validation, early stopping, a graceful end.

The state is {"params": trained arrays by name, "optimizer", "step", "skipped"}; arrays that are not trained stay outside
it. Everything random comes from (seed, step), and row i of the data is a pure function of i, so a resumed run is the
uninterrupted one, bit for bit.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llmctl import mesh as meshes
from llmctl import optim, weights
from llmctl.artifact import Artifact
from llmctl.checkpoints import Checkpoints
from llmctl.data import pipeline
from llmctl.errors import Interrupted, RequestError, WorkError
from llmctl.metrics import Reporter
from llmctl.model import ModelConfig, calls
from llmctl.settings import OptimConfig, TrainConfig

if TYPE_CHECKING:
    from llmctl.stages import Context

Params = dict[str, Any]
Batch = dict[str, Any]
State = dict[str, Any]
Sums = dict[str, jax.Array]
Fixed = tuple[Params, tuple[Any, ...]]
"""What a step reads and does not change: arrays that are not trained, and the job's constants."""

TOO_MANY_BAD = 20
"""Skipped steps in a row after which a run is given up."""


@dataclass(frozen=True)
class Job:
    """What a stage wants trained."""

    params: Params
    """Where to start; sharded over the mesh."""
    loss: Callable[..., tuple[jax.Array, Sums]]
    """(params, batch, dropout key, *constants) -> (sum of losses, sums with "weight"); the loop divides by the weight."""
    rows: Any
    """Random-access training rows."""
    validate: Callable[[Params], dict[str, float]]
    """Metrics of parameters on held-out data."""
    constants: tuple[Any, ...] = ()
    """Arrays that the loss reads besides (a teacher's parameters)."""
    metric: str = "loss"
    """The validation metric that chooses the best parameters."""
    maximize: bool = False
    """Whether more of it is better."""
    keep_best: bool = False
    """End with the best validated parameters rather than the last."""
    trains: Callable[[str], bool] = lambda _: True
    """Which arrays are trained, by name."""
    frozen_layers: int = 0
    """Layers, from the first, that are held together with the embeddings."""
    holds_zeros: Callable[[str], bool] = lambda _: False
    """Arrays whose zeros stay zero (pruned matrices)."""


def initialize(cfg: ModelConfig, seed: int, mesh: jax.sharding.Mesh) -> Params:
    """Fresh parameters, each device computing its own part."""
    shardings = calls.shardings(cfg, calls.abstract(cfg), mesh)
    return jax.jit(partial(calls.init, cfg), out_shardings=shardings)(jax.random.key(seed))


def pruned(parent: Artifact | None) -> Callable[[str], bool]:
    """Which arrays of a parent hold their zeros: the matrices of one that was pruned to zeros."""
    sparse = parent is not None and parent.manifest.sparsity > 0.01
    return lambda name: sparse and name.partition(":")[0].endswith("/kernel") and "/blocks/" in name


def make_step(job: Job, train: TrainConfig, optim_config: OptimConfig, seed: int) -> tuple[Callable[..., Any], Any]:
    """The step (state, fixed arrays, batch) -> (state, metrics), and the optimizer whose state it keeps."""
    optimizer = optim.build(optim_config, train.steps)
    rate = optim.schedule(optim_config, train.steps)
    template = jax.eval_shape(lambda: job.params)

    def loss(named: Params, fixed: Fixed, batch: Batch, key: jax.Array) -> tuple[jax.Array, Sums]:
        rest, constants = fixed
        return job.loss(weights.rebuild(template, named | rest), batch, key, *constants)

    def gradients(named: Params, fixed: Fixed, batch: Batch, key: jax.Array) -> tuple[Params, Sums]:
        """Sums over the whole batch, one microbatch after the other."""
        grad = jax.grad(loss, has_aux=True)
        if train.accumulate == 1:
            return grad(named, fixed, batch, key)

        def body(total: Any, piece: tuple[Batch, jax.Array]) -> tuple[Any, None]:
            micro, index = piece
            out = grad(named, fixed, micro, jax.random.fold_in(key, index))
            return jax.tree.map(jnp.add, total, out), None

        micro = {k: _microbatches(a, train.accumulate) for k, a in batch.items()}
        first = jax.tree.map(lambda a: a[0], micro)
        zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(grad, named, fixed, first, key))
        return jax.lax.scan(body, zero, (micro, jnp.arange(train.accumulate)))[0]

    def step(state: State, fixed: Fixed, batch: Batch) -> tuple[State, Sums]:
        old = state["params"]
        key = jax.random.fold_in(jax.random.key(seed), state["step"])
        grads, sums = gradients(old, fixed, batch, key)
        weight = jnp.maximum(sums["weight"], 1e-9)
        grads = {name: g.astype(jnp.float32) / weight for name, g in grads.items()}
        grads = optim.hold_zeros(old, grads, job.holds_zeros)
        grads = optim.freeze_layers(grads, job.frozen_layers)
        norm = optax.tree.norm(grads)
        updates, opt = optimizer.update(optim.clip(grads, norm, optim_config.clip), state["optimizer"], old)
        updates = optim.freeze_layers(updates, job.frozen_layers)
        new = optim.hold_zeros(old, optax.apply_updates(old, updates), job.holds_zeros)
        # A batch without a label, or with a loss that is no number, must change nothing at all.
        good = jnp.isfinite(norm) & jnp.isfinite(sums["loss"]) & (sums["weight"] > 0)
        new, opt = jax.tree.map(lambda a, b: jnp.where(good, a, b), (new, opt), (old, state["optimizer"]))
        metrics = {k: v / weight for k, v in sums.items() if k != "weight"}
        metrics |= {"gradient_norm": norm, "learning_rate": rate(state["step"]), "good": good}
        skipped = jnp.where(good, 0, state["skipped"] + 1)
        return {"params": new, "optimizer": opt, "step": state["step"] + 1, "skipped": skipped}, metrics

    return step, optimizer


def _microbatches(a: jax.Array, pieces: int) -> jax.Array:
    a = a.reshape(pieces, a.shape[0] // pieces, *a.shape[1:])
    return meshes.constrain(a, None, "batch", *[None] * (a.ndim - 2))


def state_shardings(optimizer: Any, named: Params, mesh: jax.sharding.Mesh) -> State:
    """Optimizer moments lie where their parameters lie; counters everywhere."""
    params = {name: a.sharding for name, a in named.items()}
    whole = meshes.replicated(mesh)
    shapes = jax.eval_shape(optimizer.init, named)
    opt = optax.tree_utils.tree_map_params(optimizer, lambda _, s: s, shapes, params, transform_non_params=lambda _: whole)
    return {"params": params, "optimizer": opt, "step": whole, "skipped": whole}


def fit(
    job: Job,
    train: TrainConfig,
    optim_config: OptimConfig,
    mesh: jax.sharding.Mesh,
    ctx: Context,
    seed: int,
    title: str,
) -> tuple[Params, dict[str, Any]]:
    """Trains to the end and returns (params, metrics).

    Raises Interrupted after a checkpoint when SIGTERM or Ctrl-C arrives, WorkError when the run diverges or the disk is
    full; either way the same command goes on from the last checkpoint.
    """
    if train.batch_size % train.accumulate:
        raise RequestError(
            f"train.batch_size {train.batch_size} is not divisible by train.accumulate {train.accumulate}"
        )
    _check_batch(train.batch_size // train.accumulate, mesh)
    named = weights.arrays(job.params)
    fixed = {name: a for name, a in named.items() if not job.trains(name)}
    named = {name: a for name, a in named.items() if job.trains(name)}
    step_fn, optimizer = make_step(job, train, optim_config, seed)
    shardings = state_shardings(optimizer, named, mesh)

    def fresh(named: Params) -> State:
        zero = jnp.zeros((), jnp.int32)
        return {"params": named, "optimizer": optimizer.init(named), "step": zero, "skipped": zero}

    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(_stop_requests())
        stack.enter_context(meshes.use(mesh))
        say: list[str] = []
        checkpoints = stack.enter_context(Checkpoints(ctx.work / "checkpoints", train.keep, say.append))
        shapes = jax.eval_shape(fresh, named)
        abstract = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, shardings)
        found = checkpoints.restore(abstract)
        state, meta = found or (
            jax.jit(fresh, out_shardings=shardings)(named),
            {"step": 0, "best": None, "best_step": None, "bad": 0},
        )
        reporter = Reporter(ctx.work, train.steps, title, train.tensorboard, start=meta["step"])
        report = stack.enter_context(reporter)
        for line in say + ([f"{title}: going on from step {meta['step']}"] if found else []):
            report.say(line)
        compiled = jax.jit(step_fn, donate_argnums=0, out_shardings=(shardings, None))
        loop = _Loop(job, train, compiled, fixed, checkpoints, report, stop, mesh)
        state, meta = loop.run(state, meta)
        if job.keep_best and meta["best"] is not None and meta["best_step"] != meta["step"]:
            state["params"] = checkpoints.restore_best(abstract["params"])
        params = weights.rebuild(job.params, state["params"] | fixed)
        metrics = {"steps": meta["step"], **{f"validation_{k}": v for k, v in job.validate(params).items()}}
        if job.keep_best:
            metrics |= {"best_step": meta["best_step"]}
        return params, metrics


class _Loop:
    """The steps between resume and end."""

    def __init__(self, job: Job, train: TrainConfig, step: Any, fixed: Params, checkpoints: Checkpoints, report: Reporter, stop: threading.Event, mesh: jax.sharding.Mesh) -> None:  # fmt: skip
        self.job, self.train, self.step, self.fixed = job, train, step, fixed
        self.checkpoints, self.report, self.stop, self.mesh = checkpoints, report, stop, mesh

    def run(self, state: State, meta: dict[str, Any]) -> tuple[State, dict[str, Any]]:
        train, done = self.train, meta["step"]
        timer = _Timer()
        with pipeline.batches(self.job.rows, train.batch_size, done, train.steps, place=self.place) as batches:
            while done < train.steps and not meta.get("stopped"):
                with timer.waiting():
                    _, (batch, tokens) = next(batches)
                state, metrics = self.step(state, (self.fixed, self.job.constants), batch)
                done += 1
                timer.count(tokens)
                last = done == train.steps
                if done % train.log_every == 0 or last:
                    self.log(done, metrics, state, timer)
                if (train.eval_every and done % train.eval_every == 0) or (last and self.job.keep_best):
                    with timer.paused():
                        meta = self.validate(done, state, meta)
                meta = {**meta, "step": done}
                if done % train.checkpoint_every == 0 or last or self.stop.is_set() or meta.get("stopped"):
                    with timer.paused():
                        self.checkpoints.save(done, state, meta, wait=self.stop.is_set())
                if self.stop.is_set() and not last:
                    raise Interrupted(
                        f"{self.report.title}: stopped at step {done}; the same command goes on from there"
                    )
        return state, meta

    def place(self, batch: dict[str, np.ndarray]) -> tuple[Batch, int]:
        """Host rows -> device arrays split over the batch, and the number of real tokens."""
        tokens = int(np.count_nonzero(batch["segments"]))
        return meshes.place(batch, self.mesh), tokens

    def log(self, done: int, metrics: Sums, state: State, timer: _Timer) -> None:
        values = {k: float(v) for k, v in metrics.items() if k != "good"}
        skipped = int(state["skipped"])
        if skipped:
            self.report.say(
                f"step {done}: no finite loss or no label; {skipped} steps in a row left the weights unchanged"
            )
        if skipped >= TOO_MANY_BAD:
            raise WorkError(
                f"{skipped} steps in a row without a finite loss; the last good checkpoint is kept, lower optim.learning_rate"
            )
        self.report.log(done, values | timer.read())

    def validate(self, done: int, state: State, meta: dict[str, Any]) -> dict[str, Any]:
        job = self.job
        found = job.validate(weights.rebuild(job.params, state["params"] | self.fixed))
        self.report.log(done, {f"validation_{k}": v for k, v in found.items()})
        value = found[job.metric]
        better = meta["best"] is None or (value > meta["best"] if job.maximize else value < meta["best"])
        if better:
            if job.keep_best:
                self.checkpoints.save_best(done, state["params"])
            return {**meta, "best": value, "best_step": done, "bad": 0}
        bad = meta["bad"] + 1
        stopped = bool(self.train.patience) and bad >= self.train.patience
        if stopped:
            self.report.say(
                f"step {done}: {bad} validations without a better {job.metric} than {meta['best']:.4g}; stopping early"
            )
        return {**meta, "bad": bad, "stopped": stopped}


class _Timer:
    """Tokens a second and the share of time spent waiting for input, between two log lines."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.start, self.wait, self.tokens, self.steps = time.monotonic(), 0.0, 0, 0

    def count(self, tokens: int) -> None:
        self.tokens += tokens
        self.steps += 1

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        before = time.monotonic()
        yield
        self.wait += time.monotonic() - before

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        before = time.monotonic()
        yield
        self.start += time.monotonic() - before

    def read(self) -> dict[str, float]:
        """What happened since the last reading; read after the step's results are there."""
        seconds = max(time.monotonic() - self.start, 1e-9)
        out = {
            "tokens_per_second": self.tokens / seconds,
            "step_seconds": seconds / max(self.steps, 1),
            "input_wait": self.wait / seconds,
        }
        self.reset()
        return out


def _check_batch(batch: int, mesh: jax.sharding.Mesh) -> None:
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch % ways:
        raise RequestError(f"train.batch_size: {batch} sequences a microbatch do not divide over data x fsdp = {ways}")


@contextlib.contextmanager
def _stop_requests() -> Iterator[threading.Event]:
    """SIGTERM and the first Ctrl-C ask for a checkpoint and an end; a second Ctrl-C ends at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def ask(number: int, frame: Any) -> None:
        event.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {s: signal.signal(s, ask) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield event
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
