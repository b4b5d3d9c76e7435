"""`tokenizer.json` of the Hugging Face `tokenizers` library: what most published models come with."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from etils import epath
from tokenizers import Tokenizer as Backend

from llmctl.data.tokenizers.base import MASK, SENTINEL, SPOILED, Tokenizer

SPELLINGS = {
    "bos": ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[CLS]", "<|endoftext|>"),
    "eos": ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "[SEP]"),
    "pad": ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>"),
    "unk": ("<unk>", "[UNK]"),
    "mask": ("<mask>", "[MASK]"),
}
"""How special tokens are usually written, for folders that do not say."""
FOREIGN = {"bos": ("bos_token", "cls_token"), "eos": ("eos_token", "sep_token"), "pad": ("pad_token",),
           "unk": ("unk_token",), "mask": ("mask_token",)}  # fmt: skip
"""Where tokenizer_config.json and special_tokens_map.json say it."""


class JsonTokenizer(Tokenizer):
    """A `tokenizer.json`. BERT's [CLS] and [SEP] are its begin and end of sequence."""

    kind: ClassVar[str] = "json"
    file: ClassVar[str] = "tokenizer.json"

    def __init__(self, model: bytes, add_bos: bool | None = None, special: dict[str, str] | None = None):
        """`special`: bos, eos, pad, unk, mask -> how they are written; what is absent is guessed.

        `add_bos` by default as the file's own post-processor does. Raises ValueError on other bytes.
        """
        try:
            self._backend = Backend.from_buffer(model)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(str(error).splitlines()[0]) from None
        self._backend.no_padding()
        self._backend.no_truncation()
        # text that spells a special token is text
        self._backend.encode_special_tokens = True
        self.model = model
        self.vocab_size = max(self._backend.get_vocab().values(), default=0) + 1
        self.special = dict(special or {})
        ids = {name: self._find(name) for name in SPELLINGS}
        eos = ids["eos"]
        if eos is None:
            raise ValueError("it has no end-of-sequence token that is known; say which in tokenizer_config.json")
        self.eos_id = eos
        # weights and segments hide padding, so any id serves where there is none
        self.pad_id = eos if ids["pad"] is None else ids["pad"]
        self.bos_id = self.pad_id if ids["bos"] is None else ids["bos"]
        self.unk_id = eos if ids["unk"] is None else ids["unk"]
        self.mask_id = ids["mask"]
        self._hidden = {i for i in ids.values() if i is not None} | {
            i for i, token in self._backend.get_added_tokens_decoder().items() if token.special
        }
        sentinels = (self._backend.token_to_id(SENTINEL.format(k)) for k in range(self.vocab_size))
        self.sentinel_ids = tuple(iter(lambda: next(sentinels), None))
        own = self._backend.encode("a").ids
        self.add_bos = ids["bos"] is not None and (own[:1] == [self.bos_id] if add_bos is None else add_bos)

    @classmethod
    def open(cls, model: bytes, described: dict[str, Any], folder: epath.Path) -> JsonTokenizer:
        """As described, or as the files beside it say."""
        return cls(model, described.get("bos"), described.get("special") or _foreign(folder))

    def options(self) -> dict[str, Any]:
        """What the model file does not say."""
        return super().options() | {"special": self.special}

    def _find(self, name: str) -> int | None:
        """The id of a special token; how it is written is noted in `special`, so that it is looked for only once."""
        spellings = (self.special[name],) if name in self.special else SPELLINGS[name]
        for spelling in spellings:
            if (i := self._backend.token_to_id(spelling)) is not None:
                self.special[name] = spelling
                return i
        if name in self.special:
            raise ValueError(f"its {name} token {self.special[name]!r} is not in its vocabulary")
        return None

    @property
    def special_ids(self) -> dict[str, int]:
        added = self._backend.get_added_tokens_decoder().items()
        return {token.content: i for i, token in added if token.special or i in self._hidden}

    def encode_spelled(self, text: str) -> list[int]:
        if SPOILED in text:
            return super().encode_spelled(text)
        return self._encode_special(text)  # as a whole: a part on its own may get a space before it

    def _encode_special(self, text: str) -> list[int]:
        """`encode`, this once with special tokens where they are spelled."""
        self._backend.encode_special_tokens = False
        try:
            return self._backend.encode(text, add_special_tokens=False).ids
        finally:
            self._backend.encode_special_tokens = True

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [e.ids for e in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def offsets(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        return [(e.ids, e.offsets) for e in self._backend.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        kept = [i for i in map(int, ids) if 0 <= i < self.vocab_size and i not in self._hidden]
        return self._backend.decode(kept, skip_special_tokens=False)

    def encode_masked(self, text: str) -> list[int]:
        if self.mask_id is None:
            raise ValueError("the tokenizer has no mask token")
        own = self.special["mask"]
        # only an added token that takes the space before it does so by itself
        return self._encode_special(text.replace(f" {MASK}", own).replace(MASK, own))

    def pieces(self) -> list[str]:
        raw = [self._backend.id_to_token(i) or "" for i in range(self.vocab_size)]
        if any(piece.startswith("##") for piece in raw):  # WordPiece marks what continues a word instead
            said = [piece[2:] if piece.startswith("##") else f" {piece}" for piece in raw]
        else:
            # byte-level BPE writes bytes as letters, the newline as "Ċ"; Metaspace writes spaces as "▁"
            said = [piece.replace("Ġ", " ").replace("Ċ", "\n").replace("▁", " ") for piece in raw]
        return ["" if i in self._hidden else piece for i, piece in enumerate(said)]


def _foreign(folder: epath.Path) -> dict[str, str]:
    """Special tokens as the files of a Hugging Face folder name them."""
    said: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            try:
                said |= json.loads((folder / name).read_text())
            except (ValueError, TypeError):
                raise ValueError(f"{name} beside it is damaged") from None
    special = {}
    for name, keys in FOREIGN.items():
        values = [said[key] for key in keys if said.get(key)]
        if values:
            special[name] = values[0]["content"] if isinstance(values[0], dict) else str(values[0])
    return special
