"""Find the sizes of a model that meet a budget of parameters, bytes or FLOPs, and estimate what each choice costs.

All combinations of layers, heads and hidden width are enumerated. For each, the number of neurons is the largest that
the budget allows. The estimated loss of a combination is the sum of four losses: each is the loss if only this size
is reduced, interpolated between measured sizes. The module does not import JAX.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from llmctl.config.base import Config
from llmctl.config.errors import RequestError
from llmctl.model import flops
from llmctl.model.config import ModelConfig

TOLERANCE = 0.01
"""Largest difference between a candidate and the budget, as a fraction of the budget."""
FRACTIONS = (7 / 8, 3 / 4, 1 / 2, 1 / 4, 1 / 8)
"""Fractions of each size at which the loss is measured."""
PARTS = {"layers": "layers", "heads": "kv_heads", "ffn": "d_ff", "hidden": "d_model"}
"""Sizes that a search may reduce: {name: field of ModelConfig that counts it}."""

Curves = Mapping[str, Mapping[int, float]]
"""Measured increase of the loss if only one size is reduced: {name in `PARTS`: {kept count: increase}}."""


class BudgetConfig(Config):
    """Configure a size budget, for which structured pruning chooses layers, heads, neurons and hidden channels.

    >>> BudgetConfig(parameters=0.5).asked
    ('parameters', 0.5)
    """

    common: ClassVar[tuple[str, ...] | None] = ()

    parameters: float = Field(default=0.0, ge=0)
    """Parameters to keep: a fraction below 1, or a number from 1 on."""
    bytes: float = Field(default=0.0, ge=0)
    """Bytes of weights to keep: a fraction below 1, or a number from 1 on."""
    flops: float = Field(default=0.0, ge=0)
    """FLOPs per token of a forward pass to keep: a fraction below 1, or a number from 1 on."""

    @model_validator(mode="after")
    def _one(self) -> BudgetConfig:
        if len(given := [name for name, amount in self if amount]) > 1:
            raise ValueError(f"{' and '.join(given)}: say one of them")
        return self

    @property
    def asked(self) -> tuple[Literal["parameters", "bytes", "flops"], float] | None:
        """Return the kind of the budget and its amount; None if there is no budget."""
        return next(((name, amount) for name, amount in self if amount), None)  # type: ignore[return-value]


@dataclass(frozen=True)
class Candidate:
    """Store one choice of sizes that meets the budget."""

    model: ModelConfig
    size: float
    """Parameters, bytes or FLOPs per token, whichever the budget limits."""
    estimate: float
    """Estimated increase of the loss."""
    measured: float | None = None
    """Increase of the loss, if it was measured."""

    @property
    def record(self) -> dict[str, Any]:
        """Return the sizes and losses as JSON data."""
        sizes = {name: getattr(self.model, field) for name, field in PARTS.items()} | {"heads": self.model.heads}
        found = sizes | {"size": self.size, "estimate": round(self.estimate, 5)}
        return found if self.measured is None else found | {"measured": round(self.measured, 5)}


def size_of(kind: str, bits: float, seq_len: int) -> Callable[[ModelConfig], float]:
    """Return a function that computes the size of a model.

    Args:
      kind: "parameters", "bytes" or "flops".
      bits: mean number of bits per parameter.
      seq_len: number of tokens per sequence, which the FLOPs of attention depend on.
    """
    if kind == "flops":
        return lambda cfg: flops.flops(cfg, seq_len)
    each = bits / 8 if kind == "bytes" else 1
    return lambda cfg: flops.parameters(cfg)["total"] * each


def limit(cfg: ModelConfig, asked: tuple[str, float], size: Callable[[ModelConfig], float]) -> float:
    """Return the budget as a number of parameters, bytes or FLOPs.

    Args:
      cfg: config of the model before pruning.
      asked: kind and amount of the budget (`BudgetConfig.asked`).
      size: function that computes the size of a model (`size_of`).

    Raises:
      RequestError: If the model already fits the budget, or if even the smallest choice of sizes does not fit.
    """
    kind, amount = asked
    whole, least = size(cfg), size(with_sizes(cfg, layers=1, heads=1, ffn=1, hidden=_hidden_sizes(cfg, 1)[-1]))
    wanted = amount * whole if amount < 1 else amount
    if wanted >= whole:
        raise RequestError(f"budget.{kind}: {wanted:,.0f}, but the artifact has only {whole:,.0f}; nothing to remove")
    if wanted < least:
        raise RequestError(
            f"budget.{kind}: {wanted:,.0f} is less than one head, neuron and layer allow, which is {least:,.0f}"
        )
    return wanted


def with_sizes(cfg: ModelConfig, *, layers: int, heads: int, ffn: int, hidden: int) -> ModelConfig:
    """Return the config with other sizes. `heads` counts key/value heads; each keeps all its query heads.

    The encoder of an encoder-decoder keeps the same fraction of layers as the decoder.
    """
    update = {
        "layers": layers, "kv_heads": heads, "heads": heads * (cfg.heads // cfg.kv_heads), "d_ff": ffn,
        "d_model": hidden, "preset": "",
    }  # fmt: skip
    if cfg.encoder_layers:
        update["encoder_layers"] = max(1, round(cfg.encoder_layers * layers / cfg.layers))
    return cfg.model_copy(update=update)


def uniform(cfg: ModelConfig, wanted: float, size: Callable[[ModelConfig], float], multiple: int = 1) -> ModelConfig:
    """Return the config that meets the budget by keeping about the same fraction of every size.

    For each percentage, layers, heads and hidden width are reduced to it, and the neurons fill the rest of the budget.
    The percentage is used for which the kept fraction of neurons is most similar.
    """
    best, distance = with_sizes(cfg, layers=1, heads=1, ffn=1, hidden=_hidden_sizes(cfg, multiple)[-1]), np.inf
    for percent in range(1, 101):
        share = percent / 100
        hidden = min(_hidden_sizes(cfg, multiple), key=lambda n, share=share: abs(n - share * cfg.d_model))
        layers, heads = (max(1, round(n * share)) for n in (cfg.layers, cfg.kv_heads))
        model = _filled(cfg, layers, heads, hidden, wanted, size, multiple)
        if model is not None and abs(model.d_ff / cfg.d_ff - share) < distance:
            best, distance = model, abs(model.d_ff / cfg.d_ff - share)
    return best


def points(cfg: ModelConfig, multiple: int = 1) -> dict[str, list[int]]:
    """Return the counts at which the loss of each size is measured, descending, for each name in `PARTS`."""
    found = {}
    for name, field in PARTS.items():
        whole = getattr(cfg, field)
        found[name] = sorted({max(1, round(whole * f)) for f in FRACTIONS} - {whole}, reverse=True)
    widths = _hidden_sizes(cfg, multiple)
    near = {min(widths, key=lambda n, f=f: abs(n - f * cfg.d_model)) for f in FRACTIONS}
    found["hidden"] = sorted(near - {cfg.d_model}, reverse=True)
    return found


def candidates(
    cfg: ModelConfig, wanted: float, size: Callable[[ModelConfig], float], curves: Curves, multiple: int = 1
) -> list[Candidate]:
    """Return all combinations of sizes that meet the budget, sorted by estimated loss.

    A combination meets the budget if its size is at most `TOLERANCE` below the budget. If there is none, the
    combinations with the largest size below the budget are returned.
    """
    found: list[Candidate] = []
    for layers in range(1, cfg.layers + 1):
        for heads in range(1, cfg.kv_heads + 1):
            for hidden in _hidden_sizes(cfg, multiple):
                model = _filled(cfg, layers, heads, hidden, wanted, size, multiple)
                if model is not None:
                    found.append(Candidate(model, size(model), estimate(cfg, model, curves)))
    near = [c for c in found if c.size >= (1 - TOLERANCE) * wanted]
    if not near and found:
        best = max(c.size for c in found)
        near = [c for c in found if c.size >= (1 - TOLERANCE) * best]
    return sorted(near, key=lambda c: (c.estimate, -c.size))


def finalists(found: list[Candidate], count: int) -> list[Candidate]:
    """Return up to `count` candidates from the start of the list, without those that are similar to an earlier one.

    Two candidates are similar if they have equally many heads, and differ by at most one layer and an eighth of the
    hidden width.
    """
    chosen: list[Candidate] = []
    for c in found:
        alike = [
            d for d in chosen
            if abs(c.model.layers - d.model.layers) <= 1 and c.model.kv_heads == d.model.kv_heads
            and abs(c.model.d_model - d.model.d_model) <= c.model.d_model / 8
        ]  # fmt: skip
        if not alike:
            chosen.append(c)
        if len(chosen) == count:
            break
    return chosen


def estimate(cfg: ModelConfig, model: ModelConfig, curves: Curves) -> float:
    """Estimate by how much the loss increases if `cfg` is reduced to the sizes of `model`.

    The increases that each size alone causes are interpolated from `curves` and added.
    """
    total = 0.0
    for name, field in PARTS.items():
        curve = {getattr(cfg, field): 0.0, **curves.get(name, {})}
        counts = sorted(curve, reverse=True)
        rising = np.maximum.accumulate([curve[n] for n in counts])
        total += float(np.interp(-getattr(model, field), [-n for n in counts], rising))
    return total


def measured(candidate: Candidate, loss: float) -> Candidate:
    """Return the candidate with its measured loss."""
    return replace(candidate, measured=loss)


def _hidden_sizes(cfg: ModelConfig, multiple: int) -> list[int]:
    """Return the hidden widths that a search considers, descending from the model's width to a quarter of it.

    The step is a sixteenth of the width. Reduced widths are multiples of `multiple`.
    """
    if cfg.positions == "sinusoidal":
        return [cfg.d_model]
    step = max(1, round(cfg.d_model / 16 / multiple)) * multiple
    rounded = {n // multiple * multiple for n in range(cfg.d_model, 0, -step)}
    return [cfg.d_model, *sorted((n for n in rounded if cfg.d_model / 4 <= n < cfg.d_model), reverse=True)]


def _filled(
    cfg: ModelConfig,
    layers: int,
    heads: int,
    hidden: int,
    wanted: float,
    size: Callable[[ModelConfig], float],
    multiple: int,
) -> ModelConfig | None:
    """Return the config with these sizes and as many neurons as the budget `wanted` allows; None if it allows none."""

    def of(ffn: int) -> ModelConfig:
        return with_sizes(cfg, layers=layers, heads=heads, ffn=ffn, hidden=hidden)

    least = min(multiple, cfg.d_ff)
    base, slope = size(of(least)), size(of(least + 1)) - size(of(least))  # all sizes are linear in the neurons
    if base > wanted:
        return None
    most = cfg.d_ff // multiple * multiple if cfg.d_ff >= multiple else cfg.d_ff
    ffn = min(most, (least + int((wanted - base) / slope)) // multiple * multiple)
    return of(max(least, ffn))
