"""Run a training command with several seeds, report the mean and deviation of its metrics, and keep the best result.

The command runs once per seed, each time in another folder. The result of a seed is therefore bit-identical to the
result of a run with this seed alone. After an interruption, finished seeds are not trained again, and the interrupted
seed continues from its last checkpoint. Only the best result so far is kept.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmctl.artifacts import saving
from llmctl.artifacts.manifest import Manifest
from llmctl.artifacts.manifest_file import read_manifest
from llmctl.artifacts.workspace import Context
from llmctl.config.base import keyed
from llmctl.distributed import processes
from llmctl.train.best_parameters import is_minimized

if TYPE_CHECKING:
    from rich.table import Table

FINISHED = "seeds.json"
"""Name of the file with the metrics of each finished seed. The file is in the run's temporary folder."""
PREFIX = "validation_"
"""Prefix of the names of metrics that were computed on validation data."""

Figures = dict[str, dict[str, Any]]
"""Metrics of each finished seed: seed -> name of the metric -> value. The seed is a str, because JSON has no other
keys.
"""


def run(
    config: Any, ctx: Context, once: Callable[[Any, Context], None], metric: Callable[[Manifest], str]
) -> dict[str, Any]:
    """Run a training command once per seed, and copy the result with the best validation metric to `ctx.out`.

    Args:
      config: config of the command. The seeds are the `config.seeds` integers from `config.seed` on.
      ctx: output folder and temporary folder of the command.
      once: function (config with one seed, its folders) that trains and saves one model.
      metric: function from the manifest of an artifact to the name of the metric that selects the best result.

    Returns:
      The summary of the metrics, as `summary` returns it. The copied result contains the summary as the metric "seeds".
    """
    found = processes.broadcast(lambda: _read(ctx.work / FINISHED))
    by, finished = found["by"], found["metrics"]
    for seed in range(config.seed, config.seed + config.seeds):
        out, work = folder(ctx, seed), ctx.work / f"training-{seed}"
        if str(seed) not in finished:
            if not processes.broadcast((out / "manifest.json").exists):  # it exists after a kill before the next lines
                processes.broadcast(lambda work=work: work.mkdir(exist_ok=True))
                own = config.model_copy(update={"seed": seed, "seeds": 1, "name": f"{config.title}-seed-{seed}"})
                once(own, Context(out, work, ctx.key, ctx.siblings, logs=ctx.out.parent))
            manifest = read_manifest(out)
            by, finished = by or metric(manifest), finished | {str(seed): with_nan(manifest.metrics)}
        processes.broadcast(partial(_keep_best, ctx, by, finished))
    best = best_of(finished, by)
    made = summary(finished, by)
    saving.copy(
        folder(ctx, best), ctx.out, key=ctx.key, config=keyed(config), metrics={**finished[str(best)], "seeds": made}
    )
    return made


def with_nan(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metrics of an artifact with NaN in place of validation metrics that are None.

    JSON has no NaN, so manifests store null for metrics that were not finite.
    """
    return {n: math.nan if v is None and n.startswith(PREFIX) else v for n, v in metrics.items()}


def folder(ctx: Context, seed: int) -> Path:
    """Return the folder that contains the result of a seed."""
    return ctx.work / f"seed-{seed}"


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.exists() else {"by": "", "metrics": {}}


def _keep_best(ctx: Context, by: str, finished: Figures) -> None:
    """Write the metrics of the finished seeds to disk, and remove the folders of all seeds except the best."""
    draft = ctx.work / f"{FINISHED}.draft"
    draft.write_text(json.dumps({"by": by, "metrics": finished}))
    draft.replace(ctx.work / FINISHED)
    for seed in map(int, finished):
        shutil.rmtree(ctx.work / f"training-{seed}", ignore_errors=True)
        if seed != best_of(finished, by):
            shutil.rmtree(folder(ctx, seed), ignore_errors=True)


def best_of(finished: Figures, by: str) -> int:
    """Return the seed with the best validation metric `by`. If several seeds are equally good, return the lowest.

    >>> best_of({"4": {"validation_loss": 2.0}, "5": {"validation_loss": 1.0}, "6": {"validation_loss": 1.0}}, "loss")
    5
    """
    sign = 1 if is_minimized(by) else -1

    def rank(seed: int) -> tuple[bool, float, int]:
        value = float(finished[str(seed)][PREFIX + by])
        return (not math.isfinite(value), sign * value, seed)

    return min(map(int, finished), key=rank)


def summary(finished: Figures, by: str) -> dict[str, Any]:
    """Return the mean, the sample standard deviation and the values of each validation metric over the seeds.

    >>> found = summary({"0": {"validation_loss": 1.0}, "1": {"validation_loss": 2.0}}, "loss")
    >>> found["best"], found["by"], found["seeds"], found["metrics"]["validation_loss"]["values"]
    (0, 'loss', [0, 1], [1.0, 2.0])
    >>> found["metrics"]["validation_loss"]["mean"], round(found["metrics"]["validation_loss"]["deviation"], 4)
    (1.5, 0.7071)
    """
    seeds = sorted(map(int, finished))
    names = [n for n, v in finished[str(seeds[0])].items() if n.startswith(PREFIX) and isinstance(v, (int, float))]
    values = {n: [float(finished[str(s)][n]) for s in seeds] for n in names}
    return {
        "best": best_of(finished, by),
        "by": by,
        "seeds": seeds,
        "metrics": {
            n: {"mean": float(np.mean(v)), "deviation": float(np.std(v, ddof=1)), "values": v}
            for n, v in values.items()
        },
    }


def table(found: Mapping[str, Any]) -> Table:
    """Return the summary of several seeds (see `summary`) as a table with one row per metric."""
    from rich.table import Table

    made = Table(title=f"{len(found['seeds'])} seeds; the best by {found['by']} is seed {found['best']}")
    for heading in ("metric", "mean ± deviation", *(f"seed {seed}" for seed in found["seeds"])):
        made.add_column(heading, justify="left" if heading == "metric" else "right")
    for name, one in found["metrics"].items():
        each = (f"{value:.4g}" for value in one["values"])
        made.add_row(name.removeprefix(PREFIX), f"{one['mean']:.4g} ± {one['deviation']:.2g}", *each)
    return made
