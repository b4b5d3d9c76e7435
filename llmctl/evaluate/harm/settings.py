"""Define the settings of harm: what counts as harmful text, and what the output filter does with it."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from llmctl.config.base import Config
from llmctl.config.errors import RequestError


class HarmConfig(Config):
    """Configure what counts as harmful text: a list of words, a classifier, or both."""

    words: str = ""
    """File with one harmful word or phrase per line; pkg:NAME/path for a file inside a Python package. Case, accents
    and simple obfuscation are ignored. Only whole words match."""
    classifier: str = ""
    """Folder of a text classifier (task classify or multilabel)."""
    classes: list[str] = []
    """Harmful classes of the classifier. Their probabilities are added or, for a multi-label classifier, the largest
    is used."""
    threshold: float = Field(default=0.5, gt=0, le=1)
    """Probability of the harmful classes from which on a text counts as harmful."""

    @property
    def active(self) -> bool:
        """Return whether there is a list or a classifier."""
        return bool(self.words or self.classifier)

    def inputs(self) -> list[str]:
        """Return the paths of the local list and of the classifier's manifest, which decide the results.

        Raises:
            RequestError: If the list is missing.
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
    """What happens to a harmful answer. refuse: replace the answer by `refusal`. redact: replace the words of the list;
    an answer that the classifier still rejects is refused. resample: sample again, at most `attempts` times, and refuse
    if all samples are harmful."""
    refusal: str = Field(default="I cannot help with that.", min_length=1)
    """Answer that replaces a harmful answer."""
    attempts: int = Field(default=4, ge=1)
    """Maximum number of further samples, for the action `resample`."""

    @model_validator(mode="after")
    def _used(self) -> FilterConfig:
        if not self.active and (unused := sorted(self.model_fields_set & {"action", "refusal", "attempts"})):
            raise ValueError(f"`{unused[0]}` is for a filter; name a list in `words`, or a classifier in `classifier`")
        return self
