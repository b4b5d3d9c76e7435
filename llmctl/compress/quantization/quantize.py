"""Quantize weights without data: convert matrices to integers with scales, as a quantization scheme defines.

The schemes are in `llmctl.compress.quantization.schemes`. `llmctl.compress.quantization.quantize_walk` quantizes with
calibration data.

A matrix [..., I, O] has one scale per output, or one scale per `group` inputs of an output. An embedding table [V, D]
has one scale per row, or one scale per `group` columns of a row. Leading axes (layers) always have their own scales.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llmctl.compress.quantization import grids, learned
from llmctl.compress.quantization import rules as patterns
from llmctl.compress.quantization.formats import Format
from llmctl.compress.quantization.quantize_method import Quantization
from llmctl.compress.quantization.rules import Rules
from llmctl.compress.quantization.schemes import BLOCKS, SCHEMES
from llmctl.config.errors import RequestError
from llmctl.model import weights
from llmctl.model.weights import LearnedScale, Node, Weight, flatten, unflatten


def quantize(
    params: dict[str, Any],
    *,
    scheme: str,
    group: int = 0,
    embeddings: bool = False,
    head: bool = False,
    activations: str = "",
    clip: bool = False,
    rules: Rules = (),
    symmetric: bool = True,
    double_quantize: bool = False,
) -> tuple[dict[str, Any], dict[str, float]]:
    """Quantize the matrices of a parameter tree. Norms, biases and position tables do not change.

    Args:
      params: the parameters.
      scheme: name of the scheme in `SCHEMES`.
      group: number of inputs per scale. 0 means the scheme's own number. If the scheme has no number, every output has
          one scale.
      embeddings: whether to quantize the token embeddings. A tied table counts as an embedding.
      head: whether to quantize the output projection, pooler and task head.
      activations: dtype of quantized activations, with one scale per token (W8A8): "int8", or "fp8_e4m3" if the scheme
        is fp8_e4m3. If empty, activations are not quantized.
      clip: whether to search for the scales with the least squared error of the weights.
      rules: formats of the matrices whose module paths match patterns, in place of `scheme`.
      symmetric: whether integers are symmetric around 0. Otherwise, each group has a zero point.
      double_quantize: whether the scales of nf4 matrices are stored in 8 bits.

    Returns:
      The tree with quantized weights, and the relative error (Frobenius) of each quantized weight by path.

    Raises:
      RequestError: If the group size does not divide the number of inputs of a weight. If a weight is already
          quantized, or has a low-rank adapter. If a pattern of `rules` matches no weight.
    """
    flat, errors = flatten(params), {}
    method = Quantization(
        scheme, group, embeddings=embeddings, head=head, rules=rules, symmetric=symmetric,
        double_quantize=double_quantize,
    )  # fmt: skip
    for path, target in chosen(flat, method).items():
        node, error = measured(flat[path], target, clip)
        errors[path] = float(error)
        flat[path] = with_activations(node, target.inputs, activations)
    return unflatten(flat), errors


class Target(NamedTuple):
    """Describe how one weight is quantized: its format, and the axis along which inputs share scales."""

    format: Format
    inputs: int
    """Axis of the inputs: -2 for a matrix [..., I, O], -1 for a table [V, D]."""


def chosen(flat: dict[str, Any], method: Quantization) -> dict[str, Target]:
    """Select the weights to quantize, and return {path of the weight: its `Target`}.

    Raises:
      RequestError: If the group size does not divide the number of inputs of a weight. If a weight is already
          quantized, or has a low-rank adapter. If a pattern matches no weight. If patterns leave no weight to quantize.
    """
    axes = dict(targets(flat, embeddings=method.embeddings, head=method.head))
    everything = {weights.module_path(path) for path, _ in targets(flat, embeddings=True, head=True)}
    modules = {path: weights.module_path(path) for path in axes}
    patterns.check(modules.values(), method.rules, everything - {*modules.values()})
    found = {path: Target(form, axes[path]) for path, name in modules.items() if (form := method.format_of(name))}
    for path, target in found.items():
        check(path, flat[path], target.inputs, target.format.scheme, target.format.group)
    if modules and not found:
        raise RequestError("rules leave no matrix to quantize")
    return found


def targets(flat: dict[str, Any], *, embeddings: bool, head: bool) -> Iterator[tuple[str, int]]:
    """Yield (path, axis of the inputs) of every weight that the settings select for quantization."""
    wanted = {"block": True, "head": head, "embedding": embeddings}
    for m in weights.matrices(unflatten(flat)):
        if wanted[m.place]:
            yield m.path, m.inputs


def check(path: str, w: Weight, inputs: int, scheme: str, group: int) -> None:
    """Check that the weight at `path` can be quantized by a scheme with one scale per `group` inputs.

    Raises:
      RequestError: If `group` does not divide the number of inputs. If the weight is already quantized, or has a
          low-rank adapter.
    """
    node = weights.as_node(w)
    if isinstance(w, LearnedScale):  # `learned.check` compares the format and the group
        return
    if node.has_adapter:
        raise RequestError(f"{path} has a low-rank update; merge it into its base before quantizing")
    if not weights.is_plain(w):
        done = "quantized" if node.is_integer else "compressed"
        raise RequestError(f"{path} is {done} already ({node.format_name}); quantize the artifact before it")
    size = w.shape[inputs]
    if group and size % group and scheme in BLOCKS:
        raise RequestError(
            f"format {scheme} has one scale per {group} inputs, which does not divide the {size} inputs of {path}; "
            "choose another format"
        )
    if group and size % group:
        divisors = [g for g in range(1, size + 1) if size % g == 0]
        near = ", ".join(map(str, sorted(sorted(divisors, key=lambda g: abs(g - group))[:4])))
        raise RequestError(f"group {group} does not divide the {size} inputs of {path}; groups near it that do: {near}")


def with_activations(node: Node, inputs: int, activations: str, input_scale: jax.Array | None = None) -> Node:
    """Return the weight `node`, changed so that products with it also quantize their input activations.

    If `activations` is empty, `node` does not change. The activations have the scale `input_scale`. If `input_scale`
    is None, each token has its own scale.

    An embedding table (`inputs` -1) is returned unchanged. Its rows are looked up, and the product with a tied table
    uses unquantized activations.
    """
    return node.with_activations(activations, input_scale) if activations and inputs != -1 else node


@partial(jax.jit, static_argnums=(1, 2))
def measured(w: jax.Array | LearnedScale, target: Target, clip: bool = False) -> tuple[Node, jax.Array]:
    """Quantize one weight, and return (quantized weight, its relative error as a float32 scalar)."""
    form, inputs = target.format, target.inputs
    if isinstance(w, LearnedScale):
        node, w = learned.converted(w, inputs), w.weight
    elif clip or not form.symmetric or form.double_quantize:
        grid, group = grids.levels_of(form)
        node = grids.quantized(w, grid, inputs, group, clip)
    else:
        node = SCHEMES[form.scheme](w, inputs, form.group)
    return node, relative_error(w, node)


def relative_error(w: jax.Array, node: Node) -> jax.Array:
    """Return ||w - dequantized|| / ||w|| in the Frobenius norm; 0 if all weights are zero."""
    w = w.astype(jnp.float32)
    square, lost = jnp.sum(jnp.square(w)), jnp.sum(jnp.square(w - node.dense()))  # not flattened: w would be gathered
    return jnp.sqrt(lost / jnp.where(square == 0, 1.0, square))
