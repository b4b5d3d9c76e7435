"""Show each stage of a run: sizes, times, metrics, settings that differ from the defaults, and the stage's reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmctl.cli import summary
from llmctl.cli.report import figures, json_tables, plots, settings_changes
from llmctl.cli.report.document import (
    Block,
    Cell,
    Columns,
    Folded,
    Paragraph,
    Plot,
    Section,
    Table,
    cell,
    number,
    plain,
)
from llmctl.cli.report.run_contents import Contents, Evaluation, Model, Record, Unfinished
from llmctl.config.base import format_toml

LAYERED = {
    "pruned_layers": ("sparsity", "error"),
    "quantized_layers": ("error",),
    "structured_layers": ("influence", "error"),
}
"""Reports with one record per layer, and the fields of these records that are plotted."""
UNFOLDED = 24
"""Maximum number of metrics per model that the page shows directly. A longer table is closed until
the reader opens it."""


def section(contents: Contents) -> Section:
    """Return the section with one part per stage, unfinished stages included."""
    parts: list[Block] = [_model(i, model) for i, model in enumerate(contents.models)]
    parts += [_evaluation(evaluation) for evaluation in contents.evaluations]
    parts += [_unfinished(stage) for stage in contents.unfinished]
    return Section("Stages", parts)


def _model(index: int, model: Model) -> Section:
    manifest, metrics = model.manifest, model.manifest.metrics
    tables: list[Block] = [Table("Size and origin", ["field", "value"], _about(model)), *_settings(manifest.config)]
    names = figures.scalars(model.summary["metrics"])
    if names:
        rows = [
            [cell(figures.title(name)), figures.metric_cell(model.summary["metrics"], name)]
            for name in figures.ordered(names)
        ]
        measured = Table("Metrics of the stage and of evaluations", ["metric", "value"], rows)
        tables.append(measured if len(rows) <= UNFOLDED else Folded(f"{len(rows)} metrics", [measured]))
    layers = _layers(model.name, metrics)
    parts: list[Block] = [Columns(tables), *([Columns(layers)] if layers else [])]
    rest = {k: v for k, v in metrics.items() if isinstance(v, (dict, list)) and v}
    rest |= {k: v for k, v in metrics.items() if isinstance(v, (str, bool))}
    if rest:
        parts.append(Folded("Reports of the stage", json_tables.blocks(rest)))
    named = model.name if model.name == manifest.stage else f"{model.name} ({manifest.stage})"
    return Section(cell(named).text, parts, id=f"model-{index}")


def _about(model: Model) -> list[list[Cell]]:
    manifest = model.manifest
    rows: list[tuple[str, Cell]] = [
        ("family", cell(manifest.family)),
        ("made from", cell(manifest.parent.name if manifest.parent else "–")),
        ("task", cell(manifest.task or manifest.model.head)),
        ("classes", _some(manifest.labels)),
        ("parameters", number(manifest.parameters)),
        ("weights in memory", number(manifest.weight_bytes, summary.size(manifest.weight_bytes))),
        ("weights on disk", number(manifest.bytes, summary.size(manifest.bytes))),
        ("sparsity", number(manifest.sparsity, f"{manifest.sparsity:.1%}")),
        ("bits per parameter", number(manifest.bits, f"{manifest.bits:.3g}")),
        ("sequence length", number(manifest.seq_len) if manifest.seq_len else cell("–")),
        *_times(model.log),
    ]
    return [[cell(name), value] for name, value in rows if value.text != "–" or name == "made from"]


def _some(names: Sequence[str]) -> Cell:
    """Return a cell with the first 12 names, and the number of the other names."""
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return cell(", ".join(names[:12]) + more) if names else cell("–")


def _times(log: Sequence[Record]) -> list[tuple[str, Cell]]:
    """Return the last logged step, and the seconds between the first and the last line of a log."""
    times = [line["time"] for line in log if figures.is_number(line.get("time"))]
    steps = [line["step"] for line in log if figures.is_number(line.get("step"))]
    if len(times) < 2 or times[-1] < times[0]:
        return []
    seconds = round(times[-1] - times[0], 3)
    return [("last logged step", number(steps[-1]))] * bool(steps) + [
        ("time from the first to the last log line", number(seconds, f"{seconds:,.1f} s"))
    ]


def _settings(config: Mapping[str, Any]) -> list[Block]:
    changed = settings_changes.flat(settings_changes.changes(config))
    if not changed:
        return [Paragraph("All settings have their defaults.")]
    rows = [[cell(name), cell(format_toml(value))] for name, value in changed.items()]
    return [Table("Settings that differ from the defaults", ["setting", "value in TOML"], rows)]


def _layers(name: str, metrics: Record) -> list[Block]:
    found: list[Block] = []
    for key, fields in LAYERED.items():
        layers = metrics.get(key)
        if not isinstance(layers, list) or not all(isinstance(layer, dict) for layer in layers):
            continue
        for field in fields:
            values = [
                {"x": f"{layer.get('stack', '')} {layer.get('layer', i)}".strip(), "y": layer[field]}
                for i, layer in enumerate(layers)
                if figures.is_number(layer.get(field))
            ]
            if not values:
                continue
            title = "relative error of the layer's output" if field == "error" else field
            rows = [[cell(v["x"]), number(v["y"])] for v in values]
            largest = max(values, key=lambda v: v["y"])
            said = (
                f"{title} of {len(values)} layers of {name}; the largest is {plain(largest['y'])}, of {largest['x']}."
            )
            table = Table(f"{title} per layer", ["layer", title], rows)
            found.append(
                Plot(f"{cell(name).text}: {title}", plots.bars(values, "layer", title), said, table, width=520)
            )
    return found


def _evaluation(evaluation: Evaluation) -> Section:
    models = list(dict.fromkeys(r["artifact"] for r in evaluation.results))
    parts: list[Block] = [
        Paragraph(f"Measured: {cell(', '.join(models)).text}."),
        *_settings(evaluation.manifest.config),
    ]
    return Section(cell(evaluation.name if evaluation.name == "eval" else f"{evaluation.name} (eval)").text, parts)


def _unfinished(stage: Unfinished) -> Section:
    text = "This stage was interrupted or has failed, so it has no artifact. The same command continues or repeats it."
    last = stage.log[-1] if stage.log else {}
    values = {k: v for k, v in last.items() if figures.is_number(v) and k != "time"}
    parts: list[Block] = [Paragraph(text)]
    if values:
        rows = [[cell(json_tables.words(k)), json_tables.json_cell(v, k)] for k, v in values.items()]
        parts.append(Table("Last line of the log", ["value", "number"], rows))
    return Section(cell(f"{stage.name} (not finished)").text, parts)
