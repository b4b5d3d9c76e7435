"""Draw the lineage of a run: each model with its stage and size, and lines from parents and teachers to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmctl.cli import summary
from llmctl.cli.report import figures, plots
from llmctl.cli.report.document import Cell, Paragraph, Plot, Section, Table, cell, number
from llmctl.cli.report.run_contents import Contents, Model
from llmctl.evaluate.metrics.base import columns

TEACHERS = ("teacher", "teachers")
"""Settings of stages whose values are names of teachers."""
LEFT, RIGHT, TOP, BOTTOM = 0.04, 0.88, 0.16, 0.84
"""Sides of a model's box within its grid cell, whose width and height are 1."""
MOST = 60
"""Maximum number of models in the picture."""


def section(contents: Contents) -> Section:
    """Return the section with the picture of the lineage."""
    if not contents.models:
        return Section("Lineage", [Paragraph("This folder has no model.")])
    models = contents.models[:MOST]
    edges = _edges(models)
    rows = [
        [
            cell(model.name),
            cell(model.manifest.stage),
            cell(", ".join(f"{source} ({kind})" for source, target, kind in edges if target == model.name) or "–"),
            number(model.manifest.parameters),
            number(model.manifest.weight_bytes, summary.size(model.manifest.weight_bytes)),
        ]
        for model in models
    ]
    table = Table("Models and what they were made from", ["model", "stage", "made from", "parameters", "weights"], rows)
    sentences = ". ".join(f"{target} was made from {source} ({kind})" for source, target, kind in edges)
    description = f"Lineage of {len(models)} models. {sentences or 'No model was made from another'}."
    legend = "An arrow leads from a model to what was made from it. " + "A dashed line leads to a teacher. " * any(
        kind == "teacher" for _, _, kind in edges
    )
    width = 420 * (1 + max(column for column, _ in _places(_names(models, edges), edges).values()))
    plot = Plot("What was made from what", _spec(models, edges), description, table, width)
    return Section("Lineage", [Paragraph(legend.strip()), plot])


def _names(models: Sequence[Model], edges: Sequence[tuple[str, str, str]]) -> list[str]:
    """Return the names of all boxes: models outside the run, then those of the run."""
    inside = [model.name for model in models]
    return list(dict.fromkeys([*(source for source, _, _ in edges if source not in inside), *inside]))


def _edges(models: Sequence[Model]) -> list[tuple[str, str, str]]:
    """Return (source, target, kind) for each parent and each teacher. The kind is "parent" or "teacher"."""
    found: list[tuple[str, str, str]] = []
    inside = {model.name: model.manifest for model in models}
    for model in models:
        if parent := model.manifest.parent:
            same = parent.name not in inside or parent.digest == inside[parent.name].digest
            found.append((parent.name if same else _other(parent.name), model.name, "parent"))
        named = [n for key in TEACHERS for n in _listed(model.manifest.config.get(key)) if isinstance(n, str) and n]
        digests = [d for key in TEACHERS for d in _listed(model.manifest.metrics.get(key)) if d is not None]
        for i, path in enumerate(named):
            name = path.rstrip("/").rpartition("/")[2]
            known = inside[name].digest == digests[i] if name in inside and len(digests) == len(named) else path == name
            found.append((name if known or name not in inside else _other(name), model.name, "teacher"))
    return found


def _other(name: str) -> str:
    """Return the displayed name of a model outside the run, if a model of the run has the same name."""
    return f"{name} (not that of this run)"


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def headline(model: Model) -> str:
    """Return the title and value of the metric that the box of a model shows; empty if none was measured.

    The metric is the model's first quality metric in the table of `llmctl run`. If the model has no such metric, the
    validation accuracy or loss is used.
    """
    there = [name for name, value in model.summary["metrics"].items() if figures.is_number(value)]
    best = next((m for m in columns(there, "run") if m.aspect == "quality"), None)
    name = best.name if best else next((n for n in there if n in ("validation_accuracy", "validation_loss")), "")
    return f"{figures.title(name)} {figures.value_text(name, model.summary['metrics'][name])}" if name else ""


def _places(names: Sequence[str], edges: Sequence[tuple[str, str, str]]) -> dict[str, tuple[int, int]]:
    """Return the grid cell (column, row) of each box.

    A box is one row below its parent. The first child is in the parent's column. Every other box starts a new
    column.
    """
    parent = {target: source for source, target, kind in edges if kind == "parent"}
    places: dict[str, tuple[int, int]] = {}
    taken: set[str] = set()
    columns_used = 0
    depth: dict[str, int] = {}
    for name in names:
        above = parent.get(name, "")
        if above in places and above not in taken:
            taken.add(above)
            column = places[above][0]
        else:
            column, columns_used = columns_used, columns_used + 1
        depth[name] = depth.get(above, -1) + 1
        places[name] = (column, depth[name])
    return places


def _spec(models: Sequence[Model], edges: Sequence[tuple[str, str, str]]) -> plots.Spec:
    places = _places(_names(models, edges), edges)
    about = {model.name: model for model in models}
    boxes: list[dict[str, Any]] = []
    for name, (column, row) in places.items():
        model = about.get(name)
        lines = ["outside this run", "", ""]
        if model:
            size = summary.size(model.manifest.weight_bytes)
            lines = [f"{model.manifest.stage} · {model.manifest.family}"]
            lines += [f"{model.manifest.parameters:,} parameters · {size}", headline(model)]
        box = {"left": column + LEFT, "right": column + RIGHT, "top": row + TOP, "bottom": row + BOTTOM}
        texts = {"name": cell(name).text, **{f"line{i}": cell(line).text for i, line in enumerate(lines)}}
        boxes.append({**box, **texts, "x": column + (LEFT + RIGHT) / 2, "known": model is not None})
    across, down = (1 + max(place[i] for place in places.values()) for i in (0, 1))
    x, y = ({"type": "quantitative", "scale": {"domain": [0, n], "nice": False}, "axis": None} for n in (across, down))
    y["scale"] = {**y["scale"], "reverse": True}
    at = {"x": {**x, "field": "left"}, "x2": {"field": "right"}, "y": {**y, "field": "top"}, "y2": {"field": "bottom"}}
    layers: list[plots.Spec] = [_line(edge, i, places, x, y) for i, edge in enumerate(edges)]
    ends = [{"x": (LEFT + RIGHT) / 2 + places[t][0], "y": places[t][1] + TOP} for _, t, k in edges if k == "parent"]
    layers.append(
        {
            "data": {"values": ends},
            "mark": {"type": "point", "shape": "triangle-down", "filled": True, "size": 70, "color": plots.QUIET},
            "encoding": {"x": {**x, "field": "x"}, "y": {**y, "field": "y"}},
        }
    )
    for known in (True, False):
        mark = {"type": "rect", "cornerRadius": 6, "fill": "var(--panel)", "stroke": plots.QUIET}
        layers.append(
            {
                "transform": [{"filter": "datum.known" if known else "!datum.known"}],
                "mark": mark if known else {**mark, "strokeDash": [4, 3]},
                "encoding": at,
            }
        )
    for field, dy, style in (
        ("name", -27, {"fontWeight": "bold", "fontSize": 14}),
        *((f"line{i}", -8 + 17 * i, {"color": plots.QUIET}) for i in range(3)),
    ):
        center = {"field": "top", **y}
        layers.append(
            {
                "mark": {"type": "text", "dy": dy + 41, "limit": {"expr": f"width * 0.8 / {across}"}, **style},
                "encoding": {"x": {**x, "field": "x"}, "y": center, "text": {"field": field}},
            }
        )
    return plots.diagram(boxes, down * 124, layers)


def _line(
    edge: tuple[str, str, str], index: int, places: dict[str, tuple[int, int]], x: plots.Spec, y: plots.Spec
) -> plots.Spec:
    """Return the line from a parent or teacher to the model that was made from it.

    The line from a teacher is dashed, and runs along the right sides of the boxes.
    """
    source, target, kind = edge
    (from_x, from_y), (to_x, to_y) = places[source], places[target]
    center = (LEFT + RIGHT) / 2
    path = [(from_x + center, from_y + BOTTOM), (to_x + center, to_y + TOP)]
    if kind == "teacher":
        beside = from_x + RIGHT + 0.03 + 0.02 * (index % 4)
        path = [
            (from_x + RIGHT, from_y + 0.5),
            (beside, from_y + 0.5),
            (beside, to_y + 0.5),
            (to_x + RIGHT, to_y + 0.5),
        ]
    return {
        "data": {"values": [{"x": a, "y": b, "order": i} for i, (a, b) in enumerate(path)]},
        "mark": {"type": "line", "color": plots.QUIET, "strokeDash": [5, 4] if kind == "teacher" else [1, 0]},
        "encoding": {
            "x": {**x, "field": "x"},
            "y": {**y, "field": "y"},
            "order": {"field": "order", "type": "quantitative"},
        },
    }


def table(contents: Contents) -> Table:
    """Return the table of all models, with the columns of `llmctl show`. Yardsticks are the last rows."""
    entries = [*(model.summary for model in contents.models), *contents.summary.get("yardsticks", [])]
    there = {name for e in entries for name, value in e["metrics"].items() if value is not None}
    shown = summary.table_metrics(there)
    head = ["model", "stage", "from", "parameters", "weights", "on disk", "sparsity", "bits", *(m.title for m in shown)]
    rows = []
    for i, e in enumerate(entries):
        rows.append(
            [
                Cell(cell(e["name"]).text, href=f"model-{i}" if i < len(contents.models) else ""),
                cell(e["stage"]),
                cell(e["parent"]["name"] if e["parent"] else "–"),
                number(e["parameters"]),
                number(e["weight_bytes"], summary.size(e["weight_bytes"])),
                number(e["bytes"], summary.size(e["bytes"])),
                number(e["sparsity"], f"{e['sparsity']:.1%}"),
                number(e["bits"], f"{e['bits']:.3g}"),
                *(figures.metric_cell(e["metrics"], m.name) for m in shown),
            ]
        )
    return Table("All models, parents before children", head, rows)
