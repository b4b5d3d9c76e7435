"""Define the probes of social bias. See the modules of this folder for the measurements."""

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


class _Benchmark(Probe):
    """Define the base class of probes that read a benchmark, from the file `path` of their settings."""

    reads_data = False

    def inputs(self, settings: Any) -> list[str]:
        """Return the path of the benchmark's file, as a list."""
        from llmctl.data.paths import resolve

        return [str(path) for path in resolve(settings.path)]

    def definition(self, settings: Any) -> Any:
        """Return the digest of the benchmark's rows. The file is read here, before all measurements."""
        from llmctl.evaluate.bias import benchmark_rows

        return benchmark_rows.digest(settings)

    def programs(
        self, name: str, artifact: Artifact, data: DataConfig, setup: Setup, settings: Any
    ) -> Sequence[Program]:
        """Return the program that scores every token of packed sentences."""
        from llmctl.evaluate import likelihood, programs

        length = min(likelihood.SHORTEST, setup.seq_len)
        sequence = likelihood.ScoredSequence((0,) * length, {}, [(i, 0, 0) for i in range(length)])
        return [programs.of_likelihoods(f"{self.title} of {name}", artifact, setup, sequence)]


class _Sentences(_Benchmark):
    """Define the base class of probes that score sentences with a language model."""

    def check_model(self, manifest: Manifest, settings: Any, where: str) -> None:
        """Check that the artifact is a decoder or an encoder with a language-model head.

        Raises:
            RequestError: If the artifact has another architecture or head.
        """
        model = manifest.model
        if model.architecture not in ("decoder", "encoder") or not model.head_kind.vocabulary:
            kind = f"{with_article(model.architecture)} with the head {model.head!r}"
            raise RequestError(
                f"{where}: task {self.name!r} scores sentences with a decoder or an encoder with the head 'lm', this "
                f"is {kind}"
            )


class CrowsPairs(_Sentences):
    """Measure the preference for stereotypical sentences (Nangia et al., 2020, arXiv:2010.00133)."""

    name = "crows_pairs"
    title = "CrowS-Pairs"
    section = "crows_pairs"

    def measure(self, artifact: Artifact, held: Held | None, setup: Setup, settings: Any) -> Measured:
        """Measure the fraction of pairs whose stereotypical sentence is more probable."""
        from llmctl.evaluate.bias import crows_pairs

        return crows_pairs.measure(artifact, setup, settings)


class StereoSet(_Sentences):
    """Measure stereotypes and language modelling (Nadeem et al., 2021, arXiv:2004.09456)."""

    name = "stereoset"
    title = "StereoSet"
    section = "stereoset"

    def measure(self, artifact: Artifact, held: Held | None, setup: Setup, settings: Any) -> Measured:
        """Measure the language modelling score, the stereotype score and ICAT."""
        from llmctl.evaluate.bias import stereoset

        return stereoset.measure(artifact, setup, settings)


class BBQProbe(_Benchmark):
    """Measure stereotypes in answers to questions (Parrish et al., 2022, arXiv:2110.08193)."""

    name = "bbq"
    title = "BBQ"
    section = "bbq"

    def check_model(self, manifest: Manifest, settings: Any, where: str) -> None:
        """Check that the artifact can select a choice: by likelihood, or by the head of the task `choice`.

        Raises:
            RequestError: If the artifact has another head.
        """
        from llmctl.evaluate.tasks.registry import TASKS

        model, needed = manifest.model, TASKS["choice"].head_for(manifest.model)
        if model.head != needed:
            kind = f"{with_article(model.architecture)} with the head {model.head!r}"
            raise RequestError(
                f"{where}: task {self.name!r} needs the head {needed!r}, this is {kind}; finetune it with task 'choice'"
            )

    def measure(self, artifact: Artifact, held: Held | None, setup: Setup, settings: Any) -> Measured:
        """Measure the accuracy and the bias scores."""
        from llmctl.evaluate.bias import bbq

        return bbq.measure(artifact, setup, settings)

    def programs(
        self, name: str, artifact: Artifact, data: DataConfig, setup: Setup, settings: Any
    ) -> Sequence[Program]:
        """Return the program that scores choices.

        A decoder uses the program that scores sentences. Other models use the program of the task `choice`.
        """
        from llmctl.evaluate import programs
        from llmctl.evaluate.tasks.registry import TASKS

        if artifact.model.architecture == "decoder":
            return super().programs(name, artifact, data, setup, settings)
        return [programs.of_task(f"{self.title} of {name}", artifact, data, setup, TASKS["choice"])]


class IdentitySwaps(Probe):
    """Measure how a classifier's predictions change if its texts name another group."""

    name = "identity_swaps"
    title = "identity swaps"
    section = "identity_swaps"

    def check_model(self, manifest: Manifest, settings: Any, where: str) -> None:
        """Check that the artifact is a classifier, and has the class that the settings name.

        Raises:
            RequestError: If the artifact has another task, or does not have this class.
        """
        from llmctl.evaluate.bias import identity_swaps
        from llmctl.evaluate.tasks.registry import of

        if (task := of(manifest)).name != "classify":
            raise RequestError(
                f"{where}: task {self.name!r} needs a model of task classify, this model has task {task.name}"
            )
        identity_swaps.positive_class(settings.positive, manifest.labels)

    def inputs(self, settings: Any) -> list[str]:
        """Return the path of the file with the identity terms."""
        from llmctl.data.paths import resolve

        return [str(path) for path in resolve(settings.terms)]

    def definition(self, settings: Any) -> Any:
        """Return the identity terms, and the name of the positive class. The file of the terms is read here,
        before all measurements."""
        from llmctl.evaluate.bias import identity_terms

        return [[repr(a) for a in identity_terms.read(settings.terms)], settings.positive]

    def measure(self, artifact: Artifact, held: Held | None, setup: Setup, settings: Any) -> Measured:
        """Measure flips of predictions, changes of probability, and gaps of rates between groups."""
        from llmctl.evaluate.bias import identity_swaps

        assert held is not None
        return identity_swaps.measure(artifact, held, setup, settings)

    def programs(
        self, name: str, artifact: Artifact, data: DataConfig, setup: Setup, settings: Any
    ) -> Sequence[Program]:
        """Return the program that classifies a batch."""
        from llmctl.evaluate import programs
        from llmctl.evaluate.tasks.registry import of

        return [programs.of_task(f"{self.title} of {name}", artifact, data, setup, of(artifact.manifest))]


CROWS_PAIRS, STEREOSET, BBQ, IDENTITY_SWAPS = CrowsPairs(), StereoSet(), BBQProbe(), IdentitySwaps()
