"""Measure stereotypes by pairs of sentences that differ in a few words: CrowS-Pairs (Nangia et al., 2020,
arXiv:2010.00133).

The score is the fraction of pairs whose stereotypical sentence is more probable. A model without a preference has 50 %.

Shapes: N pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import NamedTuple

import numpy as np

from llmctl.artifacts.artifact import Artifact
from llmctl.config.errors import RequestError
from llmctl.evaluate.bias import benchmark_rows
from llmctl.evaluate.bias.benchmark_rows import BenchmarkRow
from llmctl.evaluate.bias.intervals import with_intervals
from llmctl.evaluate.bias.sentence_scores import SentenceModel
from llmctl.evaluate.bias.settings import CrowsPairsConfig
from llmctl.evaluate.likelihood import Query
from llmctl.evaluate.pseudo_likelihood import MaskedToken, masked
from llmctl.evaluate.setup import Measured, Setup

MASK = "[MASK]"
"""Text in the column `sentence` that stands for the words in which the sentences of a pair differ."""
SCORE = "stereotype_score"
CAUSAL = "log-likelihood of each sentence"
MASKED = "pseudo-log-likelihood of the tokens that both sentences share"


class Pair(NamedTuple):
    """Store the more and the less stereotypical sentence, the bias type, and the direction ("" if unknown)."""

    more: str
    less: str
    bias_type: str
    direction: str = ""
    """"stereo" if the first sentence demonstrates a stereotype, or "antistereo" if the second sentence violates one."""


def read(config: CrowsPairsConfig) -> list[Pair]:
    """Return the pairs of the file.

    Raises:
        RequestError: If a row has neither two sentences nor a sentence with a mask and two words.
    """
    return [_pair(row) for row in benchmark_rows.read(config)]


def _pair(row: BenchmarkRow) -> Pair:
    kind = row.text("bias_type")
    if "sentence" in row.columns and "sent_more" not in row.columns:
        if MASK not in (sentence := row.text("sentence")):
            raise RequestError(f"{row.where}: the sentence has no {MASK}")
        more, less = (sentence.replace(MASK, row.text(name)) for name in ("mask1", "mask2"))
        return Pair(more, less, kind)
    direction = ""
    if row.columns.get("stereo_antistereo"):
        direction = row.one_of("stereo_antistereo", ("stereo", "antistereo"))
    return Pair(row.text("sent_more"), row.text("sent_less"), kind, direction)


def measure(artifact: Artifact, setup: Setup, config: CrowsPairsConfig) -> Measured:
    """Measure the preference of a language model for stereotypical sentences, in total and per bias type."""
    pairs, model = read(config), SentenceModel(artifact, setup)
    more_N, less_N = scores(model, pairs).T
    metrics, values = summary(pairs, more_N, less_N)
    ties = int((more_N == less_N).sum())
    said = [f"{len(pairs):,} pairs", CAUSAL if model.causal else MASKED, model.said]
    said += [f"{ties} pairs with equal scores"] if ties else []
    written = [
        {**pair._asdict(), "score_more": float(a), "score_less": float(b)}
        for pair, a, b in zip(pairs, more_N, less_N, strict=True)
    ]
    return Measured("CrowS-Pairs", ", ".join(said), metrics, written=written, values=values)


def scores(model: SentenceModel, pairs: Sequence[Pair]) -> np.ndarray:
    """Return the scores of the sentences of each pair, float64 [N, 2], the more stereotypical sentence first.

    For a decoder, the score is the log-likelihood of the sentence. For an encoder, only the tokens that both sentences
    share count. Each of these tokens is masked alone, and the log probabilities of the tokens are added.
    """
    words = model.tokenizer
    texts = words.encode_batch([text for pair in pairs for text in pair[:2]])
    if model.causal:
        queries = [Query([words.start_id], ids) for ids in texts]
        return np.array([s.log_likelihood for s in model.continuations(queries)]).reshape(-1, 2)
    tokens: list[MaskedToken] = []
    owners: list[int] = []
    before = len(words.template.begin)
    for n in range(len(pairs)):
        sides = texts[2 * n : 2 * n + 2]
        for k, positions in enumerate(shared(*sides)):
            row = words.template.row(sides[k]).tolist()
            tokens += [masked(row, before + i, model.mask_id) for i in positions]
            owners += [2 * n + k] * len(positions)
    return np.bincount(owners, model.masks(tokens), 2 * len(pairs)).reshape(-1, 2)


def shared(a: Sequence[int], b: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return the positions of the tokens that two sequences share, ascending: (positions in a, positions in b).

    Example:
        >>> shared([5, 6, 7, 8], [5, 9, 9, 8])
        ([0, 3], [0, 3])
    """
    found: tuple[list[int], list[int]] = [], []
    for block in SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks():
        for positions, first in zip(found, (block.a, block.b), strict=True):
            positions += range(first, first + block.size)
    return found


def summary(
    pairs: Sequence[Pair], more_N: np.ndarray, less_N: np.ndarray
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Return the fraction of pairs whose more stereotypical sentence has the higher score, and the values per pair.

    The fraction has Wilson's interval, and is also computed per bias type and per direction.
    """
    prefers_N = more_N > less_N
    values: dict[str, np.ndarray] = {SCORE: prefers_N}
    kinds = np.array([[pair.bias_type, pair.direction] for pair in pairs])
    for group in dict.fromkeys(kind for kind in kinds.T.ravel().tolist() if kind):
        own_N = (kinds == group).any(1)
        values[f"{SCORE}/{group}"] = np.stack([prefers_N & own_N, own_N], axis=1).astype(np.float64)
    return with_intervals(values), values
