"""Define the layers that all families use: dense, norm, feed-forward, rotary positions, dropout, embeddings, LM head.

Shapes: B batch, T sequence, D model width, F feed-forward width, H heads, K head width, I inputs, O outputs, V
vocabulary.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.errors import ScopeParamShapeError

from llmctl.distributed import mesh as meshes
from llmctl.distributed.mesh import constrain
from llmctl.model import positions, quantized_matmul, weights
from llmctl.model.config import ModelConfig

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


def weight_param(module: nn.Module, name: str, init: Any, axes: tuple[Any, ...], shape: tuple[int, ...]) -> Any:
    """Return a weight of a Flax module: a new array during initialization, otherwise the stored weight.

    A stored weight may consist of several arrays, such as integers and scales (`weights.base`). Flax's own `param`
    would compare `shape` with the shape of the first of these arrays, so `param` cannot be used.

    Raises:
        ScopeParamShapeError: If the weight has another shape than `shape`.
    """
    w = module.get_variable("params", name) if module.has_variable("params", name) else None
    if w is None or weights.is_plain(w):
        return module.param(name, nn.with_logical_partitioning(init, axes), shape, unbox=True)
    if w.shape != shape:
        raise ScopeParamShapeError(name, "/".join(module.path), w.shape, shape)
    return w


def tap(module: nn.Module, x: jax.Array) -> None:
    """Capture the input of a matrix for calibration: store it as [N, I] in the Flax collection "taps".

    Without calibration, this collection is not mutable, and nothing is stored.
    """
    rows = x.reshape(-1, x.shape[-1])
    module.sow("taps", "x", rows, reduce_fn=lambda _, new: new, init_fn=lambda: cast(Any, None))


class Dense(nn.Module):
    """Apply a dense layer: x [..., I] @ kernel [I, O] + bias [O].

    Calibration can capture the input x (see `tap`).
    """

    features: int
    axes: tuple[str, str]
    bias: bool
    dtype: Any
    scale: float = 1.0
    """Factor on the initial kernel. With the factor 1, the kernel's standard deviation is 1 / sqrt(I)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        tap(self, x)
        init = nn.initializers.variance_scaling(self.scale**2, "fan_in", "normal")
        kernel = weight_param(self, "kernel", init, self.axes, (x.shape[-1], self.features))
        kind = quantized_matmul.kind_of("/".join(self.path)) if quantized_matmul.rules_in_use.get() else ""
        y = weights.matmul(x, kernel, self.dtype, kind, fold=not meshes.splits_sequences(), axes=self.axes)
        if self.bias:
            b = self.param(
                "bias",
                nn.with_logical_partitioning(nn.initializers.zeros, (self.axes[1],)),
                (self.features,),
                unbox=True,
            )
            y = y + weights.bias(kernel, b, self.dtype)
        return y


class Norm(nn.Module):
    """Normalize the last axis in float32, by RMSNorm (Zhang and Sennrich, 2019, arXiv:1910.07467) or LayerNorm."""

    config: ModelConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        cfg, width = self.config, x.shape[-1]
        x32 = x.astype(jnp.float32)
        start = nn.initializers.zeros if cfg.norm_plus_one else nn.initializers.ones
        scale = self.param("scale", nn.with_logical_partitioning(start, ("norm",)), (width,), unbox=True)
        scale = scale.astype(jnp.float32)
        scale = 1.0 + scale if cfg.norm_plus_one else scale
        if cfg.norm == "rms":
            y = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + cfg.norm_eps) * scale
        else:
            bias = self.param(
                "bias", nn.with_logical_partitioning(nn.initializers.zeros, ("norm",)), (width,), unbox=True
            )
            centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
            y = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + cfg.norm_eps) * scale
            y = y + bias.astype(jnp.float32)
        return y.astype(self.dtype)


class FeedForward(nn.Module):
    """Apply a feed-forward layer: down(act(up(x))), or down(act(gate(x)) * up(x)) if gated (Shazeer, 2020,
    arXiv:2002.05202).
    """

    config: ModelConfig
    dtype: Any
    layers: int

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        cfg = self.config
        act = ACTIVATIONS[cfg.activation]

        def dense(name: str, features: int, axes: tuple[str, str], scale: float = 1.0) -> Dense:
            return Dense(features, axes, cfg.mlp_bias, self.dtype, scale, name=name)

        h_BTF = dense("up", cfg.d_ff, ("embed", "mlp"))(x_BTD)
        h_BTF = act(dense("gate", cfg.d_ff, ("embed", "mlp"))(x_BTD)) * h_BTF if cfg.gated else act(h_BTF)
        h_BTF = constrain(h_BTF, "batch", "seq", "act_mlp")
        return dense("down", cfg.d_model, ("mlp", "embed"), residual_scale(self.layers))(h_BTF)


def residual_scale(layers: int) -> float:
    """Return the factor on the initial values of matrices whose output is added to the residual stream.

    With this factor, the variance of the residual stream does not depend on `layers`, the number of layers (GPT-2;
    Radford et al., 2019).
    """
    return 1.0 / math.sqrt(2 * layers)


def dropout(x: jax.Array, rate: float, key: jax.Array | None, rows_B: jax.Array) -> jax.Array:
    """Apply inverted dropout with the rate `rate` to x [B, ...]; without a key, return x unchanged.

    The mask of a row depends only on the key and the row's index in the full batch (`rows_B`). The masks are therefore
    the same if the batch is computed in parts.
    """
    if key is None or rate == 0.0:
        return x
    keys_B = jax.vmap(partial(jax.random.fold_in, key))(rows_B)
    keep = jax.vmap(partial(jax.random.bernoulli, p=1.0 - rate, shape=x.shape[1:]))(keys_B)
    return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)


def rotary_table(positions_BT: jax.Array, cfg: ModelConfig, theta: float) -> tuple[jax.Array, jax.Array]:
    """Return the cosines and the sines of the rotary angles, each [B, T, K/2].

    Angles are scaled as `cfg.rope_scaling` defines (RoPE; Su et al., 2021, arXiv:2104.09864).

    Args:
        positions_BT: Position of each token.
        cfg: Config of the model.
        theta: Base of the rotary frequencies.
    """
    half = cfg.head_dim // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    frequency, magnitude = positions.scale_frequencies(frequency, cfg) if cfg.rope_scaling else (frequency, 1.0)
    angle_BTk = positions_BT.astype(jnp.float32)[..., None] * frequency
    return jnp.cos(angle_BTk) * magnitude, jnp.sin(angle_BTk) * magnitude


def rotate(x_BTHK: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate queries or keys [B, T, H, K] by the angles of a rotary table.

    Element i of a head is rotated together with element i + K/2 (the "rotate half" convention of Hugging Face weights).
    """
    cos, sin = (t[:, :, None, :] for t in table)
    a, b = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTHK.dtype)


class Embed(nn.Module):
    """Compute the sum of token, position and segment-type embeddings, [B, T, D]."""

    config: ModelConfig
    dtype: Any

    @nn.compact
    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        types_BT: jax.Array | None,
        offset_BTD: jax.Array | None,
        train: bool,
    ) -> jax.Array:
        """Return the embeddings [B, T, D].

        `offset_BTD` is added to the token embeddings before `embed_scale` is applied.
        """
        cfg = self.config

        def table(name: str, rows: int, axis: str | None, deviation: float = 0.02) -> Any:
            axes = (axis, "embed_in")
            w = weight_param(self, name, nn.initializers.normal(deviation), axes, (rows, cfg.d_model))
            return partial(weights.take, w, dtype=self.dtype, axes=axes)

        # If hidden states are scaled by d_model ** -0.5 before the tied output projection, unit variance of the logits
        # needs table entries of unit variance (T5).
        ids_BT = jnp.minimum(tokens_BT, cfg.vocab_size - 1) if cfg.prompt_tokens else tokens_BT
        x = table("tokens", cfg.vocab_size, "vocab_in", 0.02 if cfg.logit_scale else 1.0)(ids_BT)
        if cfg.prompt_tokens:
            row_BT = tokens_BT - cfg.vocab_size
            prompt = table("prompt", cfg.prompt_tokens, None)(jnp.maximum(row_BT, 0))
            x = jnp.where((row_BT >= 0)[..., None], prompt, x)
        x = x if offset_BTD is None else x + offset_BTD.astype(self.dtype)
        x = x * jnp.asarray(cfg.embed_scale or cfg.d_model**0.5, self.dtype)
        if cfg.positions == "learned":
            rows = cfg.max_seq_len + cfg.prefix_tokens + cfg.position_offset
            x = x + table("positions", rows, None)(positions_BT + cfg.position_offset)
        if cfg.positions == "sinusoidal":
            x = x + positions.sinusoids(positions_BT, cfg.d_model).astype(self.dtype)
        if cfg.token_types:
            # RoBERTa's single segment type stands for both texts of a pair.
            types_BT = jnp.zeros_like(tokens_BT) if types_BT is None else jnp.minimum(types_BT, cfg.token_types - 1)
            x = x + table("types", cfg.token_types, None)(types_BT)
        if cfg.embed_norm:
            x = Norm(cfg, self.dtype, name="norm")(x)
        if train and cfg.dropout:
            x = dropout(x, cfg.dropout, self.make_rng("dropout"), jnp.arange(len(x)))
        return constrain(x, "batch", "seq", "act_embed")


class LMHead(nn.Module):
    """Project hidden states [..., D] to logits [..., V] in float32 (the output head of a language model).

    The projection may be tied to the embedding table. In BERT, a dense layer, an activation and a norm come first.
    """

    config: ModelConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, table: weights.Weight | None, output: jax.Array | None = None) -> jax.Array:
        """Return the logits [..., V], float32.

        Args:
            x: Hidden states [..., D].
            table: Embedding table [V, D] of a tied model.
            output: The same table, if it is already transposed to [D, V].
        """
        cfg = self.config
        if cfg.head_transform:
            x = Dense(cfg.d_model, ("embed", "norm"), True, self.dtype, name="transform")(x)
            x = Norm(cfg, self.dtype, name="norm")(ACTIVATIONS[cfg.head_activation or cfg.activation](x))
        x = x * jnp.asarray(cfg.logit_scale or cfg.d_model**-0.5, x.dtype)
        tap(self, x)
        if output is not None:
            logits = weights.matmul(x, output, self.dtype)
        elif cfg.tied:
            logits = weights.transpose_matmul(x, cast(weights.Weight, table), self.dtype)
        else:
            init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
            kernel = weight_param(self, "kernel", init, ("embed", "vocab"), (cfg.d_model, cfg.vocab_size))
            logits = weights.matmul(x, kernel, self.dtype)
        logits = logits.astype(jnp.float32)
        if cfg.head_transform:
            bias_init = nn.with_logical_partitioning(nn.initializers.zeros, ("vocab",))
            logits = logits + self.param("bias", bias_init, (cfg.vocab_size,), unbox=True).astype(jnp.float32)
        if cfg.final_softcap:
            logits = cfg.final_softcap * jnp.tanh(logits / cfg.final_softcap)
        return logits
