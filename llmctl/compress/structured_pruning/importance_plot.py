"""Plot the importance by which structured pruning selected layers, heads, neurons and channels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

_KEPT, _REMOVED, _QUIET, _LINE = "#0b6bcb", "#cf222e", "#6e7781", "#d0d7de"
TITLES = {"heads": "query heads", "neurons": "neurons"}


def plot(found: Mapping[str, Any], path: Path) -> bool:
    """Write a PNG with plots of the measured importance.

    - Layers: the block influence of each layer.
    - Heads, neurons, channels: the importance in descending order, relative to the largest, with one curve per layer.
    - Budget search: the increase of the loss against the kept fraction of each size.

    Removed parts are red. A plot is omitted if nothing was measured for it.

    Args:
      found: metrics of the stage.
      path: the file.

    Returns:
      True if the PNG was written; False if nothing was measured.

    Raises:
      ImportError: If matplotlib (the `demo` extra) is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = _plots(found)
    if not drawn:
        return False
    figure = Figure(figsize=(4.6 * len(drawn), 3.6), dpi=130, layout="constrained")
    for ax, (title, draw) in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn.items(), strict=True):
        draw(ax)
        ax.set_title(title, fontsize=10)
        ax.grid(axis="y", color=_LINE, linewidth=0.6)
        ax.tick_params(colors=_QUIET, labelsize=8)
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
    FigureCanvasAgg(figure).print_png(path)
    return True


def curves(found: Mapping[str, Any]) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
    """Return the importance in descending order, divided by the largest value, and whether each part was kept.

    If heads are removed in groups, a removed head may have a higher importance than a kept head.

    Returns:
      {"heads", "neurons" or "channels": one pair of arrays per layer}. A kind is omitted if no part of this kind was
      removed.
    """
    out: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for unit in found.get("units", []):
        for name, scores in unit["importance"].items():
            kind = name.rpartition("/")[2]
            out.setdefault(kind, []).append(_descending(scores, unit["kept"][name]))
    if channels := found.get("channels"):
        out["channels"] = [_descending(channels["importance"], channels["kept"])]
    return out


def _descending(scores: list[float], kept: list[int]) -> tuple[np.ndarray, np.ndarray]:
    values = np.asarray(scores, float)
    order = np.argsort(-values, kind="stable")
    return values[order] / max(values.max(), 1e-30), np.isin(order, kept)


def _plots(found: Mapping[str, Any]) -> dict[str, Callable[[Any], None]]:
    """Return {title of a plot: function that draws the plot}."""
    out: dict[str, Callable[[Any], None]] = {}
    records = [r for r in found.get("structured_layers", []) if "influence" in r]
    if records:

        def influence(ax: Any) -> None:
            colors = [_KEPT if r["kept"] else _REMOVED for r in records]
            ax.bar(range(len(records)), [r["influence"] for r in records], color=colors)
            ax.set_xlabel("layer", color=_QUIET)

        out["block influence of layers (red: removed)"] = influence
    for kind, lines in curves(found).items():

        def sorted_importance(ax: Any, lines: list[tuple[np.ndarray, np.ndarray]] = lines, kind: str = kind) -> None:
            for values, kept in lines:
                ax.plot(range(len(values)), values, color=_LINE, linewidth=0.6, zorder=1)
                colors = np.where(kept, _KEPT, _REMOVED)
                ax.scatter(range(len(values)), values, s=max(2, 60 / len(values)), c=colors, linewidths=0, zorder=2)
            ax.set_xlabel(f"{TITLES.get(kind, kind)}, by importance", color=_QUIET)

        out[f"importance of {TITLES.get(kind, kind)} (red: removed)"] = sorted_importance
    if losses := found.get("budget", {}).get("losses"):
        whole = found["sizes"]["before"]
        sizes = {"heads": whole["kv_heads"], "ffn": whole["neurons"], "queries": whole["heads"] // whole["kv_heads"]}
        sizes |= {name: whole[name] for name in ("layers", "hidden")}

        def loss(ax: Any) -> None:
            for name, curve in losses.items():
                counts = sorted(map(int, curve))
                ax.plot([n / sizes[name] for n in counts], [curve[str(n)] for n in counts], marker="o", label=name)
            ax.set_xlabel("kept fraction", color=_QUIET)
            ax.set_yscale("symlog", linthresh=0.1)
            ax.legend(fontsize=8, frameon=False)

        out["increase of the loss"] = loss
    return out
