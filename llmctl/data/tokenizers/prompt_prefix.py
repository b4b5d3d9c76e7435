"""Copy a tokenizer, and change the ids in front of every text (the virtual tokens of prompt tuning)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from llmctl.config import containment
from llmctl.data.tokenizers import loading
from llmctl.data.tokenizers.base import DESCRIPTOR
from llmctl.distributed import processes


def with_prefix(folder: Path, work: Path, prefix: Sequence[int]) -> Path:
    """Return the folder of a tokenizer that begins every text with the ids `prefix`.

    Args:
        folder: Folder of a tokenizer. If it already has this prefix, this folder is returned.
        work: Folder for a changed copy. An existing folder is replaced.
        prefix: Token ids; empty to remove the prefix.
    """
    if list(loading.load(folder).prefix) == [*prefix]:
        return folder
    with processes.process_0_first():
        if processes.first():
            shutil.rmtree(work, ignore_errors=True)
            containment.copy(folder, work)
            described = json.loads((work / DESCRIPTOR).read_text(encoding="utf-8"))
            described.pop("prefix", None)
            changed = described | ({"prefix": [*prefix]} if prefix else {})
            (work / DESCRIPTOR).write_text(f"{json.dumps(changed, indent=2)}\n", encoding="utf-8")
    return work
