"""Convert parameters to the form that decoding steps read fastest.

Several models may have arrays in common, such as the base of several LoRA adapters. Each array is converted only once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax

from llmctl.distributed import mesh as meshes
from llmctl.model import functional, weights
from llmctl.model.config import ModelConfig

Served = tuple[functional.Params, list[functional.Params]]
"""Parameters that are converted for decoding: (all parameters except the decoder's layers, one tree per layer)."""


class Shared:
    """Cache converted arrays. If several models use an array, the array is converted and stored only once.

    Example:
        >>> import jax.numpy as jnp
        >>> shared, a = Shared(), jnp.ones((2, 3))
        >>> shared.get("transposed", [a], lambda: a.T) is shared.get("transposed", [a], lambda: a.T)
        True
    """

    def __init__(self) -> None:
        self._made: dict[tuple[Any, ...], tuple[list[Any], Any]] = {}

    def get(self, purpose: str, arrays: Iterable[Any], make: Callable[[], Any]) -> Any:
        """Return the result that is stored for these arrays under the name `purpose`. If there is none, call `make` and
        store its result.

        Arrays are compared by identity.
        """
        kept = [*arrays]  # stored with the result, because an id is unique only while its array exists
        key = (purpose, *map(id, kept))
        if key not in self._made:
            self._made[key] = (kept, make())
        return self._made[key][1]


def served(
    model: ModelConfig, params: functional.Params, platform: str = "", shared: Shared | None = None
) -> tuple[ModelConfig, Served]:
    """Convert a model to the form that decoding steps read fastest.

    Stacked layers [L, ...] are split, and low-rank updates are merged. On a CPU, matrices with quantized weights become
    dense, because the CPU would convert their integers again for every token. If activations are also quantized, the
    matrix stays quantized, because a dense matrix would give other results. On a CPU, tied embeddings get a separate
    output table [D, V]. XLA's CPU backend reads this table up to twice as fast as the transpose of [V, D].

    Args:
        model: Config of the model.
        params: Parameters of the model.
        platform: Platform that will run the programs. If empty, the platform of the current mesh or device.
        shared: Converted arrays of other models. If given, low-rank updates are not merged, so that adapters share the
            matrices of their base.

    Returns:
        The config and the parameters of the converted model, which computes the same function.
    """
    on_cpu, made = _on_cpu(platform), shared or Shared()

    def converted(w: Any) -> Any:
        node = weights.as_node(w)
        if shared and node.has_adapter:
            return node.with_base(converted(node.bare()))
        return made.get("weight", node.parts().values(), lambda: node.for_decoding(on_cpu))

    params = jax.tree.map(converted, params, is_leaf=weights.is_weight)
    table = params["embed"]["tokens"]
    if model.tied and on_cpu and weights.is_plain(table):
        kernel = made.get("transposed", [table], lambda: table.T)
        params = {**params, "lm_head": {**params.get("lm_head", {}), "kernel": kernel}}
        model = model.model_copy(update={"tied": False})
    rest = {**params, "decoder": {k: v for k, v in params["decoder"].items() if k != "blocks"}}
    blocks, depth = params["decoder"]["blocks"], range(model.layers)
    layers = [jax.tree.map(lambda a, i=i: made.get(f"layer {i}", [a], lambda: a[i]), blocks) for i in depth]
    return model, (rest, layers)


def dequantized(params: functional.Params, platform: str = "") -> str:
    """Return a log line about quantized weights that `served` converts to floats; "" if there are none.

    The line names the number of weights, their formats, the bytes of the floats, and the reason. On platforms other
    than CPUs, quantized weights are not converted.

    Args:
        params: Parameters of the model.
        platform: Platform that will run the programs. If empty, the platform of the current mesh or device.
    """
    if not _on_cpu(platform):
        return ""
    formats, size = list[str](), 0
    for w in weights.flatten(params).values():
        bare = weights.as_node(w).bare()
        if weights.as_node(bare).is_integer:
            after = jax.eval_shape(lambda w: weights.as_node(w).for_decoding(True), bare)
            if weights.is_plain(after):
                formats.append(weights.as_node(bare).format_name)
                size += after.size * after.dtype.itemsize
    if not formats:
        return ""
    names = ", ".join(f"{formats.count(name)} in {name}" for name in dict.fromkeys(formats))
    return (
        f"quantized weights ({names}) are converted once to {size / 1e6:,.1f} MB of floats for generation, because a "
        "CPU would convert them again for every token"
    )


def _on_cpu(platform: str) -> bool:
    """Return whether programs will run on a CPU. If `platform` is empty, use the current mesh or the first device."""
    mesh = meshes.current()
    return (platform or (jax.devices()[0] if mesh is None else mesh.devices.flat[0]).platform) == "cpu"
