"""Tokenize text as UTF-8 bytes, without training. Every text can be encoded, but sequences are long."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import ClassVar

import numpy as np

from llmctl.config.text_input import parse_json
from llmctl.data.tokenizers.base import Tokenizer

FIRST = 5
"""Id of byte 0. Lower ids are the tokens pad, unk, bos, eos and mask."""
SPELLINGS = {"<pad>": 0, "<unk>": 1, "<s>": 2, "</s>": 3, "<mask>": 4}
"""Ids of the special tokens, by the token's text in chat templates."""

MOST_SENTINELS = 1000
"""Maximum number of sentinels, and maximum of the setting `tokenizer.sentinels`."""


class ByteTokenizer(Tokenizer):
    """Map each UTF-8 byte b to the id b + 5. The ids of the sentinels come after the ids of the bytes."""

    kind: ClassVar[str] = "bytes"
    file: ClassVar[str] = "bytes.json"

    def __init__(self, model: bytes, add_bos: bool = True):
        """Read the number of sentinels from `model`, a JSON object.

        Raises:
            ValueError: If the JSON is invalid or has no number of sentinels.
        """
        try:
            sentinels = int(parse_json(model)["sentinels"])
        except (ValueError, KeyError, TypeError, OverflowError):
            raise ValueError('it should hold {"sentinels": n}') from None
        if not 0 <= sentinels <= MOST_SENTINELS:
            raise ValueError(f"it has {sentinels} sentinels; {MOST_SENTINELS} at most")
        self.model, self.add_bos = model, add_bos
        self.pad_id, self.unk_id, self.bos_id, self.eos_id, self.mask_id = range(FIRST)
        self.vocab_size = FIRST + 256 + sentinels
        self.sentinel_ids = tuple(range(FIRST + 256, self.vocab_size))

    @classmethod
    def new(cls, sentinels: int = 0, add_bos: bool = True) -> ByteTokenizer:
        """Build a byte tokenizer. `sentinels` is the number of sentinel tokens."""
        return cls((json.dumps({"sentinels": sentinels}) + "\n").encode(), add_bos)

    @property
    def special_ids(self) -> dict[str, int]:
        return SPELLINGS

    def encode(self, text: str) -> list[int]:
        return (np.frombuffer(text.encode(), np.uint8).astype(int) + FIRST).tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def offsets(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        spans = ([(n, n + 1) for n, c in enumerate(text) for _ in c.encode()] for text in texts)
        return [(self.encode(text), found) for text, found in zip(texts, spans, strict=True)]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i - FIRST for i in map(int, ids) if FIRST <= i < FIRST + 256).decode(errors="replace")
