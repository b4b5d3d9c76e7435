"""Define the context of a running stage: its output folder, its temporary folder, and other artifacts that it reads.

A stage is one step of a recipe, such as pretrain, prune or distill. A stage saves a model as an artifact, which is a
folder.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmctl.config.base import keyed

if TYPE_CHECKING:
    from llmctl.model.config import ModelConfig


@dataclass(frozen=True)
class Context:
    """Store the folders, the key and the other artifacts that a running stage uses in addition to its config.

    Example:
      >>> ctx = Context(out=Path("runs/demo/base"), work=Path("runs/demo/.base"), key="3f2a")
      >>> checkpoints = ctx.work / "checkpoints"
      >>> ctx.siblings.get("teacher") is None
      True
    """

    out: Path
    """Final folder of the artifact, written atomically."""
    work: Path
    """Temporary folder of this stage (checkpoints, log). The folder is removed on success and kept after an
    interruption."""
    key: str
    """Key of the stage, a hash of everything that can change its result."""
    siblings: dict[str, Path] = field(default_factory=dict)
    """Folders of other artifacts that the config refers to, by name, such as the teacher of `distill`."""
    logs: Path | None = None
    """Folder for logs that remain after `work` is removed, such as TensorBoard's. By default the parent of `out`."""

    def save(self, config: Any, params: dict[str, Any], model: ModelConfig, **about: Any) -> None:
        """Save the stage's result as an artifact in the folder `out`.

        Args:
            config: Config of the stage.
            params: Parameter tree.
            model: Model config, which must define the shapes of the parameters.
            about: Further arguments of `llmctl.artifacts.saving.save`.
        """
        from llmctl.artifacts import artifact

        fields = {"stage": config.kind, "key": self.key, "config": keyed(config), "log": self.work / "log.jsonl"}
        artifact.save(self.out, params, model, **fields, **about, allow_nonfinite=config.allow_nonfinite)
