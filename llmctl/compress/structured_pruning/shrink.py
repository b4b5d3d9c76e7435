"""Shrink parameter arrays to the shapes of a smaller ModelConfig.

`target` computes the smaller config. `cut` removes heads and neurons from the arrays, and `drop_layers` removes layers.

Shapes: L layers, H query heads, G key/value heads, R = H / G, K head width, F neurons.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from llmctl.config.errors import RequestError
from llmctl.model import wiring
from llmctl.model.config import ModelConfig
from llmctl.model.weights import Weight, as_node, flatten, kernel_of, parse, unflatten

Kept = dict[str, dict[str, list[np.ndarray]]]
"""Heads and neurons to keep: "encoder" or "decoder" -> kind ("attn/heads", "mlp/neurons", …) -> ascending indices per
layer.
"""


def target(
    cfg: ModelConfig,
    *,
    heads: float = 0.0,
    ffn: float = 0.0,
    layers: float = 0.0,
    hidden: float = 0.0,
    by: Literal["groups", "queries"] = "groups",
    multiple: int = 1,
) -> ModelConfig:
    """Return the config of the model after heads, neurons, layers and hidden channels are removed.

    In `heads`, `ffn`, `layers` and `hidden`, a number below 1 is the fraction to remove. A number of 1 or more is the
    count to keep. 0 keeps all. If a fraction is removed, the remaining count is rounded to the nearest integer.

    Args:
      cfg: the config before pruning.
      heads: query heads per layer.
      ffn: neurons per feed-forward layer.
      layers: layers of the encoder and of the decoder.
      hidden: channels of the residual stream.
      by: what to remove: "groups" (a key/value head with all its query heads) or "queries" (the same number of query
          heads in each group).
      multiple: divisor of the numbers of kept neurons and of kept hidden channels.

    Raises:
      RequestError: If a requested number is impossible, or a fraction removes nothing or leaves nothing. A fraction
        that removes nothing is an error even if the other numbers remove something.
    """
    ratio = cfg.heads // cfg.kv_heads
    update: dict[str, Any] = {}
    if heads:
        unit, units = (ratio, cfg.kv_heads) if by == "groups" else (cfg.kv_heads, ratio)
        kept = _keep("heads", heads, units, unit)
        update = {"heads": kept * unit, "kv_heads": kept if by == "groups" else cfg.kv_heads}
    for name, field, request, what in (
        ("ffn", "d_ff", ffn, "neurons a layer"), ("hidden", "d_model", hidden, "hidden channels"),
    ):  # fmt: skip
        size = getattr(cfg, field)
        if not request:
            continue
        if request < 1 and size < multiple:
            raise RequestError(f"{name}: the artifact has {size} {what}, fewer than a multiple of {multiple}")
        kept = _keep(name, request, size / multiple, multiple)
        update[field] = min(kept * multiple, size // multiple * multiple)
    if layers:
        update["layers"] = _keep("layers", layers, cfg.layers, 1)
        if cfg.encoder_layers:
            update["encoder_layers"] = _keep("layers", layers, cfg.encoder_layers, 1)
    asked = {"heads": (heads, ("heads",)), "ffn": (ffn, ("d_ff",)), "layers": (layers, ("layers", "encoder_layers"))}
    asked["hidden"] = (hidden, ("d_model",))
    vain = [
        f"{name} = {request:g}"
        for name, (request, fields) in asked.items()
        if 0 < request < 1 and all(update.get(k, getattr(cfg, k)) == getattr(cfg, k) for k in fields)
    ]
    if vain or all(getattr(cfg, k) == v for k, v in update.items()):
        what = f" by {' and '.join(vain)}" if vain else ""
        raise RequestError(
            f"nothing would be removed{what} from {cfg.layers} layers with {cfg.heads} heads ({cfg.kv_heads} kv_heads) "
            f"and {cfg.d_ff} neurons; set heads, ffn, layers or hidden (a fraction removed below 1, a number kept from "
            "1 on)"
        )
    return ModelConfig.model_validate({**cfg.model_dump(), "preset": "", **update})


def _keep(field: str, request: float, groups: float, size: int) -> int:
    """Return the number of groups of heads, neurons or layers to keep. A group is kept or removed as a whole.

    Args:
      field: name of the setting, for errors.
      request: the fraction to remove, or the number of heads, neurons or layers to keep.
      groups: number of groups before pruning.
      size: number of heads, neurons or layers in a group.

    Raises:
      RequestError: If a fraction leaves nothing. If the requested number is not a multiple of `size`, or is too large.
    """
    if request < 1:
        if kept := round(groups * (1 - request)):
            return kept
        least = f"{size:,} of {groups * size:,.0f}"
        raise RequestError(
            f"{field}: a fraction of {request:g} removed leaves fewer than {least}, the least that can stay"
        )
    if request != int(request) or int(request) % size:
        raise RequestError(f"{field}: {request:g} to keep is not a multiple of {size}, which go together")
    kept = int(request) // size
    if kept > groups:
        raise RequestError(f"{field}: {int(request)} to keep, but the artifact has {groups * size:g}")
    return kept


def check_cuttable(cfg: ModelConfig, params: dict[str, Any], target: ModelConfig) -> None:
    """Check, before any computation, that `cut` can reduce the parameters to `target`.

    Raises:
      RequestError: If a weight is quantized in groups along a reduced axis, or has a low-rank adapter.
    """
    kept: Kept = {}
    for stack in (name for name in ("encoder", "decoder") if name in params):
        kept[stack] = choices = {}
        depth = jax.tree.leaves(params[stack]["blocks"])[0].shape[0]
        for units, after in zip(wiring.units(cfg, stack), wiring.units(target, stack), strict=True):
            if units.count != after.count:
                choices[units.name] = [np.arange(after.count)] * depth
    jax.eval_shape(lambda p: cut(cfg, p, target, kept)[1], params)


def drop_layers(
    cfg: ModelConfig, params: dict[str, Any], kept: dict[str, list[int]]
) -> tuple[ModelConfig, dict[str, Any]]:
    """Return the config and parameters with only the layers in `kept` ({"encoder" or "decoder": ascending indices})."""
    update: dict[str, Any] = {"preset": ""}
    for stack, layers in kept.items():
        index = jnp.asarray(layers)
        blocks = jax.tree.map(lambda x, index=index: jnp.take(x, index, axis=0), params[stack]["blocks"])
        params = {**params, stack: {**params[stack], "blocks": blocks}}
        update["encoder_layers" if stack == "encoder" and cfg.encoder_layers else "layers"] = len(layers)
    return ModelConfig.model_validate({**cfg.model_dump(), **update}), params


def cut(
    cfg: ModelConfig, params: dict[str, Any], target: ModelConfig, kept: Kept
) -> tuple[ModelConfig, dict[str, Any]]:
    """Return the config and parameters with only the heads and neurons in `kept`.

    Biases and the relative position bias are reduced too.

    Raises:
      RequestError: If a weight is quantized in groups along a reduced axis, or has a low-rank adapter.
    """
    flat = flatten(params)
    for stack, choices in kept.items():
        for units in wiring.units(cfg, stack):
            if units.name not in choices:
                continue
            layers = choices[units.name]
            index_LN = columns(np.stack(layers), units.width)
            written = [f"{stack}/blocks/{writer}" for writer in units.writers]
            for path in (p for p in flat if p.rpartition("/")[0] in written):  # kernels and biases
                flat[path] = take(path, flat[path], index_LN, axis=-1)
            for path in (kernel_of(f"{stack}/blocks/{reader}") for reader in units.readers):
                flat[path] = take(path, flat[path], index_LN, axis=-2)
            for path in (f"{stack}/{table}" for table in units.tables):  # the same heads in every layer
                flat[path] = jnp.take(flat[path], jnp.asarray(layers[0]), axis=-1)
    return target, unflatten(flat)


def columns(units: np.ndarray, width: int) -> np.ndarray:
    """Return the indices of the columns that belong to the given heads or neurons.

    Args:
      units: indices [..., N] of the heads or neurons.
      width: number of columns per head or neuron.

    Returns:
      Indices of columns [..., N * width].
    """
    return (units[..., None] * width + np.arange(width)).reshape(*units.shape[:-1], -1)


def take_everywhere(flat: dict[str, Any], axes: Mapping[str, tuple[int, ...]], kept: np.ndarray) -> None:
    """Reduce weights to the entries `kept` along some axes. All layers keep the same entries.

    Args:
      flat: the weights by path. The reduced weights replace entries of this dictionary. A path in `axes` is skipped if
          `flat` does not have this path.
      axes: {path of a weight: axes to reduce, counted from the end}.
      kept: ascending indices.
    """
    for path, own in axes.items():
        if path not in flat:
            continue
        stacked = parse(path).stacked
        w = flat[path] if stacked else jax.tree.map(lambda a: a[None], flat[path])
        layers = as_node(w).shape[0]
        for axis in own:
            w = take(path, w, np.broadcast_to(kept, (layers, len(kept))), axis)
        flat[path] = w if stacked else jax.tree.map(lambda a: a[0], w)


def take(path: str, w: Weight, index_LN: np.ndarray, axis: int) -> Weight:
    """Return a stacked weight [L, ...] with only the entries `index_LN` [L, N] along `axis` (-1 outputs, -2 inputs).

    Row l of `index_LN` has the indices that layer l keeps.
    """
    try:
        return as_node(w).select(index_LN, axis)
    except RequestError as e:
        raise RequestError(f"{path} {e}") from None
