"""Read and write the key-value cache of a layer, and define its layout.

Keys and values are plain arrays or, to need less memory, quantized (`llmctl.model.compressed_cache`).

A slot is one position along the sequence axis of the cache. A slot holds the key and the value of one token.

Shapes: B batch, T tokens, S cache slots, G key/value heads, K head width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llmctl.model.compressed_cache import Compressed, rotated

CENTER_TOKENS = 16
"""Number of tokens whose keys determine the center of a text's keys (`compressed_cache`). The center is the mean of the
keys of the first tokens. If a text has fewer tokens, the center is zero."""
Cached = jax.Array | Compressed
"""Cached keys or values of a layer."""


def cache_shape(B: int, G: int, S: int, K: int) -> tuple[int, ...]:
    """Return the shape of a layer's cached keys or values: [B, G, S, K], without the axes B and G if their size is 1.

    `attention_xla.attend` multiplies arrays in this layout, so that XLA can update the cache in place. Axes of size 1
    are omitted, because XLA's CPU backend would remove them by copying the cache at every step.
    """
    return (*(n for n in (B, G) if n > 1), S, K)


def empty(shape: tuple[int, ...], form: str, dtype: Any, centered: bool = False) -> Cached:
    """Return a cache of zeros for the keys or the values of a layer, quantized in the format `form`.

    If `form` is empty, the result is a plain array in `dtype`. If `centered` is set, quantized keys have a center.
    """
    return Compressed.zeros(shape, form, dtype, centered) if form else jnp.zeros(shape, dtype)


def widened(cache: Any, slots: int) -> Any:
    """Return a copy of a tree of cached keys and values, with room for `slots` more tokens."""

    def more(kept: Cached) -> Cached:
        if isinstance(kept, Compressed):  # the center has no slots
            return replace(kept, codes=more(kept.codes), scale=more(kept.scale))
        return jnp.pad(kept, [(0, 0)] * (kept.ndim - 2) + [(0, slots), (0, 0)])

    return jax.tree.map(more, cache, is_leaf=lambda kept: isinstance(kept, Compressed))


def remember(
    module: nn.Module, name: str, new_BTGK: jax.Array, slot: jax.Array | int, dtype: Any, mask_BTS: jax.Array
) -> Cached:
    """Write the keys or values of T new tokens into a module's cache, and return all cached keys or values.

    Args:
        module: Attention module, whose collection "cache" is written.
        name: "k" or "v".
        new_BTGK: New keys or values [B, T, G, K].
        slot: Cache position at which the first token is written; a scalar, or one position per row [B].
        dtype: Dtype of a new cache.
        mask_BTS: Attention mask. If `slot` is 0, the diagonal of the first T columns marks the tokens that are not
            padding.

    Returns:
        All cached keys or values [B, S, G, K], or [B, G, S, K] if they are quantized.
    """
    B, T, G, K = new_BTGK.shape
    kept: nn.Variable[Any] = module.variable("cache", f"past_{name}", lambda: jnp.zeros(cache_shape(B, G, T, K), dtype))
    old = kept.value
    if jnp.ndim(slot) and B == 1:
        slot = jnp.reshape(slot, ())
    if isinstance(old, Compressed) and old.center is not None and T >= CENTER_TOKENS and not jnp.ndim(slot):
        real_BT = jnp.diagonal(mask_BTS[:, :, :T], axis1=1, axis2=2)
        old = replace(old, center=jnp.where(slot == 0, _center(new_BTGK, real_BT), old.center))
    new = _like(old, _laid_out(new_BTGK))

    def write_at(old: jax.Array, new: jax.Array, slot: jax.Array | int) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(old, new, slot, axis=old.ndim - 2)

    def write(old: jax.Array, new: jax.Array) -> jax.Array:
        return jax.vmap(write_at)(old, new, slot) if jnp.ndim(slot) else write_at(old, new, slot)

    if isinstance(old, Compressed) and isinstance(new, Compressed):
        kept.value = replace(new, codes=write(old.codes, new.codes), scale=write(old.scale, new.scale))
    else:
        kept.value = jax.tree.map(write, old, new)
    return recall(module, f"past_{name}", B, G, K)


def keep_memory(module: nn.Module, name: str, x_BSGK: jax.Array) -> None:
    """Store the keys or values of cross-attention in the cache of a module, so that later steps can read them.

    The arrays are named "memory_k" and "memory_v". If the cache already has such an array, the new array gets its
    format and dtype. The old array may have no slots: it then only defines format and dtype.
    """
    laid_out, name = _laid_out(x_BSGK), f"memory_{name}"
    kept = module.get_variable("cache", name) if module.has_variable("cache", name) else laid_out
    module.put_variable("cache", name, _like(kept, laid_out))


def has_memory(module: nn.Module) -> bool:
    """Return whether the cache of a module contains the keys of cross-attention."""
    return module.has_variable("cache", "memory_k") and module.get_variable("cache", "memory_k").shape[-2] > 0


def recall(module: nn.Module, name: str, B: int, G: int, K: int) -> Cached:
    """Return the array `name` of a module's cache.

    A plain array is returned as [B, S, G, K], and a quantized array as [B, G, S, K].
    """
    kept = module.get_variable("cache", name)
    return kept.with_heads(B, G) if isinstance(kept, Compressed) else kept.reshape(B, G, -1, K).transpose(0, 2, 1, 3)


def _like(kept: Cached, new: jax.Array) -> Cached:
    """Convert keys or values to the format and the dtype of a cached array."""
    return Compressed.of(new, kept.format, kept.center) if isinstance(kept, Compressed) else new.astype(kept.dtype)


def _center(x_BTGK: jax.Array, real_BT: jax.Array) -> jax.Array:
    """Return the center of the keys [B, T, G, K]: their mean over the first tokens, rotated.

    The mean is over the first `CENTER_TOKENS` tokens that are not padding.

    If a row has fewer tokens, its center is zero. The result has the axes of `Compressed.center`.
    """
    used_BT = real_BT & (jnp.cumsum(real_BT, axis=1) <= CENTER_TOKENS)
    enough_B = jnp.sum(used_BT, axis=1) == CENTER_TOKENS
    weight_BT = jnp.where(used_BT & enough_B[:, None], 1 / CENTER_TOKENS, 0)
    return rotated(_laid_out(jnp.sum(x_BTGK * weight_BT[..., None, None], axis=1, keepdims=True)))


def _laid_out(x_BTGK: jax.Array) -> jax.Array:
    """Return keys or values [B, T, G, K] in the layout of the cache (`cache_shape`)."""
    B, T, G, K = x_BTGK.shape
    return x_BTGK.transpose(0, 2, 1, 3).reshape(cache_shape(B, G, T, K))
