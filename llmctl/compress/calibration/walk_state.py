"""Save the progress of a calibration walk that only measures, so that an interrupted run can resume.

The file contains the statistics of all finished layers, and the outputs of the last finished layer for every batch.
These outputs have examples x tokens x width elements. They are therefore written at most once per `SECONDS`, and each
file replaces the previous one. A resumed walk starts at the layer after the last saved layer. Its inputs equal those of
the uninterrupted walk, bit for bit.

    state = WalkState(measurements, "inputs")
    _, reports = walk(cfg, params, batches, moments, keep=True, state=state)
    ...  # save what the reports are needed for
    state.drop()
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from llmctl.compress.calibration.measurements import Measurements
from llmctl.distributed import host_arrays, processes
from llmctl.model import layerwise

if TYPE_CHECKING:
    from llmctl.compress.calibration.statistics import LayerStats

SECONDS = 60.0
"""Minimum time between two writes of the file, in seconds. An interruption loses at most the layers that were measured
in this time, and the layer that was being measured."""
ABOUT = "about"


class WalkState:
    """Write and read the progress of one measuring walk. All processes call the methods; only process 0 writes."""

    def __init__(self, saved: Measurements, name: str) -> None:
        """Read the file of an interrupted walk, if there is one.

        Args:
          saved: folder of the measurements.
          name: name of the walk.
        """
        self._saved, self._name = saved, f"{name}.walk"
        self._found = saved.find(self._name) or {}
        self._about = json.loads(self._found[ABOUT].tobytes()) if self._found else {"layers": []}
        self._stats: dict[str, LayerStats] = {}
        self._layers: list[list[Any]] = []
        self._written = time.monotonic()

    def resume(self, stack: str, carries: list[layerwise.Carry]) -> int:
        """Return the number of finished layers of a stack, and put the outputs of the last one into `carries`.

        If the decoder has finished layers, a call for the encoder does not change `carries`. The decoder then reads
        the final states of the encoder from `memories`.

        The batch sizes depend on the mesh. If the file was written with other batch sizes, the file is ignored. The
        result is then 0.
        """
        if self._about.get("rows") != _rows(carries):
            self._found, self._about = {}, {"layers": []}
        count = sum(name == stack for name, *_ in self._about["layers"])
        if count and self._about["layers"][-1][0] == stack:
            for n, carry in enumerate(carries):
                carries[n] = carry._replace(x_BTD=_like(self._found[f"output.{n}"], carry.x_BTD))
        return count

    def memories(self, computed: Sequence[jax.Array]) -> list[jax.Array]:
        """Return the final states of the encoder per batch: the stored states or, if none are stored, `computed`."""
        if "memory.0" not in self._found:
            return list(computed)
        return [_like(self._found[f"memory.{n}"], a) for n, a in enumerate(computed)]

    def layer(self, stack: str, index: int, like: LayerStats) -> tuple[LayerStats, float]:
        """Return (statistics, block influence) of a finished layer. The arrays are sharded as in `like`."""
        influence = next(value for name, i, value in self._about["layers"] if (name, i) == (stack, index))
        leaves, kind = jax.tree.flatten(like)
        named = (f"{stack}.{index}.{k}" for k in range(len(leaves)))
        found = [_like(self._found[name], leaf) for name, leaf in zip(named, leaves, strict=True)]
        return jax.tree.unflatten(kind, found), influence

    def add(
        self,
        stack: str,
        index: int,
        stats: LayerStats,
        influence: float,
        carries: Sequence[layerwise.Carry] = (),
        memories: Sequence[jax.Array | None] = (),
    ) -> None:
        """Add a finished layer. Write the file if `SECONDS` have passed since the last write.

        Args:
          stack: "encoder" or "decoder".
          index: index of the layer.
          stats: statistics of the layer.
          influence: block influence of the layer.
          carries: outputs of the layer, per batch. If there are none, nothing is written.
          memories: final states of the encoder, per batch, if the stack reads them.
        """
        if self._saved.folder is None:
            return
        self._layers.append([stack, index, influence])
        self._stats[f"{stack}.{index}"] = stats
        if not carries or not processes.broadcast(lambda: time.monotonic() - self._written >= SECONDS):
            return
        arrays = {f"output.{n}": _bytes(carry.x_BTD) for n, carry in enumerate(carries)}
        arrays |= {f"memory.{n}": _bytes(a) for n, a in enumerate(memories) if a is not None}
        for at, one in self._stats.items():
            arrays |= {f"{at}.{k}": _bytes(a) for k, a in enumerate(jax.tree.leaves(one))}
        about = np.frombuffer(json.dumps({"layers": self._layers, "rows": _rows(carries)}).encode(), np.uint8)
        self._saved.put(self._name, arrays | {ABOUT: about})
        self._written = time.monotonic()

    def drop(self) -> None:
        """Remove the file, because the results of the walk are saved."""
        self._saved.drop(self._name)


def _rows(carries: Sequence[layerwise.Carry]) -> list[int]:
    """Return the number of rows of each batch."""
    return [len(carry.x_BTD) for carry in carries]


def _bytes(a: jax.Array) -> np.ndarray:
    """Return the bytes of an array as uint8, because NumPy's file format has no bfloat16."""
    return np.frombuffer(host_arrays.read(a).tobytes(), np.uint8)


def _like(stored: np.ndarray, like: jax.Array) -> jax.Array:
    """Return stored bytes as an array with the shape, dtype and sharding of `like`."""
    return host_arrays.put(np.frombuffer(stored.tobytes(), like.dtype).reshape(like.shape), like.sharding)
