"""Convert weights with learned scales to integers. The values of the weights do not change.

`llmctl.model.weights.learned_scale` describes these weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from llmctl.compress.quantization.grids import GRIDS
from llmctl.config.errors import RequestError
from llmctl.model import weights
from llmctl.model.weights import LearnedScale, Node

if TYPE_CHECKING:
    from llmctl.compress.quantization.settings import QuantizeConfig


def converted(w: LearnedScale, inputs: int) -> Node:
    """Return the integers and scales of a weight as a weight node.

    Args:
      w: a matrix [..., I, O] (`inputs` -2), or an embedding table [V, D] (`inputs` -1).
      inputs: axis of the inputs.
    """
    grid = GRIDS[w.format]

    def one(level: jax.Array, scale: jax.Array) -> Node:
        return grid.node(level, scale, jnp.float32(1), w.dtype)

    level, scale = w.level(), w.scale
    if inputs in (-2, w.ndim - 2):
        for _ in range(w.ndim - 2):
            one = jax.vmap(one)
        return one(level, scale)
    return grid.table(one(jnp.swapaxes(level, -1, -2), jnp.swapaxes(scale, -1, -2)))


def check(config: QuantizeConfig, params: dict[str, Any], where: Any) -> None:
    """Check that the settings of quantization keep the integers that each weight's learned scales define.

    Raises:
      RequestError: If the settings would choose other integers, or would not quantize a weight with learned scales.
    """
    learned = {path: w for path, w in weights.flatten(params).items() if isinstance(w, LearnedScale)}
    if not learned:
        return
    names = ("smooth", "rotate", "clip", "budget")
    others = [getattr(config, name) if name == "budget" else name for name in names if getattr(config, name)]
    others += [f"method {config.method!r}"] * (config.method != "rtn") + ["symmetric = false"] * (not config.symmetric)
    if others:
        raise RequestError(f"{where}: its scales were learned for its integers; {others[0]} would choose others")
    for path, w in learned.items():
        place = weights.parse(path).place
        setting = {"embedding": "embeddings", "head": "head"}.get(place or "")
        if setting and not getattr(config, setting):
            raise RequestError(f"{where}: {path} has scales that were learned for {w.format}; set {setting} = true")
        form, axis = config.quantization.format_of(weights.module_path(path)), -1 if place == "embedding" else -2
        size, groups = w.shape[axis], w.scale.shape[axis]
        if form is None or (form.scheme, size // (form.group or size)) != (w.format, groups):
            raise RequestError(
                f"{where}: {path} has scales that were learned for {w.format} with group "
                f"{0 if groups == 1 else size // groups}; quantize with the format, group and rules of the training"
            )
