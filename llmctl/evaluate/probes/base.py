"""Define the base class of probes. A probe measures a property of an artifact beside the metrics of its task.

A new probe is a subclass whose instance is registered in `llmctl.evaluate.probes.registry`. The name becomes a value of
the setting `tasks` of `eval`. The settings of the probe are a section of `MeasureConfig`:

    class Brevity(Probe):
        name, title, section = "brevity", "brevity", "brevity"

        def check_model(self, manifest, settings, where):
            ...

        def measure(self, artifact, held, setup, settings):
            return Measured(self.title, protocol, metrics, values=values)

    PROBE = Brevity()

The module of a probe does not import JAX at module scope, because settings are validated without JAX.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llmctl.artifacts.artifact import Artifact
    from llmctl.artifacts.manifest import Manifest
    from llmctl.data.config import DataConfig
    from llmctl.evaluate.setup import Held, Measured, Setup
    from llmctl.model.program import Program


class Probe:
    """Describe one probe by class attributes and methods.

    The argument `settings` of the methods is the section of `MeasureConfig` that `section` names. It is None if the
    probe has no settings.

    Example:
        >>> from llmctl.evaluate.probes.registry import PROBES
        >>> PROBES["robustness"].section
        'robustness'
    """

    name: ClassVar[str]
    """Name of the probe in the registry of probes, and in the setting `tasks`."""
    title: ClassVar[str]
    """Name of the probe in the results of an evaluation."""
    section: ClassVar[str] = ""
    """Field of `MeasureConfig` with the settings of the probe; empty if the probe has no settings."""
    reads_data: ClassVar[bool] = True
    """Whether the probe reads the held-out examples of the evaluation. The examples have the columns of the artifact's
    task. If the settings have a field `task` that is not empty, the examples have the columns of that task."""
    reads_training: ClassVar[bool] = False
    """Whether the probe reads the train split of the evaluation's data too (`Held.training`)."""
    tokenizes: ClassVar[bool] = False
    """Whether the examples depend on the tokenizer. If so, only results of artifacts with equal tokenizers are
    compared."""
    compares: ClassVar[bool] = True
    """Whether `measure` returns values per example, which a paired comparison needs."""

    def check_model(self, manifest: Manifest, settings: Any, where: str) -> None:
        """Check that the probe supports an artifact. This check precedes all measurements.

        Args:
            manifest: Manifest of the artifact.
            settings: Settings of the probe.
            where: Beginning of an error message.

        Raises:
            RequestError: If the probe does not support the artifact, or if a setting does not suit the artifact.
        """

    def inputs(self, settings: Any) -> list[str]:
        """Return the paths of the files that the probe reads. If a file changes, the stage `eval` runs again.

        Raises:
            RequestError: If a file is missing.
        """
        return []

    def definition(self, settings: Any) -> Any:
        """Return JSON data that determines the result together with the examples, the sequence length and the weights.

        By default, these data are the settings. A probe that reads files adds their contents.
        """
        return settings.model_dump() if settings else {}

    def generates(self, manifest: Manifest, settings: Any) -> bool:
        """Return whether the probe generates answers. If so, the settings `generation` are part of what determines the
        result."""
        return False

    def measure(self, artifact: Artifact, held: Held | None, setup: Setup, settings: Any) -> Measured:
        """Measure an artifact.

        Args:
            artifact: Artifact on the devices of `setup.mesh`.
            held: Held-out examples; None if the probe does not read data.
            setup: Sequence length, batch size, dtype and mesh.
            settings: Settings of the probe.
        """
        raise NotImplementedError

    def programs(
        self, name: str, artifact: Artifact, data: DataConfig, setup: Setup, settings: Any
    ) -> Sequence[Program]:
        """Return the compiled programs of the probe for `llmctl plan`.

        Args:
            name: Name of the artifact, for the titles of the programs.
            artifact: Artifact with abstract arrays.
            data: Data settings, which determine the columns of a batch.
            setup: Sequence length, batch size, dtype and mesh.
            settings: Settings of the probe.
        """
        return []
