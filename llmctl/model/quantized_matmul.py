"""Compute matrix products in 8 bits during training, forward and backward; master weights keep their dtype.

The library qwix quantizes the operands at every step. Scales are computed from the current values of the operands.
Activations have one scale per token, and weights have one scale per output. The backward pass reads the quantized
operands of the forward pass. The scales of these operands vary along the contracted axis. The gradient of the outputs
[N, O] is therefore multiplied by these scales before it is rounded. In the product for the gradient of x, the rounded
gradient has one scale per token. In the product for the gradient of w, the rounded gradient has one scale per output.
qwix's own quantized training does the same.

int8 is used in both directions. fp8 is e4m3 forward and e5m2 for gradients (Micikevicius et al., 2022,
arXiv:2209.05433).

Shapes: N tokens, I inputs, O outputs.
"""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from functools import partial
from typing import Any

import jax
import qwix

from llmctl.config.errors import RequestError
from llmctl.model.weights.names import is_layer_matrix, is_stacked, module_path

TYPES = {"int8": ("int8", "int8"), "fp8": ("float8_e4m3fn", "float8_e5m2")}
"""Map from the name of an 8-bit type to (dtype of operands in the forward pass, dtype of gradients)."""

rules_in_use: ContextVar[Mapping[str, str] | None] = ContextVar("rules", default=None)


@contextlib.contextmanager
def use(rules: Mapping[str, str]) -> Iterator[None]:
    """Set the 8-bit types of matrix products that are traced in a `with` block.

    Args:
        rules: {pattern for paths of matrices: "int8" or "fp8"}. The first matching rule applies. If no rule matches,
            the product is not computed in 8 bits.
    """
    token = rules_in_use.set(rules)
    try:
        yield
    finally:
        rules_in_use.reset(token)


def kind_of(path: str) -> str:
    """Return the 8-bit type of products with the matrix at `path` ("decoder/blocks/mlp/up"), or "" if none."""
    return next((kind for pattern, kind in (rules_in_use.get() or {}).items() if _matches(path, pattern)), "")


def check(rules: Mapping[str, str], names: Iterable[str]) -> None:
    """Check that every rule matches a matrix of the layers.

    Raises:
        RequestError: If a rule matches no matrix among the array names `names`.
    """
    paths = [module_path(name) for name in names if is_layer_matrix(name)]
    for pattern in rules:
        if not any(_matches(path, pattern) for path in paths):
            raise RequestError(
                f"train.matmuls: no plain matrix matches {pattern!r}; there are {', '.join(sorted(paths)) or 'none'}"
            )


def _matches(path: str, pattern: str) -> bool:
    """Return True if the pattern matches a path or its end: `mlp/*` matches `decoder/blocks/mlp/up`."""
    return is_stacked(path) and (fnmatch.fnmatch(path, pattern) or fnmatch.fnmatch(path, f"*/{pattern}"))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(x: jax.Array, w_IO: jax.Array, kind: str) -> jax.Array:
    """Return x [..., I] @ w [I, O] in the dtype of x, computed with operands of the 8-bit type `kind`."""
    return _forward(x, w_IO, kind)[0]


def _forward(x: jax.Array, w_IO: jax.Array, kind: str) -> Any:
    operand, _ = TYPES[kind]
    last = x.ndim - 1
    x_q = qwix.quantize(x, operand, channelwise_axes=list(range(last)))
    w = qwix.quantize(w_IO, operand, channelwise_axes=[1])
    y = qwix.dot_general(x_q, w, (((last,), (0,)), ((), ())))
    return y.astype(x.dtype), (x_q, w)


def _backward(kind: str, saved: tuple[qwix.QArray, qwix.QArray], d_y: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w = saved
    _, gradient = TYPES[kind]
    last = d_y.ndim - 1
    rows = tuple(range(last))
    for_x = qwix.quantize(d_y * w.scale.reshape(-1), gradient, channelwise_axes=list(rows))
    d_x = qwix.dot_general(for_x, w.qvalue, (((last,), (1,)), ((), ())))
    for_w = qwix.quantize(d_y * x.scale, gradient, channelwise_axes=[last])
    d_w = qwix.dot_general(x.qvalue, for_w, ((rows, rows), ((), ())))
    return d_x.astype(d_y.dtype), d_w.astype(d_y.dtype)


matmul.defvjp(_forward, _backward)
