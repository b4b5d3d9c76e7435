"""Define a stage: a frozen config, a function that runs it, and a function that returns its compiled programs.

A stage is one module:

    class Config(StageConfig):
        kind: Literal["average"] = "average"

    def run(config: Config, parent: Path | None, ctx: Context) -> None:
        ...  # write the artifact to ctx.out, as ctx.save does

    def programs(config: Config, base: Artifact | None, others: dict[str, Artifact], mesh: Mesh) -> Programs:
        ...  # optional: the programs that `llmctl plan` compiles, and the artifact of the stage

`base` is the parent and `others` are the artifacts that the config names, with abstract arrays on `mesh`. If a stage
has no `programs`, a plan assumes that the stage compiles nothing. The plan also assumes that the stage's artifact has
the parent's shapes.
"""

from __future__ import annotations

import importlib
from pathlib import Path
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
    """Programs of a stage, and the artifact that the stage writes for later stages."""

T = TypeVar("T")


class StageConfig(Config):
    """Define the settings that every stage has."""

    heading: ClassVar[str] = "What it does"
    unkeyed: ClassVar[frozenset[str]] = frozenset(
        {"name", "parent", "base", "mesh", "platform", "allow_nonfinite", "replace"}
    )
    unshared: ClassVar[frozenset[str]] = frozenset({"kind", "name", "parent", "base"})
    """Fields that a recipe cannot set among its shared settings, because each stage needs its own value."""
    starts: ClassVar[bool] = False
    """Whether the stage has a parent only if `from` is given. This is true for pretrain."""
    produces: ClassVar[bool] = True
    """Whether the stage writes a model. By default, the next stage then starts from this model. `eval` writes
    no model."""
    artifact_fields: ClassVar[tuple[str, ...]] = ()
    """Names of the fields that name further artifacts. The fields have the type str or list[str]. An empty list means
    all earlier models, and None names no artifact. `run` finds the artifacts in `Context.siblings`. If such an
    artifact changes, the stage runs again."""

    keyed_artifact_fields: ClassVar[tuple[str, ...]] = ()
    """Names of the fields among `artifact_fields` whose value is part of the stage's key. Such a field selects an
    artifact for a special role, such as `against` of `eval`. The keys of the artifacts themselves are always part of
    the stage's key."""

    kind: str
    """Kind of the stage: the name of its file in `llmctl/pipeline/stages`."""
    name: str = ""
    """Name of the artifact and of its folder in the run; the kind by default."""
    parent: str = Field(default="", alias="from")
    """Artifact to start from: the name of an earlier stage, or a folder. Default: the previous stage."""
    base: str = ""
    """Folder of the base, if the stage starts from an adapter. By default, the base is next to the adapter. The base's
    digest is checked.
    """
    seed: int = Field(default=0, ge=-(2**63), lt=2**63)
    """Seed of all random numbers."""
    platform: Literal["", "cpu", "gpu", "tpu"] = ""
    """Platform that the stage requires; empty uses the platform that JAX finds."""
    allow_nonfinite: bool = False
    """Save weights that contain NaN or infinity. By default the stage fails and names the array."""
    replace: bool = False
    """Replace the artifact at --out even if another kind of stage wrote it, or if the folder contains other files."""
    mesh: MeshConfig = MeshConfig()
    """Number of devices per mesh axis."""

    @property
    def reads_data(self) -> bool:
        """Return whether the stage reads the data that its setting `data` describes. By default, the result is True.

        Callers look for the setting `data` first, so the result has no effect for stages without this setting.
        """
        return True

    @property
    def makes_model(self) -> bool:
        """Return whether the stage makes a model without a parent.

        The model is made from the settings, and from artifacts that the settings name.
        """
        return False

    @property
    def title(self) -> str:
        """Return the name of this stage for messages: its name, or its kind if the name is empty."""
        return self.name or self.kind

    @property
    def bases(self) -> tuple[Path, ...]:
        """Return the folder that the setting `base` names, as a tuple. If the setting is empty, return (). The base of
        an adapter is then searched in the folders next to the adapter."""
        return (Path(self.base),) if self.base else ()


def required(config: StageConfig, parent: T | None) -> T:
    """Return the parent of a stage that requires a parent.

    Raises:
      RequestError: If the stage has no parent.
    """
    if parent is None:
        raise RequestError(f"{config.kind}: nothing to start from; name an artifact with `from` (--from)")
    return parent


def kinds() -> list[str]:
    """Return the kinds of all stages, from the file names."""
    return registry.stages()


def load(kind: str) -> ModuleType:
    """Import and return a stage's module, which defines `Config` (a StageConfig) and `run`. JAX is not imported."""
    return importlib.import_module(f"llmctl.pipeline.stages.{kind}")
