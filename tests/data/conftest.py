"""A tokenizer whose ids can be read off by eye, and a small corpus of invented reviews."""

import csv
from collections.abc import Iterable, Sequence

import pytest

from llmctl.data.tokenizers.base import Tokenizer


class Letters(Tokenizer):
    """One letter, one token: a = 4, b = 5, ...; pad 0, unk 1, bos 2, eos 3."""

    kind, file = "letters", "letters"
    vocab_size, pad_id, unk_id, bos_id, eos_id = 30, 0, 1, 2, 3
    mask_id, sentinel_ids, model = None, (), b"letters"

    def __init__(self, add_bos: bool = False):
        self.add_bos = add_bos

    def encode(self, text: str) -> list[int]:
        return [ord(c) - ord("a") + 4 for c in text]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(t) for t in texts]

    def offsets(self, texts):
        return [(self.encode(t), [(n, n + 1) for n in range(len(t))]) for t in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(chr(i - 4 + ord("a")) for i in ids if i > 3)


@pytest.fixture
def letters():
    return Letters


VOCABULARY = "the a film plot actor scene was is felt very quite truly good bad dull bright slow grand music end"


@pytest.fixture(scope="session")
def sentences():
    """600 different sentences of words, by a fixed rule."""
    vocabulary = VOCABULARY.split()
    made, state = [], 7
    for i in range(600):
        words = []
        for _ in range(6 + i % 9):
            state = (state * 1103515245 + 12345) % 2**31
            words.append(vocabulary[(state >> 16) % len(vocabulary)])
        made.append(" ".join(words) + f" {i}.")
    return made


@pytest.fixture
def reviews(tmp_path, sentences):
    """A csv of reviews: columns review, stars (0 or 1) and site (a or b)."""
    path = tmp_path / "reviews.csv"
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["review", "stars", "site"])
        rows.writerows([s, i % 2, "ab"[i % 3 == 0]] for i, s in enumerate(sentences))
    return path
