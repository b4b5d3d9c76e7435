"""Workspace of a running stage: its output folder, its scratch folder, and the artifacts it may read."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmctl.config.base import keyed

if TYPE_CHECKING:
    from llmctl.model.config import ModelConfig


@dataclass(frozen=True)
class Context:
    """What a stage is told besides its config."""

    out: Path
    """The artifact's final folder; appears whole or not at all."""
    work: Path
    """Scratch folder of this stage (checkpoints, log); survives an interruption, removed on success."""
    key: str
    """Content key: equal keys mean equal results."""
    siblings: dict[str, Path] = field(default_factory=dict)
    """Artifacts of the same run by name, in order (what `eval` measures, what `distill` calls its teacher)."""

    def leave(self, config: Any, params: dict[str, Any], model: ModelConfig, **about: Any) -> None:
        """Writes what the stage made as the artifact `out`; `about` as for `llmctl.artifacts.artifact.save`."""
        from llmctl.artifacts import artifact

        said = {"stage": config.kind, "key": self.key, "config": keyed(config), "log": self.work / "log.jsonl"}
        artifact.save(self.out, params, model, **said, **about)
