"""Define the probes `robustness` and `attack`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmctl.config.errors import RequestError
from llmctl.evaluate.probes.base import Probe
from llmctl.evaluate.robustness import synonyms

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llmctl.artifacts.artifact import Artifact
    from llmctl.artifacts.manifest import Manifest
    from llmctl.data.config import DataConfig
    from llmctl.evaluate.setup import Held, Measured, Setup
    from llmctl.evaluate.tasks.base import Task
    from llmctl.model.program import Program


class Robustness(Probe):
    """Measure a task on changed texts: its main metric, and the fraction of predictions that change (flip rate)."""

    name = "robustness"
    title = "robustness"
    section = "robustness"

    def task(self, manifest: Manifest, settings: Any) -> Task:
        """Return the task that is measured."""
        from llmctl.evaluate.tasks import registry

        return registry.TASKS[settings.task] if settings.task else registry.of(manifest)

    def check_model(self, manifest: Manifest, settings: Any, where: str) -> None:
        """Check that the task has predictions per text, that the model suits it, and that the synonyms can be read.

        Raises:
            RequestError: If the task or the model is not supported, or if the synonyms cannot be read.
        """
        task = self.task(manifest, settings)
        if not task.perturbs:
            raise RequestError(
                f"{where}: tasks: 'robustness' changes the texts of classify, multilabel, regress and choice, not of "
                f"task {task.name!r}; robustness.task names another one"
            )
        task.check_model(manifest.model, where)
        if "synonyms" in settings.changes:
            synonyms.read(settings.synonyms)

    def definition(self, settings: Any) -> Any:
        """Return the settings and the digest of the synonyms."""
        known = synonyms.digest(synonyms.read(settings.synonyms)) if "synonyms" in settings.changes else ""
        return [settings.model_dump(exclude={"synonyms"}), known]

    def measure(self, artifact: Artifact, held: Held | None, setup: Setup, settings: Any) -> Measured:
        """Measure the task on the original texts, and on the texts after each change."""
        from llmctl.evaluate.robustness import measurement

        assert held is not None
        return measurement.measure(self.task(artifact.manifest, settings), artifact, held, setup, settings)

    def programs(
        self, name: str, artifact: Artifact, data: DataConfig, setup: Setup, settings: Any
    ) -> Sequence[Program]:
        """Return the program of the task, which scores a batch."""
        from llmctl.evaluate import programs

        task = self.task(artifact.manifest, settings)
        return [programs.of_task(f"robustness of {name}", artifact, data, setup, task)]


class Attack(Probe):
    """Measure the accuracy of a classifier under attack and, for comparison, under random substitutions."""

    name = "attack"
    title = "attack"
    section = "attack"

    def check_model(self, manifest: Manifest, settings: Any, where: str) -> None:
        """Check that the artifact predicts one class per text, and that the synonyms can be read.

        Raises:
            RequestError: If the artifact predicts no single class per text, or if the synonyms cannot be read.
        """
        from llmctl.evaluate.tasks import registry

        task = registry.of(manifest)
        if task.head != "classify" or task.label_type != "class":
            raise RequestError(
                f"{where}: tasks: 'attack' needs a classifier with one class per text, not task {task.name!r}"
            )
        task.check_model(manifest.model, where)
        if "textfooler" in settings.methods:
            synonyms.read(settings.synonyms)

    def definition(self, settings: Any) -> Any:
        """Return the settings and the digest of the synonyms."""
        known = synonyms.digest(synonyms.read(settings.synonyms)) if "textfooler" in settings.methods else ""
        return [settings.model_dump(exclude={"synonyms"}), known]

    def measure(self, artifact: Artifact, held: Held | None, setup: Setup, settings: Any) -> Measured:
        """Attack a sample of the examples."""
        from llmctl.evaluate.robustness import attack

        assert held is not None
        return attack.measure(artifact, held, setup, settings)

    def programs(
        self, name: str, artifact: Artifact, data: DataConfig, setup: Setup, settings: Any
    ) -> Sequence[Program]:
        """Return the program that scores a batch and, for HotFlip, the program that selects substitutions."""
        from llmctl.evaluate.robustness import attack_programs

        return attack_programs.of(name, artifact, data, setup, settings)


ROBUSTNESS, ATTACK = Robustness(), Attack()
