"""Define the Transformer for all families: embeddings, stacks of layers, and the forward pass of training.

Shapes: B batch, T sequence, D model width, L layers, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core.scope import Scope

from llmctl.distributed import mesh as meshes
from llmctl.distributed.mesh import constrain
from llmctl.model import attention_kernels, layer_states, pipeline_parallel, quantized_matmul, relative_bias, weights
from llmctl.model.attention import PROJECTED, Attention, Choose, Shared, local_layers, share, visible
from llmctl.model.attention_xla import KEPT
from llmctl.model.bottleneck import Bottleneck
from llmctl.model.config import ModelConfig
from llmctl.model.layers import Embed, FeedForward, LMHead, Norm, dropout

Batch = dict[str, jax.Array]
Params = dict[str, Any]

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
    """Apply one layer: attention (and cross-attention) and feed-forward, each with residual connection and norms."""

    config: ModelConfig
    dtype: Any
    layers: int
    cross: bool = False
    choose: Choose | None = None
    """Function that computes attention; None selects a kernel, or plain XLA on CPUs."""

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, shared: Shared, local: jax.Array, key: jax.Array | None = None
    ) -> tuple[jax.Array, None]:
        """Apply the layer, and return (output [B, T, D], None), the form that `nn.scan` requires.

        Args:
            x_BTD: Input.
            shared: Inputs that all layers share, such as masks.
            local: Whether this layer has the sliding window, a bool scalar.
            key: Random key for dropout; None disables dropout.
        """
        cfg, rows_B = self.config, cast(jax.Array, shared.rows_B)
        choose = self.choose or (attention_kernels.attend if _may_use_kernels() else None)
        attention = partial(Attention, cfg, self.dtype, self.layers, choose=choose)
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

        read = x if cfg.norm_position == "post" else norm("norm")(x)
        y = sublayer(read)
        adapted = cfg.adapter_size and cfg.has_adapter(name)
        adapter = Bottleneck(cfg, self.dtype, name=f"{name}_adapter") if adapted else None
        if adapter and cfg.adapter_form == "parallel":
            y = y + adapter(read)
        if cfg.norm_position == "sandwich":
            y = norm("post_norm")(y)
        y = drop(y)
        if adapter and cfg.adapter_form == "sequential":
            y = y + adapter(y)
        x = x + y
        return norm("norm")(x) if cfg.norm_position == "post" else x


def _may_use_kernels() -> bool:
    """Return True if attention may use fused kernels or ring attention.

    On CPUs, the result is True only if sequences are sharded, or if a test requests kernels.
    """
    on_cpu = meshes.device().platform == "cpu"
    return not on_cpu or meshes.splits_sequences() or attention_kernels.setting.get() == "interpret"


class Stack(nn.Module):
    """Run L layers by `nn.scan` over parameters that are stacked on axis 0.

    Because of the scan, compile time does not grow with L.

    On a mesh with a `pipeline` axis, each pipeline stage scans over its own layers (`llmctl.model.pipeline_parallel`).
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
            self.relative_bias = relative_bias.RelativeBias(cfg)
        if cfg.norm_position != "post":
            self.norm = Norm(cfg, self.dtype)

    def share(
        self,
        segments_BT: jax.Array,
        positions_BT: jax.Array,
        cached_BS: jax.Array | None = None,
        slot: jax.Array | int | None = None,
        order_BT: jax.Array | None = None,
        branches_BT: jax.Array | None = None,
    ) -> Shared:
        """Return the masks and rotary tables that all layers of this stack use, as `attention.share` describes."""
        cfg = self.config
        shared = share(
            cfg, segments_BT, positions_BT, causal=self.causal, cached_BS=cached_BS, slot=slot, order_BT=order_BT,
            branches_BT=branches_BT,
        )  # fmt: skip
        if cfg.positions != "relative":
            return shared
        return relative_bias.add(
            shared, self.relative_bias(), cfg,
            causal=self.causal, slot=slot, order_BT=order_BT, positions_BT=positions_BT,
        )  # fmt: skip

    def __call__(self, x_BTD: jax.Array, shared: Shared) -> jax.Array:
        own = self._own()
        if meshes.axis_size("pipeline") == 1 or self.is_initializing():
            x_BTD, _ = self.blocks(x_BTD, shared, *own)
        else:
            blocks = self.variables["params"]["blocks"]
            x_BTD = pipeline_parallel.run(self._as_function(), blocks, own, x_BTD, shared)
        return self.finish(x_BTD)

    def states(self, x_BTD: jax.Array, shared: Shared, layers: Sequence[int]) -> tuple[jax.Array, jax.Array]:
        """Run the stack, and also return the outputs of the layers with the indices `layers`; -1 is the stack's input.

        Returns:
            The output of the stack [B, T, D], and the outputs of these layers [n, B, T, D].
        """
        blocks = self.variables["params"]["blocks"]
        x_BTD, states_nBTD = layer_states.run(self._as_function(), blocks, self._own(), x_BTD, shared, layers)
        return self.finish(x_BTD), states_nBTD

    def _own(self) -> tuple[jax.Array, jax.Array | None]:
        """Return two arrays [L] with one element per layer: whether attention is local, and dropout keys (or None)."""
        key = self.make_rng("dropout") if self.train and self.config.dropout else None
        keys_L = None if key is None else jax.random.split(key, self.layers)
        return local_layers(self.config, self.layers), keys_L

    def _as_function(self) -> Callable[..., jax.Array]:
        """Return the function `_layer`, wrapped in `jax.checkpoint` if the stack has a rematerialization policy."""
        if self.remat == "none":
            return self._layer
        return jax.checkpoint(self._layer, policy=REMAT[self.remat], prevent_cse=False)

    def _layer(self, params: Any, x_BTD: jax.Array, shared: Shared, local: jax.Array, key: Any) -> jax.Array:
        """Apply one layer with the given parameters."""
        at: Any = Scope({"params": params}, path=(*self.path, "blocks"))
        return Block(self.config, self.dtype, self.layers, self.cross, parent=at)(x_BTD, shared, local, key)[0]

    def finish(self, x_BTD: jax.Array) -> jax.Array:
        """Apply the final norm to the output of the last layer. A post-norm stack has no final norm."""
        return x_BTD if self.config.norm_position == "post" else self.norm(x_BTD)


class Transformer(nn.Module):
    """Combine embeddings with an encoder stack, a decoder stack, or both.

    Task heads are in `llmctl.model.task_head`.
    """

    config: ModelConfig
    dtype: Any = jnp.float32
    remat: str = "none"
    train: bool = False

    def setup(self) -> None:
        cfg = self.config
        self.embed = Embed(cfg, self.dtype)
        common = {"dtype": self.dtype, "remat": self.remat, "train": self.train}
        if cfg.architecture != "decoder":
            own = cfg.of_stack("encoder")
            self.encoder = Stack(own, cfg.encoder_layers or cfg.layers, causal=False, **common)
        if cfg.architecture != "encoder":
            self.decoder = Stack(cfg, cfg.layers, causal=True, cross=cfg.encoder_layers > 0, **common)

    def __call__(self, batch: Batch) -> jax.Array:
        """Return the final hidden states [B, T, D] of the decoder or, if there is none, of the encoder."""
        memory = self.encode(batch) if self.config.encoder_layers else None
        x_BTD = self._last()(*self.start(batch, memory))
        return x_BTD if meshes.axis_size("pipeline") == 1 else pipeline_parallel.spread(x_BTD)

    def states(self, batch: Batch, layers: Sequence[int]) -> tuple[jax.Array, jax.Array]:
        """Return (final hidden states [B, T, D], outputs [n, B, T, D] of the n layers `layers`).

        The layers are those of the decoder or, if there is none, of the encoder.
        """
        memory = self.encode(batch) if self.config.encoder_layers else None
        return self._last().states(*self.start(batch, memory), layers)

    def _last(self) -> Stack:
        """Return the stack that runs last: the decoder or, if there is none, the encoder."""
        return self.encoder if self.config.architecture == "encoder" else self.decoder

    def start(self, batch: Batch, memory_BSD: jax.Array | None = None) -> tuple[jax.Array, Shared]:
        """Return the embeddings of `batch["tokens"]`, and the attention inputs that all layers share, such as masks.

        The layers are those of the decoder or, if there is none, of the encoder. With a key-value cache of S positions,
        the batch has two more arrays. `slot` is the cache position of the first token. `cached_segments` [B, S] has the
        segment of the token at each cache position.
        """
        stack = self._last()
        offset_BTD, prefix = batch.get("embedding_offset"), self.config.prefix_tokens
        positions_BT = batch["positions"] + prefix if prefix else batch["positions"]
        x = self.embed(batch["tokens"], positions_BT, batch.get("types"), offset_BTD, self.train)
        shared = stack.share(
            batch["segments"], positions_BT, batch.get("cached_segments"), batch.get("slot"), batch.get("order"),
            batch.get("branches"),
        )  # fmt: skip
        if not self.config.encoder_layers:
            return x, shared
        shared = shared._replace(memory_BSD=memory_BSD)  # with a cache, the memory may already be cached
        if shared.mask_BTS is None:
            return x, shared._replace(memory_segments_BS=batch["encoder_segments"])
        return x, shared._replace(memory_mask_BTS=visible(batch["segments"], batch["encoder_segments"]))

    def start_encoder(self, batch: Batch) -> tuple[jax.Array, Shared]:
        """Return the embeddings of `batch["encoder_tokens"]`, and the attention inputs that encoder layers share."""
        offset_BSD = batch.get("encoder_embedding_offset")
        x = self.embed(batch["encoder_tokens"], batch["encoder_positions"], None, offset_BSD, self.train)
        order_BS = batch.get("encoder_order")
        return x, self.encoder.share(batch["encoder_segments"], batch["encoder_positions"], order_BT=order_BS)

    def encode(self, batch: Batch) -> jax.Array:
        """Return the encoder output [B, S, D] that the decoder attends to."""
        return self.encoder(*self.start_encoder(batch))

    def finish(self, x_BTD: jax.Array, stack: str) -> jax.Array:
        """Apply the final norm of a stack, "encoder" or "decoder"."""
        return getattr(self, stack).finish(x_BTD)


# --- the forward pass as functions of a parameter tree ----------------------------------------------------------------


def apply(module: nn.Module, variables: Params, *args: Any, **options: Any) -> Any:
    """Call `module.apply`. Type checkers get the result type Any, because Flax's own type is unusable here."""
    return module.apply(variables, *args, **options)


def body_params(params: Params) -> Params:
    """Return the parameters of `Transformer`: all parameters except the output heads."""
    return {name: params[name] for name in ("embed", "encoder", "decoder") if name in params}


def product_rules(train: bool) -> contextlib.AbstractContextManager[None]:
    """Return a context manager that disables 8-bit matrix products if `train` is false.

    Validation and teacher models therefore never use 8-bit products, even if training does.
    """
    off = not train and bool(quantized_matmul.rules_in_use.get())
    return quantized_matmul.use({}) if off else contextlib.nullcontext()


def hidden(
    cfg: ModelConfig,
    params: Params,
    batch: Batch,
    *,
    train: bool = False,
    rng: jax.Array | None = None,
    dtype: Any = jnp.float32,
    remat: str = "none",
) -> jax.Array:
    """Compute the final hidden states of a model for a batch of token sequences.

    Args:
        cfg: Config of the model.
        params: Parameters of the model.
        batch: Tokens, positions and segments [B, T]. An encoder-decoder has the same arrays for the encoder. Several
            texts may be packed into one sequence. Each text is a segment, numbered from 1; 0 is padding. Optional
            `branches` [B, T] separate several continuations of a text (see `llmctl.model.attention`). An optional
            `embedding_offset` [B, T, D] is added to the token embeddings (adversarial training, prompt tuning).
            `encoder_embedding_offset` is added to the encoder's token embeddings.
        train: Whether dropout is applied.
        rng: Random key; required if `train` is set and the config has dropout.
        dtype: Dtype of the computation.
        remat: Rematerialization policy, a name in `transformer.REMAT`.

    Returns:
        Hidden states [B, T, D] of the decoder or, if there is none, of the encoder.
    """
    body, rngs = body_params(params), {} if rng is None else {"dropout": rng}
    with product_rules(train):
        return apply(Transformer(cfg, dtype, remat, train), {"params": body}, batch, rngs=rngs)


def head_params(cfg: ModelConfig, params: Params) -> Params:
    """Return the parameters that `head_logits` needs.

    A tied embedding table is transposed to [D, V]. With this form, XLA's CPU backend computes the gradient in less than
    half the time.
    """
    head = {"lm_head": params.get("lm_head", {})}
    if not cfg.tied:
        return head
    table = params["embed"]["tokens"]
    return head | ({"output": table.T} if weights.is_plain(table) else {"table": table})


def head_logits(cfg: ModelConfig, head: Params, x: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    """Compute float32 logits [..., V] from hidden states [..., D] and the result of `head_params`."""
    return apply(LMHead(cfg, dtype), {"params": head["lm_head"]}, x, head.get("table"), head.get("output"))
