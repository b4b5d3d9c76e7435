"""Store a tokenized corpus: the token ids of many documents in one flat array, saved as two .npy files."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from llmctl.config import checksums
from llmctl.config.errors import RequestError
from llmctl.config.text_input import parse_json
from llmctl.data.tokenizers.base import Tokenizer
from llmctl.distributed import processes

T = TypeVar("T")

FILES = ("tokens.npy", "starts.npy")
"""Names of the files with the arrays of a saved corpus."""
CHUNK = 1024
"""Number of documents that the tokenizer gets per call: enough to use all cores, but few enough to limit memory."""


class Tokens(Protocol):
    """Define the interface of the token ids of all documents. The ids are indexed like one array, but may be in
    files.
    """

    def __getitem__(self, at_N: np.ndarray, /) -> np.ndarray:
        """Return the token ids at the positions `at_N`, integers [N]."""
        ...


class Documents(Protocol):
    """Define the interface of D tokenized documents, which may be in memory or in files."""

    @property
    def lengths(self) -> np.ndarray:
        """Return the number of tokens of each document, int64 [D]."""
        ...

    @property
    def tokens(self) -> Tokens:
        """Return the token ids of all documents. Document d begins at position `lengths[:d].sum()`."""
        ...


@dataclass(frozen=True)
class Corpus:
    """Store tokenized documents in one array. Document d is `tokens[starts[d]:starts[d + 1]]`.

    The documents contain no beginning-of-sequence and end-of-sequence tokens.
    """

    tokens: np.ndarray
    """Token ids [N]: uint16 if the vocabulary fits, else uint32."""
    starts: np.ndarray
    """Offset of each document, int64 [D + 1]: the first is 0, the last is the number of tokens."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, d: int) -> np.ndarray:
        return self.tokens[self.starts[d] : self.starts[d + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """Return the number of tokens of each document, int64 [D]."""
        return np.diff(self.starts)

    def save(self, folder: Path, tokenizer: str, texts: str) -> None:
        """Save the arrays and a description to a folder.

        The description is written last and atomically, so that `load` ignores an incomplete save.

        Args:
            folder: Output folder.
            tokenizer: Digest of the tokenizer, which `load` checks.
            texts: Digest of the texts, which `load` checks.
        """
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "corpus.json").unlink(missing_ok=True)
        np.save(folder / "tokens.npy", self.tokens, allow_pickle=False)
        np.save(folder / "starts.npy", self.starts, allow_pickle=False)
        described = {"tokenizer": tokenizer, "texts": texts, "documents": len(self), "tokens": len(self.tokens)}
        described["checksums"] = {name: checksums.of_file(folder / name) for name in FILES}
        (folder / "corpus.tmp").write_text(json.dumps(described) + "\n")
        (folder / "corpus.tmp").replace(folder / "corpus.json")

    @staticmethod
    def load(folder: Path, tokenizer: str, texts: str, check: bool = True) -> Corpus | None:
        """Load a saved corpus, with memory-mapped arrays, if its digests match.

        Args:
            folder: Folder of the corpus.
            tokenizer: Digest of the tokenizer.
            texts: Digest of the texts.
            check: Whether to compare the files with their checksums. The comparison reads the complete files.

        Returns:
            The corpus; None if the saved corpus is missing or damaged, or has other digests.
        """
        try:
            described = parse_json((folder / "corpus.json").read_bytes())
            if (described["tokenizer"], described["texts"]) != (tokenizer, texts):
                return None
            if check and any(checksums.of_file(folder / n) != described["checksums"][n] for n in FILES):
                return None
            tokens_N = np.load(folder / "tokens.npy", mmap_mode="r", allow_pickle=False)
            starts_D1 = np.load(folder / "starts.npy", allow_pickle=False)
            sizes = described["documents"] + 1, described["tokens"], described["tokens"]
        except (OSError, EOFError, ValueError, KeyError, TypeError):
            return None
        return Corpus(tokens_N, starts_D1) if (len(starts_D1), len(tokens_N), starts_D1[-1]) == sizes else None


def tokenize(texts: Iterable[str], tokenizer: Tokenizer) -> Corpus:
    """Tokenize every text, in order, and return the corpus.

    Raises:
        RequestError: If there is no text.
    """
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    chunks, lengths = [], []
    for batch in batched(texts):
        encoded = tokenizer.encode_batch(batch)
        lengths.extend(map(len, encoded))
        chunks.append(np.fromiter(itertools.chain.from_iterable(encoded), dtype, sum(map(len, encoded))))
    if not lengths:
        raise RequestError("no text to tokenize")
    return Corpus(np.concatenate(chunks), np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]))


def cached(folder: Path, texts: Iterable[str], digest: str, tokenizer: Tokenizer) -> Corpus:
    """Tokenize texts, or load the result of an earlier call from the cache in `folder`.

    Args:
        folder: Cache folder.
        texts: Texts of the documents.
        digest: Digest of the texts. The cached result is used only if it was saved with the same digests of texts and
            tokenizer.
        tokenizer: Tokenizer of the model.

    Raises:
        RequestError: If there is no text.
    """
    with processes.process_0_first():  # process 0 tokenizes and the others load the result
        # Other processes do not compare the checksums, because process 0 has just done so.
        if (corpus := Corpus.load(folder, tokenizer.digest, digest, check=processes.first())) is None:
            tokenize(texts, tokenizer).save(folder, tokenizer.digest, digest)
            corpus = Corpus.load(folder, tokenizer.digest, digest, check=False)
            assert corpus is not None, folder
        return corpus


def batched(things: Iterable[T]) -> Iterator[tuple[T, ...]]:
    """Yield tuples of `CHUNK` items; the last tuple may be shorter."""
    # itertools.batched needs Python 3.12.
    it = iter(things)
    while batch := tuple(itertools.islice(it, CHUNK)):
        yield batch
