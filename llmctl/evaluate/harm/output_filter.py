"""Filter complete answers of a language model: refuse, redact or sample again what a detector finds harmful.

An answer is checked as a whole, after its last token. A classifier judges the whole answer, and a refusal replaces all
of it. No part of an answer may therefore be shown earlier.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llmctl.evaluate.harm.detector import Detector, Finding
from llmctl.evaluate.harm.settings import FilterConfig

Again = Callable[[int, list[int]], list[str]]
"""Function that samples answers again. Its arguments are the number of the attempt, from 1, and the indices of the
answers. It returns the new samples of these answers."""


@dataclass(frozen=True)
class Filtered:
    """Store an answer after the filter."""

    text: str
    """The unchanged answer, the redacted answer, the new sample, or the refusal."""
    action: str = ""
    """"refused", "redacted" or "resampled"; empty if the answer was not changed."""
    finding: Finding | None = None
    """Words and score of the original answer, if it was harmful; None if the answer was not changed."""
    attempts: int = 0
    """Number of times that the answer was sampled again."""

    def report(self) -> dict[str, Any]:
        """Return the action and its reasons as JSON data; {} if the answer was not changed."""
        if not self.finding:
            return {}
        return {"action": self.action, **self.finding.reasons()} | (
            {"attempts": self.attempts} if self.attempts else {}
        )


class OutputFilter:
    """Apply a detector and an action to answers.

    Example:
        output_filter = OutputFilter(FilterConfig(words="words.txt"), "filter")
        output_filter(["Oh darn."])[0].text
        'I cannot help with that.'
    """

    def __init__(self, config: FilterConfig, where: str) -> None:
        """Load the detector.

        Args:
            config: Settings.
            where: Name of the settings, for error messages.

        Raises:
            RequestError: If the word list or the classifier cannot be used.
        """
        self.config, self._detect = config, Detector(config, where)

    def __call__(self, answers: Sequence[str], again: Again | None = None) -> list[Filtered]:
        """Return the answers after the filter.

        Args:
            answers: Complete answers.
            again: Function that samples answers again. The action `resample` needs it.

        Raises:
            WorkError: If a score of the classifier is not a finite number.
        """
        found = [
            Filtered(text, "refused", finding) if finding.harmful else Filtered(text)
            for text, finding in zip(answers, self._detect(answers), strict=True)
        ]
        left = [i for i, one in enumerate(found) if one.finding]
        if self.config.action == "redact" and self._detect.words:
            redacted = [self._detect.words.redact(found[i].text) for i in left]
            for i, text, finding in zip(left, redacted, self._detect(redacted), strict=True):
                if not finding.harmful:
                    found[i] = dataclasses.replace(found[i], text=text, action="redacted")
        if self.config.action == "resample":
            assert again is not None
            for attempt in range(1, self.config.attempts + 1):
                if not left:
                    break
                samples = again(attempt, left)
                for i, text, finding in zip(left, samples, self._detect(samples), strict=True):
                    kept = {} if finding.harmful else {"text": text, "action": "resampled"}
                    found[i] = dataclasses.replace(found[i], attempts=attempt, **kept)
                left = [i for i in left if found[i].action == "refused"]
        refusal = self.config.refusal
        return [dataclasses.replace(one, text=refusal) if one.action == "refused" else one for one in found]


def attempt_seed(seed: int, attempt: int) -> int:
    """Return the seed of an attempt to sample again, a hash in [0, 2^31). Attempt 0, the first sample, has the seed
    `seed`."""
    if not attempt:
        return seed
    return int.from_bytes(hashlib.sha256(b"%d %d" % (seed, attempt)).digest()[:4], "big") >> 1
