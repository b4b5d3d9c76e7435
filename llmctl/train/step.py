"""Build the training step: a compiled function from a training state to the next training state.

`training_state` describes the state. All randomness is derived from (seed, step).

    runs = program(job, train, optim, mesh, seed)
    state = runs.begin(runs.named)
    state, metrics = runs.step(state, (runs.fixed, job.constants), batch)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llmctl.config.settings import OptimConfig, TrainConfig
from llmctl.distributed import mesh as meshes
from llmctl.model import attention_kernels, chunked_loss, pipeline_parallel, quantized_matmul, weights
from llmctl.train import optim
from llmctl.train.job import EXTRA, Batch, Job, Params, State, Sums, split
from llmctl.train.training_state import fresh, state_shardings

Fixed = tuple[Params, tuple[Any, ...]]
"""Pair (model arrays that are not trained, other arrays that the loss reads). No step changes these arrays."""

Inputs = tuple[Params, tuple[Any, ...], Any]
"""Triple (model arrays that are not trained, other constant arrays, arrays that are kept between steps or None).
The loss reads these arrays in addition to the trained arrays.
"""

TOO_MANY_BAD = 20
"""Number of consecutive bad steps that ends a run. A bad step has no labels, or a loss or gradient that is not finite
or is an outlier. After this number, no step changes anything, so the host need not check the count at every step.
"""
SETTLED = 20
"""Number of good steps after which steps with outliers are skipped.

Until then, the running mean and variance of loss and gradient norm are unreliable.
"""
NEWEST = 0.02
"""Smallest weight of the newest step in the running mean and variance of loss and gradient norm."""
STEADY = 0.02
"""Smallest standard deviation assumed for loss and gradient norm, as a fraction of their mean. Without this limit a run
with little noise would skip harmless steps."""

OVERLAP = {
    "xla_enable_async_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_enable_async_all_reduce": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": True,
}
"""Options of the TPU compiler that overlap collectives with matrix products. By default, only few kinds of TPU use
these options."""


@dataclass(frozen=True)
class Program:
    """Store the compiled functions of a training run and their inputs.

    The training state is sharded over the mesh and donated at every step.
    """

    step: Any
    """Compiled function that runs one step. Its arguments are the state, (fixed, constants) and the batch. It
    returns (next state, metrics). `constants` is the field `constants` of the Job."""
    begin: Any
    """Compiled function that creates the first state from the trained arrays. The arrays are donated."""
    named: Params
    """Trained arrays by name, in float32. The parent may have bfloat16 arrays, in which small updates would round to
    zero."""
    fixed: Params
    """Arrays that are not trained, by name."""
    state: State
    """Shape, dtype and sharding of each array of the state."""


def program(job: Job, train: TrainConfig, config: OptimConfig, mesh: jax.sharding.Mesh, seed: int) -> Program:
    """Return the compiled functions of a training job. Each function is traced and compiled at its first call.

    The arrays of the job may be abstract, and the devices of the mesh need not be attached.
    """
    trained, fixed = split(job)
    named = {name: _master(a) for name, a in trained.items()}
    quantized_matmul.check(train.matmuls, named)
    step, optimizer = make_step(job, train, config, seed)
    shardings = state_shardings(optimizer, config, named, mesh, job.memory)
    begin = partial(fresh, optimizer, config, memory=job.memory)
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
    """Set what the model reads while a step is traced: mesh, attention kernel and number of microbatches."""
    with meshes.use(mesh), attention_kernels.use(train.attention), pipeline_parallel.use(train.microbatches):
        yield


def _master(a: Any) -> Any:
    return a.astype(jnp.float32) if isinstance(a, jax.Array) else a.update(dtype=jnp.dtype("float32"))


def make_step(job: Job, train: TrainConfig, config: OptimConfig, seed: int) -> tuple[Callable[..., Any], Any]:
    """Return the step function and the optimizer.

    The step function maps (state, (fixed, constants), batch) to (next state, metrics). `fixed` has the arrays of the
    model that are not trained. `constants` is the field `constants` of the Job.
    """
    trained = split(job)[0]
    starts = {name: s for name in trained if np.any((s := job.starts(name)) > 0)}
    optimizer = optim.build(config, train.steps, trained, starts)
    rate = optim.schedule(config, train.steps)
    gradients = _gradients(job, train)
    held = {name for name in trained if job.holds_zeros(name)}
    rates = {name: f for name in trained if np.any((f := job.rate(name)) != 1.0)}

    def step(state: State, fixed: Fixed, batch: Batch) -> tuple[State, Sums]:
        old = state["params"]
        key = jax.random.fold_in(jax.random.key(seed), state["step"])
        grads, sums = gradients(old, (*fixed, state["memory"] if job.reads_memory else None), batch, key)
        weight = jnp.maximum(sums["weight"], 1e-9)
        dense = {name: g.astype(jnp.float32) / weight for name, g in grads.items()}
        grads = hold_zeros(old, dense, held)
        grads = freeze_layers(grads, job.frozen_layers)
        grads = freeze_until(grads, starts, state["step"] - state["skips"])
        norm = optax.tree.norm(grads)
        grads = clip(grads, norm, config.clip)
        updates, opt = optimizer.update(grads, state["optimizer"], old)
        updates = {name: u * rates[name] if name in rates else u for name, u in cast(Params, updates).items()}
        updates = freeze_layers(updates, job.frozen_layers)
        updates = freeze_until(updates, starts, state["step"] - state["skips"])
        new = hold_zeros(old, cast(Params, optax.apply_updates(old, updates)), held)
        metrics = chunked_loss.means(sums)
        # A batch without labels, or with a loss that is not finite or an outlier, must change nothing.
        good = jnp.isfinite(norm) & jnp.isfinite(sums["loss"]) & (sums["weight"] > 0)
        found = jnp.stack([metrics["loss"], norm]).astype(jnp.float32)
        if config.spike:
            good &= ~_is_outlier(found, state["usual"], config.spike)
        stuck = state["skipped"] >= TOO_MANY_BAD
        good &= ~stuck
        updated = state["step"] - state["skips"]
        kept = {"params": new, "optimizer": opt}
        if config.ema:
            kept["ema"] = average(state["ema"], new, updated, config.ema)
        if config.spike:
            kept["usual"] = _remember(found, state["usual"])
        if "memory" in state:
            kept["memory"] = state["memory"]
        if job.after_step:
            read = {"gradients": grads, "dense_gradients": clip(dense, norm, config.clip), "before": old}
            kept = {k: v for k, v in job.after_step(kept | read, state["step"] + 1).items() if k not in read}
        kept = jax.tree.map(lambda a, b: jnp.where(good, a, b), kept, {k: state[k] for k in kept})
        metrics |= {"gradient_norm": norm, "learning_rate": jnp.asarray(rate(updated))}
        metrics |= job.state_metrics(kept) if job.state_metrics else {}
        counters = {
            "step": state["step"] + 1,
            "skipped": jnp.where(stuck, state["skipped"], jnp.where(good, 0, state["skipped"] + 1)),
            "skips": state["skips"] + ~good,
        }
        return kept | counters, metrics

    return step, optimizer


def _gradients(job: Job, train: TrainConfig) -> Callable[..., tuple[Params, Sums]]:
    """Return a function that computes the gradients and the metric sums of a batch.

    Its arguments are the trained arrays, the other inputs (see `Inputs`), the batch, and the dropout key. It returns
    (gradients by name, metric sums).

    If `train.accumulate` is above 1, the function adds the gradients of the microbatches.
    """
    accumulate, rules = train.accumulate, train.matmuls
    template = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), job.params)
    # The names are matched to the leaves of the tree once, here, so that the step only reorders arrays.
    name_of = {id(a): name for name, a in weights.arrays(template).items()}
    leaves, structure = jax.tree.flatten(template)
    order = [name_of[id(leaf)] for leaf in leaves]

    def loss(named: Params, inputs: Inputs, batch: Batch, key: jax.Array) -> tuple[jax.Array, Sums]:
        rest, constants, memory = inputs
        arrays = named | rest
        params = jax.tree.unflatten(structure, [arrays[name] for name in order])
        extra: dict[str, Any] = {"extra": {name: named[EXTRA + name] for name in job.extra}} if job.extra else {}
        if job.trains_result:
            params = job.result(params, extra.pop("extra", {}))
        extra |= {"memory": memory} if job.reads_memory else {}
        with quantized_matmul.use(rules) if rules else contextlib.nullcontext():
            total, sums = job.loss(params, batch, key, *constants, **extra)
        return (total + sums["weight"] * job.penalty(params), sums) if job.penalty else (total, sums)

    grad = jax.grad(loss, has_aux=True)
    if accumulate == 1:
        return grad

    def accumulated(named: Params, inputs: Inputs, batch: Batch, key: jax.Array) -> tuple[Params, Sums]:
        def body(total: Any, piece: tuple[Batch, jax.Array]) -> tuple[Any, None]:
            micro, index = piece
            out = grad(named, inputs, micro, jax.random.fold_in(key, index))
            return jax.tree.map(jnp.add, total, out), None

        micro = {k: _microbatches(a, accumulate) for k, a in batch.items()}
        first = jax.tree.map(lambda a: a[0], micro)
        zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(grad, named, inputs, first, key))
        return jax.lax.scan(body, zero, (micro, jnp.arange(accumulate)))[0]

    return accumulated


def _microbatches(a: jax.Array, pieces: int) -> jax.Array:
    a = a.reshape(pieces, a.shape[0] // pieces, *a.shape[1:])
    return meshes.constrain(a, None, "batch", *[None] * (a.ndim - 2))


def clip(grads: Params, norm: Any, limit: float) -> Params:
    """Return the gradients scaled to a global norm of at most `limit`. If `limit` is 0, return the gradients
    unchanged."""
    if not limit:
        return grads
    factor = jnp.minimum(1.0, limit / jnp.maximum(norm, 1e-12))
    return {name: g * factor for name, g in grads.items()}


def hold_zeros(old: Params, new: Params, held: Collection[str]) -> Params:
    """Return the arrays `new` after a step. In the arrays named in `held`, the zeros of `old` are kept.

    Pruned weights therefore stay pruned. Bottleneck adapters are an exception. If an adapter's parameters in a layer
    are all zero, this adapter was never trained. Its zeros may change.
    """

    def mask(name: str) -> jax.Array:
        zero = old[name] == 0
        if not weights.parse(name).bottleneck:
            return zero
        return zero & jnp.any(~zero, axis=tuple(range(1, zero.ndim)), keepdims=True)

    return {name: jnp.where(mask(name), 0, a) if name in held else a for name, a in new.items()}


def freeze_layers(updates: Params, layers: int) -> Params:
    """Set the updates of frozen arrays to zero, and return all updates.

    The embeddings and the first `layers` layers of the encoder and of the decoder are frozen. If `layers` is 0, nothing
    is frozen.
    """

    def one(name: str, u: Any) -> Any:
        if weights.parse(name).embeds:
            return jnp.zeros_like(u)
        if weights.is_stacked(name):
            return jnp.where((jnp.arange(u.shape[0]) >= layers).reshape(-1, *[1] * (u.ndim - 1)), u, 0)
        return u

    return {name: one(name, u) for name, u in updates.items()} if layers else updates


def freeze_until(updates: Params, starts: Mapping[str, Any], count: Any) -> Params:
    """Set the updates of arrays to zero if their training has not started yet, and return all updates.

    Training may start at another step for each array, or for each layer of an array.

    Args:
      updates: updates of the trained arrays, by name.
      starts: number of updates after which the training of an array starts, by name. The number may differ per layer.
      count: number of updates so far.
    """
    return {n: jnp.where(count >= starts[n], u, 0) if n in starts else u for n, u in updates.items()}


def average(old: Params, new: Params, step: Any, decay: float) -> Params:
    """Return the exponential moving average of the weights after `step` + 1 updates.

    The decay at update n is min(decay, (1 + n) / (10 + n)). At the start of training the decay is small, so that
    initial weights have little influence in a short run.
    """
    n = step.astype(jnp.float32) + 1
    share = 1 - jnp.minimum(decay, (1 + n) / (10 + n))
    # An increment towards the new weights: arrays that do not change keep their bits.
    return {name: a + share.astype(a.dtype) * (new[name] - a) for name, a in old.items()}


def _is_outlier(found: jax.Array, usual: dict[str, jax.Array], deviations: float) -> jax.Array:
    """Return whether the loss or the gradient norm is far above its running mean. Values far below are not outliers.

    Args:
      found: loss and gradient norm of the step, [2].
      usual: running "mean" [2], "variance" [2] and "count" of the good steps.
      deviations: number of standard deviations above the mean from which a value is an outlier.
    """
    width = jnp.maximum(jnp.sqrt(usual["variance"]), STEADY * jnp.abs(usual["mean"]))
    return (usual["count"] >= SETTLED) & jnp.any(found > usual["mean"] + deviations * width)


def _remember(found: jax.Array, usual: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Return the running mean and variance of [loss, norm], updated with the values of a step.

    In the first 1 / NEWEST steps, all steps have equal weight. After that the newest step has the weight NEWEST, and
    the weights of older steps decay.
    """
    count = usual["count"] + 1
    share = jnp.maximum(1 / count.astype(jnp.float32), NEWEST)
    apart = found - usual["mean"]
    return {
        "mean": usual["mean"] + share * apart,
        "variance": (1 - share) * (usual["variance"] + share * jnp.square(apart)),
        "count": count,
    }
