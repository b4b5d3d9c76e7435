"""Define a stage: a frozen config, a function that runs it, and a function that lists its compiled programs.

A stage is one module:

    class Config(StageConfig):
        kind: Literal["average"] = "average"

    def run(config: Config, parent: Path | None, ctx: Context) -> None:
        ...  # write the artifact to ctx.out, as ctx.leave does

    def programs(config: Config, base: Artifact | None, others: dict[str, Artifact], mesh: Mesh) -> Programs:
        ...  # optional: what `llmctl plan` compiles, and the artifact that the stage leaves

`base` is the parent and `others` are the artifacts that the config names, with abstract arrays on `mesh`. A stage
without `programs` is planned as one that compiles nothing and leaves arrays like its parent's.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, ClassVar, Literal, TypeVar

from pydantic import Field

from llmctl.config.base import Config
from llmctl.config.errors import RequestError
from llmctl.config.settings import MeshConfig
from llmctl.pipeline import registry

if TYPE_CHECKING:
    from types import ModuleType

    from llmctl.artifacts.artifact import Artifact
    from llmctl.model.program import Program

    Programs = tuple[list[Program], Artifact | None]
    """The programs of a stage, and the artifact that it leaves for later stages."""

T = TypeVar("T")


class StageConfig(Config):
    """What every stage has."""

    heading: ClassVar[str] = "What it does"
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


def required(config: StageConfig, parent: T | None) -> T:
    """Return what a stage starts from.

    Raises:
      RequestError: there is nothing.
    """
    if parent is None:
        raise RequestError(f"{config.kind}: nothing to start from; name an artifact with `from` (--from)")
    return parent


def kinds() -> list[str]:
    """Every stage's kind, from the file names."""
    return registry.stages()


def load(kind: str) -> ModuleType:
    """The stage's module: `Config` (a StageConfig) and `run`. Imports no JAX."""
    return importlib.import_module(f"llmctl.pipeline.stages.{kind}")
