"""Attribute an output to tokens by attention rollout (Abnar and Zuidema, 2020, arXiv:2005.00928).

The attention of a layer is averaged over the heads, and then averaged with the identity. The identity represents the
residual connection. The product of the layers' matrices gives the share of each input token in each output position.
The attribution is the mean of the rows of some output positions. These are the positions from which the model's output
is computed: the pooled positions, or the scored positions.

The cited paper has no cross-attention. A decoder with cross-attention has a second residual connection per layer. After
this connection, a position's rollout is the mean of two terms: its earlier rollout, and that of the attended encoder
outputs.

The attention probabilities of each layer are computed from its queries and keys. No other program stores them.

Shapes: B rows, T tokens per row, S encoder tokens per row, P scored positions per row.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from llmctl.artifacts.artifact import Artifact
from llmctl.config.errors import RequestError
from llmctl.model import layerwise
from llmctl.model.attention import local_layers
from llmctl.model.attention_xla import attend, probabilities
from llmctl.model.config import ModelConfig
from llmctl.model.functional import depth
from llmctl.model.task_head import pool
from llmctl.model.transformer import Batch, Block, Params, apply
from llmctl.model.wiring import has_cross_attention

RESIDUAL = 0.5
"""Factor of the identity (the residual connection) in the weighted mean of the identity and a layer's attention."""


def check(found: Artifact) -> None:
    """Check that attention rollout is defined for the model.

    Raises:
        RequestError: If the model has trained keys (prefix tuning), which belong to no token.
    """
    if found.model.prefix_tokens:
        raise RequestError(
            f"{found.path}: attention rollout needs tokens, and prefix tuning has trained keys; use --method "
            "integrated_gradients"
        )


def program(found: Artifact, dtype: str) -> Any:
    """Return a compiled function that computes attributions [B, T]. Its arguments are the parameters and a batch.

    The attributions of all input tokens of a row sum to 1. For an encoder-decoder, only the attributions of the
    encoder's tokens are returned, [B, S]. Those of the decoder's inputs are the rest of the sum.
    """
    cfg = found.model

    @jax.jit
    def run(params: Params, batch: Batch) -> jax.Array:
        if not cfg.encoder_layers:
            carry = layerwise.embed(cfg, params, batch, dtype=dtype)
            own_BTT, _ = _rollout(cfg, cfg.architecture, params, carry, dtype, None)
            return jnp.einsum("bt,bts->bs", read_from(cfg, batch), own_BTT)
        carry = layerwise.embed_encoder(cfg, params, batch, dtype)
        memory_BSS, _ = _rollout(cfg, "encoder", params, carry, dtype, None)
        memory_BSD = layerwise.encode(cfg, params, batch, dtype)
        carry = layerwise.embed(cfg, params, batch, memory_BSD, dtype)
        _, source_BTS = _rollout(cfg, "decoder", params, carry, dtype, memory_BSS)
        return jnp.einsum("bt,bts->bs", read_from(cfg, batch), source_BTS)

    return run


def read_from(cfg: ModelConfig, batch: Batch) -> jax.Array:
    """Return the share of each position in the output, [B, T]. The shares of a row sum to 1.

    A language model computes its output from the scored positions. A task head computes its output from the pooled
    positions.
    """
    segments_BT = batch["segments"]
    eye_TT = jnp.eye(segments_BT.shape[1])
    if not cfg.head_kind.vocabulary:
        return pool(jnp.broadcast_to(eye_TT, (len(segments_BT), *eye_TT.shape)), segments_BT, cfg.pooling)
    weights_BP = batch["weights"]
    return jnp.einsum("bp,bpt->bt", weights_BP / jnp.sum(weights_BP, axis=1, keepdims=True), eye_TT[batch["at"]])


def _rollout(
    cfg: ModelConfig, stack: str, params: Params, carry: layerwise.Carry, dtype: Any, memory_BSS: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Return the shares of the input positions in each output position of a stack, as two arrays.

    The first array [B, T, T] is for the stack's own inputs. The second array [B, T, S] is for the encoder's inputs.
    Without cross-attention, the second array is empty (S = 0).
    """
    layers = depth(cfg, stack)
    B, T = carry.x_BTD.shape[:2]
    seen: list[tuple[bool, jax.Array]] = []

    def spy(q: Any, k: Any, v: Any, mask: Any, shared: Any, local: Any, own: ModelConfig, *, cross: bool) -> jax.Array:
        bias = None if cross else shared.bias_HTS
        seen.append((cross, jnp.mean(probabilities(q, k, mask, bias, own), axis=1)))
        return attend(q, k, v, mask, bias, own)

    source_BSS = jnp.zeros((B, 0, 0)) if memory_BSS is None else memory_BSS
    block = Block(cfg.of_stack(stack), dtype, layers, has_cross_attention(cfg, stack), choose=spy)

    def layer(state: Any, each: Any) -> tuple[Any, None]:
        x_BTD, own_BTT, source_BTS = state
        weights, local = each
        seen.clear()
        x_BTD, _ = apply(block, {"params": weights}, x_BTD, carry.shared, local)
        for cross, mean_BTS in seen:
            if cross:
                read_BTT, read_BTS = jnp.zeros(()), mean_BTS @ source_BSS
            else:
                read_BTT, read_BTS = mean_BTS @ own_BTT, mean_BTS @ source_BTS
            own_BTT = RESIDUAL * own_BTT + (1 - RESIDUAL) * read_BTT
            source_BTS = RESIDUAL * source_BTS + (1 - RESIDUAL) * read_BTS
        return (x_BTD, own_BTT, source_BTS), None

    start = (carry.x_BTD, jnp.broadcast_to(jnp.eye(T), (B, T, T)), jnp.zeros((B, T, source_BSS.shape[2])))
    (_, own_BTT, source_BTS), _ = jax.lax.scan(layer, start, (params[stack]["blocks"], local_layers(cfg, layers)))
    return own_BTT, source_BTS
