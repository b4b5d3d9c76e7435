"""What a stage is: a frozen config and one function `run(config, parent, ctx)`, one file a stage.

It leaves its artifact in `ctx.out`.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from llmctl import menu
from llmctl.config import Config, keyed
from llmctl.settings import MeshConfig

if TYPE_CHECKING:
    from types import ModuleType

    from llmctl.model import ModelConfig


class StageConfig(Config):
    """What every stage has."""

    unkeyed: ClassVar[frozenset[str]] = frozenset({"name", "parent", "mesh", "platform"})
    unshared: ClassVar[frozenset[str]] = frozenset({"kind", "name", "parent"})
    """Fields that a recipe's shared settings never reach, because each stage must mean its own."""
    starts: ClassVar[bool] = False
    """Starts from nothing unless `from` is given (pretrain)."""
    produces: ClassVar[bool] = True
    """Leaves a model that later stages start from by default (eval does not)."""
    artifact_fields: ClassVar[tuple[str, ...]] = ()
    """Fields that name further artifacts (a str, or a list of them: empty means every one before). They come in
    `Context.siblings` under those names, and their keys are part of this stage's key."""

    kind: str
    """Which stage this is; the name of its file in `llmctl/stages`."""
    name: str = ""
    """Name of the artifact, and its folder in the run; the kind by default."""
    parent: str = Field(default="", alias="from")
    """The artifact to start from: a stage's name in a recipe, a folder elsewhere; the stage before by default."""
    seed: int = Field(default=0, ge=-(2**63), lt=2**63)
    """Seed of everything random."""
    platform: Literal["", "cpu", "gpu", "tpu"] = ""
    """The platform this must run on; its absence is an error. Empty takes what JAX finds."""
    mesh: MeshConfig = MeshConfig()
    """How the devices are laid out."""

    @property
    def title(self) -> str:
        """What lines for people call this stage."""
        return self.name or self.kind


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

    def leave(self, config: StageConfig, params: dict[str, Any], model: ModelConfig, **about: Any) -> None:
        """Writes what the stage made as the artifact `out`; `about` as for `llmctl.artifact.save`."""
        from llmctl import artifact

        said = {"stage": config.kind, "key": self.key, "config": keyed(config), "log": self.work / "log.jsonl"}
        artifact.save(self.out, params, model, **said, **about)


def kinds() -> list[str]:
    """Every stage's kind, from the file names."""
    return menu.stages()


def load(kind: str) -> ModuleType:
    """The stage's module: `Config` (a StageConfig) and `run`. Imports no JAX."""
    return importlib.import_module(f"llmctl.stages.{kind}")
