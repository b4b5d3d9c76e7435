"""List the choices of sizes that meet a budget, such as a number of parameters, and estimate their losses.

All combinations of layers, heads and hidden width are enumerated. Each combination gets the largest number of neurons
that the budget allows (`llmctl.compress.structured_pruning.search_space`).

The estimated increase of the loss is a sum over four sizes: layers, heads, neurons and hidden width. Each term is the
increase if only this size is reduced. The term is interpolated between measured sizes. The module does not import JAX.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from llmctl.compress.structured_pruning.search_space import PARTS, QUERIES, Size, Space, count
from llmctl.config.base import Config
from llmctl.config.errors import RequestError
from llmctl.model import flops
from llmctl.model.config import ModelConfig

TOLERANCE = 0.01
"""Largest accepted difference between the budget and the size of a candidate, as a fraction of the budget."""

Kind = Literal["parameters", "bytes", "flops", "latency"]
KINDS: tuple[Kind, ...] = ("parameters", "bytes", "flops", "latency")
UNITS = {"latency": " µs"}
"""Unit of each kind of budget, for messages. A kind without a unit is a count, such as the number of parameters."""

Curves = Mapping[str, Mapping[int, float]]
"""Measured increase of the loss if only one size is reduced: {name in `PARTS`: {kept count: increase}}."""


class BudgetConfig(Config):
    """Configure a size budget, for which structured pruning chooses layers, heads, neurons and hidden channels.

    >>> BudgetConfig(parameters=0.5).asked
    ('parameters', 0.5)
    """

    added: ClassVar[frozenset[str]] = frozenset({"latency", "latency_of", "batch_size", "context"})
    common: ClassVar[tuple[str, ...] | None] = ()

    parameters: float = Field(default=0.0, ge=0)
    """Parameters to keep: a fraction (below 1) or a number (1 or more)."""
    bytes: float = Field(default=0.0, ge=0)
    """Size of the weights to keep, in bytes of memory: a fraction (below 1) or a number (1 or more)."""
    flops: float = Field(default=0.0, ge=0)
    """FLOPs to keep, per token of a forward pass: a fraction (below 1) or a number (1 or more)."""
    latency: float = Field(default=0.0, ge=0, lt=1)
    """Fraction of the latency to keep. The latency is measured on one device of the run, before and after pruning."""
    latency_of: Literal["decode", "prefill"] = "decode"
    """Latency to reduce. decode: time per new token. prefill: time to read a prompt."""
    batch_size: int = Field(default=1, ge=1)
    """Number of texts that run together when the latency is measured."""
    context: int = Field(default=0, ge=0)
    """Number of tokens per text when the latency is measured; 0 means the length of the calibration data."""

    @model_validator(mode="after")
    def _one(self) -> BudgetConfig:
        if len(given := [name for name in KINDS if getattr(self, name)]) > 1:
            raise ValueError(f"{' and '.join(given)}: say one of them")
        if (stray := sorted({"latency_of", "batch_size", "context"} & self.model_fields_set)) and not self.latency:
            raise ValueError(f"{', '.join(stray)}: for budget.latency; set it to the fraction to keep")
        return self

    @property
    def asked(self) -> tuple[Kind, float] | None:
        """Return the kind of the budget and its amount; None if there is no budget."""
        return next(((name, amount) for name in KINDS if (amount := getattr(self, name))), None)


@dataclass(frozen=True)
class Candidate:
    """Store one choice of sizes that meets the budget."""

    model: ModelConfig
    size: float
    """Quantity that the budget limits: parameters, bytes, FLOPs per token, or latency in microseconds."""
    estimate: float
    """Estimated increase of the loss."""
    measured: float | None = None
    """Increase of the loss, if it was measured."""

    @property
    def record(self) -> dict[str, Any]:
        """Return the sizes and losses as JSON data."""
        sizes = {name: getattr(self.model, field) for name, field in PARTS.items()}
        sizes |= {"heads": self.model.heads, "kv_heads": self.model.kv_heads}
        found = sizes | {"size": self.size, "estimate": round(self.estimate, 5)}
        return found if self.measured is None else found | {"measured": round(self.measured, 5)}


def size_of(kind: str, seq_len: int) -> Size:
    """Return a function that computes the size of a model from its config.

    Args:
      kind: "parameters" or "flops". If no latency has been measured, "flops" is also used for "latency".
      seq_len: number of tokens per sequence, which the FLOPs of attention depend on.
    """
    if kind == "parameters":
        return lambda cfg: flops.parameters(cfg)["total"]
    return lambda cfg: flops.flops(cfg, seq_len)


def limit(space: Space, asked: tuple[str, float], size: Size, whole: float = 0.0) -> float:
    """Return the budget as a number of parameters, bytes, FLOPs or microseconds.

    Args:
      space: the sizes that the search considers.
      asked: kind and amount of the budget.
      size: function that computes the size of a model.
      whole: size of the unpruned model; by default the result of `size`.

    Raises:
      RequestError: If the model already fits the budget, or if even the smallest choice of sizes does not fit.
    """
    kind, amount = asked
    smallest = space.smallest()
    whole, least = whole or size(space.cfg), size(smallest)
    wanted = amount * whole if amount < 1 else amount
    unit = UNITS.get(kind, "")
    if wanted >= whole:
        raise RequestError(f"budget.{kind}: {wanted:,.0f}, but the artifact has only {whole:,.0f}; nothing to remove")
    if wanted < least:
        neurons = "neuron and" if smallest.d_ff == 1 else f"{smallest.d_ff:,} neurons and one"
        raise RequestError(
            f"budget.{kind}: {wanted:,.0f}{unit} is less than one head, {neurons} layer allow, which is "
            f"{least:,.0f}{unit}"
        )
    return wanted


def candidates(space: Space, wanted: float, size: Size, curves: Curves) -> list[Candidate]:
    """Return all combinations of sizes that meet the budget, sorted by estimated loss.

    A combination meets the budget if its size is at most `TOLERANCE` below the budget. If no combination has such a
    size, the combinations with the largest size below the budget are returned.
    """
    found: list[Candidate] = []
    for layers, heads, hidden, queries in space.choices():
        model = space.filled(layers, heads, hidden, queries, wanted, size)
        if model is not None:
            found.append(Candidate(model, size(model), estimate(space.cfg, model, curves)))
    near = [c for c in found if c.size >= (1 - TOLERANCE) * wanted]
    if not near and found:
        best = max(c.size for c in found)
        near = [c for c in found if c.size >= (1 - TOLERANCE) * best]
    return sorted(near, key=lambda c: (c.estimate, -c.size))


def finalists(found: list[Candidate], number: int) -> list[Candidate]:
    """Return the first `number` candidates. A candidate that is similar to an earlier candidate is skipped.

    Similar candidates have equally many heads. Their numbers of layers differ by at most 1, and their hidden widths
    differ by at most an eighth.
    """
    chosen: list[Candidate] = []
    for c in found:
        alike = [
            d for d in chosen
            if abs(c.model.layers - d.model.layers) <= 1
            and (c.model.heads, c.model.kv_heads) == (d.model.heads, d.model.kv_heads)
            and abs(c.model.d_model - d.model.d_model) <= c.model.d_model / 8
        ]  # fmt: skip
        if not alike:
            chosen.append(c)
        if len(chosen) == number:
            break
    return chosen


def estimate(cfg: ModelConfig, model: ModelConfig, curves: Curves) -> float:
    """Estimate the increase of the loss if `cfg` is reduced to the sizes of `model`.

    The increase that each size alone causes is interpolated from `curves`. The increases of all sizes are added.
    """
    total = 0.0
    for name in (*PARTS, QUERIES):
        curve = {count(cfg, name): 0.0, **curves.get(name, {})}
        counts = sorted(curve, reverse=True)
        rising = np.maximum.accumulate([curve[n] for n in counts])
        total += float(np.interp(-count(model, name), [-n for n in counts], rising))
    return total


def measured(candidate: Candidate, loss: float) -> Candidate:
    """Return the candidate with `loss` as its measured increase of the loss."""
    return replace(candidate, measured=loss)
