"""Report how formats were chosen: the Pareto front of bits per weight and perplexity, as JSON data and as a table.

A mixture assigns one format to each matrix.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from llmctl.compress.quantization.format_allocation import Mixture
from llmctl.compress.quantization.quantize import Target
from llmctl.model import weights

ROWS = 12
"""Number of mixtures in the table, in addition to the measured mixtures."""


def perplexity_increase(loss_increase: float) -> float:
    """Return the relative increase of the perplexity if the loss increases by `loss_increase`.

    The perplexity is exp(loss).

    >>> round(perplexity_increase(0.00995), 6)
    0.01
    """
    with np.errstate(over="ignore"):
        return float(np.expm1(loss_increase))


def record(mixture: Mixture, count: int, measured: Mapping[Mixture, float]) -> dict[str, Any]:
    """Return a mixture as JSON data: bits per weight, and the predicted and measured increase of the perplexity.

    Args:
      mixture: the mixture.
      count: number of weights in the matrices.
      measured: measured increase of the perplexity, by mixture. For other mixtures, the data has no entry `measured`.
    """
    found: dict[str, Any] = {"bits": round(mixture.bits / count, 5)}
    found["predicted"] = number(perplexity_increase(mixture.increase))
    return found | ({"measured": number(measured[mixture])} if mixture in measured else {})


def counted(mixture: Mixture, count: int, measured: Mapping[Mixture, float], chosen: bool) -> dict[str, Any]:
    """Return the data of `record`, and the number of matrices per format. An entry "chosen" marks the chosen
    mixture."""
    found = record(mixture, count, measured) | {"formats": dict(sorted(Counter(mixture.formats).items()))}
    return found | ({"chosen": True} if chosen else {})


def losses(increases: Mapping[tuple[str, Target], float]) -> dict[str, dict[str, Any]]:
    """Return the measured increases of the loss as JSON data: {module: {format: increase}}."""
    found: dict[str, dict[str, Any]] = {}
    for (path, target), increase in increases.items():
        found.setdefault(weights.module_path(path), {})[target.format.scheme] = number(increase)
    return found


def table(front: Sequence[Mapping[str, Any]]) -> Table:
    """Return a table of a Pareto front for the terminal. The chosen mixture is bold.

    A mixture assigns one format to each matrix. The table contains every measured mixture, and at most `ROWS` further
    mixtures at equal distances on the front.

    Args:
      front: mixtures as JSON data (`counted`), in ascending order of bits.
    """
    out = Table(title="mixtures of formats", title_justify="left", header_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for title in ("bits per weight", "predicted perplexity", "measured perplexity", "matrices"):
        out.add_column(title, justify="left" if title == "matrices" else "right")
    shown = {*np.linspace(0, len(front) - 1, ROWS).round().astype(int).tolist()}
    for i, mixture in enumerate(front):
        if i not in shown and "measured" not in mixture:
            continue
        names = ", ".join(f"{count} {name}" for name, count in mixture["formats"].items())
        values = (_percent(mixture["predicted"]), _percent(mixture["measured"]) if "measured" in mixture else "")
        out.add_row(f"{mixture['bits']:.3f}", *values, names, style="bold" if mixture.get("chosen") else "")
    return out


def line(about: Mapping[str, Any]) -> str:
    """Return a line about the chosen mixture: bits per weight, and the increase of the perplexity."""
    told = f"{about['bits']:.3f} bits per weight; perplexity on the calibration data {_percent(about['measured'])}"
    return f"{told} with all matrices rounded to nearest, {_percent(about['predicted'])} predicted"


def line_after(about: Mapping[str, Any], method: str) -> str:
    """Return a line about the perplexity increase of a model after quantization with calibration data."""
    told = f"perplexity on the calibration data {_percent(about['measured_after'])} after {method}"
    over = about["kind"] == "max_perplexity_increase" and not (about["measured_after"] or 0.0) <= about["limit"]
    return told + (f", which is above the limit of {_percent(about['limit'])}" if over else "")


def _percent(value: float | None) -> str:
    return "not finite" if value is None else f"{value:+.2%}"


def number(value: float) -> float | None:
    """Return a number for JSON, rounded to six decimals; None if the number is not finite."""
    return round(value, 6) if np.isfinite(value) else None
