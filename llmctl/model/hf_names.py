"""Map parameter paths to tensor names of Hugging Face, for each model family and each of its output heads.

A name map is a table {parameter path: Hugging Face tensor name}. "{}" in a name is replaced by the layer index, because
llmctl stacks the arrays of all layers on axis 0. Matrices of llmctl are [in, out]. Matrices of Hugging Face are [out,
in], except the matrices that match `Bridge.in_out`. In some checkpoints, one tensor "name" contains the query, key and
value matrices, concatenated along the output axis. Then "name#0" is the query matrix, "name#1" the key matrix, and
"name#2" the value matrix.

Example:
    >>> linear({"attn/q": "q_proj"})
    {'attn/q/kernel': 'q_proj.weight', 'attn/q/bias': 'q_proj.bias'}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from llmctl.model.hf_config import Fields, Keys


@dataclass(frozen=True)
class Head:
    """Describe one output head of a family: its class in `transformers`, and the names of its tensors."""

    architecture: str
    names: Mapping[str, str] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Fields of ModelConfig that the class in `transformers` implies, with their values. Import sets these fields, and
    export requires these values."""
    prefix: str = ""
    """Prefix of the network's tensor names in checkpoints with this head; empty if it is the family's prefix."""


@dataclass(frozen=True)
class Bridge:
    """Convert the config and the tensor names of a model family to and from the Hugging Face format."""

    model_type: str
    prefix: str
    """Prefix of the tensor names of the network without heads. Files of models without a head omit the prefix."""
    names: Callable[[Any], Mapping[str, str]]
    """Function from a ModelConfig to {parameter path: Hugging Face tensor name}, for the network without heads."""
    heads: Mapping[str, Head]
    """Heads by name. "lm+next_sentence" is a language model that also has the next-sentence head."""
    from_config: Callable[[Keys], Fields]
    """Function from the keys of a config.json to the fields of ModelConfig that the family's flags do not set."""
    to_config: Callable[[Any], Fields]
    """Function from a ModelConfig to the keys of config.json. The function raises RequestError if the format does not
    support a field."""
    buffers: tuple[str, ...] = ()
    """Regular expressions for the names of tensors that are not parameters, and are ignored on import."""
    copies: Mapping[str, str] = field(default_factory=dict)
    """Tensors that some files store twice: {name of the second tensor: name of the equal first tensor}."""
    in_out: str = ""
    """Regular expression for the names of matrices that Hugging Face stores as [in, out], as llmctl does."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Outdated names of classes, and outdated endings of tensor names, that are accepted on import: {old: current}."""

    def table(self, cfg: Any, head: Head, bare: bool) -> dict[str, str]:
        """Return {parameter path: Hugging Face tensor name} for all parameters of a model with this head.

        Args:
            cfg: ModelConfig of the model.
            head: Head of the model.
            bare: Whether to omit the prefix of the network's tensor names.
        """
        prefix = "" if bare else head.prefix or self.prefix
        return {ours: prefix + theirs for ours, theirs in self.names(cfg).items()} | dict(head.names)


def blocks(ours: str, theirs: str, table: Mapping[str, str]) -> dict[str, str]:
    """Add the prefix `ours` to each parameter path, and the prefix `theirs` to each Hugging Face tensor name.

    `table` is {parameter path: Hugging Face tensor name}.
    """
    return {f"{ours}/{k}": f"{theirs}.{v}" for k, v in table.items()}


def linear(table: Mapping[str, str]) -> dict[str, str]:
    """Return {parameter path: Hugging Face tensor name} for the kernels and biases of linear layers.

    `table` is {path of the layer: Hugging Face name of the layer}.
    """
    return {
        f"{ours}/{ours_leaf}": _part(theirs, theirs_leaf)
        for ours, theirs in table.items()
        for ours_leaf, theirs_leaf in (("kernel", "weight"), ("bias", "bias"))
    }


def norm(table: Mapping[str, str]) -> dict[str, str]:
    """Return {parameter path: Hugging Face tensor name} for the scales and biases of norms.

    `table` is {path of the norm: Hugging Face name of the norm}.
    """
    return {
        f"{ours}/{ours_leaf}": f"{theirs}.{theirs_leaf}"
        for ours, theirs in table.items()
        for ours_leaf, theirs_leaf in (("scale", "weight"), ("bias", "bias"))
    }


def _part(name: str, leaf: str) -> str:
    stem, hash_, part = name.partition("#")
    return f"{stem}.{leaf}{hash_}{part}"
