"""Compute position encodings: rotary frequencies scaled for longer contexts, and fixed sinusoids.

Shapes: B batch, T sequence, D model width, K head width.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from llmctl.model.config import ModelConfig


def scale_frequencies(frequency: jax.Array, cfg: ModelConfig) -> tuple[jax.Array, float]:
    """Scale rotary frequencies [K / 2] for longer contexts, by the method of `cfg.rope_scaling`.

    The methods are linear, llama3 and yarn (YaRN; Peng et al., 2023, arXiv:2309.00071). The keys of `rope_scaling` must
    be valid (see `hf_config.wrong_scaling`).

    Returns:
        The scaled frequencies [K / 2], and the factor by which the cosines and sines are multiplied.
    """
    scaling = cfg.rope_scaling
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return frequency, 1.0
    factor = float(scaling["factor"])
    if kind == "linear":
        return frequency / factor, 1.0
    original = float(scaling.get("original_max_position_embeddings", cfg.max_seq_len + cfg.prefix_tokens))
    if kind == "llama3":
        low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
        turns = original * frequency / (2 * math.pi)
        keep = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
        return frequency * (keep + (1 - keep) / factor), 1.0
    half, theta = frequency.shape[0], cfg.rope_theta

    def dimension(turns: float) -> float:
        return half * math.log(original / (turns * 2 * math.pi)) / math.log(theta)

    low = max(math.floor(dimension(float(scaling.get("beta_fast", 32)))), 0)
    high = min(math.ceil(dimension(float(scaling.get("beta_slow", 1)))), 2 * half - 1)
    # As in transformers: if the range ends before it begins, the ramp is descending.
    ramp = jnp.clip((jnp.arange(half) - low) / ((high - low) or 0.001), 0.0, 1.0)
    magnitude = float(scaling.get("attention_factor") or 0.1 * math.log(max(factor, 1.0)) + 1.0)
    return frequency / factor * ramp + frequency * (1 - ramp), magnitude


def sinusoids(positions_BT: jax.Array, width: int) -> jax.Array:
    """Return sine and cosine position encodings, interleaved, float32 [B, T, D] (Vaswani et al., 2017,
    arXiv:1706.03762, section 3.5).
    """
    rate = 10_000.0 ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angle = positions_BT.astype(jnp.float32)[..., None] * rate
    return jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1).reshape(*positions_BT.shape, -1)[..., :width]
