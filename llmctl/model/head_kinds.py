"""Describe the outputs of each head of a model, by the head's name in `ModelConfig.head`.

Each task (`llmctl.evaluate.tasks`) needs one of these heads. Several tasks may use the same head. This module does not
import JAX.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HeadKind:
    """Describe the shape and the meaning of a head's outputs.

    By default, each sequence is pooled to one vector, which is projected to one logit per label.
    """

    vocabulary: bool = False
    """Whether the outputs are logits over the vocabulary. A model with this head can also have a next-sentence head."""
    per_token: bool = False
    """Whether there is one output per token. Otherwise, the tokens of a sequence are pooled to one output."""
    bare: bool = False
    """Whether the output is the pooled vector itself, scaled to unit length, without a projection."""
    width: int = 0
    """Number of logits per output; 0 means one logit per label."""
    scalar: bool = False
    """Whether the output is a scalar, without an axis of logits."""

    @property
    def labelled(self) -> bool:
        """Return True if the output has one logit per label."""
        return not (self.width or self.bare)


HEAD_KINDS = {
    "lm": HeadKind(vocabulary=True, width=2),
    "classify": HeadKind(),
    "regress": HeadKind(width=1, scalar=True),
    "tokens": HeadKind(per_token=True),
    "span": HeadKind(per_token=True, width=2),
    "embed": HeadKind(bare=True),
    "choice": HeadKind(width=1, scalar=True),
}
"""Description of each head, by name. For "lm", `width` is the number of classes of the optional next-sentence head."""
