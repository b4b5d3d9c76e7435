"""Rotate the channels of a model so that outliers spread over all channels, without changing the model's function.

QuaRot (Ashkboos et al., 2024, arXiv:2404.00456) multiplies the residual stream by an orthogonal matrix R. Matrices that
write to the stream are multiplied by R. Matrices that read the stream are multiplied by R^T. RMSNorm commutes with R if
the norm's scales are first moved into the matrices after the norm. The values of each head are rotated in the same way,
between the value and the output projection. All products are folded into the weights, so the rotated model runs as
before.

R is a Hadamard matrix with random signs. If the size is not a power of two, R is a Kronecker product. One factor is a
random orthogonal matrix. The other factor is a Hadamard matrix. Its size is the largest power of two that divides the
size of R.

Shapes: I inputs and O outputs of a matrix, D model width, V vocabulary, K size of the rotation.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llmctl.artifacts.artifact import Artifact
from llmctl.compress.quantization.quantize import check as check_plain
from llmctl.config.errors import RequestError
from llmctl.model import functional, weights, wiring
from llmctl.model.config import ModelConfig

Params = dict[str, Any]
HEAD, TABLE = "lm_head/kernel", "embed/tokens"


def refusal(cfg: ModelConfig) -> str:
    """Return the reason why a model cannot be rotated; empty if a rotation is possible.

    >>> refusal(ModelConfig(preset="llama-tiny")), refusal(ModelConfig(preset="bert-tiny"))
    ('', 'its layer norms subtract the mean of the channels, which rotations change')
    """
    if cfg.norm != "rms":
        return "its layer norms subtract the mean of the channels, which rotations change"
    if cfg.norm_position != "pre":
        return "its norms scale single channels of the residual stream, which rotations mix"
    if cfg.embed_norm or cfg.head_transform:
        return f"its {'embedding norm' if cfg.embed_norm else 'output transform'} scales single channels"
    if cfg.positions == "sinusoidal":
        return "its sinusoidal positions are computed and cannot be rotated"
    if cfg.task_head and cfg.head_kind.bare:
        return "its output is the hidden state, which would be rotated"
    return ""


def check(cfg: ModelConfig, params: Params, pruned: bool) -> None:
    """Check, before any computation, that a model can be rotated.

    Raises:
      RequestError: If the norms or the head do not allow a rotation. If the model is pruned. If a weight is quantized.
    """
    reason = refusal(cfg) or ("its zeros would be filled" if pruned else "")
    if reason:
        raise RequestError(f"rotate: the model cannot be rotated: {reason}; leave out rotate")
    for m in weights.matrices(params):
        check_plain(m.path, m.weight, m.inputs, "", 0)


def untied(cfg: ModelConfig) -> ModelConfig:
    """Return the config of the rotated model, in which embeddings are not tied.

    The scale of the final norm is moved into the output projection, but not into the embedding table. The two matrices
    then differ.
    """
    shared = cfg.tied and cfg.head_kind.vocabulary
    return cfg.model_copy(update={"tied": False, "preset": ""}) if shared else cfg


def with_model(base: Artifact, cfg: ModelConfig) -> Artifact:
    """Return an artifact with another model config, for functions that read the config from the artifact."""
    return replace(base, manifest=base.manifest.model_copy(update={"model": cfg}))


def rotate(cfg: ModelConfig, params: Params, seed: int, mesh: Mesh) -> Params:
    """Return the parameters of the rotated model, sharded over the devices.

    The rotated model has the config `untied(cfg)`.

    Args:
      cfg: config of a model that `check` accepts.
      params: parameters of the model; the matrices are plain arrays.
      seed: seed of the signs.
      mesh: the devices.
    """
    turned = rotated(cfg, params, seed)
    return jax.device_put(turned, functional.shardings(untied(cfg), turned, mesh))


def rotated(cfg: ModelConfig, params: Params, seed: int) -> Params:
    """Return the parameters of the rotated model (see `rotate`). `params` may be abstract."""
    flat, new = weights.flatten(params), untied(cfg)
    if new.tied != cfg.tied:
        flat[HEAD] = flat[TABLE].T
    stream_DD = jnp.asarray(orthogonal(cfg.d_model, seed))
    for feed in wiring.feeds(new):
        if feed.producer.endswith("norm"):
            path = f"{feed.producer}/scale"
            scale = flat[path].astype(jnp.float32) + float(cfg.norm_plus_one)
            for reader in feed.readers:
                kernel = weights.kernel_of(reader)
                flat[kernel] = turn(flat[kernel], stream_DD, -2, scale)
            flat[path] = jnp.full_like(flat[path], 0.0 if cfg.norm_plus_one else 1.0)
        elif feed.producer.endswith("/v") and feed.foldable:
            head_KK = jnp.asarray(orthogonal(cfg.head_dim, seed + 1))
            _turn_outputs(flat, feed.producer, head_KK)
            for reader in feed.readers:
                flat[weights.kernel_of(reader)] = turn(flat[weights.kernel_of(reader)], head_KK, -2)
    residuals = [wiring.residual(new, stack) for stack in wiring.stacks(new)]
    for writer in dict.fromkeys(path for residual in residuals for path in residual.writers):
        if writer in flat:  # an embedding table
            flat[writer] = turn(flat[writer], stream_DD, -1)
        else:
            _turn_outputs(flat, writer, stream_DD)
    for reader in dict.fromkeys(path for residual in residuals for path in residual.readers):
        if (kernel := weights.kernel_of(reader)) in flat:  # an adapter; the norms have no directions any more
            flat[kernel] = turn(flat[kernel], stream_DD, -2)
    return weights.unflatten(flat)


def _turn_outputs(flat: dict[str, Any], module: str, rotation_KK: jax.Array) -> None:
    for path in (weights.kernel_of(module), f"{module}/bias"):
        if path in flat:
            flat[path] = turn(flat[path], rotation_KK, -1)


@partial(jax.jit, static_argnames=("axis",))
def turn(w: jax.Array, rotation_KK: jax.Array, axis: int, scale: jax.Array | None = None) -> jax.Array:
    """Multiply each block of K channels along one axis by a rotation.

    Args:
      w: the weight.
      rotation_KK: orthogonal matrix, float32.
      axis: axis of the channels: -1 for the outputs of a matrix [..., I, O], -2 for the inputs.
      scale: scale of a norm [..., I]. The inputs are multiplied by the scale before the rotation.
    """
    full = w.astype(jnp.float32) if scale is None else w.astype(jnp.float32) * scale[..., None]
    last = jnp.moveaxis(full, axis, -1)
    blocks = last.reshape(*last.shape[:-1], -1, len(rotation_KK))
    turned = jnp.matmul(blocks, rotation_KK, precision=jax.lax.Precision.HIGHEST).reshape(last.shape)
    return jnp.moveaxis(turned, -1, axis).astype(w.dtype)


def orthogonal(size: int, seed: int) -> np.ndarray:
    """Return an orthogonal matrix, float32 [K, K], whose entries have similar magnitudes.

    >>> np.abs(orthogonal(4, 0)).tolist() == [[0.5] * 4] * 4
    True
    """
    rng, power = np.random.default_rng(seed), size & -size
    matrix = np.ones((1, 1))
    while len(matrix) < power:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    if (odd := size // power) > 1:
        matrix = np.kron(np.linalg.qr(rng.normal(size=(odd, odd)))[0], matrix)
    return (rng.choice([-1.0, 1.0], size)[:, None] * matrix / np.sqrt(power)).astype(np.float32)
