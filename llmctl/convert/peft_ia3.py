"""Read and write (IA)^3 factors in PEFT's format (Liu et al., 2022, arXiv:2205.05638).

The factors of a feed-forward module multiply its inputs. Those of other modules multiply their outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from llmctl.config.errors import RequestError
from llmctl.convert.name_map import Slot
from llmctl.model import weights

NEUTRAL: dict[str, tuple[Any, ...]] = {"init_ia3_weights": (True, False)}
"""Config keys that may change the outputs, with the only supported value of each: the one that changes nothing."""
KINDS = ("scaled",)
"""Kinds of llmctl's adapters (names of weight classes) that this module writes."""


class Factors(NamedTuple):
    """Store the factors of one layer's matrix: an array [I, 1] for side "inputs", or [1, O] for side "outputs"."""

    factor: np.ndarray
    side: str


def suffixes(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the suffixes of the tensor names of one module."""
    return ("ia3_l",)


def read(
    config: Mapping[str, Any], module: str, tensors: Mapping[str, np.ndarray], inputs: int, slots: tuple[Slot, ...]
) -> list[Factors]:
    """Return the factors of each of llmctl's matrices in a module; a fused module has several (`slots`).

    The matrices of a fused module share the factors of inputs.

    Raises:
        RequestError: If the factors do not fit the base's matrix.
    """
    factor, outputs = tensors["ia3_l"], sum(s.shape[-1] for s in slots)
    if factor.shape == (1, inputs):
        return [Factors(factor.T, "inputs")] * len(slots)
    if factor.shape != (outputs, 1):
        raise RequestError(
            f"{module}.ia3_l is {list(factor.shape)}, which does not fit the base's matrix [{outputs}, {inputs}]"
        )

    def part(slot: Slot) -> Factors:
        rows = slice(slot.first, slot.first + slot.shape[-1]) if len(slots) > 1 else slice(None)
        return Factors(factor[rows].T, "outputs")

    return [part(slot) for slot in slots]


def node(w: Any, layers: Mapping[int, Factors]) -> weights.Scaled:
    """Return the weight `w` wrapped in an adapter with these factors. Layers without factors get ones."""
    first = next(iter(layers.values()))
    if any(one.side != first.side for one in layers.values()):
        raise RequestError("ia3_l scales the inputs of one layer and the outputs of another, which is not supported")
    factor = np.ones((*w.shape[:-2], *first.factor.shape), np.float32)
    for layer, one in layers.items():
        factor[layer if set(layers) != {-1} else ...] = one.factor
    return weights.Scaled(w, jnp.asarray(factor), first.side)


def write(w: Any) -> dict[str, np.ndarray]:
    """Return the tensors of one layer's adapter, by suffix."""
    return {"ia3_l": np.asarray(w.factor, np.float32).T}


def settings(
    nodes: Mapping[str, Any], tensors: Mapping[str, Mapping[str, np.ndarray]], every: Iterable[str]
) -> dict[str, Any]:
    """Return the config keys of the format for the adapters of all modules."""
    return {
        "peft_type": "IA3",
        "target_modules": sorted(tensors),
        "feedforward_modules": sorted(m for m in tensors if nodes[m].side == "inputs"),
        "init_ia3_weights": True,
    }
