"""Parse parameter names. The result tells, for example, whether a parameter is a bias, and whether it belongs to a
layer.

The path of a weight consists of the keys of the parameter tree joined by "/", such as `decoder/blocks/attn/q/kernel`.
If the weight is one plain array, the name of the array is the path. A weight node has several arrays. The name of each
array is then "path:name in the node", such as `decoder/blocks/attn/q/kernel:scale`.
"""

from __future__ import annotations

import fnmatch
from typing import Literal, NamedTuple

Place = Literal["block", "head", "embedding"]
"""Part of the model that contains a matrix: a layer of a stack, an output head (language model, pooler, task), or the
token embedding table."""

BLOCKS, KERNEL, BIAS, EMBED, HEAD = "blocks", "kernel", "bias", "embed", "head"
RELATIVE = "relative_bias"
VECTORS = ("factor", "magnitude", "e")
"""Names of adapter arrays that have one vector per adapted matrix, such as the magnitudes of DoRA."""


class Name(NamedTuple):
    """Store the components of a parameter name."""

    path: str
    """Path of the weight, such as `decoder/blocks/attn/q/kernel`."""
    stack: str
    """Stack whose layers contain the parameter, `encoder` or `decoder`; empty if the parameter is not in a layer."""
    module: str
    """Path of the module, such as `lm_head`. If the module is in a layer, the path within the layer, such as
    `attn/q`."""
    leaf: str
    """Last key of the path: `kernel`, `bias`, `scale`, …"""
    part: str
    """Name of the array within its weight, such as `scale` of a quantized weight; empty for a plain array."""

    @property
    def stacked(self) -> bool:
        """Return True if the parameter has an axis of layers, axis 0."""
        return bool(self.stack)

    @property
    def place(self) -> Place | None:
        """Return the part of the model that contains this matrix.

        If the parameter is not a matrix but a norm, a bias or a position table, return None.
        """
        if self.leaf == KERNEL:
            return "block" if self.stack else "head"
        return "embedding" if self.path == f"{EMBED}/tokens" else None

    @property
    def bias(self) -> bool:
        """Return True if the parameter is the bias of a matrix, a norm or another module."""
        return self.leaf == BIAS

    @property
    def vector(self) -> bool:
        """Return True if the array belongs to an adapter and has one vector per adapted matrix. Such arrays are the
        factors of (IA)^3, the magnitudes of DoRA and the singular values of AdaLoRA."""
        return self.part in VECTORS

    @property
    def bottleneck(self) -> bool:
        """Return True if the parameter belongs to a bottleneck adapter."""
        return self.stacked and self.module.partition("/")[0].endswith("_adapter")

    @property
    def norm(self) -> bool:
        """Return True if the parameter is the scale or the bias of a norm."""
        return self.module.endswith("norm")

    @property
    def embeds(self) -> bool:
        """Return True if the parameter belongs to the embeddings of tokens, positions or types, or to the norm after
        them."""
        return self.path.startswith(f"{EMBED}/")

    def belongs(self, module: str) -> bool:
        """Return True if the parameter belongs to a module whose path ends with `module`, such as `attn/q` or `q`."""
        return f"/{self.path.rpartition('/')[0]}".endswith(f"/{module}")

    @property
    def below(self) -> bool:
        """Return True if the parameter belongs to the embeddings or to the relative position bias.

        The embeddings are used before the first layer, and the bias is used by all layers.
        """
        return self.embeds or RELATIVE in self.path.split("/")

    @property
    def prompt(self) -> bool:
        """Return True if the parameter is the table of trained prompt vectors (prompt tuning)."""
        return self.path == f"{EMBED}/prompt"

    @property
    def prefix(self) -> bool:
        """Return True if the parameter is the trained keys or values of prefix tuning."""
        return self.stacked and self.module == "attn/prefix"

    @property
    def task_head(self) -> bool:
        """Return True if the parameter belongs to a task head. The language-model head is not a task head."""
        return self.path.startswith(f"{HEAD}/")


def parse(name: str) -> Name:
    """Split a parameter name into its components.

    >>> parse("decoder/blocks/attn/q/kernel:a")[1:]
    ('decoder', 'attn/q', 'kernel', 'a')
    >>> parse("head/out/kernel").place
    'head'
    """
    path, _, part = name.partition(":")
    *keys, leaf = path.split("/")
    stack = ""
    if BLOCKS in keys:
        at = keys.index(BLOCKS)
        stack, keys = "/".join(keys[:at]), keys[at + 1 :]
    return Name(path, stack, "/".join(keys), leaf, part)


def join(path: str, part: str) -> str:
    """Return the name of one array of a weight: "path:part", or the path if `part` is empty.

    Args:
        path: Path of the weight.
        part: Name of the array within the weight; empty if the weight is a plain array.
    """
    return f"{path}:{part}" if part else path


def matches(name: str, pattern: str) -> bool:
    """Return True if a glob pattern (`*`, `?`, `[…]`) matches a substring of the name.

    >>> matches("decoder/blocks/attn_norm/scale", "norm"), matches("decoder/blocks/mlp/up/kernel", "attn/*/kernel")
    (True, False)
    """
    return fnmatch.fnmatchcase(name, f"*{pattern}*")


def is_kernel(path: str) -> bool:
    """Return True for a matrix [..., in, out] of a layer or an output head. `path` may be relative to a layer."""
    return parse(path).leaf == KERNEL


def is_stacked(name: str) -> bool:
    """Return True if this array has an axis of layers, axis 0."""
    return parse(name).stacked


def is_layer_matrix(name: str) -> bool:
    """Return True if the array is a matrix of a layer, and not a part of a weight node."""
    found = parse(name)
    return found.place == "block" and not found.part


def module_path(path: str) -> str:
    """Return the path of the module that a matrix belongs to: `attn/q/kernel` -> `attn/q`."""
    return path.removesuffix(f"/{KERNEL}")


def bias_of(path: str) -> str:
    """Return the path of the bias in the module of a matrix: `attn/q/kernel` -> `attn/q/bias`."""
    return f"{module_path(path)}/{BIAS}"


def kernel_of(module: str) -> str:
    """Return the path of a module's matrix: `attn/q` -> `attn/q/kernel`."""
    return f"{module}/{KERNEL}"
