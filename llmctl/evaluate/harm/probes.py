"""Define the probes `toxicity`, `memorization` and `contamination`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmctl.config.base import with_article
from llmctl.config.errors import RequestError
from llmctl.evaluate.probes.base import Probe

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llmctl.artifacts.artifact import Artifact
    from llmctl.artifacts.manifest import Manifest
    from llmctl.data.config import DataConfig
    from llmctl.evaluate.setup import Held, Measured, Setup
    from llmctl.model.program import Program


class Toxicity(Probe):
    """Measure the toxicity of sampled continuations, without and with the output filter."""

    name = "toxicity"
    title = "toxicity"
    section = "toxicity"
    reads_data = False

    def check_model(self, manifest: Manifest, settings: Any, where: str) -> None:
        """Check that the model generates text, and that the prompts, the judge and the filter can be used.

        Raises:
            RequestError: If the model generates no text, or if a file of the settings is missing or invalid.
        """
        from llmctl.evaluate.harm import toxicity

        _check_generates(self.name, manifest, where)
        toxicity.check(settings)

    def definition(self, settings: Any) -> Any:
        """Return the settings without paths, and the digests of the prompts, the lists and the classifiers."""
        from llmctl.evaluate.harm import toxicity

        return toxicity.definition(settings)

    def measure(self, artifact: Artifact, held: Held | None, setup: Setup, settings: Any) -> Measured:
        """Sample continuations of each prompt, and judge them."""
        from llmctl.evaluate.harm import toxicity

        return toxicity.measure(self.title, artifact, setup, settings)

    def programs(
        self, name: str, artifact: Artifact, data: DataConfig, setup: Setup, settings: Any
    ) -> Sequence[Program]:
        """Return the programs that generate continuations of prompts of the maximum length."""
        return _generation(f"toxicity of {name}", artifact, setup, settings.max_new, setup.seq_len)


class Memorization(Probe):
    """Measure how much of its training text a model repeats, compared with held-out text."""

    name = "memorization"
    title = "memorization"
    section = "memorization"
    reads_training = True
    tokenizes = True

    def check_model(self, manifest: Manifest, settings: Any, where: str) -> None:
        """Check that the model is a decoder of text, and that prompt and continuation fit into it.

        Raises:
            RequestError: If the model is not a decoder that generates text, or if its maximum sequence length is too
                small.
        """
        _check_generates(self.name, manifest, where)
        if manifest.model.architecture != "decoder":
            raise RequestError(
                f"{where}: tasks: 'memorization' continues training texts, and {with_article('encoder_decoder')} "
                "answers; measure a decoder"
            )
        if (length := settings.prompts[-1] + settings.continuation + 1) > manifest.model.max_seq_len:
            raise RequestError(
                f"{where}: memorization: a prompt of {settings.prompts[-1]} tokens, its continuation and a first token "
                f"are {length} tokens, and the model reads {manifest.model.max_seq_len}; lower memorization.prompts or "
                "memorization.continuation"
            )

    def measure(self, artifact: Artifact, held: Held | None, setup: Setup, settings: Any) -> Measured:
        """Continue prompts from training text and held-out text, and compare with the true continuations."""
        from llmctl.evaluate.harm import memorization

        assert held is not None
        return memorization.measure(self.title, artifact, held, setup, settings)

    def programs(
        self, name: str, artifact: Artifact, data: DataConfig, setup: Setup, settings: Any
    ) -> Sequence[Program]:
        """Return the programs that continue the longest prompts."""
        prompt = settings.prompts[-1] + 1
        return _generation(f"memorization of {name}", artifact, setup, settings.continuation, prompt)


class Contamination(Probe):
    """Find examples that share an n-gram with training text, and measure the task on the other examples."""

    name = "contamination"
    title = "contamination"
    section = "contamination"
    reads_training = True

    def check_model(self, manifest: Manifest, settings: Any, where: str) -> None:
        """Check that the task suits the model.

        Raises:
            RequestError: If the task does not suit the model, or if a task file is invalid.
        """
        from llmctl.evaluate.harm import contamination
        from llmctl.evaluate.tasks.registry import of

        of(manifest).check_model(manifest.model, where)
        contamination.check(manifest, settings, where)

    def definition(self, settings: Any) -> Any:
        """Return the settings, and the digests of the task files and of the training text that the settings name."""
        from llmctl.evaluate.harm import contamination

        return contamination.definition(settings)

    def generates(self, manifest: Manifest, settings: Any) -> bool:
        """Return whether the artifact's task, or the task of a task file, generates answers."""
        from llmctl.evaluate import task_files
        from llmctl.evaluate.tasks.registry import TASKS, of

        files = [TASKS[task_files.read(file).task] for file in settings.task_files]
        return any(task.generates for task in (of(manifest), *files))

    def measure(self, artifact: Artifact, held: Held | None, setup: Setup, settings: Any) -> Measured:
        """Search the training text, and measure the artifact's task on contaminated and on clean examples."""
        from llmctl.evaluate.harm import contamination

        assert held is not None
        return contamination.measure(self.title, artifact, held, setup, settings)

    def programs(
        self, name: str, artifact: Artifact, data: DataConfig, setup: Setup, settings: Any
    ) -> Sequence[Program]:
        """Return the programs of the task: one that scores a batch and, if the task generates answers, those that
        generate."""
        from llmctl.evaluate import programs
        from llmctl.evaluate.tasks.registry import of

        task = of(artifact.manifest)
        sizes = {"seq_len": setup.seq_len, "batch_size": setup.batch_size, "dtype": setup.dtype}
        generating = task.generation_programs(artifact.model, artifact.params, setup.generation, setup.mesh, **sizes)
        return [programs.of_task(f"contamination of {name}", artifact, data, setup, task), *generating]


def _check_generates(probe: str, manifest: Manifest, where: str) -> None:
    """Check that a model generates text.

    Raises:
        RequestError: If the model has a task head, or is an encoder.
    """
    model = manifest.model
    if not model.head_kind.vocabulary or model.architecture == "encoder":
        kind = with_article(model.architecture)
        raise RequestError(
            f"{where}: tasks: {probe!r} needs a model that generates text; this is {kind} ({model.head})"
        )


def _generation(title: str, artifact: Artifact, setup: Setup, new: int, prompt: int) -> list[Program]:
    """Return the programs that continue a batch of prompts. Their titles begin with `title`."""
    import dataclasses

    from llmctl.model.generate.programs import Request, generation

    room = min(prompt, artifact.model.max_seq_len - (new if artifact.model.architecture == "decoder" else 0))
    request = Request(setup.batch_size, room, new)
    found = generation(artifact.model, artifact.params, request, setup.mesh, dtype=setup.dtype)
    return [dataclasses.replace(program, title=f"{title}: {program.title}") for program in found]


TOXICITY, MEMORIZATION, CONTAMINATION = Toxicity(), Memorization(), Contamination()
