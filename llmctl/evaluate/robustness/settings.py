"""Define the settings of the probes `robustness` and `attack`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, field_validator

from llmctl.config.base import Config
from llmctl.evaluate.robustness.perturbations import PERTURBATIONS
from llmctl.evaluate.tasks.registry import TASKS

PLACE = "{{ text }}"
"""Part of a paraphrase template that is replaced by the text."""
TEMPLATES = (
    "{{ text }} That is what was written.",
    "In short: {{ text }}",
    'Somebody said: "{{ text }}"',
    "To put it in other words, {{ text }}",
    "Here is the text: {{ text }}",
)
NEUTRAL = (
    "This is a text.",
    "It has several sentences.",
    "The next sentence follows this one.",
    "This page has a number at the bottom.",
    "The text was written on a weekday.",
)


class SynonymsConfig(Config):
    """Define the base class of settings that read synonyms."""

    synonyms: str = ""
    """Synonyms: a text file with one set of words per line, separated by commas, or a folder with WordNet's files. By
    default, a small list of English words is used."""

    def inputs(self) -> list[str]:
        """Return the paths of the files with synonyms."""
        path = Path(self.synonyms)
        if not self.synonyms or not path.is_dir():
            return [self.synonyms] if self.synonyms else []
        return sorted(str(file) for part in ("data", "index") for file in path.glob(f"{part}.*"))


class RobustnessConfig(SynonymsConfig):
    """Configure how texts are changed to measure robustness."""

    heading: ClassVar[str] = "Robustness"
    common: ClassVar[tuple[str, ...] | None] = ()

    changes: list[Annotated[str, AfterValidator(PERTURBATIONS.check), PERTURBATIONS]] = Field(
        default=list(PERTURBATIONS.own), min_length=1
    )
    """Changes of the texts. Each change is measured separately."""
    rate: float = Field(default=0.2, gt=0, le=1)
    """Fraction of the words that are changed, among the words that a change applies to. Also the fraction of words that
    truncation removes, and the length of the padding relative to the text."""
    templates: list[str] = Field(default=list(TEMPLATES), min_length=1)
    """Paraphrases: texts in which `{{ text }}` stands for the text. One template is sampled for each text."""
    neutral: list[str] = Field(default=list(NEUTRAL), min_length=1)
    """Neutral sentences for padding."""
    task: str = ""
    """Task whose metrics are measured, such as `choice` for a language model. By default, the artifact's own task is
    used."""
    records: int = Field(default=20, ge=0)
    """Number of changed predictions per change that are written to predictions.jsonl, with the changed texts."""
    seed: int = Field(default=0, ge=0)
    """Seed of the random changes."""

    @field_validator("templates")
    @classmethod
    def _has_place(cls, templates: list[str]) -> list[str]:
        for template in templates:
            if template.count(PLACE) != 1:
                raise ValueError(f"{template!r} must contain {PLACE} once")
        return templates

    @field_validator("neutral")
    @classmethod
    def _has_words(cls, sentences: list[str]) -> list[str]:
        if not all(sentence.strip() for sentence in sentences):
            raise ValueError("a neutral sentence must not be empty")
        return sentences

    @field_validator("task")
    @classmethod
    def _known(cls, name: str) -> str:
        return TASKS.check(name) if name else name


class AttackConfig(SynonymsConfig):
    """Configure attacks: searches for small changes of a text that change the prediction of a classifier."""

    heading: ClassVar[str] = "Attacks"
    common: ClassVar[tuple[str, ...] | None] = ()

    methods: list[Literal["hotflip", "textfooler"]] = Field(default=["hotflip", "textfooler"], min_length=1)
    """Attacks. hotflip: substitute tokens, guided by the gradient of the loss (Ebrahimi et al., 2018). textfooler:
    substitute words by synonyms, the most important word first (Jin et al., 2020). For comparison, random
    substitutions with the same budget are measured too."""
    budget: float = Field(default=0.15, gt=0, le=1)
    """Maximum number of substitutions, as a fraction of the text's tokens (hotflip) or words (textfooler); at least one
    substitution is allowed."""
    examples: int = Field(default=200, ge=1)
    """Maximum number of examples to attack, sampled by their hash."""
    similarity: float = Field(default=0.0, ge=0, lt=1)
    """Minimum cosine similarity between the embeddings of a token and its substitute (hotflip); 0 allows any token."""
    records: int = Field(default=20, ge=0)
    """Number of successful attacks per method that are written to predictions.jsonl, with the changed texts."""
    seed: int = Field(default=0, ge=0)
    """Seed of the random substitutions."""

    @field_validator("methods")
    @classmethod
    def _once(cls, methods: list[str]) -> list[str]:
        if len({*methods}) < len(methods):
            raise ValueError("names a method twice")
        return methods
