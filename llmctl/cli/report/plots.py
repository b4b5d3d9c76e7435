"""Build the plots of a report as Vega-Lite specifications.

Colors are CSS variables of the page, so that a plot follows the page's light or dark colors. Texts of artifacts are
always data of a plot, never part of an expression.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from llmctl.config.terminal import visible

Spec = dict[str, Any]
Values = Sequence[Mapping[str, Any]]

SERIES = [f"var(--series-{i})" for i in range(1, 7)]
"""Colors of series. `page.css` defines them for light and for dark pages."""
DASHES = [[1, 0], [6, 3], [2, 2], [8, 3, 2, 3], [12, 4], [4, 6]]
"""Dash patterns of series, so that lines differ without color."""
SHAPES = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down"]
INK, QUIET, LINE, PAPER = "var(--ink)", "var(--quiet)", "var(--line)", "var(--paper)"
MOST_POINTS = 400
"""Maximum number of points per series. A longer series is thinned."""

_CONFIG: Spec = {
    "background": None,
    "aria": False,  # the page has the alternative text
    "font": "system-ui, 'Segoe UI', Arial, sans-serif",
    "view": {"stroke": None},
    "axis": {
        "labelColor": QUIET,
        "titleColor": QUIET,
        "gridColor": LINE,
        "domainColor": LINE,
        "tickColor": LINE,
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "labelLimit": 220,
    },
    "legend": {
        "labelColor": INK,
        "titleColor": QUIET,
        "orient": "top",
        "labelFontSize": 12,
        "labelLimit": 260,
        "symbolStrokeColor": INK,
    },
    "text": {"color": INK, "fontSize": 12},
    "range": {"category": SERIES, "symbol": SHAPES},
    "line": {"strokeWidth": 2},
    "point": {"size": 60, "strokeWidth": 2},
}


def _plot(values: Values, height: float | Spec, **more: Any) -> Spec:
    return {
        "width": "container",
        "height": height,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "data": {"values": [{k: visible(a) if isinstance(a, str) else a for k, a in v.items()} for v in values]},
        "config": _CONFIG,
        **more,
    }


def _axis(field: str, title: str, **more: Any) -> Spec:
    return {"field": field, "type": "quantitative", "title": title, **more}


def thinned(points: Sequence[tuple[float, float]], most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """Return at most `most` points of a series: the lowest and the highest y of each interval of x, and both ends.

    Example:
        >>> thinned([(x, x % 5) for x in range(1000)], 6)
        [(0, 0), (4, 4), (500, 0), (504, 4), (999, 4)]
    """
    if len(points) <= most:
        return list(points)
    count = max((most - 2) // 2, 1)
    kept = {0, len(points) - 1}
    for i in range(count):
        part = range(i * len(points) // count, (i + 1) * len(points) // count)
        kept |= {min(part, key=lambda n: points[n][1]), max(part, key=lambda n: points[n][1])}
    return [points[n] for n in sorted(kept)]


def lines(series: Mapping[str, Sequence[tuple[float, float]]], x: str, y: str, scale: float = 1.0) -> Spec:
    """Return a plot with one line per series {name: [(x, y), …]} and two sliders that select the range of x.

    Args:
        series: Points of each series.
        x: Title of the x axis.
        y: Title of the y axis.
        scale: Factor of the y values in the plot.
    """
    values = [{"x": a, "y": b * scale, "series": name} for name, points in series.items() for a, b in points]
    first, last = min(v["x"] for v in values), max(v["x"] for v in values)
    wide = last > first
    params = [
        {"name": name, "value": value, "bind": {"input": "range", "min": first, "max": last, "step": 1, "name": label}}
        for name, value, label in (("low", first, f"first {x}"), ("high", last, f"last {x}"))
    ]
    scale_x = {"domain": [{"expr": "min(low, high)"}, {"expr": "max(low, high)"}], "nice": False}
    names = list(series)
    several = len(names) > 1

    def by_series(values: Sequence[Any]) -> Spec:
        shown = {"domain": names, "range": [values[i % len(values)] for i in range(len(names))]}
        return {"field": "series", "type": "nominal", "scale": shown, "title": None} | ({} if several else _HIDDEN)

    few = max(len(points) for points in series.values()) <= 60
    return _plot(
        values,
        260,
        **({"params": params} if wide else {}),
        transform=[{"filter": "datum.x >= min(low, high) && datum.x <= max(low, high)"}] if wide else [],
        mark={"type": "line", "tooltip": True, "point": {"size": 24} if few else False},
        encoding={
            "x": _axis(
                "x", x, axis={"grid": False, "format": "~s", "tickCount": 7}, **({"scale": scale_x} if wide else {})
            ),
            "y": _axis("y", y, scale={"zero": False}),
            "color": by_series(SERIES),
            "strokeDash": by_series(DASHES),
        },
    )


_HIDDEN: Spec = {"legend": None}


def tradeoff(values: Values, x: str, y: str, log: bool, percent: bool, joined: bool) -> Spec:
    """Return a scatter plot of quality against cost. The points on the Pareto front are filled.

    Args:
        values: Records with "name", "x", "y", "front" (bool), and possibly "low" and "high", the interval of y.
        x: Title of the x axis.
        y: Title of the y axis.
        log: Whether the x axis is logarithmic.
        percent: Whether y is a fraction, shown in percent.
        joined: Whether the points on the front are joined by a line.
    """
    middle = _middle([v["x"] for v in values], log)
    placed = [
        {**v, "side": "left" if v["x"] > middle else "right", "above": i % 2 == 0}
        for i, v in enumerate(sorted(values, key=lambda v: (v["x"], v["y"])))
    ]
    ends = [v[end] for v in values for end in ("low", "y", "high") if end in v]
    room = (max(ends) - min(ends)) * 0.15 or abs(max(ends)) * 0.05 or 1.0
    xs = [v["x"] for v in values]
    edge = _edges(min(xs), max(xs), log)
    at_x = _axis("x", x, scale={"type": "log" if log else "linear", "domain": edge, "nice": False, "zero": False})
    at_x["axis"] = {"grid": False, "format": "~s", "tickCount": 5, "labelOverlap": True}
    at_y = _axis("y", y, scale={"zero": False, "domain": [min(ends) - room, max(ends) + room], "nice": True})
    at_y["axis"] = {"format": ".1%"} if percent else {}
    dots = {"type": "point", "tooltip": True, "size": 90, "stroke": SERIES[0]}
    layers: list[Spec] = [
        {
            "transform": [{"filter": "isValid(datum.low)"}],
            "mark": {"type": "rule", "color": QUIET},
            "encoding": {"x": at_x, "y": {**at_y, "field": "low"}, "y2": {"field": "high"}},
        },
        {
            "transform": [{"filter": "datum.front"}],
            "mark": {"type": "line", "color": SERIES[1], "strokeDash": [5, 3]},
            "encoding": {"x": at_x, "y": at_y, "order": {"field": "x", "type": "quantitative"}},
        },
        *(
            {
                "transform": [{"filter": "datum.front" if front else "!datum.front"}],
                "mark": {**dots, "fill": SERIES[0] if front else PAPER},
                "encoding": {"x": at_x, "y": at_y},
            }
            for front in (False, True)
        ),
        *(
            {
                "transform": [{"filter": {"and": [{"field": "side", "equal": side}, {"field": "above", "equal": up}]}}],
                "mark": {"type": "text", "align": "right" if side == "left" else "left", "limit": 170}
                | {"dx": -9 if side == "left" else 9, "dy": -11 if up else 12},
                "encoding": {"x": at_x, "y": at_y, "text": {"field": "name"}},
            }
            for side in ("left", "right")
            for up in (True, False)
        ),
    ]
    return _plot(placed, 300, layer=layers if joined else [layers[0], *layers[2:]])


def _middle(xs: Sequence[float], log: bool) -> float:
    return math.sqrt(min(xs) * max(xs)) if log else (min(xs) + max(xs)) / 2


def _edges(low: float, high: float, log: bool) -> list[float]:
    """Return the ends of an axis with some room on both sides of the values."""
    if log:
        room = max((high / low) ** 0.12, 1.2)
        return [low / room, high * room]
    room = (high - low) * 0.12 or abs(high) * 0.2 or 1.0
    return [low - room, high + room]


def confusion(values: Values, names: Sequence[str], counted: bool) -> Spec:
    """Return a heat map of a confusion matrix.

    Args:
        values: Records with "true", "predicted", "count", and "share", which is the count divided by the sum of its
            row.
        names: Class names, in order.
        counted: Whether the counts are written into the cells.
    """
    size = {"step": max(36, 170 // len(names)) if counted else max(4, 300 // len(names))}
    labels = {"labelLimit": 110} | ({} if len(names) <= 30 else {"labels": False, "ticks": False})
    encoding: Spec = {
        "x": {"field": "predicted", "type": "nominal", "scale": {"domain": list(names)}, "title": "predicted class"},
        "y": {"field": "true", "type": "nominal", "scale": {"domain": list(names)}, "title": "true class"},
    }
    encoding["y"]["axis"] = labels
    encoding["x"]["axis"] = {**labels, "labelAngle": -40 if len(names) > 3 else 0}
    shade = {"field": "share", "type": "quantitative", "legend": None}
    shade["scale"] = {"domain": [0, 1], "range": [0.04, 0.55]}  # the ink stays readable on the darkest cell
    cells: Spec = {"mark": {"type": "rect", "color": SERIES[0], "tooltip": True}}
    cells["encoding"] = {**encoding, "opacity": shade}
    texts: Spec = {"mark": {"type": "text"}, "encoding": {**encoding, "text": {"field": "count", "format": ","}}}
    return _plot(values, size, layer=[cells, texts] if counted else [cells])


def reliability(values: Values) -> Spec:
    """Return a plot of accuracy against confidence, from records with "confidence", "accuracy" and "count" of each bin.

    Calibrated probabilities are on the diagonal.
    """
    unit = {"scale": {"domain": [0, 1]}, "axis": {"format": ".0%"}}
    x, y = _axis("confidence", "confidence", **unit), _axis("accuracy", "accuracy", **unit)
    diagonal = {
        "data": {"values": [{"confidence": 0, "accuracy": 0}, {"confidence": 1, "accuracy": 1}]},
        "mark": {"type": "line", "color": QUIET, "strokeDash": [4, 4], "strokeWidth": 1},
        "encoding": {"x": x, "y": y},
    }
    size = {"field": "count", "type": "quantitative", "legend": None, "scale": {"range": [30, 500], "zero": True}}
    points = {"mark": {"type": "point", "filled": True, "color": SERIES[0], "opacity": 0.85, "tooltip": True}}
    joined = {"mark": {"type": "line", "color": SERIES[0], "strokeWidth": 1}, "encoding": {"x": x, "y": y}}
    return _plot(values, 260, layer=[diagonal, joined, {**points, "encoding": {"x": x, "y": y, "size": size}}])


def intervals(values: Values, rows: Sequence[str], series: Sequence[str], title: str) -> Spec:
    """Return a plot with one row per name. A row has one point per series, with the interval of its value.

    Args:
        values: Records with "row", "series", "value", and possibly "low" and "high".
        rows: Names of the rows, in order.
        series: Names of the series, in order.
        title: Title of the x axis.
    """
    x = _axis("value", title, scale={"zero": False, "nice": True}, axis={"tickCount": 8})
    place: Spec = {
        "y": {"field": "row", "type": "nominal", "sort": list(rows), "title": None, "axis": {"grid": True}},
        "yOffset": {"field": "series", "type": "nominal", "sort": list(series)},
        "color": {
            "field": "series",
            "type": "nominal",
            "title": None,
            "scale": {"domain": list(series), "range": [SERIES[i % len(SERIES)] for i in range(len(series))]},
        },
    }
    shape = {"field": "series", "type": "nominal", "title": None}
    shape["scale"] = {"domain": list(series), "range": [SHAPES[i % len(SHAPES)] for i in range(len(series))]}
    spread: Spec = {
        "transform": [{"filter": "isValid(datum.low)"}],
        "mark": {"type": "rule", "strokeWidth": 1.5},
        "encoding": {**place, "x": {**x, "field": "low"}, "x2": {"field": "high"}},
    }
    points: Spec = {"mark": {"type": "point", "filled": True, "tooltip": True}}
    points["encoding"] = {**place, "x": x, "shape": shape}
    return _plot(values, {"step": 14}, layer=[spread, points])


def bars(values: Values, x: str, y: str) -> Spec:
    """Return a bar chart of "y" per "x", with the bars in the order of the records."""
    at = {"field": "x", "type": "nominal", "sort": None, "title": x, "axis": {"labelAngle": -40, "labelOverlap": True}}
    mark = {"type": "bar", "color": SERIES[0], "tooltip": True}
    return _plot(values, 180, mark=mark, encoding={"x": at, "y": _axis("y", y)})


def diagram(values: Values, height: int, layers: Sequence[Spec]) -> Spec:
    """Return a plot that consists of the given Vega-Lite layers, without axes."""
    return _plot(values, height, layer=list(layers))
