"""Detect harmful texts by a word list, by a classifier artifact, or by both.

Example:
    detect = Detector(HarmConfig(words="words.txt", classifier="runs/toxic", classes=["toxic"]), "filter")
    detect(["Have a nice day."])
    [Finding(words=(), score=0.01, harmful=False)]
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llmctl.artifacts import artifact
from llmctl.config.errors import RequestError, WorkError
from llmctl.data.tokenizers import loading as tokenizers
from llmctl.evaluate.harm import word_list
from llmctl.evaluate.harm.settings import HarmConfig
from llmctl.evaluate.predict import Predictor
from llmctl.evaluate.setup import prediction_length
from llmctl.evaluate.tasks.predictions import short
from llmctl.evaluate.tasks.registry import of


class Finding(NamedTuple):
    """Store what was found in a text."""

    words: tuple[str, ...]
    """Entries of the word list that occur in the text, without duplicates."""
    score: float | None
    """Probability of the harmful classes; None without a classifier."""
    harmful: bool
    """Whether the text has a word of the list, or the score is at least the threshold."""

    def reasons(self) -> dict[str, Any]:
        """Return the words and the score as JSON data, without fields that have no value."""
        found: dict[str, Any] = {"words": list(self.words)} if self.words else {}
        return found | ({"score": short(self.score)} if self.score is not None else {})


class Detector:
    """Detect harmful texts. The classifier is loaded once, and its programs are compiled once per padded length."""

    def __init__(self, config: HarmConfig, where: str) -> None:
        """Read the word list, and load the classifier onto all devices.

        Args:
            config: Settings.
            where: Name of the settings, for error messages.

        Raises:
            RequestError: If the word list or the classifier cannot be used (see `check`).
        """
        self.config = config
        self.words = check(config, where)
        self._classifier = Classifier(Path(config.classifier), config.classes) if config.classifier else None

    def __call__(self, texts: Sequence[str]) -> list[Finding]:
        """Return the finding of each text.

        Raises:
            WorkError: If a score of the classifier is not a finite number.
        """
        scores = self._classifier(texts) if self._classifier else [None] * len(texts)
        found = []
        for text, score in zip(texts, scores, strict=True):
            entries = tuple(dict.fromkeys(m.entry for m in self.words.find(text))) if self.words else ()
            found.append(Finding(entries, score, bool(entries) or (score or 0.0) >= self.config.threshold))
        return found


class Classifier:
    """Compute the probability that a text belongs to the harmful classes of a classifier."""

    def __init__(self, path: Path, classes: Sequence[str]) -> None:
        """Load the artifact onto all devices. Call `check` first."""
        found = artifact.load(path)
        self._path, self._predictor, manifest = path, Predictor(found), found.manifest
        self._tokenizer = tokenizers.load(found.tokenizer_dir)
        self._room = max(prediction_length(manifest, 0, path) - len(self._tokenizer.template.row([])), 1)
        self._index = [manifest.labels.index(name) for name in classes]
        self._exclusive = self._predictor.task.label_type == "class"

    def __call__(self, texts: Sequence[str]) -> list[float]:
        """Return one probability per text. A text without words has the probability 0.

        A text that is longer than the classifier's sequence length is split, if possible between words. Its probability
        is the largest probability of a part.

        Raises:
            WorkError: If a probability is not a finite number.
        """
        parts = [(i, part) for i, text in enumerate(texts) for part in self._parts(text) if part.strip()]
        score_N = np.zeros(len(texts))
        if parts:
            predictions = self._predictor.predictions([{"text": part} for _, part in parts])
            p_PC = np.array([np.asarray(p)[self._index] for p in predictions], np.float64)
            score_P = p_PC.sum(1) if self._exclusive else p_PC.max(1)
            if not np.isfinite(score_P).all():
                raise WorkError(f"{self._path}: gives a probability that is not a finite number")
            np.maximum.at(score_N, [i for i, _ in parts], np.minimum(score_P, 1.0))
        return score_N.tolist()

    def _parts(self, text: str) -> list[str]:
        """Split a text in halves until each part fits into the classifier's sequence length, and return the parts.

        A text is split at the white space nearest to its middle. If there is no white space, as in Chinese, the text is
        split in the middle.
        """
        bare = text.strip()
        if len(bare) < 2 or len(self._tokenizer.encode(text)) <= self._room:
            return [text]
        text = bare
        middle = len(text) // 2
        at = min((m.start() for m in re.finditer(r"\s", text)), key=lambda i: abs(i - middle), default=middle)
        return [*self._parts(text[:at].strip()), *self._parts(text[at:].strip())]


def check(config: HarmConfig, where: str) -> word_list.WordList | None:
    """Check that a word list and a classifier can be used, without loading arrays. Return the list, if there is one.

    Args:
        config: Settings.
        where: Name of the settings, for error messages.

    Raises:
        RequestError: If the list is missing or empty. If the classifier is no artifact, is no text classifier, or does
            not have one of the harmful classes.
    """
    if config.classifier:
        manifest = artifact.read_manifest(Path(config.classifier))
        at = f"{where}.classifier: {config.classifier}"
        if manifest.model.head_kind.vocabulary or of(manifest).label_type not in ("class", "set"):
            raise RequestError(f"{at} is no text classifier (task {of(manifest).name}); name one of task classify")
        if unknown := [name for name in config.classes if name not in manifest.labels]:
            raise RequestError(
                f"{where}.classes: {config.classifier} has no class {unknown[0]!r} (it has: "
                f"{', '.join(manifest.labels)})"
            )
    return word_list.read(config.words, f"{where}.words") if config.words else None
