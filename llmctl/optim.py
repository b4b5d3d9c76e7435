"""Optimizers and schedules (optax) over a flat dictionary of named arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax

from llmctl.settings import OptimConfig

Named = dict[str, Any]


def schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up from 0, then the named shape down to `final` of the peak at `steps`."""
    peak = config.learning_rate
    warmup = round(config.warmup * steps) if config.warmup < 1 else round(config.warmup)
    rest = max(steps - warmup, 1)
    body = {
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, alpha=config.final),
        "linear": lambda: optax.linear_schedule(peak, peak * config.final, rest),
        "constant": lambda: optax.constant_schedule(peak),
    }[config.schedule]()
    # The first step already learns: warm-up reaches the peak at step `warmup - 1`.
    return optax.join_schedules(
        [optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1)), body], [warmup]
    )


def decays(name: str) -> bool:
    """Weight decay acts on matrices, and on the low-rank pairs that change them."""
    path, _, part = name.partition(":")
    return path.endswith("/kernel") or part in ("a", "b")


def build(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """AdamW (arXiv:1711.05101) with decoupled decay on matrices; gradients are clipped by the caller, which logs their norm."""

    def mask(named: Named) -> Named:
        return {name: decays(name) for name in named}

    return optax.adamw(
        schedule(config, steps),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=mask,
    )


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
        if name.startswith("embed/"):
            return jnp.zeros_like(u)
        if "/blocks/" in name:
            return jnp.where((jnp.arange(u.shape[0]) >= layers).reshape(-1, *[1] * (u.ndim - 1)), u, 0)
        return u

    return {name: one(name, u) for name, u in updates.items()} if layers else updates
