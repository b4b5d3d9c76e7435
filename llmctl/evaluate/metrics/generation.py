"""Compute metrics of generated texts with the packages sacrebleu and rouge-score (extra `seq2seq`).

BLEU (Papineni et al., 2002) and chrF (Popović, 2015) are scores of the complete set of texts, from 0 to 100. ROUGE
(Lin, 2004) is the mean F1 of the texts, from 0 to 1. Exact match is the fraction of texts that equal their reference.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np

from llmctl.config.errors import RequestError

ROUGE = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}
"""Map from llmctl's names of the ROUGE metrics to the names in rouge-score."""


class Words:
    """Split texts into lowercase words of any script, for ROUGE.

    Each Chinese or Japanese character is one word. The class replaces the tokenizer of rouge-score, which keeps only
    Latin letters without accents. On ASCII text, both tokenizers give the same words.
    """

    def __init__(self, characters: bool = False) -> None:
        """Compile the regular expression that matches a word or, if `characters` is true, a single character of any
        script.
        """
        import regex  # sacrebleu requires it

        alone = r"\p{Han}\p{Hiragana}\p{Katakana}ー"
        word = rf"[{alone}]|[[\p{{L}}\p{{N}}]--[{alone}]][[\p{{L}}\p{{N}}\p{{M}}]--[{alone}]]*"
        self._pattern = regex.compile(r"[\p{L}\p{N}]\p{M}*" if characters else word, regex.V1)

    def tokenize(self, text: str) -> list[str]:
        """Return the words of a text."""
        return self._pattern.findall(text.lower())


def check() -> None:
    """Check that the packages sacrebleu and rouge-score are installed.

    Raises:
        RequestError: If a package is not installed.
    """
    if any(importlib.util.find_spec(name) is None for name in ("sacrebleu", "rouge_score")):
        raise RequestError("task seq2seq: its metrics need sacrebleu and rouge-score: pip install 'llmctl[seq2seq]'")


def scores(references: Sequence[str], predictions: Sequence[str], tokenizer: str = "13a") -> dict[str, float]:
    """Return BLEU, chrF, ROUGE and exact match of generated texts, by name.

    Args:
        references: True text of each example.
        predictions: Generated text of each example.
        tokenizer: Name of sacrebleu's tokenizer for BLEU. If "char", characters are also the words of ROUGE.
    """
    bleu, chrf = _corpus(tokenizer)
    found = {"bleu": bleu.corpus_score(predictions, [references]).score}
    found["chrf"] = chrf.corpus_score(predictions, [references]).score
    return found | {name: sum(each) / len(each) for name, each in _of_texts(references, predictions, tokenizer).items()}


def values(references: Sequence[str], predictions: Sequence[str], tokenizer: str = "13a") -> dict[str, np.ndarray]:
    """Return the values per text that bootstrap intervals of the metrics in `scores` need, by name.

    For ROUGE and exact match, the values are those of the metric, [N]. For BLEU and chrF, the values are the numbers of
    n-grams of each text (see `llmctl.evaluate.metrics.resampling`).
    """
    found = {name: np.array(each) for name, each in _of_texts(references, predictions, tokenizer).items()}
    for name, metric in zip(("bleu_counts", "chrf_counts"), _corpus(tokenizer), strict=True):
        found[name] = np.array(metric._extract_corpus_statistics(predictions, [references]))
    return found


def _of_texts(references: Sequence[str], predictions: Sequence[str], tokenizer: str) -> dict[str, list[float]]:
    """Return ROUGE and exact match of each text."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(ROUGE.values()), tokenizer=Words(characters=tokenizer == "char"))
    pairs = list(zip(references, predictions, strict=True))
    rows = [scorer.score(reference, prediction) for reference, prediction in pairs]
    found = {ours: [row[theirs].fmeasure for row in rows] for ours, theirs in ROUGE.items()}
    return found | {"exact_match": [float(r.strip() == p.strip()) for r, p in pairs]}


def signature(references: Sequence[str], predictions: Sequence[str], tokenizer: str = "13a") -> str:
    """Describe how BLEU, chrF and ROUGE were computed.

    For BLEU and chrF this is the signature of sacrebleu, which publications quote.
    """
    found = []
    for name, metric in zip(("BLEU", "chrF"), _corpus(tokenizer), strict=True):
        metric.corpus_score(predictions[:1], [references[:1]])  # the signature is complete after a computation
        found.append(f"{name} {metric.get_signature()}")
    found.append("ROUGE without stemming")
    if tokenizer == "char":
        found[-1] += " of characters"
    elif not all(text.isascii() for text in (*references, *predictions)):
        found[-1] += " of words of any script, and characters of Chinese and Japanese"
    return ", ".join(found)


def _corpus(tokenizer: str) -> tuple[Any, Any]:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    return BLEU(tokenize=tokenizer), CHRF()
