"""Read and write the key-value cache of a layer, and define its layout.

A slot is one position along the sequence axis of the cache. It holds the key and the value of one token.

Shapes: B batch, T tokens, S cache slots, G key/value heads, K head width.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def cache_shape(B: int, G: int, S: int, K: int) -> tuple[int, ...]:
    """Return the shape of a layer's cached keys or values: [B, G, S, K], without the axes B and G if their size is 1.

    `attention_xla.attend` multiplies arrays in this layout, so that XLA can update the cache in place. The cache has no
    axes of size 1, because XLA's CPU backend would copy the cache at every step to drop them.
    """
    return (*(n for n in (B, G) if n > 1), S, K)


def remember(module: nn.Module, name: str, new_BTGK: jax.Array, slot: jax.Array | int, dtype: Any) -> jax.Array:
    """Write the keys or values [B, T, G, K] of T new tokens into the cache of a module, from position `slot` on.

    Args:
        module: Attention module, whose collection "cache" is written.
        name: "k" or "v".
        new_BTGK: New keys or values.
        slot: Cache position at which the first token is written.
        dtype: Dtype of a new cache.

    Returns:
        All cached keys or values [B, S, G, K].
    """
    B, T, G, K = new_BTGK.shape
    kept = module.variable("cache", f"past_{name}", lambda: jnp.zeros(cache_shape(B, G, T, K), dtype))
    new = _laid_out(new_BTGK).astype(kept.value.dtype)
    kept.value = jax.lax.dynamic_update_slice_in_dim(kept.value, new, slot, axis=kept.value.ndim - 2)
    return recall(module, f"past_{name}", B, G, K)


def keep_memory(module: nn.Module, name: str, x_BSGK: jax.Array) -> None:
    """Store the keys or values of cross-attention in the cache of a module, so that later steps can read them."""
    module.put_variable("cache", f"memory_{name}", _laid_out(x_BSGK))


def recall(module: nn.Module, name: str, B: int, G: int, K: int) -> jax.Array:
    """Return the array `name` of a module's cache, as [B, S, G, K]."""
    return module.get_variable("cache", name).reshape(B, G, -1, K).transpose(0, 2, 1, 3)


def _laid_out(x_BTGK: jax.Array) -> jax.Array:
    """Return keys or values [B, T, G, K] in the layout of the cache (`cache_shape`)."""
    B, T, G, K = x_BTGK.shape
    return x_BTGK.transpose(0, 2, 1, 3).reshape(cache_shape(B, G, T, K))
