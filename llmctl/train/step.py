"""One optimizer step of any job, as a function that is compiled once, and the state it turns into the next.

The state is {"params": trained arrays by name, "optimizer", "step", "skipped": bad steps in a row, "skips": bad steps
in all}, with "ema" where weights are averaged and "usual" where outliers are skipped. Arrays that are not trained stay
outside it. Everything random comes from (seed, step).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from llmctl.config.settings import OptimConfig, TrainConfig
from llmctl.distributed import mesh as meshes
from llmctl.model import attention_kernels, chunked_loss, pipeline_parallel, quantized_matmul, weights
from llmctl.model.config import ModelConfig
from llmctl.train import optim

Params = dict[str, Any]
Batch = dict[str, Any]
State = dict[str, Any]
Sums = dict[str, jax.Array]
Fixed = tuple[Params, tuple[Any, ...]]
"""What a step reads and does not change: arrays that are not trained, and the job's constants."""

TOO_MANY_BAD = 20
"""Bad steps in a row after which a run is given up; from then on no step changes anything, whenever the host looks."""
SETTLED = 20
"""Good steps before outliers are told from what is usual."""
MEMORY = 0.02
"""Share of the newest step in the running mean and variance of what is usual."""
STEADY = 0.02
"""Least standard deviation, as a fraction of the mean: without it a very steady run would skip harmless steps."""

OVERLAP = {
    "xla_enable_async_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_enable_async_all_reduce": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": True,
}
"""What the TPU compiler is told: collectives run beside matrix products. By itself it does so on few kinds of TPU."""


@dataclass(frozen=True)
class Job:
    """What a stage wants trained."""

    params: Params
    """Where to start; sharded over the mesh. Training takes the arrays that it trains for itself; abstract ones do for
    compiling alone."""
    loss: Callable[..., tuple[jax.Array, Sums]]
    """(params, batch, dropout key, *constants) -> (sum of losses, sums with "weight"); the step divides by it."""
    rows: Any
    """Random-access training rows."""
    validate: Callable[[Params], dict[str, float]]
    """Metrics of parameters on held-out data."""
    constants: tuple[Any, ...] = ()
    """Arrays that the loss reads besides (a teacher's parameters)."""
    metric: str = "loss"
    """Validation metric that chooses the best parameters; its record in `METRICS` has the direction."""
    keep_best: bool = False
    """End with the best validated parameters rather than the last."""
    trains: Callable[[str], bool] = lambda _: True
    """Which arrays are trained, by name."""
    frozen_layers: int = 0
    """Layers, from the first, that are held together with the embeddings."""
    holds_zeros: Callable[[str], bool] = lambda _: False
    """Arrays whose zeros stay zero (pruned matrices)."""
    flops: float = 0.0
    """Floating-point operations a token of this training, for the utilization; 0 reports none."""
    model: ModelConfig | None = None
    """The network, where there is one: the log says how it attends."""


def split(job: Job) -> tuple[Params, Params]:
    """The arrays that are trained and those that are not, by name."""
    named = weights.arrays(job.params)
    return {n: a for n, a in named.items() if job.trains(n)}, {n: a for n, a in named.items() if not job.trains(n)}


def fresh(optimizer: Any, config: OptimConfig, named: Params) -> State:
    """The state before the first step."""

    def zero() -> jax.Array:  # each its own: the step gives its input's memory away, array by array
        return jnp.zeros((), jnp.int32)

    state = {"params": named, "optimizer": optimizer.init(named), "step": zero(), "skipped": zero(), "skips": zero()}
    if config.ema:
        state["ema"] = jax.tree.map(jnp.copy, named)
    if config.spike:
        state["usual"] = {"mean": jnp.zeros(2), "variance": jnp.zeros(2), "count": zero()}
    return state


def state_shardings(optimizer: Any, config: OptimConfig, named: Params, mesh: jax.sharding.Mesh) -> State:
    """Moments and averages lie where their parameters lie; counters everywhere."""
    params = {name: a.sharding for name, a in named.items()}
    whole = meshes.replicated(mesh)
    shapes = jax.eval_shape(lambda n: fresh(optimizer, config, n), named)
    lies = jax.tree.map(lambda _: whole, shapes)
    lies |= {key: params for key in ("params", "ema") if key in lies}
    return lies | {"optimizer": optim.shardings(shapes["optimizer"], params, shapes["params"], whole)}


@dataclass(frozen=True)
class Program:
    """A job's step as it runs: its state laid out over the mesh, and given away at every step."""

    step: Any
    """Compiled (state, (fixed, constants), batch) -> (state, metrics)."""
    begin: Any
    """Compiled (trained arrays, which are given away) -> the first state."""
    named: Params
    """The arrays that are trained, float32 whatever the parent stores (an import may be bfloat16): small updates must
    not round away."""
    fixed: Params
    """Those that are not."""
    state: State
    """Shapes and shardings of the state."""


def program(job: Job, train: TrainConfig, config: OptimConfig, mesh: jax.sharding.Mesh, seed: int) -> Program:
    """Nothing is computed nor traced yet, so `job.params` may be abstract and `mesh` of devices that are not there."""
    trained, fixed = split(job)
    named = {name: _master(a) for name, a in trained.items()}
    quantized_matmul.check(train.matmuls, named)
    step, optimizer = make_step(job, train, config, seed)
    shardings = state_shardings(optimizer, config, named, mesh)
    begin = partial(fresh, optimizer, config)
    state = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), jax.eval_shape(begin, named), shardings
    )
    options: Any = OVERLAP if mesh.devices.flat[0].platform == "tpu" else None
    return Program(
        jax.jit(step, donate_argnums=0, out_shardings=(shardings, None), compiler_options=options),
        jax.jit(begin, out_shardings=shardings, donate_argnums=0),
        named,
        fixed,
        state,
    )


@contextlib.contextmanager
def context(mesh: jax.sharding.Mesh, train: TrainConfig) -> Iterator[None]:
    """Set what the model reads while a step is traced: the mesh, the attention kernel, the microbatches."""
    with meshes.use(mesh), attention_kernels.use(train.attention), pipeline_parallel.use(train.microbatches):
        yield


def _master(a: Any) -> Any:
    return a.astype(jnp.float32) if isinstance(a, jax.Array) else a.update(dtype=jnp.dtype("float32"))


def make_step(job: Job, train: TrainConfig, config: OptimConfig, seed: int) -> tuple[Callable[..., Any], Any]:
    """The step (state, fixed arrays, batch) -> (state, metrics), and the optimizer whose state it keeps."""
    optimizer = optim.build(config, train.steps)
    rate = optim.schedule(config, train.steps)
    gradients = _gradients(job, train.accumulate, train.matmuls)

    def step(state: State, fixed: Fixed, batch: Batch) -> tuple[State, Sums]:
        old = state["params"]
        key = jax.random.fold_in(jax.random.key(seed), state["step"])
        grads, sums = gradients(old, fixed, batch, key)
        weight = jnp.maximum(sums["weight"], 1e-9)
        grads = {name: g.astype(jnp.float32) / weight for name, g in grads.items()}
        grads = optim.hold_zeros(old, grads, job.holds_zeros)
        grads = optim.freeze_layers(grads, job.frozen_layers)
        norm = optax.tree.norm(grads)
        updates, opt = optimizer.update(optim.clip(grads, norm, config.clip), state["optimizer"], old)
        updates = optim.freeze_layers(cast(Params, updates), job.frozen_layers)
        new = optim.hold_zeros(old, cast(Params, optax.apply_updates(old, updates)), job.holds_zeros)
        metrics = chunked_loss.means(sums)
        # A batch without a label, or with a loss that is no number or an outlier, must change nothing at all.
        good = jnp.isfinite(norm) & jnp.isfinite(sums["loss"]) & (sums["weight"] > 0)
        found = jnp.stack([metrics["loss"], norm]).astype(jnp.float32)
        if config.spike:
            good &= ~_outlies(found, state["usual"], config.spike)
        stuck = state["skipped"] >= TOO_MANY_BAD
        good &= ~stuck
        updated = state["step"] - state["skips"]
        kept = {"params": new, "optimizer": opt}
        if config.ema:
            kept["ema"] = optim.average(state["ema"], new, updated, config.ema)
        if config.spike:
            kept["usual"] = _remember(found, state["usual"])
        kept = jax.tree.map(lambda a, b: jnp.where(good, a, b), kept, {k: state[k] for k in kept})
        metrics |= {"gradient_norm": norm, "learning_rate": jnp.asarray(rate(updated))}
        counters = {
            "step": state["step"] + 1,
            "skipped": jnp.where(stuck, state["skipped"], jnp.where(good, 0, state["skipped"] + 1)),
            "skips": state["skips"] + ~good,
        }
        return kept | counters, metrics

    return step, optimizer


def _gradients(job: Job, accumulate: int, matmuls: Mapping[str, str]) -> Callable[..., tuple[Params, Sums]]:
    """(trained arrays, fixed arrays, batch, key) -> sums over the whole batch, one microbatch after the other."""
    template = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), job.params)

    def loss(named: Params, fixed: Fixed, batch: Batch, key: jax.Array) -> tuple[jax.Array, Sums]:
        rest, constants = fixed
        with quantized_matmul.use(matmuls):
            return job.loss(weights.rebuild(template, named | rest), batch, key, *constants)

    grad = jax.grad(loss, has_aux=True)
    if accumulate == 1:
        return grad

    def accumulated(named: Params, fixed: Fixed, batch: Batch, key: jax.Array) -> tuple[Params, Sums]:
        def body(total: Any, piece: tuple[Batch, jax.Array]) -> tuple[Any, None]:
            micro, index = piece
            out = grad(named, fixed, micro, jax.random.fold_in(key, index))
            return jax.tree.map(jnp.add, total, out), None

        micro = {k: _microbatches(a, accumulate) for k, a in batch.items()}
        first = jax.tree.map(lambda a: a[0], micro)
        zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(grad, named, fixed, first, key))
        return jax.lax.scan(body, zero, (micro, jnp.arange(accumulate)))[0]

    return accumulated


def _microbatches(a: jax.Array, pieces: int) -> jax.Array:
    a = a.reshape(pieces, a.shape[0] // pieces, *a.shape[1:])
    return meshes.constrain(a, None, "batch", *[None] * (a.ndim - 2))


def _outlies(found: jax.Array, usual: dict[str, jax.Array], deviations: float) -> jax.Array:
    """Whether loss or gradient norm lies far above its running mean. What is far below is good news."""
    width = jnp.maximum(jnp.sqrt(usual["variance"]), STEADY * jnp.abs(usual["mean"]))
    return (usual["count"] >= SETTLED) & jnp.any(found > usual["mean"] + deviations * width)


def _remember(found: jax.Array, usual: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Running mean and variance [loss, norm]; the plain ones of all steps until those outnumber the memory."""
    count = usual["count"] + 1
    share = jnp.maximum(1 / count.astype(jnp.float32), MEMORY)
    apart = found - usual["mean"]
    return {
        "mean": usual["mean"] + share * apart,
        "variance": (1 - share) * (usual["variance"] + share * jnp.square(apart)),
        "count": count,
    }
