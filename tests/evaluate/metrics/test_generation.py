"""Scores of generated texts: ROUGE of any script, and that of rouge-score for ASCII."""

import string

import numpy as np
import pytest
from rouge_score.tokenizers import DefaultTokenizer

from llmctl.evaluate.metrics import generation


def test_words_of_ascii_text_are_those_of_rouge_score():
    letters = np.random.default_rng(0).choice(list(string.printable), (50, 80))
    for text in ["It's a_b 3.5% of U.S.", *("".join(row) for row in letters)]:
        assert generation.Words().tokenize(text) == DefaultTokenizer(False).tokenize(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [("Ёлка у дома.", ["ёлка", "у", "дома"]), ("我爱NLP。", ["我", "爱", "nlp"]), ("हिन्दी है", ["हिन्दी", "है"])],
)
def test_words_of_other_scripts(text, words):
    assert generation.Words().tokenize(text) == words
    found = generation.scores([text], [text])
    assert [found[name] for name in generation.ROUGE] == [1.0] * 3
    assert generation.Words(characters=True).tokenize("ab é") == ["a", "b", "é"]


def test_the_protocol_names_other_words():
    assert generation.signature(["a"], ["b"]).endswith("ROUGE without stemming")
    assert "any script" in generation.signature(["ё"], ["b"])
    assert generation.signature(["a"], ["b"], "char").endswith("ROUGE without stemming of characters")
