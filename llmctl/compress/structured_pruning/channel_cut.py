"""Remove channels of the residual stream from all arrays of a model, so that its hidden width becomes smaller.

Every axis of length `d_model` is reduced to the same channels. Such axes are in embeddings, position and segment
tables, norms, inputs and outputs of matrices, and output heads. In an encoder-decoder, both stacks keep the same
channels, because they share the embedding table. Norms are computed over the kept channels alone, as in Minitron
(Muralidharan et al., 2024, arXiv:2407.14679).

Shapes: D hidden width before pruning, E hidden width after pruning.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmctl.compress.structured_pruning.shrink import take_everywhere
from llmctl.config.errors import RequestError
from llmctl.model import functional, weights, wiring
from llmctl.model.config import ModelConfig

Params = dict[str, Any]


def hidden_axes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return {path of a weight: axes whose length is the hidden width, counted from the end}.

    >>> found = hidden_axes(ModelConfig(preset="llama-tiny"))
    >>> found["decoder/blocks/mlp/up/kernel"], found["decoder/blocks/mlp/down/kernel"], found["embed/tokens"]
    ((-2,), (-1,), (-1,))
    """
    wider = cfg.model_copy(update={"d_model": cfg.d_model + 1, "preset": ""})
    one, other = (weights.flatten(functional.abstract(c)) for c in (cfg, wider))
    found = {
        path: tuple(i - a.ndim for i in range(a.ndim) if a.shape[i] != other[path].shape[i]) for path, a in one.items()
    }
    return {path: axes for path, axes in found.items() if axes}


def cut_channels(
    cfg: ModelConfig, params: Params, kept_E: np.ndarray, ratios: dict[str, np.ndarray] | None = None
) -> tuple[ModelConfig, Params]:
    """Return the config and the parameters with only the channels `kept_E`.

    Some models multiply embeddings by sqrt(D), or hidden states before the output projection by 1 / sqrt(D). These
    factors change with the width. To undo the change, the embedding table and the norm before the output projection are
    scaled.

    Args:
      cfg: config of the model.
      params: parameters of the model.
      kept_E: ascending indices of the kept channels.
      ratios: factors that multiply the scales of norms, [layers] or []. The keys are the paths of the norms.

    Raises:
      RequestError: If a weight is quantized in groups along the channels.
    """
    target = ModelConfig.model_validate({**cfg.model_dump(), "preset": "", "d_model": len(kept_E)})
    flat = weights.flatten(params)
    take_everywhere(flat, hidden_axes(cfg), kept_E)
    for norm, ratio in (ratios or {}).items():
        _scale_norm(cfg, flat, norm, ratio, biased=False)
    _keep_factors(cfg, flat, math.sqrt(cfg.d_model / len(kept_E)))
    return target, weights.unflatten(flat)


def check(cfg: ModelConfig, params: Params, width: int) -> None:
    """Check, before any computation, that the hidden width can be reduced to `width`.

    Raises:
      RequestError: If a weight is quantized in groups along the channels, or the model's positions are sinusoidal.
    """
    if width == cfg.d_model:
        return
    if cfg.positions == "sinusoidal":
        raise RequestError(
            "hidden: sinusoidal positions are computed from the hidden width, so channels cannot be removed; remove "
            "heads, ffn or layers"
        )
    jax.eval_shape(lambda p: cut_channels(cfg, p, np.arange(width))[1], params)


def _keep_factors(cfg: ModelConfig, flat: dict[str, Any], root: float) -> None:
    """Scale embeddings and norms in `flat` so that factors sqrt(D) and 1 / sqrt(D) keep their effect at width E.

    `flat` has the weights by path, and `root` is sqrt(D / E).
    """
    after = 1.0
    if not cfg.embed_scale:  # sqrt(D)
        for path in (p for p in ("embed/tokens", "embed/prompt") if p in flat):
            if not weights.is_plain(flat[path]):
                raise RequestError(f"{path} is quantized, and a smaller hidden width changes its scale; prune first")
            flat[path] = (flat[path] * root).astype(flat[path].dtype)
        after = 1 / root if cfg.tied else 1.0
    if not cfg.logit_scale:  # 1 / sqrt(D)
        after /= root
    if after != 1.0 and cfg.head_kind.vocabulary:
        norm = "lm_head/norm" if cfg.head_transform else wiring.end(cfg, wiring.stacks(cfg)[-1])
        last = np.ones(cfg.layers, np.float32)
        last[-1] = after  # a post-norm model has no final norm, but one per layer
        _scale_norm(cfg, flat, norm, last if weights.is_stacked(f"{norm}/scale") else np.float32(after), biased=True)


def _scale_norm(cfg: ModelConfig, flat: dict[str, Any], norm: str, ratio: Any, *, biased: bool) -> None:
    """Multiply the scale of a norm by `ratio`: one factor, or one per layer. If `biased`, also multiply the bias."""
    factor = jnp.asarray(ratio, jnp.float32)[..., None]
    scale = flat[f"{norm}/scale"]
    new = (scale.astype(jnp.float32) + cfg.norm_plus_one) * factor - cfg.norm_plus_one
    flat[f"{norm}/scale"] = new.astype(scale.dtype)
    if biased and f"{norm}/bias" in flat:
        bias = flat[f"{norm}/bias"]
        flat[f"{norm}/bias"] = (bias.astype(jnp.float32) * factor).astype(bias.dtype)
