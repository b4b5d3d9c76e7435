"""What every kind of tokenizer can do."""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from etils import epath

DESCRIPTOR = "llmctl_tokenizer.json"
"""Beside the model file in an artifact: kind, digest and options."""


SENTINEL = "<extra_id_{}>"
"""How the sentinels of span corruption are written (T5, arXiv:1910.10683)."""


MASK = "<mask>"
"""How people write the mask, whatever the tokenizer's own spelling."""


SPOILED = "\ufdd0"
"""Stands inside a special token's spelling that is meant as text; Unicode gives no text this character."""


class Tokenizer(ABC):
    """Text to ids and back. Ids of special tokens never come from text, and decode to nothing."""

    kind: ClassVar[str]
    file: ClassVar[str]
    """Name of the model file in a folder."""
    foreign: ClassVar[tuple[str, ...]] = ()
    """Other names that it has in foreign folders."""
    vocab_size: int
    pad_id: int
    unk_id: int
    bos_id: int
    eos_id: int
    mask_id: int | None
    sentinel_ids: tuple[int, ...]
    """`<extra_id_0>` and on."""
    add_bos: bool
    """Documents and prompts begin with `bos_id`."""
    model: bytes
    """Content of the model file."""

    @classmethod
    def open(cls, model: bytes, described: dict[str, Any], folder: epath.Path) -> Self:
        """The tokenizer of a model file.

        Args:
            model: content of the file.
            described: what `options` said when it was saved; empty beside foreign tokenizers.
            folder: where foreign tokenizers may have other files.

        Raises:
            ValueError: what is wrong with them, in a few words.
        """
        return cls(model, described.get("bos", True))  # pyright: ignore[reportCallIssue]

    def options(self) -> dict[str, Any]:
        """What the model file does not say, kept beside it."""
        return {"bos": self.add_bos}

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of a text, without begin and end of sequence."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of every text, on all cores."""

    @abstractmethod
    def offsets(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """(ids, the characters [first, last) that each stands for) of every text; (n, n) for none."""

    def encode_spans(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids int32 [N], spans int32 [N, 2]) of every text, as `encode` cuts it.

        A span is the characters that a token stands for, without white space at its ends: empty where that is all.
        Several tokens of one character have the same span.
        """
        out = []
        for text, (ids, found) in zip(texts, self.offsets(texts), strict=True):
            spans_N2 = np.array(found, np.int32).reshape(-1, 2)
            for n, (first, last) in enumerate(found):
                bare = text[first:last].strip()
                first += len(text[first:last]) - len(text[first:last].lstrip())
                spans_N2[n] = first, first + len(bare)
            out.append((np.array(ids, np.int32), spans_N2))
        return out

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; special ones, and ids beyond the vocabulary, are left out."""

    def pieces(self) -> list[str]:
        """The text of every token by id, with a space where it begins a word after a space; "" for special ones."""
        return [self.decode([i]) for i in range(self.vocab_size)]

    def encode_masked(self, text: str) -> list[int]:
        """Ids of a text in which `MASK` stands for the mask token.

        A space before it belongs to the word that is masked. Raises ValueError where the tokenizer has no mask.
        """
        if self.mask_id is None:
            raise ValueError("the tokenizer has no mask token")
        first, *rest = (self.encode(part) for part in text.split(MASK))
        return [*first, *(i for part in rest for i in (self.mask_id, *part))]

    @property
    def special_ids(self) -> dict[str, int]:
        """Every special token as it is written -> its id."""
        return {}

    @property
    def spelled(self) -> dict[str, str]:
        """How chat templates name the special tokens ("bos_token", …) -> how they are written."""
        names = {i: text for text, i in self.special_ids.items()}
        ids = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id, "unk_token": self.unk_id}
        return {name: names[i] for name, i in ids.items() if i in names}

    def encode_spelled(self, text: str) -> list[int]:
        """`encode` of what a chat template wrote: special tokens that are spelled out are those tokens.

        A spelling with `SPOILED` in it is text, without that character.
        """
        special = self.special_ids
        if not special:
            return self.encode(text.replace(SPOILED, ""))
        pattern = "|".join(map(re.escape, sorted(special, key=len, reverse=True)))
        parts = re.split(f"({pattern})", text)
        out: list[int] = []
        for i, part in enumerate(parts):
            out += [special[part]] if i % 2 else self.encode(part.replace(SPOILED, "")) if part else []
        return out

    def prompt(self, text: str) -> list[int]:
        """Ids of a text that the model is to continue."""
        return [self.bos_id] * self.add_bos + self.encode(text)

    @property
    def digest(self) -> str:
        """sha256 of the model file."""
        return hashlib.sha256(self.model).hexdigest()

    def save(self, path: Path) -> None:
        """Writes the model file and its descriptor into folder `path`."""
        path.mkdir(parents=True, exist_ok=True)
        (path / self.file).write_bytes(self.model)
        described = {"kind": self.kind, "file": self.file, "digest": self.digest, **self.options()}
        (path / DESCRIPTOR).write_text(json.dumps(described, indent=2) + "\n")
