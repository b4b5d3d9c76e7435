"""List the models of a run, parents before children, each with the metrics that were measured on its weights."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from llmctl.artifacts import artifact
from llmctl.config.errors import RequestError
from llmctl.config.text_input import parse_json
from llmctl.evaluate.metrics.base import VALIDATION, Metric, columns, find
from llmctl.evaluate.report import YARDSTICK
from llmctl.pipeline.recipe import MANIFEST

if TYPE_CHECKING:
    from collections.abc import Iterable

RESULTS = "results.json"
"""Name of the file with the results of `eval`: a list of {artifact, digest, content, task, protocol, metrics}."""

SIZES = ("stage", "family", "parameters", "weight_bytes", "bytes", "sparsity", "bits")
"""Fields in a result of `eval` that describe the measured artifact. Results of earlier versions may lack them."""

COMPARISONS = "comparisons.json"
"""Name of the file with the differences between artifacts: a list of {artifact, against, task, metrics, ...}."""


def run(folder: Path) -> dict[str, Any]:
    """Return the models and reports in a run's folder.

    Returns:
      {"artifacts": [...], "reports": [...]}. Models are in lineage order: parents before children, older before newer.
      Each model has the metrics of its manifest and of every report that measured it. If an evaluation measured a
      yardstick, the result also has the key "yardsticks".

    Raises:
      RequestError: If the folder has no artifact, or an artifact is damaged.
    """
    # Names that begin with a dot are drafts of killed processes.
    there = [p for p in folder.glob(f"*/{MANIFEST}") if not p.parent.name.startswith(".")]
    found = sorted(there, key=lambda p: (p.stat().st_mtime_ns, p.parent.name))
    if not found:
        raise RequestError(f"{folder}: neither an artifact nor a run: there is no {MANIFEST} in it or one below")
    manifests = [(p.parent, artifact.read_manifest(p.parent)) for p in found]
    reports = [r for path, _ in manifests for r in results(path)]
    models = [entry(m, reports) for _, m in manifests if m.weights]
    yardsticks = [
        {"name": r["artifact"], **{k: r[k] for k in (*SIZES, "digest", "content", "metrics")}, "parent": None}
        for r in {r["content"]: r for r in reports if r.get("stage") == YARDSTICK}.values()
    ]
    return {"artifacts": _lineage(models), "reports": reports} | ({"yardsticks": yardsticks} if yardsticks else {})


def one(folder: Path) -> dict[str, Any]:
    """Return the summary of an artifact: the fields that `run` gives for each artifact, and the rest of its manifest.

    Metrics are also read from the `eval` artifacts beside the folder. Damaged artifacts and other folders are ignored.

    Raises:
      RequestError: If the folder is not an artifact, or is damaged.
    """
    manifest = artifact.read_manifest(folder)
    beside = results(folder)
    for file in sorted(folder.parent.glob(f"*/{RESULTS}")):
        if (file.parent / MANIFEST).is_file() and file.parent.resolve() != folder.resolve():
            with contextlib.suppress(RequestError):  # a finished stage must not fail because of its neighbors
                beside += results(file.parent)
    return {**json.loads(manifest.model_dump_json()), **entry(manifest, beside)}


def results(folder: Path) -> list[dict[str, Any]]:
    """Return the results that `eval` wrote into its artifact, or an empty list if there are none.

    Fields that only the tables of `eval` need are omitted.

    Raises:
      RequestError: If the file is damaged.
    """
    names = ("artifact", "digest", "task", "protocol", "metrics", "content", *SIZES)
    return [{k: r[k] for k in names if k in r} for r in complete_results(folder)]


def complete_results(folder: Path) -> list[dict[str, Any]]:
    """Return the results that `eval` wrote into its artifact, with all fields; an empty list if there are none.

    Raises:
      RequestError: If the file is damaged.
    """
    file = folder / RESULTS
    if not file.exists():
        return []
    try:
        found = parse_json(file.read_bytes())
        if odd := next((r for r in found if not isinstance(r["metrics"], dict)), None):
            raise ValueError(f"the metrics of {str(odd['artifact'])[:40]!r} are no object")
        for result in found:
            needed = ("artifact", "digest", "task", "protocol")
            if odd := [key for key in needed if not isinstance(result[key], str)]:
                raise ValueError(f"{odd[0]} is no text")
            if result.get("stage") == YARDSTICK and (lost := [key for key in ("content", *SIZES) if key not in result]):
                raise ValueError(f"a yardstick has no {lost[0]}")
        return found
    except (ValueError, KeyError, TypeError) as e:
        raise RequestError(f"{file}: damaged ({e}); run eval again") from None


def comparisons(folder: Path) -> list[dict[str, Any]]:
    """Return the comparisons that `eval` wrote into its artifact; an empty list if there are none.

    Raises:
      RequestError: If the file is damaged.
    """
    file = folder / COMPARISONS
    if not file.exists():
        return []
    try:
        needed = ("artifact", "against", "task", "examples", "resamples", "seed", "metrics")
        found = [{k: one[k] for k in needed} for one in parse_json(file.read_bytes())]
        numbers = ("value", "against", "difference", "difference_low", "difference_high", "p_value")
        for one in found:
            texts = [one["artifact"], one["against"], one["task"], *(m["test"] for m in one["metrics"].values())]
            values = [m[name] for m in one["metrics"].values() for name in numbers] + [
                one["examples"],
                one["resamples"],
            ]
            if not all(isinstance(text, str) for text in texts):
                raise ValueError("a name is no text")
            if not all(isinstance(value, (int, float)) for value in values):
                raise ValueError("a difference is no number")
        return found
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise RequestError(f"{file}: damaged ({e}); run eval again") from None


def reports(folder: Path) -> list[Path]:
    """Return the paths of the tables and plots that the `eval` stages of a run wrote."""
    return sorted(f for r in folder.glob(f"*/{RESULTS}") for f in r.parent.iterdir() if f.suffix in (".md", ".png"))


def entry(manifest: artifact.Manifest, reports: Iterable[dict[str, Any]] = ()) -> dict[str, Any]:
    """Return an artifact's record: its sizes and metrics, and the metrics of all `reports` about the same weights.

    If several tasks have a metric of the same name, only the first task in `reports` keeps this name. In the other
    tasks, the metric is named `task/metric`.
    """
    metrics, owner = dict(manifest.metrics), dict.fromkeys(manifest.metrics, "")
    for report in reports:
        if not _scored(report, manifest):
            continue
        for name, value in report["metrics"].items():
            taken = owner.get(name, "") not in ("", report["task"])
            metrics[f"{report['task']}/{name}" if taken else name] = value
            if not taken:
                owner[name] = report["task"]
    parent = manifest.parent
    return {
        "name": manifest.name,
        "stage": manifest.stage,
        "family": manifest.family,
        "parameters": manifest.parameters,
        "bytes": manifest.bytes,
        "weight_bytes": manifest.weight_bytes,
        "sparsity": manifest.sparsity,
        "bits": manifest.bits,
        "digest": manifest.digest,
        "content": manifest.content,
        "parent": parent.model_dump() if parent else None,
        "metrics": metrics,
    }


def _scored(report: dict[str, Any], manifest: artifact.Manifest) -> bool:
    """Return whether a report of `eval` measured the weights of the artifact with this manifest.

    The content digests of report and artifact are compared. Earlier versions of llmctl wrote reports and artifacts
    without content digests. For such files, the digests of the arrays are compared instead.
    """
    if report.get("content") and manifest.content:
        return report["content"] == manifest.content
    return report["digest"] == manifest.digest


def run_table(found: dict[str, Any], title: str) -> Table:
    """Format the result of `run` as a table of models. Yardsticks are the last rows."""
    return table([*found["artifacts"], *found.get("yardsticks", [])], title)


def table(entries: list[dict[str, Any]], title: str) -> Table:
    """Return the table that `llmctl run` prints at its end: one row per artifact, one column per measured metric.

    If no `eval` has measured the run, the columns are the validation metrics of training.
    """
    shown = table_metrics({name for e in entries for name, value in e["metrics"].items() if value is not None})
    out = Table(title=title, title_justify="left", header_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for column in ("artifact", "stage", "from"):
        out.add_column(column, overflow="fold")
    for column in ("parameters", "weights", "on disk", "sparsity", "bits", *(m.title for m in shown)):
        out.add_column(column, justify="right", overflow="fold")
    for e in entries:
        fixed = (e["name"], e["stage"], e["parent"]["name"] if e["parent"] else "")
        sizes = size(e["weight_bytes"]), size(e["bytes"])
        figures = (f"{e['parameters']:,}", *sizes, f"{e['sparsity']:.0%}", f"{e['bits']:.3g}")
        values = ((m, e["metrics"].get(m.name)) for m in shown)
        out.add_row(*fixed, *figures, *(m.text(v) if isinstance(v, (int, float)) else "" for m, v in values))
    return out


def table_metrics(there: set[str]) -> list[Metric]:
    """Return the metrics that become columns of the table of artifacts, chosen from the names in `there`.

    If no quality metric of `eval` is among the names, validation metrics of training are included.
    """
    measured = columns(there, "run")
    if any(m.aspect == "quality" for m in measured):
        return measured
    validated = columns({n.removeprefix(VALIDATION) for n in there if n.startswith(VALIDATION)}, "run")
    return [m for v in validated if (m := find(VALIDATION + v.name))] + measured


def size(count: float) -> str:
    """Format a number of bytes with a unit: 812 B, 3.4 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _lineage(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the records sorted so that every parent precedes its children, and otherwise from old to new."""
    out: list[dict[str, Any]] = []
    waiting = list(entries)
    while waiting:
        missing = {e["name"] for e in waiting}
        ready = next(
            (e for e in waiting if not e["parent"] or e["parent"]["name"] not in missing - {e["name"]}), waiting[0]
        )
        waiting.remove(ready)
        out.append(ready)
    return out
