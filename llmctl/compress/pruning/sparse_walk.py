"""Prune single weights of an artifact. If the method reads data, prune layer by layer as the data passes through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh

from llmctl.artifacts.artifact import Artifact
from llmctl.compress.calibration import calibration_data, gradients
from llmctl.compress.calibration.calibrate import LayerReport, Visit, walk
from llmctl.compress.calibration.layer_files import Saved
from llmctl.compress.calibration.measurements import Measurements
from llmctl.compress.calibration.settings import CalibrationConfig
from llmctl.compress.pruning import allocation, global_threshold, prune, prune_report
from llmctl.compress.pruning.sparse_method import SparseMethod
from llmctl.config.errors import RequestError
from llmctl.evaluate.tasks.registry import of

Params = dict[str, Any]


def prune_weights(
    config: CalibrationConfig,
    base: Artifact,
    params: Params,
    method: SparseMethod,
    mesh: Mesh,
    *,
    seed: int,
    saved: Saved,
    progress: Callable[[LayerReport], None],
) -> tuple[Params, list[dict[str, Any]]]:
    """Return the pruned parameters, and data about each layer (`llmctl.compress.pruning.prune_report.records`).

    If the method needs calibration data, the layers are pruned one by one. Finished layers are saved, so that an
    interrupted run can resume. The measurements that determine the sparsity of each layer are saved too.

    Args:
      config: calibration settings.
      base: artifact that is compressed.
      params: parameters of the model, with merged adapters. The parameters of the layers are donated.
      method: the pruning method.
      mesh: the devices.
      seed: seed of the random keys.
      saved: folder of finished layers and of measurements.
      progress: function that is called with the report of each layer that was measured or pruned.

    Raises:
      RequestError: If the method does not fit the matrices. If the model already has this sparsity. If the calibration
        data cannot be read.
    """
    pattern = method.pattern
    prune.check(params, method)
    before = prune.sparsity(params, pattern)
    if not pattern.of and before >= pattern.sparsity:
        what = "blocks of zeros" if pattern.blocks else "zeros"
        raise RequestError(
            f"{base.path}: its matrices are {before:.1%} {what} already; sparsity {pattern.sparsity} changes nothing"
        )
    compete = method.allocation.name == "global"
    counts: allocation.Counts | None = None
    if not method.calibrated:
        if compete:
            counts = global_threshold.counts(lambda: prune.scored(params, method, seed=seed), pattern.sparsity)
        params = prune.prune_uncalibrated(params, method=method.name, pattern=pattern, seed=seed, counts=counts)
        return params, prune_report.counted(params)
    model, dtype = base.model, config.dtype
    batches = calibration_data.load(config, base, mesh, labels=bool(method.gradients))
    sums = None
    if method.gradients:
        sums = gradients.accumulate(of(base.manifest), model, params, batches, method.gradients, dtype)
    if compete:
        counts = global_threshold.counts(lambda: prune.scored(params, method, sums, seed), pattern.sparsity)
    elif not method.allocation.uniform:
        counts = allocation.allocate(
            model, params, batches, method, gradients=sums, seed=seed, progress=progress, dtype=dtype,
            saved=Measurements(saved.folder),
        )  # fmt: skip

    def change(visit: Visit) -> Params:
        at = (seed, visit.stack, visit.index)
        own = counts[visit.stack, visit.index] if counts else None
        layer, visit.notes["matrices"] = prune.prune_layer(
            visit.layer, visit.stats, visit.gradients, method=method, at=at, counts=own
        )
        return layer

    params, reports = walk(
        model, params, batches, prune.collector(method), change,
        gradients=sums, progress=progress, saved=saved, dtype=dtype,
    )  # fmt: skip
    return params, prune_report.records(reports)
