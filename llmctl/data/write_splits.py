"""Write the train, validation and test splits as JSON lines, after filtering and deduplication."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from llmctl.config.errors import RequestError
from llmctl.data import splits
from llmctl.data.config import DataConfig
from llmctl.data.source import Row
from llmctl.distributed import locks


def write(cfg: DataConfig, folder: Path) -> tuple[dict[str, tuple[Path, int]], splits.Splits]:
    """Write `train.jsonl`, `validation.jsonl` and `test.jsonl` with llmctl's own column names (such as text and label)
    and class names.

    To read the same splits again, set `data.path = "train.jsonl"`, `data.validation_path` and `data.test_path`.

    Returns:
        {split: (file, number of rows)}, and the splits. A split without rows has an empty file.

    Raises:
        RequestError: If the data is invalid, or if the folder contains files.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RequestError(f"{folder}: is there already, with something in it; choose another folder")
    loaded = splits.load(cfg)
    draft = locks.scratch(folder, "draft")
    with locks.claim(folder):
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        try:
            for split, examples in loaded.examples.items():
                with (draft / f"{split}.jsonl").open("w", encoding="utf-8") as file:
                    for row in examples:
                        line = json.dumps(_plain(row, examples.classes), ensure_ascii=False, allow_nan=False)
                        file.write(line + "\n")
            if folder.exists():
                folder.rmdir()
            draft.rename(folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    files = {split: (folder / f"{split}.jsonl", len(examples)) for split, examples in loaded.examples.items()}
    return files, loaded


def _plain(row: Row, classes: tuple[str, ...]) -> dict[str, Any]:
    """Convert a row of `Examples` to the format of data files: class names as labels, and answers in SQuAD's format."""
    out = dict(row)
    label = out.get("label")
    if isinstance(label, list):
        out["label"] = [name for name, member in zip(classes, label, strict=True) if member]
    elif label is not None and classes:
        out["label"] = classes[label]
    if "answers" in out:
        out["answers"] = {"text": [t for t, _ in out["answers"]], "answer_start": [s for _, s in out["answers"]]}
    return out
