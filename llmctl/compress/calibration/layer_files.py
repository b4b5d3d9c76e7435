"""Save each layer to disk as soon as it is compressed, so that an interrupted run can resume.

Each layer is one file with the changed layer and its report. The file is written under another name and then renamed.
The file does not contain the batches' residual streams, which can be recomputed from the changed layers. A
residual stream has examples x tokens x width elements, and would be written again for every layer. For a model of 7B
and 128 sequences of 2,048 tokens in float32, this would be 4.3 GB per layer. The layer itself has 0.4 to 0.8 GB.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from llmctl.compress.calibration.layer_stack import sharding
from llmctl.distributed import host_arrays, processes
from llmctl.model import weights

Layer = dict[str, Any]

ABOUT = "about"
"""Name of the entry in a layer's file that holds JSON data: the type of every weight, and the layer's report."""


class Saved:
    """Write and read finished layers in a folder. All processes call the methods; only process 0 writes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, stack: str, index: int, layer: Layer, report: dict[str, Any]) -> None:
        """Save one changed layer and its report (JSON data). The file appears only when it is complete."""
        flat = weights.flatten(layer)
        records = {path: weights.describe(w) for path, w in flat.items()}
        arrays = {name: host_arrays.read(a) for name, a in weights.arrays(layer).items()}
        if not processes.first():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self._file(stack, index)
        draft = file.with_suffix(".draft")
        with draft.open("wb") as f:
            # Bytes, as NumPy's format has no bfloat16 and no int4.
            values: dict[str, Any] = {name: np.frombuffer(a.tobytes(), np.uint8) for name, a in arrays.items()}
            about = json.dumps({"weights": records, "report": report}).encode()
            values[ABOUT] = np.frombuffer(about, np.uint8)
            np.savez(f, **values)
        draft.replace(file)

    def read(self, stack: str, index: int, like: Layer) -> tuple[Layer, dict[str, Any]] | None:
        """Return a finished layer and its report; None if the file is missing or damaged.

        The arrays are sharded like the arrays of `like`, the unchanged layer.
        """
        file = self._file(stack, index)
        if not processes.broadcast(file.is_file):
            return None
        try:
            found = _content(file)
        except Exception:  # the zip format has a checksum of every entry, and a damaged file raises many types
            found = None
        whole = all(processes.gather(found is not None))
        if found is None or not whole:
            return None
        about, arrays = found
        old, flat = weights.flatten(like), {}
        for path, record in about["weights"].items():
            shapes = {part: tuple(shape) for part, (_, shape) in record["parts"].items()}
            parts = {
                part: host_arrays.put(arrays[weights.join(path, part)], sharding(shape, old[path]))
                for part, shape in shapes.items()
            }
            flat[path] = weights.assemble(record, parts)
        return weights.unflatten(flat), about["report"]

    def _file(self, stack: str, index: int) -> Path:
        return self.folder / f"{stack}.{index:05d}.npz"


def _content(file: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return (JSON content, arrays by name) of a saved layer's file."""
    arrays = {}
    with np.load(file, allow_pickle=False) as stored:
        about = json.loads(stored[ABOUT].tobytes())
        for path, record in about["weights"].items():
            for part, (dtype, shape) in record["parts"].items():
                name = weights.join(path, part)
                arrays[name] = np.frombuffer(stored[name].tobytes(), jnp.dtype(dtype)).reshape(shape)
    return about, arrays
