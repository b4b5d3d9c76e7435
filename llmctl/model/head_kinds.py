"""Head kinds: output structure of a model, by the name in `ModelConfig.head`. This module does not import JAX.

A task (`llmctl.evaluate.tasks`) names the head that it needs; several tasks may share one.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HeadKind:
    """Output structure of a head. By default one vector per sequence is pooled and projected to one logit per label."""

    vocabulary: bool = False
    """The output projection gives logits over the vocabulary. Only next-sentence prediction adds a task head."""
    per_token: bool = False
    """One output per token, without pooling."""
    bare: bool = False
    """The output is the pooled vector at unit length, without a projection."""
    width: int = 0
    """Logits per output; 0 means one per label."""
    scalar: bool = False
    """The output is a scalar: the axis of logits is removed."""

    @property
    def labelled(self) -> bool:
        """Whether the output has one logit per label."""
        return not (self.width or self.bare)


HEAD_KINDS = {
    "lm": HeadKind(vocabulary=True, width=2),
    "classify": HeadKind(),
    "regress": HeadKind(width=1, scalar=True),
    "tokens": HeadKind(per_token=True),
    "span": HeadKind(per_token=True, width=2),
    "embed": HeadKind(bare=True),
}
"""Head kinds by name. The width of "lm" is the width of the next-sentence head."""
