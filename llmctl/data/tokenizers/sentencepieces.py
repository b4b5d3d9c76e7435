"""Train and load SentencePiece tokenizers (Kudo and Richardson, 2018, arXiv:1808.06226).

The algorithms are unigram and BPE, both with byte fallback.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import sentencepiece as spm

from llmctl.config.errors import RequestError
from llmctl.data.config import TokenizerConfig
from llmctl.data.shuffle import permutation
from llmctl.data.tokenizers.base import MASK, SENTINEL, Tokenizer

SPACE = "▁"
"""Character by which SentencePiece represents a space in tokens."""
MASK_PLACEHOLDER = "\ue000"
"""Character that replaces `<mask>` while a text is encoded. No vocabulary contains this private-use character, so it
is encoded as bytes. The mask is found by these bytes."""
THREADS = 4
"""Number of training threads. Sums over threads depend on this number. The number is fixed, so that the model is the
same on every machine."""
SENTENCE = 2000
"""Maximum length of a training text in characters. Longer texts are split at spaces, because the trainer would drop
them."""
NORMALIZE = {"identity": "identity", "nfkc": "nmt_nfkc", "nfkc_lowercase": "nmt_nfkc_cf"}


class SentencePieces(Tokenizer):
    """Tokenize with a SentencePiece model. The ids of special tokens are read from the model."""

    kind: ClassVar[str] = "sentencepiece"
    file: ClassVar[str] = "tokenizer.model"
    other_files: ClassVar[tuple[str, ...]] = ("spiece.model", "sentencepiece.bpe.model")

    def __init__(self, model: bytes, add_bos: bool = True):
        """Parse a serialized SentencePiece model.

        Raises:
            ValueError: If the bytes are no SentencePiece model, or if the model has no end-of-sequence token.
        """
        try:
            if not model:  # the library would take it as none, and print errors at every call
                raise RuntimeError
            self._sp = spm.SentencePieceProcessor(model_proto=model)
        except RuntimeError:
            raise ValueError("not a SentencePiece model") from None
        self.model, self.add_bos = model, add_bos and self._sp.bos_id() >= 0
        self._special_ids: dict[str, int] | None = None
        self.vocab_size = self._sp.vocab_size()
        self.unk_id, self.bos_id, self.eos_id = self._sp.unk_id(), self._sp.bos_id(), self._sp.eos_id()
        if self.eos_id < 0:
            raise ValueError("it has no end-of-sequence token")
        self._sp.id_to_piece(list(range(self.vocab_size)))  # raises a ValueError if a piece is not UTF-8 text
        # Other models may lack a padding token. Weights and segments mask padding, so any id serves.
        self.pad_id = max(self._sp.pad_id(), 0)
        self.bos_id = self.pad_id if self.bos_id < 0 else self.bos_id
        self.mask_id = self._special(MASK)
        sentinels = (self._special(SENTINEL.format(k)) for k in range(self.vocab_size))
        self.sentinel_ids = tuple(iter(lambda: next(sentinels), None))

    def _special(self, piece: str) -> int | None:
        i = self._sp.piece_to_id(piece)
        return None if i == self.unk_id else i

    def piece(self, i: int) -> str:
        """Return the text of the token with id `i`."""
        return self._sp.id_to_piece(i)

    @property
    def special_ids(self) -> dict[str, int]:
        if self._special_ids is None:
            special = (i for i in range(self.vocab_size) if self._sp.is_control(i) or self._sp.is_unknown(i))
            self._special_ids = {self._sp.id_to_piece(i): i for i in special}
        return self._special_ids

    def encode(self, text: str) -> list[int]:
        return self._sp.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._sp.encode(list(texts), num_threads=_cores())

    def offsets(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        from sentencepiece import sentencepiece_pb2

        protos = self._sp.encode(list(texts), out_type="serialized_proto", num_threads=_cores())
        parse: Any = sentencepiece_pb2
        return [_spans(text, parse.SentencePieceText.FromString(p)) for text, p in zip(texts, protos, strict=True)]

    def decode(self, ids: Iterable[int]) -> str:
        return self._sp.decode([i for i in map(int, ids) if 0 <= i < self.vocab_size and i != self.unk_id])

    def encode_masked(self, text: str) -> list[int]:
        if self.mask_id is None:
            raise ValueError("the tokenizer has no mask token")
        # The whole text is encoded at once, because the model would put a space before each separate part.
        ids = self.encode(text.replace(MASK, MASK_PLACEHOLDER))
        mark = [self._sp.piece_to_id(f"<0x{byte:02X}>") for byte in MASK_PLACEHOLDER.encode()]
        space, out, at = self._sp.piece_to_id("▁"), [], 0
        while at < len(ids):
            if ids[at : at + len(mark)] == mark:
                if out[-1:] == [space]:
                    out.pop()
                out.append(self.mask_id)
                at += len(mark)
            else:
                out.append(ids[at])
                at += 1
        return out

    def pieces(self) -> list[str]:
        return [self._piece(i) for i in range(self.vocab_size)]

    def _piece(self, i: int) -> str:
        if self._sp.is_control(i) or self._sp.is_unknown(i):
            return ""
        piece = self._sp.id_to_piece(i)
        return (
            bytes([int(piece[1:-1], 16)]).decode(errors="replace") if self._sp.is_byte(i) else piece.replace("▁", " ")
        )


def _spans(text: str, found: Any) -> tuple[list[int], list[tuple[int, int]]]:
    """Convert the library's result for a text to (token ids, range [first, last) of each token's characters).

    The library counts UTF-8 bytes. If a character takes several tokens, the library assigns the character to the last
    token.
    """
    # number of characters before each byte offset
    char_at = np.cumsum([0, *((byte & 0xC0) != 0x80 for byte in text.encode())])
    spans, last = [], len(text)
    for piece in reversed(found.pieces):
        first = int(char_at[piece.begin])
        if piece.end > piece.begin:
            last = int(char_at[piece.end])
        # A piece without text belongs to the character that the next piece ends, or is the space put before the text.
        spans.append((first, first if piece.end == piece.begin and piece.piece == SPACE else last))
    return [piece.id for piece in found.pieces], spans[::-1]


def train(texts: Iterable[str], cfg: TokenizerConfig) -> SentencePieces:
    """Train a tokenizer on at most `cfg.sample` characters. Training is deterministic.

    Raises:
        RequestError: If the vocabulary is larger than the corpus supports, or too small for the 256 bytes and all
            required characters.
    """
    sample = _sample(list(texts), cfg.sample)
    if not sample:
        raise RequestError("no text to train a tokenizer on")
    model = io.BytesIO()
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=_sentences(sample), model_writer=model, model_type=cfg.kind, vocab_size=cfg.vocab_size,
            pad_id=0, unk_id=1, bos_id=2, eos_id=3,
            # control symbols never match text, so a text that spells <mask> does not become the mask
            control_symbols=[MASK, *(SENTINEL.format(k) for k in range(cfg.sentinels))],
            byte_fallback=True, character_coverage=0.9995, normalization_rule_name=NORMALIZE[cfg.normalize],
            remove_extra_whitespaces=False, split_digits=True, num_threads=THREADS, shuffle_input_sentence=False,
            max_sentence_length=16 * SENTENCE, minloglevel=2,
        )  # fmt: skip
    except RuntimeError as error:
        if "KeyboardInterrupt" in str(error):  # the library wraps exceptions of its iterator
            raise KeyboardInterrupt from None
        raise RequestError(_error_message(str(error), cfg)) from None
    return SentencePieces(model.getvalue(), cfg.bos != "no")


def _cores() -> int:
    """Return the number of cores that this process may use. On macOS, return the number of all cores, because macOS has
    no CPU affinity."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _error_message(error: str, cfg: TokenizerConfig) -> str:
    if most := re.search(r"set it to a value <= (\d+)", error):
        return (
            f"tokenizer.vocab_size = {cfg.vocab_size} is larger than the corpus supports; "
            f"the largest possible is {most[1]}"
        )
    if least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", error):
        return (
            f"tokenizer.vocab_size = {cfg.vocab_size} is too small for the bytes and characters of the corpus; "
            f"it needs more than {least[1]}"
        )
    return f"the tokenizer cannot be trained: {error.splitlines()[0]}"


def _sample(texts: list[str], budget: int) -> list[str]:
    """Return a pseudo-random sample of texts with `budget` characters in total. Only the last text is truncated.

    The sample is the same in every run.
    """
    if sum(map(len, texts)) <= budget:
        return [t for t in texts if t.strip()]
    order = permutation(len(texts), 0, 0)
    ends = np.cumsum([len(texts[i]) for i in order])
    last = int(np.searchsorted(ends, budget))
    chosen = [texts[i] for i in order[: last + 1]]
    chosen[-1] = chosen[-1][: len(chosen[-1]) - int(ends[last] - budget)]
    return [t for t in chosen if t.strip()]


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        while len(text) > SENTENCE:
            cut = text.rfind(" ", 1, SENTENCE)
            cut = cut if cut > 0 else SENTENCE
            yield text[:cut]
            text = text[cut:]
        if text.strip():
            yield text
