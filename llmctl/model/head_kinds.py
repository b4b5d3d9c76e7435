"""Head kinds: the structure of a model's answer, by the word in `ModelConfig.head`. Imports no JAX.

A task (`llmctl.evaluate.tasks`) names the head that it needs; several tasks may share one.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HeadKind:
    """Structure of an answer. By default one vector per sequence is pooled and projected to one logit per label."""

    vocabulary: bool = False
    """Logits over the vocabulary, by the output projection; only next-sentence prediction adds a task head."""
    per_token: bool = False
    """One answer per token; nothing is pooled."""
    bare: bool = False
    """The pooled vector itself, scaled to unit length; nothing is projected."""
    width: int = 0
    """Logits per answer; 0 means one per label."""
    scalar: bool = False
    """The answer is one number, without an axis for it."""

    @property
    def labelled(self) -> bool:
        """Whether the answer has one logit per label."""
        return not (self.width or self.bare)


HEAD_KINDS = {
    "lm": HeadKind(vocabulary=True, width=2),
    "classify": HeadKind(),
    "regress": HeadKind(width=1, scalar=True),
    "tokens": HeadKind(per_token=True),
    "span": HeadKind(per_token=True, width=2),
    "embed": HeadKind(bare=True),
}
"""The kinds by name. The width of "lm" is that of next-sentence prediction."""
