"""Initialize BERT-style encoders so that equal tokens attend to each other in the first layer.

To predict whether one passage follows another, a network must find words that occur in both passages. With random
queries and keys, attention is at first a uniform mean over all tokens. The smallest BERTs do not learn to find equal
tokens within millions of training tokens.

Here the key projection of the first layer is initialized as a copy of the query projection. Both projections are scaled
up. The outputs of both projections do not depend on the segment type (first or second passage). Token embeddings are
larger than position embeddings. From the first step, a token therefore attends to equal tokens in both passages. The
output of attention then shows whether the token occurs in one passage or in both. Initialization with the structure of
trained networks is called mimetic (Trockman and Kolter, 2023, arXiv:2305.09828).

Shapes: L layers, D model width, H query heads, G key heads, R = H / G, K head width, U segment types minus one.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from llmctl.model.config import ModelConfig

SHARES = {"tokens": 5.0, "positions": 0.25, "types": 3.5}
"""Factors on the initial standard deviation (0.02) of token, position and segment-type embeddings. The sum of the
embeddings is normalized, so only the ratios of these factors matter."""
SHARPNESS = 2.5
"""Factor on the query and key projections of the first layer. With this factor, equal tokens stand out among hundreds
of other tokens."""


def applies_to(cfg: ModelConfig) -> bool:
    """Return True if this initialization is used for new models with the config `cfg`.

    The result is True for encoders with learned positions, such as BERT and RoBERTa.
    """
    return cfg.architecture == "encoder" and cfg.positions == "learned"


def initialize(cfg: ModelConfig, params: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters with rescaled embeddings, and with new query and key kernels in the first layer.

    Args:
        cfg: Config of the model.
        params: Randomly initialized parameters.
    """
    embed = {name: value * SHARES[name] if name in SHARES else value for name, value in params["embed"].items()}
    blocks = params["encoder"]["blocks"]
    attention = blocks["attn"]
    q, k = attention["q"], attention["k"]
    queries_DI = SHARPNESS * _without_type_response(q["kernel"][0], params["embed"].get("types"))
    keys_DGK = queries_DI.reshape(cfg.d_model, cfg.heads, cfg.head_dim)[:, :: cfg.heads // cfg.kv_heads]
    alike = {
        "q": q | {"kernel": q["kernel"].at[0].set(queries_DI)},
        "k": k | {"kernel": k["kernel"].at[0].set(keys_DGK.reshape(cfg.d_model, -1))},
    }
    encoder = params["encoder"] | {"blocks": blocks | {"attn": attention | alike}}
    return params | {"embed": embed, "encoder": encoder}


def _without_type_response(kernel_DI: jax.Array, types_UD: jax.Array | None) -> jax.Array:
    """Change a kernel [D, I] so that x @ kernel does not depend on the segment type.

    The input x is the output of a LayerNorm. The columns of the kernel are made orthogonal to the differences between
    type embeddings. Before that, the mean over the D elements of a difference is subtracted, as a LayerNorm does.
    """
    if types_UD is None or len(types_UD) < 2:
        return kernel_DI
    apart_UD = types_UD[1:] - types_UD[0]
    apart_UD = apart_UD - apart_UD.mean(axis=1, keepdims=True)
    basis_DU, _ = jnp.linalg.qr(apart_UD.T)
    return kernel_DI - basis_DU @ (basis_DU.T @ kernel_DI)
