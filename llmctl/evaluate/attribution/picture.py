"""Draw attributions as a PNG, from their JSON record (`record.record`)."""

from __future__ import annotations

import textwrap
import warnings
from pathlib import Path
from typing import Any

from llmctl.config.terminal import visible
from llmctl.evaluate.attribution.page import counted, number

MOST, BARS = 6, 10
"""Maximum number of texts (`MOST`). Maximum number of averaged words for a target, and against it (`BARS` each)."""
COLUMNS, ROWS = 100, 8
"""Characters per line, and lines per text; the rest of a text is left out."""
_INK, _QUIET, _FOR, _AGAINST = "#1f2328", "#59636e", "#0969da", "#cf5c14"
_LINE = 0.28
"""Height of a line in inches."""
_GLYPH = 0.0815
"""Width of a character in inches, for the monospaced font below."""


def draw(record: dict[str, Any], path: Path) -> None:
    """Write a PNG with the first texts and, if there are any, the average attributions per word. Tokens are shaded.

    Raises:
        ImportError: If matplotlib (the `demo` extra) is not installed.
    """
    # The object interface needs no global state and no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    texts = [(_title(i, text), _lines(text)) for i, text in enumerate(record["texts"][:MOST], 1)]
    averages = record["averages"]
    heights = [1.6 + len(lines) for _, lines in texts]
    bars = [2.6 + len(a["for"][:BARS]) + len(a["against"][:BARS]) for a in averages]
    total = sum(heights) + sum(bars) + 2
    width = COLUMNS * _GLYPH + 0.6
    figure = Figure(figsize=(width, total * _LINE), dpi=160, facecolor="white")
    figure.text(0.3 / width, 1 - 0.7 / total, _heading(record), color=_QUIET, fontsize=9, va="center", parse_math=False)
    top = 2.0
    for (title, lines), height in zip(texts, heights, strict=True):
        ax = figure.add_axes((0.3 / width, 1 - (top + height) / total, 1 - 0.6 / width, height / total))
        ax.set(xlim=(0, COLUMNS), ylim=(height, 0))
        ax.axis("off")
        ax.text(0, 0.5, title, color=_INK, fontsize=10, weight="bold", va="center", parse_math=False)
        for row, line in enumerate(lines):
            _draw_line(ax, row + 1.6, line)
        top += height
    for one, height in zip(averages, bars, strict=True):
        ax = figure.add_axes((2.0 / width, 1 - (top + height - 0.9) / total, 1 - 3.4 / width, (height - 2.2) / total))
        _draw_bars(ax, one)
        top += height
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # fonts lack characters of some scripts
        FigureCanvasAgg(figure).print_png(path)


def _heading(record: dict[str, Any]) -> str:
    method = record["method"].replace("_", " ")
    return f"{record['artifact']}: {method}, {record['unit']}; blue for the target, orange against it"


def _title(at: int, text: dict[str, Any]) -> str:
    error = f", completeness error {text['completeness_error']:.2%}" if "completeness_error" in text else ""
    return (
        f"Text {at}: target “{textwrap.shorten(visible(text['target']), 40)}” (output {number(text['output'])}{error})"
    )


def _lines(text: dict[str, Any]) -> list[list[tuple[str, float, int]]]:
    """Return the lines of a text: lists of (characters, share of the largest attribution, column)."""
    tokens = [t for t in text["tokens"] if t["kind"] == "text"]
    largest = max((abs(t["attribution"]) for t in tokens), default=0) or 1
    words: list[list[tuple[str, float]]] = []
    before = (0, 0)
    for token in tokens:
        shown = visible(" ".join(token["text"].split()))
        if not shown:
            continue
        joined = words and before == (token["part"], token["first"]) and not token["text"][0].isspace()
        words = words if joined else [*words, []]
        words[-1].append((shown[:COLUMNS], token["attribution"] / largest))
        before = token["part"], token["last"]
    lines: list[list[tuple[str, float, int]]] = [[]]
    column = 0
    for word in words:
        column += bool(lines[-1])
        if column + sum(len(shown) for shown, _ in word) > COLUMNS and lines[-1]:
            lines.append([])
            column = 0
        for shown, share in word:
            lines[-1].append((shown, share, column))
            column += len(shown)
    return lines if len(lines) <= ROWS else [*lines[: ROWS - 1], [("…", 0.0, 0)]]


def _draw_line(ax: Any, row: float, line: list[tuple[str, float, int]]) -> None:
    from matplotlib.patches import Rectangle

    for shown, share, column in line:
        color = _FOR if share > 0 else _AGAINST
        ax.add_patch(Rectangle((column, row - 0.4), len(shown), 0.8, color=color, alpha=0.5 * abs(share), linewidth=0))
        for i, character in enumerate(shown):  # one by one, so that columns fit the rectangles
            ax.text(
                column + i + 0.5, row, character, color=_INK, fontsize=9.5, family="DejaVu Sans Mono", ha="center",
                va="center", parse_math=False,
            )  # fmt: skip


def _draw_bars(ax: Any, one: dict[str, Any]) -> None:
    rows = [*one["for"][:BARS], *reversed(one["against"][:BARS])]
    ax.barh(range(len(rows)), [r["mean"] for r in rows], color=[_FOR if r["mean"] > 0 else _AGAINST for r in rows])
    ax.set_yticks(range(len(rows)), [f"{visible(r['word'])} ({r['count']})" for r in rows], parse_math=False)
    ax.invert_yaxis()
    ax.axvline(0, color=_QUIET, linewidth=0.8)
    title = f"Mean attribution per word: {textwrap.shorten(visible(one['target']), 40)} ({counted(one['texts'])})"
    ax.set_title(title, fontsize=10, weight="bold", loc="left", color=_INK, parse_math=False)
    for name in ("top", "right", "left"):
        ax.spines[name].set_visible(False)
    ax.spines["bottom"].set_color("#d0d7de")
    ax.tick_params(colors=_QUIET, labelsize=8.5, length=0)
