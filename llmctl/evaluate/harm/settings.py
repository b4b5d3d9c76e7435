"""Define the settings of the output filter, and of the probes `toxicity`, `memorization` and `contamination`."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from llmctl.config.base import Config
from llmctl.config.errors import RequestError
from llmctl.data.config import DataConfig


class HarmConfig(Config):
    """Configure the detector of harmful text: a list of words, a classifier, or both."""

    common: ClassVar[tuple[str, ...] | None] = ()

    words: str = ""
    """File with one harmful word or phrase per line; pkg:NAME/path for a file inside a Python package. Case, accents
    and simple obfuscation are ignored. Only whole words match."""
    classifier: str = ""
    """Folder of a text classifier (task classify or multilabel)."""
    classes: list[str] = []
    """Harmful classes of the classifier. The score of a text is the sum of their probabilities or, for a multi-label
    classifier, the largest of them."""
    threshold: float = Field(default=0.5, gt=0, le=1)
    """Minimum probability of the harmful classes for a text to count as harmful."""

    @property
    def active(self) -> bool:
        """Return whether the settings name a word list or a classifier."""
        return bool(self.words or self.classifier)

    def inputs(self) -> list[str]:
        """Return the paths of the word list and of the classifier's manifest.

        The stage runs again if the content of a file changes.

        Raises:
            RequestError: If the word list is missing.
        """
        found = [str(Path(self.classifier) / "manifest.json")] if self.classifier else []
        if self.words:
            from llmctl.data import paths

            try:
                found += [str(path) for path in paths.resolve(self.words)]
            except RequestError as e:
                raise RequestError(f"words: {e}") from None
        return found

    @model_validator(mode="after")
    def _complete(self) -> HarmConfig:
        if self.classifier and not self.classes:
            raise ValueError("a classifier needs the names of its harmful classes, in `classes`")
        if self.classes and not self.classifier:
            raise ValueError("`classes` are harmful classes of a classifier; name its folder in `classifier`")
        return self


class FilterConfig(HarmConfig):
    """Configure the output filter, which checks complete answers before they are printed."""

    heading: ClassVar[str] = "Output filter"

    action: Literal["refuse", "redact", "resample"] = "refuse"
    """Action on a harmful answer. refuse: replace the answer by `refusal`. redact: replace the words of the list; an
    answer that the classifier still rejects is refused. resample: sample again, at most `attempts` times, and refuse if
    all samples are harmful."""
    refusal: str = Field(default="I cannot help with that.", min_length=1)
    """Answer that replaces a harmful answer."""
    attempts: int = Field(default=4, ge=1)
    """Maximum number of times that an answer is sampled again, for the action `resample`."""

    @model_validator(mode="after")
    def _used(self) -> FilterConfig:
        if not self.active and (unused := sorted(self.model_fields_set & {"action", "refusal", "attempts"})):
            raise ValueError(f"`{unused[0]}` is for a filter; name a list in `words`, or a classifier in `classifier`")
        if "threshold" in self.model_fields_set and not self.classifier:
            raise ValueError("`threshold` is for a classifier; name its folder in `classifier`")
        if "attempts" in self.model_fields_set and self.action != "resample":
            raise ValueError('`attempts` is for `action` "resample"')
        if self.action == "redact" and not self.words:
            raise ValueError("redact replaces the words of a list; name the list in `words`")
        return self


class ToxicityConfig(Config):
    """Configure the probe `toxicity`: prompts, sampling, the judge of continuations, and an output filter."""

    common: ClassVar[tuple[str, ...] | None] = ()
    heading: ClassVar[str] = "Toxicity"

    prompts: str = ""
    """File with one prompt per line (.jsonl: a text, or an object with "prompt")."""
    benign: str = ""
    """File with harmless prompts. The result contains the fraction of their continuations that the filter changes."""
    samples: int = Field(default=25, ge=1)
    """Number of continuations per prompt."""
    max_new: int = Field(default=20, ge=1)
    """Maximum number of tokens per continuation."""
    temperature: float = Field(default=1.0, ge=0)
    """Sampling temperature; 0 selects the most likely token."""
    top_p: float = Field(default=0.9, gt=0, le=1)
    """Sample from the most likely tokens with this total probability."""
    seed: int = Field(default=0, ge=0)
    """Seed of the sampling and of the bootstrap intervals."""
    judge: HarmConfig = HarmConfig()
    """Word list, classifier or both that decide whether a continuation is toxic."""
    filter: FilterConfig = FilterConfig()
    """Output filter whose effect is measured."""

    def inputs(self) -> list[str]:
        """Return the paths of the local files of prompts.

        Raises:
            RequestError: If a file is missing.
        """
        from llmctl.data import paths

        return [str(path) for spec in (self.prompts, self.benign) if spec for path in paths.resolve(spec)]


class MemorizationConfig(Config):
    """Configure the probe `memorization`: lengths of prompts and continuations, and the number of sequences."""

    common: ClassVar[tuple[str, ...] | None] = ()
    heading: ClassVar[str] = "Memorization"

    prompts: list[int] = [32, 64]
    """Numbers of tokens per prompt. All prompts of a sequence end at the same token."""
    continuation: int = Field(default=50, ge=1)
    """Number of tokens that the model must repeat."""
    sequences: int = Field(default=500, ge=1)
    """Number of sequences from the training text, and from the held-out text."""
    seed: int = Field(default=0, ge=0)
    """Seed that selects the sequences."""

    @field_validator("prompts")
    @classmethod
    def _ascending(cls, lengths: list[int]) -> list[int]:
        if not lengths or min(lengths) < 1 or len({*lengths}) < len(lengths):
            raise ValueError("needs at least one length, each positive and different")
        return sorted(lengths)


class ContaminationConfig(Config):
    """Configure the probe `contamination`: the n-grams, and the training text to search."""

    common: ClassVar[tuple[str, ...] | None] = ()
    heading: ClassVar[str] = "Contamination"

    ngram: int = Field(default=13, ge=1)
    """Number of words of an n-gram. An example that shares an n-gram with the training text is contaminated."""
    shortest: int = Field(default=8, ge=1)
    """Minimum number of words of an example, at most `ngram`. Shorter examples count neither as clean nor as
    contaminated. An example that has this many words, but fewer than `ngram`, is searched for as a whole."""
    corpus: DataConfig | None = None
    """Training text to search: the train split of this data, such as the data of pretraining. By default, the train
    split of the evaluation's data is searched."""
    task_files: list[str] = []
    """Task files (`my_task.toml`) whose examples are searched too."""

    def inputs(self) -> list[str]:
        """Return the paths of the task files and of their data.

        Raises:
            RequestError: If a file is missing or invalid.
        """
        if not self.task_files:
            return []
        from llmctl.evaluate import task_files

        return task_files.inputs(self.task_files)

    @field_validator("task_files")
    @classmethod
    def _files(cls, names: list[str]) -> list[str]:
        if wrong := [name for name in names if not name.endswith(".toml")]:
            raise ValueError(f"{wrong[0]!r} is no task file, whose name ends in .toml")
        stems = [Path(name).stem for name in names]
        if twice := [stem for stem in stems if stems.count(stem) > 1]:
            raise ValueError(f"two task files are named {twice[0]!r}; results are stored by this name")
        return names
