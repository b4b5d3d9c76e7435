"""Run a calibration walk that only measures, and save the measurements, so that an interrupted run can resume.

The measurements are saved when the walk ends. Until then, `llmctl.compress.calibration.walk_state` saves its progress.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from llmctl.compress.calibration.calibrate import Batch, LayerReport, walk
from llmctl.compress.calibration.measurements import Arrays, Measurements
from llmctl.compress.calibration.statistics import Collect
from llmctl.compress.calibration.walk_state import WalkState
from llmctl.model.config import ModelConfig

Progress = Callable[[LayerReport], None] | None
UNSAVED = Measurements(None)

_INFLUENCE = "influence:"


def measure(
    name: str,
    saved: Measurements,
    cfg: ModelConfig,
    params: dict[str, Any],
    batches: Sequence[Batch],
    collect: Collect,
    reduce: Callable[[list[LayerReport]], Arrays],
    *,
    head: bool = False,
    progress: Progress = None,
    dtype: Any = jnp.float32,
) -> tuple[Arrays, dict[str, list[float]]]:
    """Return the arrays that `reduce` computes from a walk's reports, and the block influence of the layers by stack.

    If an interrupted run saved both results, the walk does not run. `progress` is then called with the saved influence,
    so that the log has the same lines.

    Args:
      name: name of the measurements in `saved`.
      saved: measurements of an interrupted run.
      cfg: config of the model.
      params: parameters of the model. They do not change.
      batches: calibration batches.
      collect: function that selects the statistics (see `Collect`).
      reduce: function from the reports, with statistics, to the arrays that are saved.
      head: whether to visit the output head too.
      progress: function that is called with the report of each layer.
      dtype: dtype of the computation.
    """
    runs: list[bool] = []
    state = WalkState(saved, name)

    def measured() -> Arrays:
        runs.append(True)
        _, reports = walk(
            cfg, params, batches, collect, head=head, keep=True, progress=progress, state=state, dtype=dtype
        )
        stacks = dict.fromkeys(r.stack for r in reports)
        influence = {f"{_INFLUENCE}{s}": np.array([r.influence for r in reports if r.stack == s]) for s in stacks}
        return reduce(reports) | influence

    found = saved.get(name, measured)
    state.drop()
    influence = {k.removeprefix(_INFLUENCE): v.tolist() for k, v in found.items() if k.startswith(_INFLUENCE)}
    if progress is not None and not runs:
        for stack, values in influence.items():
            for i, value in enumerate(values):
                progress(LayerReport(stack, i, value, 0.0, {}))
    return {k: v for k, v in found.items() if not k.startswith(_INFLUENCE)}, influence


def measure_once(saved: Measurements, name: str, compute: Callable[[], float]) -> float:
    """Return a number that an interrupted run saved. If no number was saved, call `compute` and save the result."""
    return float(saved.get(name, lambda: {"value": np.array(compute(), np.float64)})["value"])
