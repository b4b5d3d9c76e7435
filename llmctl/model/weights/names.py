"""Parse the names of parameters: which are matrices, which belong to a layer of a stack, and which part of a node.

A path is the keys of the parameter tree joined by "/": `decoder/blocks/attn/q/kernel`. A name is a path and, for a
weight node, one of its parts: `decoder/blocks/attn/q/kernel:a`. This is the only module that compares such strings.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Place = Literal["block", "head", "embedding"]
"""Location of a matrix: a layer of a stack, an output head (language model, pooler, task), or a token table."""

BLOCKS, KERNEL, BIAS, EMBED, HEAD = "blocks", "kernel", "bias", "embed", "head"
VECTORS = ("factor", "magnitude", "e")
"""Parts of adapters that are a vector per matrix."""


class Name(NamedTuple):
    """The pieces of a name."""

    path: str
    """The weight: `decoder/blocks/attn/q/kernel`."""
    stack: str
    """`encoder` or `decoder` for a parameter that is stacked over layers, otherwise empty."""
    module: str
    """The owner of the leaf, within its layer if it has one: `attn/q`, `lm_head`."""
    leaf: str
    """`kernel`, `bias`, `scale`, …"""
    part: str
    """The part of a node; empty for a plain array."""

    @property
    def stacked(self) -> bool:
        """True if axis 0 is the layers of a stack."""
        return bool(self.stack)

    @property
    def place(self) -> Place | None:
        """Location of this matrix; None for other weights (norms, biases, tables of positions)."""
        if self.leaf == KERNEL:
            return "block" if self.stack else "head"
        return "embedding" if self.path == f"{EMBED}/tokens" else None

    @property
    def bias(self) -> bool:
        """True for the bias of a matrix, a norm or an output head."""
        return self.leaf == BIAS

    @property
    def vector(self) -> bool:
        """True for an adapter's vector of factors, magnitudes or singular values."""
        return self.part in VECTORS

    @property
    def embeds(self) -> bool:
        """True for everything that makes the embeddings: tokens, positions, types and their norm."""
        return self.path.startswith(f"{EMBED}/")

    @property
    def task_head(self) -> bool:
        """True for everything of the task's head, matrices or not; the language model's is not one."""
        return self.path.startswith(f"{HEAD}/")


def parse(name: str) -> Name:
    """Split a name into its pieces.

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
    """Return the name of one array: the weight's path, and for a node its part."""
    return f"{path}:{part}" if part else path


def is_kernel(path: str) -> bool:
    """Return True for a matrix [.., in, out] of a layer or an output head. `path` may be relative to a layer."""
    return parse(path).leaf == KERNEL


def is_stacked(name: str) -> bool:
    """Return True if axis 0 of this array is the layers of a stack."""
    return parse(name).stacked


def is_layer_matrix(name: str) -> bool:
    """Return True for a matrix of a layer that is stored as one plain array."""
    found = parse(name)
    return found.place == "block" and not found.part


def module_path(path: str) -> str:
    """Return the path of the module that a matrix belongs to: `decoder/blocks/attn/q/kernel` without `/kernel`."""
    return path.removesuffix(f"/{KERNEL}")


def bias_of(path: str) -> str:
    """Return the path of the bias beside a matrix: `attn/q/kernel` -> `attn/q/bias`."""
    return f"{module_path(path)}/{BIAS}"


def kernel_of(module: str) -> str:
    """Return the path of a module's matrix: `attn/q` -> `attn/q/kernel`."""
    return f"{module}/{KERNEL}"
