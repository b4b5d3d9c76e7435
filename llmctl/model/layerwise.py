"""Run the network layer by layer, for calibration and for generation with a key-value cache.

    carry = layerwise.embed(cfg, params, batch)
    for index in range(functional.depth(cfg, "decoder")):
        layer = layerwise.layer_params(params, "decoder", index)
        carry, _ = layerwise.block(cfg, "decoder", layer, carry, index)
    x_BTD = layerwise.finish(cfg, params, "decoder", carry)

A stack is the encoder or the decoder. The result is the same as the result of `functional.hidden`.

Shapes: B batch, T sequence, S encoder tokens, D model width, N tokens of a batch, I inputs of a matrix.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llmctl.model import weights
from llmctl.model.attention import Shared, local_layers
from llmctl.model.config import ModelConfig
from llmctl.model.functional import depth
from llmctl.model.layers import LMHead
from llmctl.model.task_head import TaskHead
from llmctl.model.transformer import Batch, Block, Params, Transformer, apply, body_params
from llmctl.model.wiring import has_cross_attention


class Carry(NamedTuple):
    """Store the inputs of a layer: the residual stream, and the inputs that all layers share, such as masks."""

    x_BTD: jax.Array
    shared: Shared


def embed(
    cfg: ModelConfig, params: Params, batch: Batch, memory_BSD: jax.Array | None = None, dtype: Any = jnp.float32
) -> Carry:
    """Return the inputs of the first decoder layer or, if there is no decoder, of the first encoder layer.

    Args:
        cfg: Config of the model.
        params: Parameters of the model.
        batch: Batch (see `hidden`).
        memory_BSD: Output of the encoder in an encoder-decoder.
        dtype: Dtype of the computation.
    """
    model, body = Transformer(cfg, dtype), body_params(params)
    return Carry(*apply(model, {"params": body}, batch, memory_BSD, method="start"))


def embed_encoder(cfg: ModelConfig, params: Params, batch: Batch, dtype: Any = jnp.float32) -> Carry:
    """Return the inputs of the first encoder layer in an encoder-decoder."""
    model, body = Transformer(cfg, dtype), body_params(params)
    return Carry(*apply(model, {"params": body}, batch, method="start_encoder"))


def encode(cfg: ModelConfig, params: Params, batch: Batch, dtype: Any = jnp.float32) -> jax.Array:
    """Return the encoder output [B, S, D] of an encoder-decoder, computed from `encoder_tokens`."""
    body = body_params(params)
    return apply(Transformer(cfg, dtype), {"params": body}, batch, method="encode")


def layer_params(params: Params, stack: str, layer: int) -> Params:
    """Return the parameters of one layer: a slice of the stacked parameters."""
    return weights.layer_of(params[stack]["blocks"], layer)


def block(
    cfg: ModelConfig,
    stack: str,
    layer: Params,
    carry: Carry,
    index: int | jax.Array = 0,
    *,
    taps: bool = False,
    dtype: Any = jnp.float32,
) -> tuple[Carry, dict[str, jax.Array]]:
    """Apply one layer, and optionally capture the inputs of its matrices.

    Args:
        cfg: Config of the model.
        stack: Name of the stack, "encoder" or "decoder".
        layer: Parameters of the layer.
        carry: Inputs of the layer.
        index: Index of the layer in the stack.
        taps: Whether to capture the inputs of the layer's matrices, for calibration.
        dtype: Dtype of the computation.

    Returns:
        The inputs of the next layer, and {path of a matrix, such as "attn/q": captured input [N, I]}.
    """
    layers = depth(cfg, stack)
    module = Block(cfg.of_stack(stack), dtype, layers, has_cross_attention(cfg, stack))
    local = local_layers(cfg, layers)[index]
    (x, _), state = apply(module, {"params": layer}, carry.x_BTD, carry.shared, local, mutable=["taps"] if taps else [])
    tapped = weights.flatten(state.get("taps", {}))
    return carry._replace(x_BTD=x), {path.removesuffix("/x"): value for path, value in tapped.items()}


def cached_block(
    cfg: ModelConfig, stack: str, layer: Params, carry: Carry, index: int, cache: Params, dtype: Any = jnp.float32
) -> tuple[Carry, Params]:
    """Apply one layer, and add the keys and values of the tokens to the key-value cache.

    In an encoder-decoder, the keys and values of cross-attention are cached under "cross" when they are first computed.

    Args:
        cfg: Config of the model.
        stack: Name of the stack, "encoder" or "decoder".
        layer: Parameters of the layer.
        carry: Inputs of the layer. For the first layer, they are the result of `embed`. The batch argument of `embed`
            must contain `slot` and `cached_segments`. `slot` is the cache position of the first token.
            `cached_segments` has the segment of the token at each cache position.
        index: Index of the layer in the stack.
        cache: Cache of this layer, {"attn": {"past_k", "past_v"}}.
        dtype: Dtype of the computation.

    Returns:
        The inputs of the next layer, and the new cache of this layer.
    """
    layers = depth(cfg, stack)
    module = Block(cfg.of_stack(stack), dtype, layers, has_cross_attention(cfg, stack))
    variables = {"params": layer, "cache": cache}
    (x, _), state = apply(
        module, variables, carry.x_BTD, carry.shared, local_layers(cfg, layers)[index], mutable=["cache"]
    )
    return carry._replace(x_BTD=x), state["cache"]


def finish(cfg: ModelConfig, params: Params, stack: str, carry: Carry, dtype: Any = jnp.float32) -> jax.Array:
    """Apply the final norm of a stack ("encoder" or "decoder") to the output of its last layer, [B, T, D]."""
    body = body_params(params)
    return apply(Transformer(cfg, dtype), {"params": body}, carry.x_BTD, stack, method="finish")


def head_taps(
    cfg: ModelConfig, params: Params, x_BTD: jax.Array, batch: Batch, dtype: Any = jnp.float32
) -> dict[str, jax.Array]:
    """Return the captured input [N, I] of each matrix of the output head, by the path of the matrix.

    N is the number of tokens; for a matrix after the pooling, N is the number of sequences. `wiring.matrices` returns
    the paths.
    """
    found: dict[str, jax.Array] = {}
    if cfg.head_kind.vocabulary:
        table = params["embed"]["tokens"] if cfg.tied else None
        lm_head = {"params": params.get("lm_head", {})}
        _, state = apply(LMHead(cfg, dtype), lm_head, x_BTD, table, mutable=["taps"])
        tapped = weights.flatten({"lm_head": state["taps"]})
        found = {path.removesuffix("/x"): x for path, x in tapped.items()}
        if cfg.tied:
            found["embed/tokens"] = found.pop("lm_head")
    if "head" in params:
        head = {"params": params["head"]}
        _, state = apply(TaskHead(cfg, dtype), head, x_BTD, batch["segments"], batch.get("order"), mutable=["taps"])
        tapped = weights.flatten({"head": state.get("taps", {})})
        found |= {path.removesuffix("/x"): x for path, x in tapped.items()}
    return found
