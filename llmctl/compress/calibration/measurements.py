"""Save measurements of layers to disk, so that an interrupted run does not measure them again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from llmctl.distributed import processes

Arrays = dict[str, np.ndarray]


class Measurements:
    """Read measurements from files of a folder, or measure and write them.

    All processes call the methods; only process 0 writes. Without a folder, nothing is saved.

    >>> Measurements(None).get("errors", lambda: {"relative": np.array([0.25])})["relative"].tolist()
    [0.25]
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def get(self, name: str, measure: Callable[[], Arrays]) -> Arrays:
        """Return the arrays of the file `name`.

        If the file is missing or damaged, call `measure` and write the file.
        """
        if self.folder is None:
            return measure()
        file = self.folder / f"{name}.npz"
        try:
            with np.load(file, allow_pickle=False) as stored:
                found = dict(stored)
        except Exception:  # the zip format has a checksum of every entry, and a damaged file raises many types
            found = None
        if all(processes.gather(found is not None)) and found is not None:
            return found
        found = measure()
        if processes.first():
            self.folder.mkdir(parents=True, exist_ok=True)
            draft = file.with_suffix(".draft")
            with draft.open("wb") as f:
                np.savez(f, **found)  # pyright: ignore[reportArgumentType]
            draft.replace(file)
        return found
