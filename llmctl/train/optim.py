"""Build optimizers and schedules (optax) for a flat dictionary of arrays by name.

Matrices of the layers are stacked: [layers, inputs, outputs]. Muon's orthogonalization and Adafactor's statistics need
one complete matrix at a time. Both therefore run on each layer separately. Stacked arrays and separate arrays per layer
give the same updates.

    optimizer = build(OptimConfig(name="lion"), steps=1000, names=named)
    updates, state = optimizer.update(gradients, optimizer.init(named), named)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from llmctl.config.settings import OptimConfig, portion
from llmctl.model import weights

Named = dict[str, Any]

FACTORED_FROM = 128
"""Minimum length of both sides of a matrix for which Adafactor factors the second moments, as in the authors' code."""


def schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Return the learning rate as a function of the step: linear warm-up, then the configured schedule.

    - cosine and linear decay to `final` times the peak at the last step.
    - wsd (warm-up, stable, decay) keeps the peak and decays linearly in the last `decay` steps (Hu et al., 2024,
      arXiv:2404.06395).
    - rsqrt is peak * sqrt(warmup / step) (Vaswani et al., 2017, arXiv:1706.03762).
    - constant keeps the peak.
    """
    peak, end = config.learning_rate, config.learning_rate * config.final
    warmup = portion(config.warmup, steps)
    rest = max(steps - warmup, 1)

    def wsd() -> optax.Schedule:
        falling = max(min(portion(config.decay, steps), rest), 1)
        return optax.join_schedules(
            [optax.constant_schedule(peak), optax.linear_schedule(peak, end, falling)], [rest - falling]
        )

    def rsqrt() -> optax.Schedule:
        start = max(warmup, 1)
        return lambda count: peak * jnp.sqrt(start / (start + count))

    body = {
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, alpha=config.final),
        "linear": lambda: optax.linear_schedule(peak, end, rest),
        "constant": lambda: optax.constant_schedule(peak),
        "rsqrt": rsqrt,
        "wsd": wsd,
    }[config.schedule]()
    # The rate of step 0 is not zero: warm-up reaches the peak at step `warmup - 1`.
    return optax.join_schedules(
        [optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1)), body], [warmup]
    )


def decays(name: str) -> bool:
    """Return whether weight decay applies to the array with this name: to matrices, including the matrices of
    adapters."""
    return weights.is_kernel(name) and not weights.parse(name).vector


def build(
    config: OptimConfig, steps: int, names: Iterable[str], starts: Mapping[str, Any] | None = None
) -> optax.GradientTransformation:
    """Build the configured optimizer with its learning rate schedule.

    Weight decay is decoupled (Loshchilov and Hutter, 2017, arXiv:1711.05101) and applies to matrices. The optimizer
    does not clip gradients. The caller clips gradients, because the caller also logs the norm. The optimizers are:

    - adamw, and sgd with momentum.
    - adafactor (Shazeer and Stern, 2018, arXiv:1804.04235): no first moment, updates relative to each weight's size.
    - lion (Chen et al., 2023, arXiv:2302.06675).
    - muon on the matrices of the layers, and AdamW on the other arrays. Muon's updates are scaled to the root mean
      square of AdamW's updates (Liu et al., 2025, arXiv:2502.16982).

    Args:
      config: settings of the optimizer and the schedule.
      steps: number of training steps.
      names: names of the arrays that are trained.
      starts: number of updates after which the training of an array starts, by name. None starts all arrays at the
          first step. Until the training of an array starts, the caller sets the array's gradients and updates to zero.
    """
    rate = schedule(config, steps)
    mask = {name: decays(name) for name in names}
    decay = optax.add_decayed_weights(config.weight_decay, mask)
    step = optax.scale_by_learning_rate(rate)

    def adamw() -> optax.GradientTransformation:
        if starts:
            return optax.chain(adam_from(config, starts), decay, step)
        return optax.adamw(
            rate,
            b1=config.beta1,
            b2=config.beta2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=mask,
        )

    def sgd() -> optax.GradientTransformation:
        return optax.chain(optax.trace(config.momentum), decay, step)

    def adafactor() -> optax.GradientTransformation:
        scale = optax.chain(
            optax.scale_by_factored_rms(min_dim_size_to_factor=FACTORED_FROM),
            optax.clip_by_block_rms(1.0),
            optax.scale_by_param_block_rms(),
        )
        return optax.chain(by_layer(scale), decay, step)

    def lion() -> optax.GradientTransformation:
        return optax.chain(optax.scale_by_lion(config.beta1, config.beta2), decay, step)

    def muon() -> optax.GradientTransformation:
        orthogonal = optax.contrib.scale_by_muon(beta=config.momentum, weight_dimension_numbers=cast(Any, _muon_axes))
        return optax.partition(
            {"muon": optax.chain(orthogonal, _like_adam(), decay, step), "adamw": adamw()},
            lambda named: {name: "muon" if _is_muon(name, a) else "adamw" for name, a in named.items()},
        )

    return {"adamw": adamw, "sgd": sgd, "adafactor": adafactor, "lion": lion, "muon": muon}[config.name]()


def adam_from(config: OptimConfig, starts: Mapping[str, Any]) -> optax.GradientTransformation:
    """Build Adam's scaling of updates for arrays whose training starts at different steps.

    `starts` maps the name of an array to the number of updates before the array is trained. The moments of such an
    array are zero until then. The bias correction of the array therefore counts updates from its own start. A count
    from the first step would make the first updates up to (1 - beta1) / sqrt(1 - beta2) times too large.
    """
    b1, b2, eps = config.beta1, config.beta2, config.epsilon
    inner = optax.scale_by_adam(b1, b2, eps)

    def update(updates: Named, state: Any, params: Named | None = None) -> tuple[Named, Any]:
        out, new = cast(Any, inner.update(cast(Any, updates), state, cast(Any, params)))
        out = dict(out)
        for name, start in starts.items():
            if not isinstance(new.mu[name], optax.MaskedNode):
                own = jnp.maximum(new.count - start, 1).astype(jnp.float32)
                variance = new.nu[name] / (1 - b2**own)
                out[name] = new.mu[name] / (1 - b1**own) / (jnp.sqrt(variance) + eps)
        return out, new

    return optax.GradientTransformation(inner.init, cast(Any, update))


def _is_muon(name: str, a: Any) -> bool:
    return weights.is_layer_matrix(name) and a.ndim == 3


def _muon_axes(named: Named) -> Named:
    """Return, for each array, the two axes that Muon orthogonalizes: the last two.

    If another optimizer updates an array, optax puts a masked node in its place. Masked nodes are returned unchanged.
    """
    numbers = optax.contrib.MuonDimensionNumbers(1, 2)
    return {name: a if isinstance(a, optax.MaskedNode) else numbers for name, a in named.items()}


def _like_adam() -> optax.GradientTransformation:
    """Return a transformation that scales updates [inputs, outputs] to AdamW's root mean square of about 0.2.

    The root mean square of an orthogonal update is 1 / sqrt(max(inputs, outputs)).
    """
    return optax.stateless(lambda updates, _: jax.tree.map(lambda u: 0.2 * max(u.shape[-2:]) ** 0.5 * u, updates))


def by_layer(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Return a transformation that applies `inner` to each layer of stacked arrays separately.

    Arrays are grouped by their number of layers. The state is a dictionary of inner states with this number as the key,
    as a string. Arrays that are not stacked have the key "0".
    """

    def groups(named: Named) -> dict[str, Named]:
        out: dict[str, Named] = {}
        for name, a in named.items():
            out.setdefault(str(a.shape[0] if weights.is_stacked(name) else 0), {})[name] = a
        return out

    def init(named: Named) -> Any:
        return {depth: inner.init(g) if depth == "0" else jax.vmap(inner.init)(g) for depth, g in groups(named).items()}

    def update(updates: Named, state: Any, params: Named | None = None) -> tuple[Named, Any]:
        if params is None:
            raise ValueError("by_layer needs the parameters")
        out, new = {}, {}
        for depth, group in groups(updates).items():
            fn: Any = inner.update if depth == "0" else jax.vmap(inner.update)
            found, new[depth] = fn(group, state[depth], {name: params[name] for name in group})
            out |= found
        return {name: out[name] for name in updates}, new

    return optax.GradientTransformation(cast(Any, init), cast(Any, update))


def shardings(state: Any, params: dict[str, NamedSharding], shapes: Named, replicated: NamedSharding) -> Any:
    """Return the sharding of each array in an optimizer's state. Moments are sharded like their parameters.

    An array of the state belongs to the parameter whose name is in the array's path. Adafactor's row and column
    statistics are sharded like their parameter without the averaged axis. Counters are replicated.

    Args:
      state: the optimizer's state, as arrays or their shapes.
      params: sharding of each parameter, by name.
      shapes: parameters or their shapes, by name.
      replicated: sharding of all other arrays.
    """

    def one(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        keys = [getattr(k, "key", getattr(k, "name", None)) for k in path]
        name = next((k for k in reversed(keys) if isinstance(k, str) and k in params), None)
        if name is None:
            return replicated
        shape, sharding = shapes[name].shape, params[name]
        if leaf.shape == shape:
            return sharding
        if leaf.ndim == len(shape) - 1 and ("v_row" in keys or "v_col" in keys):
            first = int(weights.is_stacked(name))
            axis = first + int(np.argsort(shape[first:])[-1 if "v_row" in keys else -2])  # as optax chooses it
            spec = [*sharding.spec, *[None] * (len(shape) - len(sharding.spec))]
            if leaf.shape == shape[:axis] + shape[axis + 1 :]:
                return NamedSharding(sharding.mesh, PartitionSpec(*spec[:axis], *spec[axis + 1 :]))
        return replicated

    return jax.tree_util.tree_map_with_path(one, state)
