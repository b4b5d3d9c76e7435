"""Build pretraining rows by applying a self-supervised objective to documents."""

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
from llmctl.data.pretraining.objectives import masked
from llmctl.data.pretraining.packing import PackedRows, causal
from llmctl.data.tokenizers.base import Tokenizer
from llmctl.data.tokenizers.vocabulary import Vocabulary

ObjectiveName = Literal["causal", "masked", "next_sentence", "spans", "prefix", "completions"]
OBJECTIVES: dict[str, tuple[ObjectiveName, ...]] = {
    "decoder": ("causal", "completions"),
    "encoder": ("masked", "next_sentence"),
    "encoder_decoder": ("spans", "prefix", "completions"),
}
"""Objectives of each architecture. The first objective is the default. For encoders with a next-sentence head, however,
next_sentence is the default. The objective "completions" trains on pairs of a prompt and a completion."""


@dataclass(frozen=True)
class Objective:
    """Configure a self-supervised objective, and build rows for it.

    Example:
      >>> from llmctl.data.corpus import tokenize
      >>> from llmctl.data.tokenizers.byte_tokenizer import ByteTokenizer
      >>> words = ByteTokenizer.new()
      >>> documents = tokenize(["abcdefg"], words)
      >>> rows = Objective("causal").rows(documents, words, 4, seed=0, packing="segments", shuffle=False)
      >>> rows[0]["tokens"].tolist(), rows[0]["targets"].tolist()
      ([2, 102, 103, 104], [102, 103, 104, 105])
    """

    name: ObjectiveName = "causal"
    rate: float = 0.15
    """Fraction of tokens to predict, for the objectives `masked`, `next_sentence` and `spans`."""
    span: float = 3.0
    """Mean number of consecutive tokens that one sentinel replaces, for the objective `spans`."""
    whole_words: bool = False
    """Whether to mask all tokens of a word or none, for the objectives `masked` and `next_sentence`."""

    def sentinels(self, tokenizer: Tokenizer) -> Sequence[int]:
        """Return the ids of the sentinels that appear in the targets; empty for objectives without sentinels."""
        return tokenizer.sentinel_ids if self.name == "spans" else ()

    def rows(
        self, documents: Documents, tokenizer: Tokenizer, seq_len: int, *, seed: int, packing: Packing, shuffle: bool
    ) -> PackedRows | PairRows:
        """Build endless rows of `seq_len` tokens from documents.

        Args:
            documents: Tokenized documents.
            tokenizer: Tokenizer of the model.
            seq_len: Number of tokens per row; for an encoder-decoder, the number of encoder tokens.
            seed: Seed of the shuffle and of the objective's random choices.
            packing: Method of packing documents into rows.
            shuffle: Whether to shuffle in every epoch.

        Raises:
            RequestError: If the tokenizer lacks special tokens. If the tokenizer adds a trained prompt (prompt tuning)
                to texts. If there are too few documents.
        """
        if tokenizer.prefix:
            raise RequestError(
                f"packed rows leave out the trained prompt of {len(tokenizer.prefix):,} tokens before every text; give "
                "the data prompts and completions, or use a model without a trained prompt"
            )
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
    """Return the default objective of a model with this architecture, with or without a next-sentence head."""
    return "next_sentence" if next_sentence else OBJECTIVES[architecture][0]


def check(name: str, architecture: str, next_sentence: bool) -> None:
    """Check that a model supports the objective `name`.

    Raises:
        RequestError: If the objective is for another architecture, or needs a next-sentence head.
    """
    if name not in OBJECTIVES[architecture]:
        known = ", ".join(n for n in OBJECTIVES[architecture] if n != "next_sentence" or next_sentence)
        raise RequestError(f"objective {name!r} is not for a model with architecture {architecture!r}: {known}")
    if name == "next_sentence" and not next_sentence:
        raise RequestError("objective 'next_sentence' needs model.next_sentence (the bert family has it)")
