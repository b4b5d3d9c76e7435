"""The rows that self-supervised training reads: an objective by name, applied to documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from llmctl.config.errors import RequestError
from llmctl.data.config import Packing
from llmctl.data.corpus import Documents
from llmctl.data.pretraining import span_corruption
from llmctl.data.pretraining.next_sentence import PairRows
from llmctl.data.pretraining.objectives import causal, masked
from llmctl.data.pretraining.packing import PackedRows
from llmctl.data.tokenizers.base import Tokenizer
from llmctl.data.tokenizers.vocabulary import Vocabulary

ObjectiveName = Literal["causal", "masked", "next_sentence", "spans", "prefix"]
LEARNS: dict[str, tuple[ObjectiveName, ...]] = {
    "decoder": ("causal",),
    "encoder": ("masked", "next_sentence"),
    "encoder_decoder": ("spans", "prefix"),
}
"""Objectives by architecture; the first is the default (of an encoder with the head for it: next_sentence)."""


@dataclass(frozen=True)
class Objective:
    """What rows of text ask for."""

    name: ObjectiveName = "causal"
    rate: float = 0.15
    """masked, next_sentence, spans: fraction of the tokens that is to be predicted."""
    span: float = 3.0
    """spans: mean length."""
    whole_words: bool = False
    """masked, next_sentence: words instead of tokens."""

    def sentinels(self, tokenizer: Tokenizer) -> Sequence[int]:
        """Those that its targets have."""
        return tokenizer.sentinel_ids if self.name == "spans" else ()

    def rows(
        self, documents: Documents, tokenizer: Tokenizer, seq_len: int, *, seed: int, packing: Packing, shuffle: bool
    ) -> PackedRows | PairRows:
        """Endless rows of `seq_len` tokens (of the encoder where there are two stacks).

        Raises RequestError where the tokenizer lacks special tokens, or the documents are too few.
        """
        words = Vocabulary(tokenizer)
        if self.name in ("masked", "next_sentence"):
            _ = words.mask_id
        if self.name == "next_sentence":
            return PairRows(
                documents, words, seq_len, rate=self.rate, whole_words=self.whole_words, seed=seed, shuffle=shuffle
            )
        width, objective = seq_len, causal
        if self.name == "masked":
            objective = partial(masked, words=words, rate=self.rate, whole_words=self.whole_words, seed=seed)
        if self.name == "prefix":
            objective = partial(span_corruption.prefix, words=words, seed=seed)
        if self.name == "spans":
            width, decoder, sentinels = span_corruption.sizes(seq_len, self.rate, self.span)
            have = len(tokenizer.sentinel_ids)
            if have < sentinels:
                raise RequestError(
                    f"span corruption of {seq_len} tokens needs {sentinels} sentinels, the tokenizer has {have}; "
                    "set tokenizer.sentinels"
                )
            objective = partial(
                span_corruption.corrupted, words=words, encoder=seq_len, decoder=decoder,
                rate=self.rate, span=self.span, seed=seed,
            )  # fmt: skip
        return PackedRows(documents, tokenizer, width, seed=seed, packing=packing, shuffle=shuffle, objective=objective)


def default(architecture: str, next_sentence: bool) -> ObjectiveName:
    """What a model learns where nothing is said."""
    return "next_sentence" if next_sentence else LEARNS[architecture][0]


def check(name: str, architecture: str, next_sentence: bool) -> None:
    """Raises RequestError where a model cannot learn the objective."""
    if name not in LEARNS[architecture]:
        known = ", ".join(n for n in LEARNS[architecture] if n != "next_sentence" or next_sentence)
        raise RequestError(f"objective {name!r} is not for a model with architecture {architecture!r}: {known}")
    if name == "next_sentence" and not next_sentence:
        raise RequestError("objective 'next_sentence' needs model.next_sentence (the bert family has it)")
