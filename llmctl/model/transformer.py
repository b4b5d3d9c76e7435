"""Transformer of all families: stacks of scanned blocks on embeddings, with the flags of ModelConfig.

Shapes: B batch, T sequence, D model width, L layers, V vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core.scope import Scope

from llmctl.distributed import mesh as meshes
from llmctl.distributed.mesh import constrain
from llmctl.model import pipeline_parallel, weights
from llmctl.model.attention import (
    PROJECTED,
    Attention,
    RelativeBias,
    Shared,
    bucket_of,
    distances,
    local_layers,
    share,
    visible,
)
from llmctl.model.attention_xla import KEPT
from llmctl.model.config import ModelConfig
from llmctl.model.layers import ACTIVATIONS, Dense, FeedForward, Norm, dropout, tap, weight_param

Batch = dict[str, jax.Array]

REMAT = {
    "none": None,
    "minimal": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, jax.checkpoint_policies.save_only_these_names(KEPT)
    ),
    "qkv": jax.checkpoint_policies.save_only_these_names(PROJECTED),
    "full": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
}


class Block(nn.Module):
    """One layer: attention (and cross-attention) and feed-forward, each with residual connection and norms."""

    config: ModelConfig
    dtype: Any
    layers: int
    cross: bool = False

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, shared: Shared, local: jax.Array, key: jax.Array | None = None
    ) -> tuple[jax.Array, None]:
        """Apply the layer.

        Args:
            x_BTD: Input.
            shared: Inputs that all layers share.
            local: Whether this layer has the sliding window, a bool scalar.
            key: Random key of the dropout; no dropout if None.
        """
        cfg, rows_B = self.config, cast(jax.Array, shared.rows_B)
        attention = partial(Attention, cfg, self.dtype, self.layers)
        sublayers: dict[str, Any] = {"attn": lambda x: attention(name="attn")(x, shared, local)}
        if self.cross:
            sublayers["cross"] = lambda x: attention(cross=True, name="cross")(x, shared, local)
        sublayers["mlp"] = FeedForward(cfg, self.dtype, self.layers, name="mlp")
        for i, (name, sublayer) in enumerate(sublayers.items()):
            own = None if key is None else jax.random.fold_in(key, i)
            x_BTD = self._residual(name, x_BTD, sublayer, partial(dropout, rate=cfg.dropout, key=own, rows_B=rows_B))
        return constrain(x_BTD, "batch", "seq", "act_embed"), None

    def _residual(self, name: str, x: jax.Array, sublayer: Any, drop: Any) -> jax.Array:
        cfg = self.config

        def norm(suffix: str) -> Norm:
            return Norm(cfg, self.dtype, name=f"{name}_{suffix}")

        y = sublayer(x if cfg.norm_position == "post" else norm("norm")(x))
        if cfg.norm_position == "sandwich":
            y = norm("post_norm")(y)
        x = x + drop(y)
        return norm("norm")(x) if cfg.norm_position == "post" else x


class Stack(nn.Module):
    """Stack of L blocks as one scan, with parameters stacked on axis 0. Compile time does not grow with L.

    On a mesh with a `pipeline` axis, each stage scans over its own layers (`llmctl.model.pipeline_parallel`).
    """

    config: ModelConfig
    layers: int
    causal: bool
    dtype: Any
    remat: str = "none"
    train: bool = False
    cross: bool = False

    def setup(self) -> None:
        cfg = self.config
        block = Block if self.remat == "none" else nn.remat(Block, policy=REMAT[self.remat], prevent_cse=False)
        scanned = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=cast(Any, (nn.broadcast, 0, 0)),
            length=self.layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        self.blocks = scanned(cfg, self.dtype, self.layers, self.cross)
        if cfg.positions == "relative":
            self.relative_bias = RelativeBias(cfg)
        if cfg.norm_position != "post":
            self.norm = Norm(cfg, self.dtype)

    def share(
        self,
        segments_BT: jax.Array,
        positions_BT: jax.Array,
        cached_BS: jax.Array | None = None,
        slot: jax.Array | int | None = None,
        order_BT: jax.Array | None = None,
    ) -> Shared:
        """Compute the shared inputs of the layers once; see `attention.share` for the arguments."""
        cfg = self.config
        shared = share(
            cfg, segments_BT, positions_BT, causal=self.causal, cached_BS=cached_BS, slot=slot, order_BT=order_BT
        )
        if cfg.positions != "relative":
            return shared
        table_UH = self.relative_bias()
        if shared.mask_BTS is None:
            return shared._replace(bias_table_UH=table_UH)
        distance_TS = distances(shared.mask_BTS, slot, order_BT)
        bias_TSH = table_UH.astype(jnp.float32)[bucket_of(cfg, not self.causal, distance_TS)]
        return shared._replace(bias_HTS=jnp.transpose(bias_TSH, (2, 0, 1)))

    def __call__(self, x_BTD: jax.Array, shared: Shared) -> jax.Array:
        key = self.make_rng("dropout") if self.train and self.config.dropout else None
        keys_L = None if key is None else jax.random.split(key, self.layers)
        own = (local_layers(self.config, self.layers), keys_L)
        if meshes.axis_size("pipeline") == 1 or self.is_initializing():
            x_BTD, _ = self.blocks(x_BTD, shared, *own)
        else:
            blocks = self.variables["params"]["blocks"]
            layer = jax.checkpoint(self._layer, policy=REMAT[self.remat], prevent_cse=False)
            x_BTD = pipeline_parallel.run(self._layer if self.remat == "none" else layer, blocks, own, x_BTD, shared)
        return self.finish(x_BTD)

    def _layer(self, params: Any, x_BTD: jax.Array, shared: Shared, local: jax.Array, key: Any) -> jax.Array:
        """Apply one layer of `blocks` as a function of its parameters."""
        at: Any = Scope({"params": params}, path=(*self.path, "blocks"))
        return Block(self.config, self.dtype, self.layers, self.cross, parent=at)(x_BTD, shared, local, key)[0]

    def finish(self, x_BTD: jax.Array) -> jax.Array:
        """Apply the final norm, if the family has one."""
        return x_BTD if self.config.norm_position == "post" else self.norm(x_BTD)


class Embed(nn.Module):
    """Sum of token, position and segment-type embeddings [B, T, D]."""

    config: ModelConfig
    dtype: Any

    @nn.compact
    def __call__(
        self, tokens_BT: jax.Array, positions_BT: jax.Array, types_BT: jax.Array | None, train: bool
    ) -> jax.Array:
        cfg = self.config

        def table(name: str, rows: int, axis: str | None, deviation: float = 0.02) -> Any:
            axes = (axis, "embed_in")
            w = weight_param(self, name, nn.initializers.normal(deviation), axes, (rows, cfg.d_model))
            return partial(weights.take, w, dtype=self.dtype, axes=axes)

        # If hidden states are scaled by d_model ** -0.5 before the tied output projection, unit variance of the logits
        # needs table entries of unit variance (T5).
        x = table("tokens", cfg.vocab_size, "vocab_in", 0.02 if cfg.logit_scale else 1.0)(tokens_BT)
        x = x * jnp.asarray(cfg.embed_scale or cfg.d_model**0.5, self.dtype)
        if cfg.positions == "learned":
            rows = cfg.max_seq_len + cfg.position_offset
            x = x + table("positions", rows, None)(positions_BT + cfg.position_offset)
        if cfg.positions == "sinusoidal":
            x = x + sinusoids(positions_BT, cfg.d_model).astype(self.dtype)
        if cfg.token_types:
            # RoBERTa's single segment type stands for both texts of a pair.
            types_BT = jnp.zeros_like(tokens_BT) if types_BT is None else jnp.minimum(types_BT, cfg.token_types - 1)
            x = x + table("types", cfg.token_types, None)(types_BT)
        if cfg.embed_norm:
            x = Norm(cfg, self.dtype, name="norm")(x)
        if train and cfg.dropout:
            x = dropout(x, cfg.dropout, self.make_rng("dropout"), jnp.arange(len(x)))
        return constrain(x, "batch", "seq", "act_embed")


def sinusoids(positions_BT: jax.Array, width: int) -> jax.Array:
    """Compute sine and cosine position encodings, interleaved [B, T, D].

    (Vaswani et al., 2017, arXiv:1706.03762, section 3.5)
    """
    rate = 10_000.0 ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angle = positions_BT.astype(jnp.float32)[..., None] * rate
    return jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1).reshape(*positions_BT.shape, -1)[..., :width]


class LMHead(nn.Module):
    """Output head of a language model: hidden states [..., D] -> logits [..., V] in float32.

    The projection is tied or untied. BERT transforms the hidden states first.
    """

    config: ModelConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, table: weights.Weight | None, output: jax.Array | None = None) -> jax.Array:
        """Compute the logits.

        Args:
            x: Hidden states [..., D].
            table: Embedding table [V, D] of a tied model.
            output: The same table, already transposed [D, V].
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


class Transformer(nn.Module):
    """Embeddings with an encoder stack, a decoder stack, or both. Task heads are in `llmctl.model.task_head`."""

    config: ModelConfig
    dtype: Any = jnp.float32
    remat: str = "none"
    train: bool = False

    def setup(self) -> None:
        cfg = self.config
        self.embed = Embed(cfg, self.dtype)
        common = {"dtype": self.dtype, "remat": self.remat, "train": self.train}
        if cfg.architecture != "decoder":
            self.encoder = Stack(cfg, cfg.encoder_layers or cfg.layers, causal=False, **common)
        if cfg.architecture != "encoder":
            self.decoder = Stack(cfg, cfg.layers, causal=True, cross=cfg.encoder_layers > 0, **common)

    def __call__(self, batch: Batch) -> jax.Array:
        """Compute the final hidden states [B, T, D] of the last stack."""
        if self.config.architecture == "encoder":
            x_BTD = self.encoder(*self.start(batch))
        else:
            memory = self.encode(batch) if self.config.encoder_layers else None
            x_BTD = self.decoder(*self.start(batch, memory))
        return x_BTD if meshes.axis_size("pipeline") == 1 else pipeline_parallel.spread(x_BTD)

    def start(self, batch: Batch, memory_BSD: jax.Array | None = None) -> tuple[jax.Array, Shared]:
        """Compute the embeddings and shared inputs of the stack that reads `tokens`.

        With a cache, `cached_segments` [B, S] and `slot` of the batch give the tokens' slots in it.
        """
        stack = self.encoder if self.config.architecture == "encoder" else self.decoder
        x = self.embed(batch["tokens"], batch["positions"], batch.get("types"), self.train)
        shared = stack.share(
            batch["segments"], batch["positions"], batch.get("cached_segments"), batch.get("slot"), batch.get("order")
        )
        if not self.config.encoder_layers:
            return x, shared
        shared = shared._replace(memory_BSD=memory_BSD)  # with a cache, the memory may already be cached
        if shared.mask_BTS is None:
            return x, shared._replace(memory_segments_BS=batch["encoder_segments"])
        return x, shared._replace(memory_mask_BTS=visible(batch["segments"], batch["encoder_segments"]))

    def start_encoder(self, batch: Batch) -> tuple[jax.Array, Shared]:
        """Compute the embeddings and shared inputs of the encoder in an encoder-decoder."""
        x = self.embed(batch["encoder_tokens"], batch["encoder_positions"], None, self.train)
        order_BS = batch.get("encoder_order")
        return x, self.encoder.share(batch["encoder_segments"], batch["encoder_positions"], order_BT=order_BS)

    def encode(self, batch: Batch) -> jax.Array:
        """Compute the encoder output [B, S, D] that the decoder attends to."""
        return self.encoder(*self.start_encoder(batch))

    def finish(self, x_BTD: jax.Array, stack: str) -> jax.Array:
        """Apply the final norm of the named stack."""
        return getattr(self, stack).finish(x_BTD)
