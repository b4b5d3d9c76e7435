"""Optimizers and schedules (optax) over a flat dictionary of named arrays.

Matrices of a stack are stacked [L, in, out]. What an optimizer does with a matrix as a whole (Muon's
orthogonalization, Adafactor's factors and root mean squares) it does layer by layer, so that a scanned model is trained
like an unrolled one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from llmctl.config.settings import OptimConfig
from llmctl.model import weights

Named = dict[str, Any]

FACTORED_FROM = 128
"""Adafactor keeps row and column statistics of matrices with sides at least this long, as the paper's code does."""


def _steps(amount: float, steps: int) -> int:
    return round(amount * steps) if amount < 1 else round(amount)


def schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up, then the named shape.

    cosine and linear fall to `final` of the peak at `steps`; wsd (warm-up, stable, decay: arXiv:2404.06395) holds the
    peak and falls linearly in the last `decay` steps; rsqrt is peak * sqrt(warmup / step) (arXiv:1706.03762).
    """
    peak, end = config.learning_rate, config.learning_rate * config.final
    warmup = _steps(config.warmup, steps)
    rest = max(steps - warmup, 1)

    def wsd() -> optax.Schedule:
        falling = max(min(_steps(config.decay, steps), rest), 1)
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
    # The first step already learns: warm-up reaches the peak at step `warmup - 1`.
    return optax.join_schedules(
        [optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1)), body], [warmup]
    )


def decays(name: str) -> bool:
    """Return whether weight decay applies: to matrices, and to the parts of adapters around them."""
    return weights.is_kernel(name)


def _mask(named: Named) -> Named:
    return {name: decays(name) for name in named}


def build(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """The configured optimizer with its schedule. Weight decay is decoupled (arXiv:1711.05101) and acts on matrices.

    adamw; sgd with momentum; adafactor (arXiv:1804.04235: no first moment, updates relative to the weights' own size);
    lion (arXiv:2302.06675); muon on the matrices of the stacks, scaled to AdamW's root mean square (arXiv:2502.16982),
    with AdamW on the rest. Gradients are clipped by the caller, which logs their norm.
    """
    rate = schedule(config, steps)
    decay = optax.add_decayed_weights(config.weight_decay, _mask)
    step = optax.scale_by_learning_rate(rate)

    def adamw() -> optax.GradientTransformation:
        return optax.adamw(
            rate,
            b1=config.beta1,
            b2=config.beta2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=_mask,
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


def _is_muon(name: str, a: Any) -> bool:
    return weights.is_layer_matrix(name) and a.ndim == 3


def _muon_axes(named: Named) -> Named:
    """Orthogonalize the last two axes; what other optimizers train is masked, and stays so."""
    numbers = optax.contrib.MuonDimensionNumbers(1, 2)
    return {name: a if isinstance(a, optax.MaskedNode) else numbers for name, a in named.items()}


def _like_adam() -> optax.GradientTransformation:
    """An orthogonal [in, out] has root mean square 1 / sqrt(max(in, out)); AdamW's updates have about 0.2."""
    return optax.stateless(lambda updates, _: jax.tree.map(lambda u: 0.2 * max(u.shape[-2:]) ** 0.5 * u, updates))


def by_layer(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` on every layer of stacked arrays for itself. Its state is {depth of the stack or 0: inner state}."""

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


def shardings(state: Any, params: dict[str, NamedSharding], shapes: Named, whole: NamedSharding) -> Any:
    """Where every array of an optimizer's (abstract) state lies: with its parameter, and counters everywhere.

    An array belongs to the parameter whose name is on its path. Adafactor's row and column statistics lie like their
    parameter with the averaged axis left out.
    """

    def one(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        keys = [getattr(k, "key", getattr(k, "name", None)) for k in path]
        name = next((k for k in reversed(keys) if isinstance(k, str) and k in params), None)
        if name is None:
            return whole
        shape, sharding = shapes[name].shape, params[name]
        if leaf.shape == shape:
            return sharding
        if leaf.ndim == len(shape) - 1 and ("v_row" in keys or "v_col" in keys):
            first = int(weights.is_stacked(name))
            axis = first + int(np.argsort(shape[first:])[-1 if "v_row" in keys else -2])  # as optax chooses it
            spec = [*sharding.spec, *[None] * (len(shape) - len(sharding.spec))]
            if leaf.shape == shape[:axis] + shape[axis + 1 :]:
                return NamedSharding(sharding.mesh, PartitionSpec(*spec[:axis], *spec[axis + 1 :]))
        return whole

    return jax.tree_util.tree_map_with_path(one, state)


def average(old: Named, new: Named, step: Any, decay: float) -> Named:
    """Exponential moving average of weights after `step` + 1 updates.

    The decay starts low, min(decay, (1 + n) / (10 + n)), so that a short run forgets where it began.
    """
    n = step.astype(jnp.float32) + 1
    share = 1 - jnp.minimum(decay, (1 + n) / (10 + n))
    # Written as a step towards the new weights: what does not move keeps its bits.
    return {name: a + share.astype(a.dtype) * (new[name] - a) for name, a in old.items()}


def clip(grads: Named, norm: Any, limit: float) -> Named:
    """Scales the gradients so that their global norm is at most `limit`; 0 leaves them."""
    if not limit:
        return grads
    factor = jnp.minimum(1.0, limit / jnp.maximum(norm, 1e-12))
    return {name: g * factor for name, g in grads.items()}


def hold_zeros(old: Named, new: Named, held: Callable[[str], bool]) -> Named:
    """A pruned weight stays pruned: entries that are zero stay zero in the arrays that `held` names."""
    return {name: jnp.where(old[name] == 0, 0, a) if held(name) else a for name, a in new.items()}


def freeze_layers(updates: Named, layers: int) -> Named:
    """No update to the embeddings nor to the first `layers` layers of any stack."""

    def one(name: str, u: Any) -> Any:
        if weights.parse(name).embeds:
            return jnp.zeros_like(u)
        if weights.is_stacked(name):
            return jnp.where((jnp.arange(u.shape[0]) >= layers).reshape(-1, *[1] * (u.ndim - 1)), u, 0)
        return u

    return {name: one(name, u) for name, u in updates.items()} if layers else updates
