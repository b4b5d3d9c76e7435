"""Fold the scales of a matrix's inputs into the module that produces the inputs, without changing the layer's outputs.

The inputs x of a matrix W are divided by the scales, and the rows of W are multiplied by the scales: (x / s) (s W) = x
W. The division is folded into the parameters of the module that produces x, a norm or another matrix. SmoothQuant and
AWQ choose scales that reduce the error of quantization.

Shapes: I inputs of the matrices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from llmctl.model import weights, wiring
from llmctl.model.config import ModelConfig

Layer = dict[str, Any]


@dataclass(frozen=True)
class Fold:
    """Name the matrices of a layer that read the same inputs, and the module that produces these inputs."""

    producer: str
    """Path of the norm or matrix within the layer."""
    readers: tuple[str, ...]
    """Paths of the matrices within the layer."""
    groups: int
    """Number of key/value heads in grouped-query attention, if the producer is the value projection; otherwise 1."""
    repeat: int
    """Number of inputs that depend on the same output of the producer. In grouped-query attention, this is the number
    of query heads per key/value head; otherwise 1. These inputs must have equal scales."""

    def shared(self, values_I: jax.Array, reduce: Any) -> jax.Array:
        """Replace the values of inputs that depend on the same output of the producer by one common value.

        Args:
          values_I: one value per input.
          reduce: function (array, axis, keepdims) that computes the common value, such as `jnp.max`.
        """
        values = values_I.reshape(self.groups, self.repeat, -1)
        return jnp.broadcast_to(reduce(values, axis=1, keepdims=True), values.shape).reshape(-1)


def folds(cfg: ModelConfig, stack: str) -> list[Fold]:
    """Return the producers in a layer of `stack` ("encoder" or "decoder") into which scales can be folded.

    Each `Fold` also names the readers of the producer.

    >>> [fold.producer for fold in folds(ModelConfig(preset="llama-tiny"), "decoder")]
    ['attn_norm', 'attn/v', 'mlp_norm', 'mlp/up']
    """
    block, found = f"{stack}/blocks/", []
    for feed in wiring.feeds(cfg):
        paths = (feed.producer, *feed.readers)
        if feed.foldable and all(path.startswith(block) for path in paths):
            producer, *readers = (path.removeprefix(block) for path in paths)
            found.append(Fold(producer, tuple(readers), cfg.kv_heads if feed.repeat > 1 else 1, feed.repeat))
    return found


def fold(cfg: ModelConfig, layer: Layer, at: Fold, scale_I: jax.Array) -> Layer:
    """Return the layer with scales folded into the producer of an activation.

    The outputs of the producer are divided by the scales. The rows of the readers are multiplied by the same scales.

    Args:
      cfg: config of the model.
      layer: parameters of the layer. The matrices must be plain arrays.
      at: the producer and its readers.
      scale_I: positive scales, equal for inputs that depend on the same output of the producer (`Fold.shared`).
    """
    flat, changed = weights.flatten(layer), {}
    own = scale_I.reshape(at.groups, at.repeat, -1)[:, 0].reshape(-1)
    for leaf in ("kernel", "bias", "scale"):
        if (w := flat.get(path := f"{at.producer}/{leaf}")) is not None:
            plus = float(cfg.norm_plus_one and leaf == "scale")  # these norms multiply by 1 + scale
            changed[path] = ((w.astype(jnp.float32) + plus) / own - plus).astype(w.dtype)
    for reader in at.readers:
        w = flat[path := weights.kernel_of(reader)]
        changed[path] = (w.astype(jnp.float32) * scale_I[:, None]).astype(w.dtype)
    return weights.updated(layer, changed)
