"""Read and write (IA)^3 factors in PEFT's format (Liu et al., 2022, arXiv:2205.05638).

The factors of a feed-forward module multiply the module's inputs. The factors of other modules multiply outputs.
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
"""Values of config keys that llmctl accepts, because they do not change the outputs. Other values may change the
outputs."""
KINDS = ("scaled",)
"""Kinds of adapters that this module writes: names of llmctl's weight classes (`weights.Node.kind`)."""


class Factors(NamedTuple):
    """Store the factors of one layer's matrix: an array [I, 1] for side "inputs", or [1, O] for side "outputs"."""

    factor: np.ndarray
    side: str


def suffixes(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the endings of the tensor names that PEFT stores for one adapted module."""
    return ("ia3_l",)


def read(
    config: Mapping[str, Any], module: str, tensors: Mapping[str, np.ndarray], inputs: int, slots: tuple[Slot, ...]
) -> list[Factors]:
    """Read the factors of one module, and return one entry per matrix of llmctl.

    A fused module, such as one for queries, keys and values, has several matrices. If the factors multiply the
    module's inputs, each matrix gets all factors. Otherwise, each matrix gets the factors of its own outputs.

    Args:
        config: Content of adapter_config.json.
        module: Name of the module, for error messages.
        tensors: Tensors of the module, by the ending of their names.
        inputs: Number of inputs of the module.
        slots: Matrices of the module.

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
    """Wrap the weight `w` in an adapter with the factors of its layers. Layers without factors get factors of 1.

    The keys of `layers` are layer indices, or -1 if the weight is not stacked over layers.
    """
    first = next(iter(layers.values()))
    if any(one.side != first.side for one in layers.values()):
        raise RequestError("ia3_l scales the inputs of one layer and the outputs of another, which is not supported")
    factor = np.ones((*w.shape[:-2], *first.factor.shape), np.float32)
    for layer, one in layers.items():
        factor[layer if set(layers) != {-1} else ...] = one.factor
    return weights.Scaled(w, jnp.asarray(factor), first.side)


def write(w: Any) -> dict[str, np.ndarray]:
    """Return the tensors of one layer's adapter in PEFT's format, by the ending of their names."""
    return {"ia3_l": np.asarray(w.factor, np.float32).T}


def settings(
    nodes: Mapping[str, Any], tensors: Mapping[str, Mapping[str, np.ndarray]], every: Iterable[str]
) -> dict[str, Any]:
    """Return the entries of adapter_config.json for (IA)^3.

    Args:
        nodes: Weights with adapters, by module name.
        tensors: Written tensors of each module.
        every: Names of all modules of the model, which are not used here.
    """
    return {
        "peft_type": "IA3",
        "target_modules": sorted(tensors),
        "feedforward_modules": sorted(m for m in tensors if nodes[m].side == "inputs"),
        "init_ia3_weights": True,
    }
