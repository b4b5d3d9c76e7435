"""Define the base class of all tokenizers."""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from etils import epath

DESCRIPTOR = "llmctl_tokenizer.json"
"""Name of the file, next to the model file, that describes a saved tokenizer: its kind, digest and options."""


SENTINEL = "<extra_id_{}>"
"""Format of the text of a sentinel, a token that stands for a removed span in span corruption (Raffel et al., 2019,
arXiv:1910.10683)."""


MASK = "<mask>"
"""Text that means the mask token in user input, for all tokenizers."""


ESCAPE = "\ufdd0"
"""Character to insert into the text of a special token so that it is encoded as ordinary text. The character is a
Unicode noncharacter, which ordinary text does not contain."""


@dataclass(frozen=True)
class TextTemplate:
    """Store the special tokens to add around a text or a pair of texts, like a Hugging Face post-processor.

    Example:
      >>> template = TextTemplate((1,), (2,), (2, 2))
      >>> template.row([7, 8]).tolist(), template.row([7], [8]).tolist()
      ([1, 7, 8, 2], [1, 7, 2, 2, 8, 2])
    """

    begin: tuple[int, ...]
    end: tuple[int, ...]
    between: tuple[int, ...]
    """Tokens between the two texts of a pair."""

    def row(self, text: Sequence[int] | np.ndarray, pair: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
        """Return the token ids of a text, or of a pair of texts, with the special tokens added, int32 [N]."""
        second = () if pair is None else (self.between, pair)
        return np.concatenate([np.asarray(part, np.int32) for part in (self.begin, text, *second, self.end)])


class Tokenizer(ABC):
    """Convert text to token ids and back.

    `encode` never returns special tokens, even if the text contains the name of a special token. Special tokens decode
    to "". A subclass sets the attributes that are declared here, and defines `encode`, `encode_batch`, `offsets` and
    `decode`.

    Example:
      >>> from llmctl.data.tokenizers.byte_tokenizer import ByteTokenizer
      >>> tokenizer: Tokenizer = ByteTokenizer.new()
      >>> tokenizer.encode("ab"), tokenizer.decode([102, 103])
      ([102, 103], 'ab')
    """

    kind: ClassVar[str]
    file: ClassVar[str]
    """Name of the model file in a tokenizer folder."""
    other_files: ClassVar[tuple[str, ...]] = ()
    """Other names that the model file may have in folders that llmctl did not write."""
    vocab_size: int
    pad_id: int
    unk_id: int
    bos_id: int
    eos_id: int
    mask_id: int | None
    sentinel_ids: tuple[int, ...]
    """Ids of the sentinels `<extra_id_0>`, `<extra_id_1>`, …"""
    add_bos: bool
    """Whether documents and prompts begin with `bos_id`."""
    model: bytes
    """Content of the file that defines the tokenizer (the model file)."""
    chat_template: str | None = None
    """Text of the Jinja template that renders conversations. None if the tokenizer has no template."""
    own_template: TextTemplate | None = None
    """Special tokens that an imported tokenizer adds around texts; None uses the default of `template`."""

    prefix: tuple[int, ...] = ()
    """Token ids of a trained prompt (prompt tuning) that is put before every text. These ids come after the ids of the
    vocabulary."""

    @classmethod
    def open(cls, model: bytes, saved_options: dict[str, Any], folder: epath.Path) -> Self:
        """Build the tokenizer from the content of a model file.

        Args:
            model: Content of the file.
            saved_options: Result of `options` when the tokenizer was saved; empty for tokenizers that llmctl did not
                write.
            folder: Folder of the model file, which may contain configuration files.

        Raises:
            ValueError: If the files are invalid. The caller adds the path to the message.
        """
        return cls(model, saved_options.get("bos", True))  # pyright: ignore[reportCallIssue]

    def options(self) -> dict[str, Any]:
        """Return the options to save in the JSON file next to the model file. The model file does not contain these
        options."""
        return {"bos": self.add_bos}

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without beginning-of-sequence and end-of-sequence tokens."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of several texts, as `encode` does, but computed on all cores."""

    @abstractmethod
    def offsets(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Return, for every text, its token ids and the range [first, last) of characters that each token covers.

        A token without characters has an empty range (n, n).
        """

    def encode_spans(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return, for every text, its token ids and the range of characters that each token covers.

        Ranges do not include surrounding white space. A token that is only white space therefore has an empty range. If
        one character takes several tokens, all of these tokens have the same range.

        Returns:
            For each text, token ids int32 [N] as `encode` returns them, and ranges [first, last) int32 [N, 2].
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
        """Convert token ids to text. Special tokens and ids outside the vocabulary are skipped."""

    def pieces(self) -> list[str]:
        """Return the text of every token, in the order of ids; "" for special tokens.

        A token at the start of a word begins with a space.
        """
        return [self.decode([i]) for i in range(self.vocab_size)]

    def encode_masked(self, text: str) -> list[int]:
        """Return the token ids of a text in which each `<mask>` becomes the mask token.

        A space before `<mask>` is part of the masked word.

        Raises:
            ValueError: If the tokenizer has no mask token.
        """
        if self.mask_id is None:
            raise ValueError("the tokenizer has no mask token")
        first, *rest = (self.encode(part) for part in text.split(MASK))
        return [*first, *(i for part in rest for i in (self.mask_id, *part))]

    @property
    def special_ids(self) -> dict[str, int]:
        """Return the id of every special token, by the token's text."""
        return {}

    @property
    def special_spellings(self) -> dict[str, str]:
        """Return the text of each special token, by the token's variable in chat templates, such as "bos_token"."""
        names = {i: text for text, i in self.special_ids.items()}
        ids = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id, "unk_token": self.unk_id}
        return {name: names[i] for name, i in ids.items() if i in names}

    def encode_with_special(self, text: str) -> list[int]:
        """Return the token ids of a text, such as the output of a chat template, that may contain special tokens.

        The name of a special token, such as `<s>`, is encoded as the special token. If the name contains `ESCAPE`,
        the name is encoded as ordinary text, without `ESCAPE`.
        """
        special = self.special_ids
        out: list[int] = []
        for i, part in enumerate(self.split_special(text)):
            out += [special[part]] if i % 2 else self.encode(part.replace(ESCAPE, "")) if part else []
        return out

    def split_special(self, text: str) -> list[str]:
        """Split a text at every occurrence of a special token, such as `<s>`.

        Elements 1, 3, 5, … of the result are special tokens. Elements 0, 2, 4, … are the texts around them.
        """
        special = sorted(self.special_ids, key=len, reverse=True)
        return re.split(f"({'|'.join(map(re.escape, special))})", text) if special else [text]

    def offsets_with_special(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the token ids of `encode_with_special`, and the range [first, last) of each token's characters."""
        special = self.special_ids
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        at = 0
        for i, part in enumerate(self.split_special(text)):
            if i % 2:
                ids.append(special[part])
                spans.append((at, at + len(part)))
            elif part:
                place = [*(at + n for n, c in enumerate(part) if c != ESCAPE), at + len(part)]
                own, found = self.offsets([part.replace(ESCAPE, "")])[0]
                ids += own
                spans += [(place[a], place[b - 1] + 1 if a < b else place[a]) for a, b in found]
            at += len(part)
        return ids, spans

    @property
    def template(self) -> TextTemplate:
        """Return the special tokens to add around texts. By default, `eos` follows a text, and `bos` precedes it if
        `add_bos` is set.

        A trained prompt (`prefix`) comes first.
        """
        end = (self.eos_id,)
        found = self.own_template or TextTemplate((self.bos_id,) * self.add_bos, end, end)
        return replace(found, begin=(*self.prefix, *found.begin)) if self.prefix else found

    @property
    def begin(self) -> tuple[int, ...]:
        """Return the token ids to put before a document or a prompt: `prefix`, and `bos_id` if `add_bos` is set."""
        return (*self.prefix, *(self.bos_id,) * self.add_bos)

    @property
    def start_id(self) -> int:
        """Return the id of the token from which a model predicts a text's first token, if there is no context.

        This is the begin-of-sequence token or, if the tokenizer has none, the end-of-sequence token.
        """
        return self.bos_id if self.add_bos or self.bos_id != self.pad_id else self.eos_id

    def prompt(self, text: str) -> list[int]:
        """Return the token ids of a prompt for generation: first the ids that `begin` returns, then the ids of the
        text."""
        return [*self.begin, *self.encode(text)]

    @property
    def digest(self) -> str:
        """Return the SHA-256 of the model file, as hex digits."""
        return hashlib.sha256(self.model).hexdigest()

    def save(self, path: Path) -> None:
        """Write the tokenizer into the folder `path`: the model file, and a JSON file that describes it."""
        path.mkdir(parents=True, exist_ok=True)
        (path / self.file).write_bytes(self.model)
        saved_options = {"kind": self.kind, "file": self.file, "digest": self.digest, **self.options()}
        saved_options |= {"template": asdict(self.own_template)} if self.own_template else {}
        saved_options |= {"prefix": list(self.prefix)} if self.prefix else {}
        (path / DESCRIPTOR).write_text(json.dumps(saved_options, indent=2) + "\n")
