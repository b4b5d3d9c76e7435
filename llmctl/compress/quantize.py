"""Weight quantization: integers with scales, round to nearest, symmetric. A scheme is a function `(w, inputs, group)`.

A matrix [..., I, O] has one scale an output, or one for every `group` inputs of an output; an embedding table [V, D]
one a row, or one for every `group` columns of a row. Leading axes (layers) always have their own scales.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import qwix

from llmctl.config.errors import RequestError
from llmctl.model import weights
from llmctl.model.weights import Quantized, Weight, dense, flatten, unflatten

Scheme = Callable[[jax.Array, int, int], qwix.QArray]


def int8(w: jax.Array, inputs: int, group: int) -> qwix.QArray:
    """-127..127; the error of an element is at most half its scale, and the scale is max|w| / 127.5."""
    return _nearest(w, jnp.int8, inputs, group)


def int4(w: jax.Array, inputs: int, group: int) -> qwix.QArray:
    """-7..7; the error of an element is at most half its scale, and the scale is max|w| / 7.5."""
    return _nearest(w, jnp.int4, inputs, group)


SCHEMES: dict[int, Scheme] = {8: int8, 4: int4}


def _nearest(w: jax.Array, qtype: Any, inputs: int, group: int) -> qwix.QArray:
    axis = inputs % w.ndim
    channels = [a for a in range(w.ndim) if a != axis]
    return qwix.quantize(w, qtype, channelwise_axes=channels, tiled_axes={axis: group} if group else None)


def quantize(
    params: dict[str, Any],
    *,
    bits: int,
    group: int = 0,
    embeddings: bool = False,
    head: bool = False,
    activations: str = "",
) -> tuple[dict[str, Any], dict[str, float]]:
    """The tree with its matrices as integers, and the relative error (Frobenius) of every weight that changed.

    The matrices of the blocks always; the token embeddings and the heads (output projection, pooler, task head) by
    choice. A tied table is both: it counts as an embedding. Norms, biases and position tables stay as they are.
    `activations="int8"` makes the products of the blocks and heads W8A8, with one scale a token found as it goes by.

    Raises RequestError, naming the weight, when a group does not divide its inputs, or it is quantized or low-rank.
    """
    flat = flatten(params)
    chosen = dict(targets(flat, embeddings=embeddings, head=head))
    for path, inputs in chosen.items():
        check(path, flat[path], inputs, group)
    errors: dict[str, float] = {}
    for path, inputs in chosen.items():
        w = flat[path]
        array, error = measured(w, bits, inputs, group)
        errors[path] = float(error)
        table = inputs == -1  # looked up by row; where it is tied the activations still meet it as they are
        flat[path] = Quantized(array, "" if table else activations)
    return unflatten(flat), errors


def targets(flat: dict[str, Any], *, embeddings: bool, head: bool) -> Iterator[tuple[str, int]]:
    """(path, axis of the inputs) of every weight to quantize."""
    wanted = {"block": True, "head": head, "embedding": embeddings}
    for m in weights.matrices(weights.unflatten(flat)):
        if wanted[m.place]:
            yield m.path, m.inputs


def check(path: str, w: Weight, inputs: int, group: int) -> None:
    """Raises RequestError as `quantize`."""
    node = weights.as_node(w)
    if node.has_adapter:
        raise RequestError(f"{path} has a low-rank update; merge it into its base before quantizing")
    if node.is_integer:
        raise RequestError(f"{path} is quantized already ({node.values().dtype}); quantize the artifact before it")
    size = w.shape[inputs]
    if group and size % group:
        divisors = [g for g in range(1, size + 1) if size % g == 0]
        near = ", ".join(map(str, sorted(sorted(divisors, key=lambda g: abs(g - group))[:4])))
        raise RequestError(f"group {group} does not divide the {size} inputs of {path}; groups near it that do: {near}")


@partial(jax.jit, static_argnums=(1, 2, 3))
def measured(w: jax.Array, bits: int, inputs: int, group: int) -> tuple[qwix.QArray, jax.Array]:
    """One weight as integers, and its relative error."""
    array = SCHEMES[bits](w, inputs, group)
    return array, relative_error(w, array)


def relative_error(w: jax.Array, array: qwix.QArray) -> jax.Array:
    """||w - dequantized|| / ||w||, Frobenius; 0 for a weight of zeros."""
    w = w.astype(jnp.float32)
    square, lost = jnp.sum(jnp.square(w)), jnp.sum(jnp.square(w - dense(Quantized(array))))  # flat, w would be gathered
    return jnp.sqrt(lost / jnp.where(square == 0, 1.0, square))
