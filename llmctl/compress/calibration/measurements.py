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
        found = self.find(name)
        if found is None:
            found = measure()
            self.put(name, found)
        return found

    def find(self, name: str) -> Arrays | None:
        """Return the arrays of the file `name`, or None if the file is missing or damaged."""
        if self.folder is None:
            return None
        try:
            with np.load(self.folder / f"{name}.npz", allow_pickle=False) as stored:
                found = dict(stored)
        except Exception:  # the zip format has a checksum of every entry, and a damaged file raises many types
            found = None
        return found if all(processes.gather(found is not None)) else None

    def put(self, name: str, arrays: Arrays) -> None:
        """Write the file `name`. The file appears only when it is complete."""
        if self.folder is None or not processes.first():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        draft = self.folder / f"{name}.draft"
        with draft.open("wb") as f:
            np.savez(f, **arrays)  # pyright: ignore[reportArgumentType]
        draft.replace(self.folder / f"{name}.npz")

    def drop(self, name: str) -> None:
        """Remove the file `name`, if it exists."""
        if self.folder is not None and processes.first():
            (self.folder / f"{name}.npz").unlink(missing_ok=True)
