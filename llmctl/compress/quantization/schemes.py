"""Define quantization schemes: functions from an array of weights to a quantized weight (a pytree with few bits).

A new scheme is one function here and its name in `SCHEMES`. Another package provides a scheme by the entry point
`scheme.NAME`. The module imports JAX only inside the functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from llmctl.config.registry import Registry

if TYPE_CHECKING:
    import jax

    from llmctl.model.weights import Node, NormalFloat, Quantized

Scheme = Callable[["jax.Array", int, int], "Node"]
"""Function that quantizes a weight, for example to integers with scales. Its arguments are the weight, the axis of the
inputs, and the number of inputs per scale.

A matrix [..., I, O] has its inputs on axis -2, an embedding table [V, D] on axis -1. With 0 inputs per scale, every
output channel (or row of the table) has one scale. Leading axes (layers) always have their own scales. A function may
have an attribute `group`: the number of inputs per scale that is used if 0 is requested.
"""

NAMES = ("int8", "int4", "int3", "int2", "fp8_e4m3", "fp8_e5m2", "nf4", "mxfp4", "nvfp4")
INTEGERS = NAMES[:4]
"""Formats that can have zero points."""
BLOCKS = {"mxfp4": 32, "nvfp4": 16}
"""Number of inputs per scale, by format, for formats whose specification fixes this number."""

SCHEMES: Registry[Scheme] = Registry("scheme", {name: f"{__name__}:{name}" for name in NAMES})


def int8(w: jax.Array, inputs: int, group: int) -> Quantized:
    """Return the weight rounded to integers from -127 to 127, with the scale max|w| / 127.5.

    The error of an element is at most half its scale.
    """
    return nearest(w, "int8", inputs, group)


def int4(w: jax.Array, inputs: int, group: int) -> Quantized:
    """Return the weight rounded to integers from -7 to 7, with the scale max|w| / 7.5.

    The error of an element is at most half its scale.
    """
    return nearest(w, "int4", inputs, group)


def int3(w: jax.Array, inputs: int, group: int) -> Node:
    """Return the weight rounded to integers from -4 to 3, packed, with the scale max|w| / 3.5."""
    return _levels("int3", w, inputs, group)


def int2(w: jax.Array, inputs: int, group: int) -> Node:
    """Return the weight rounded to integers from -2 to 1, packed, with the scale max|w| / 1.5."""
    return _levels("int2", w, inputs, group)


def fp8_e4m3(w: jax.Array, inputs: int, group: int) -> Node:
    """Return the weight as float8_e4m3fn, with the scale max|w| / 448."""
    return _levels("fp8_e4m3", w, inputs, group)


def fp8_e5m2(w: jax.Array, inputs: int, group: int) -> Node:
    """Return the weight as float8_e5m2, with the scale max|w| / 57,344."""
    return _levels("fp8_e5m2", w, inputs, group)


def mxfp4(w: jax.Array, inputs: int, group: int) -> Node:
    """Return the weight as 4-bit floats (e2m1), with a power of two as the scale of every 32 inputs.

    The OCP Microscaling Formats specification 1.0 defines the format.
    """
    return _levels("mxfp4", w, inputs, inputs_per_scale("mxfp4", group))


mxfp4.group = BLOCKS["mxfp4"]  # type: ignore[attr-defined]


def nvfp4(w: jax.Array, inputs: int, group: int) -> Node:
    """Return the weight as 4-bit floats (e2m1), with a float8_e4m3fn scale per 16 inputs and a factor per matrix."""
    return _levels("nvfp4", w, inputs, inputs_per_scale("nvfp4", group))


nvfp4.group = BLOCKS["nvfp4"]  # type: ignore[attr-defined]


def nf4(w: jax.Array, inputs: int, group: int) -> NormalFloat:
    """Return the weight as 4-bit codes, which stand for normal quantiles, with the scale max|w|.

    QLoRA (Dettmers et al., 2023, arXiv:2305.14314) introduced the format.
    """
    from llmctl.model.weights import NormalFloat

    return NormalFloat.of(w, inputs, inputs_per_scale("nf4", group))


nf4.group = 64  # type: ignore[attr-defined]


def inputs_per_scale(name: str, group: int) -> int:
    """Return the number of inputs per scale: `group`, or the scheme's own number if `group` is 0.

    The specifications of the formats in `BLOCKS` fix the number.

    >>> inputs_per_scale("nf4", 0), inputs_per_scale("nf4", 32), inputs_per_scale("int4", 0)
    (64, 32, 0)
    """
    return BLOCKS.get(name) or group or getattr(SCHEMES[name], "group", 0)


def has_grid(name: str) -> bool:
    """Return whether a format has a grid of levels in `llmctl.compress.quantization.grids`.

    Calibrated methods and the clipping search round to the levels of a grid. The formats that other packages add have
    no grid.
    """
    return name in SCHEMES.own


def _levels(name: str, w: jax.Array, inputs: int, group: int) -> Node:
    from llmctl.compress.quantization.grids import GRIDS, quantized

    return quantized(w, GRIDS[name], inputs, group, False)


def nearest(w: jax.Array, qtype: Any, inputs: int, group: int) -> Quantized:
    """Return the weight rounded to the nearest integers with their scales, symmetric around zero.

    >>> from jax import numpy as jnp
    >>> nearest(jnp.array([[7.5], [-3.2], [0.49]]), "int4", -2, 0).dense().tolist()
    [[7.0], [-3.0], [0.0]]
    """
    import qwix

    from llmctl.model.weights import Quantized

    axis = inputs % w.ndim
    channels = [a for a in range(w.ndim) if a != axis]
    tiles = {axis: group} if group else None
    return Quantized(qwix.quantize(w, qtype, channelwise_axes=channels, tiled_axes=tiles))
