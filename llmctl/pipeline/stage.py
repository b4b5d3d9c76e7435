"""What a stage is: a frozen config and one function `run(config, parent, ctx)`, one file a stage.

It leaves its artifact in `ctx.out`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from llmctl.config.base import Config
from llmctl.config.settings import MeshConfig
from llmctl.pipeline import registry

if TYPE_CHECKING:
    from types import ModuleType


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


def kinds() -> list[str]:
    """Every stage's kind, from the file names."""
    return registry.stages()


def load(kind: str) -> ModuleType:
    """The stage's module: `Config` (a StageConfig) and `run`. Imports no JAX."""
    return importlib.import_module(f"llmctl.pipeline.stages.{kind}")
