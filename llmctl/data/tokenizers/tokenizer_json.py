"""Load tokenizers in `tokenizer.json` format (Hugging Face `tokenizers`), the format of most published models."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from etils import epath
from tokenizers import Tokenizer as Backend

from llmctl.config.containment import within
from llmctl.config.text_input import parse_json
from llmctl.data.tokenizers import rust_errors
from llmctl.data.tokenizers.base import ESCAPE, MASK, SENTINEL, Tokenizer

SPELLINGS = {
    "bos": ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[CLS]", "<|endoftext|>"),
    "eos": ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "[SEP]"),
    "pad": ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>"),
    "unk": ("<unk>", "[UNK]"),
    "mask": ("<mask>", "[MASK]"),
}
"""Common texts of special tokens, for folders that do not specify these texts."""
MAX_GROWTH = 1000
"""Maximum number of characters into which replacements may convert one character. Published tokenizers replace a space
by one character."""
HF_KEYS = {"bos": ("bos_token", "cls_token"), "eos": ("eos_token", "sep_token"), "pad": ("pad_token",),
           "unk": ("unk_token",), "mask": ("mask_token",)}  # fmt: skip
"""Keys for each special token in tokenizer_config.json and special_tokens_map.json. Earlier keys take precedence."""


class JsonTokenizer(Tokenizer):
    """Tokenize with a `tokenizer.json` file.

    BERT's [CLS] and [SEP] are used as beginning-of-sequence and end-of-sequence tokens.
    """

    kind: ClassVar[str] = "json"
    file: ClassVar[str] = "tokenizer.json"

    def __init__(self, model: bytes, add_bos: bool | None = None, special: dict[str, str] | None = None):
        """Parse a `tokenizer.json` file.

        Args:
            model: Content of the file.
            add_bos: Whether texts begin with `bos_id`; by default as the file's post-processor does.
            special: Text of each special token, by the names bos, eos, pad, unk and mask. If a text is missing, the
                vocabulary is searched for common texts of this token.

        Raises:
            ValueError: If the file is invalid, or has no known end-of-sequence token.
        """
        try:
            with rust_errors.silenced_stderr():
                self._backend = Backend.from_buffer(model)
                for part in (self._backend.normalizer, self._backend.decoder):
                    _check_growth(part)
                self._backend.no_padding()
                self._backend.no_truncation()
                own = self._backend.encode("a").ids
                self._backend.decode(own)
        except BaseException as error:
            raise ValueError(rust_errors.reason(error)) from None
        # A text that spells a special token is encoded as text.
        self._backend.encode_special_tokens = True
        self.model = model
        self.vocab_size = max(self._backend.get_vocab().values(), default=0) + 1
        if self.vocab_size > len(model):  # each token takes some bytes, and arrays are as long as the largest id
            raise ValueError(f"its largest token id is {self.vocab_size - 1:,}, and it does not hold so many tokens")
        self.special = dict(special or {})
        self._special_ids: dict[str, int] | None = None
        ids = {name: self._find(name) for name in SPELLINGS}
        eos = ids["eos"]
        if eos is None:
            raise ValueError("it has no end-of-sequence token that is known; say which in tokenizer_config.json")
        self.eos_id = eos
        # Weights and segments mask padding, so any id serves if there is no padding token.
        self.pad_id = eos if ids["pad"] is None else ids["pad"]
        self.bos_id = self.pad_id if ids["bos"] is None else ids["bos"]
        self.unk_id = eos if ids["unk"] is None else ids["unk"]
        self.mask_id = ids["mask"]
        self._hidden = {i for i in ids.values() if i is not None} | {
            i for i, token in self._backend.get_added_tokens_decoder().items() if token.special
        }
        sentinels = (self._backend.token_to_id(SENTINEL.format(k)) for k in range(self.vocab_size))
        self.sentinel_ids = tuple(iter(lambda: next(sentinels), None))
        self.add_bos = ids["bos"] is not None and (own[:1] == [self.bos_id] if add_bos is None else add_bos)

    @classmethod
    def open(cls, model: bytes, saved_options: dict[str, Any], folder: epath.Path) -> JsonTokenizer:
        """Build the tokenizer. The special tokens come from `saved_options`, or else from files in `folder`."""
        special = saved_options.get("special") or _hf_spellings(folder)
        return cls(model, saved_options.get("bos"), special)

    def options(self) -> dict[str, Any]:
        """Return the options to save in the JSON file next to the model file, including the texts of special tokens."""
        return super().options() | {"special": self.special}

    def _find(self, name: str) -> int | None:
        """Return the id of a special token, and store the token's text in `special`. If the vocabulary has no such
        token, return None.

        Args:
            name: Kind of the token: "bos", "eos", "pad", "unk" or "mask".

        Raises:
            ValueError: If the caller gave a text for this token, and the vocabulary does not contain the text.
        """
        spellings = (self.special[name],) if name in self.special else SPELLINGS[name]
        for spelling in spellings:
            if (i := self._backend.token_to_id(spelling)) is not None:
                self.special[name] = spelling
                return i
        if name in self.special:
            raise ValueError(f"its {name} token {self.special[name]!r} is not in its vocabulary")
        return None

    @property
    def backend(self) -> Backend:
        """Return a new object of the library `tokenizers`, built from this tokenizer's file."""
        return Backend.from_buffer(self.model)

    @property
    def special_ids(self) -> dict[str, int]:
        if self._special_ids is None:
            added = self._backend.get_added_tokens_decoder().items()
            self._special_ids = {token.content: i for i, token in added if token.special or i in self._hidden}
        return self._special_ids

    def encode_with_special(self, text: str) -> list[int]:
        if ESCAPE in text:
            return super().encode_with_special(text)
        # The text is encoded at once, because the backend may put a space before each separate part.
        return self._encode_special(text).ids

    def offsets_with_special(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        if ESCAPE in text:
            return super().offsets_with_special(text)
        found = self._encode_special(text)
        return found.ids, found.offsets

    def _encode_special(self, text: str) -> Any:
        """Encode a text. If the text contains the name of a special token, such as `<s>`, this name is encoded as that
        token.
        """
        self._backend.encode_special_tokens = False
        try:
            return rust_errors.call(self._backend.encode, text, add_special_tokens=False)
        finally:
            self._backend.encode_special_tokens = True

    def encode(self, text: str) -> list[int]:
        return rust_errors.call(self._backend.encode, text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [e.ids for e in rust_errors.call(self._backend.encode_batch_fast, list(texts), add_special_tokens=False)]

    def offsets(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        found = rust_errors.call(self._backend.encode_batch, list(texts), add_special_tokens=False)
        return [(e.ids, e.offsets) for e in found]

    def decode(self, ids: Iterable[int]) -> str:
        kept = [i for i in map(int, ids) if 0 <= i < self.vocab_size and i not in self._hidden]
        return rust_errors.call(self._backend.decode, kept, skip_special_tokens=False)

    def encode_masked(self, text: str) -> list[int]:
        if self.mask_id is None:
            raise ValueError("the tokenizer has no mask token")
        own = self.special["mask"]
        # Only an added token with `lstrip` absorbs the space before it, so that space is removed here.
        return self._encode_special(text.replace(f" {MASK}", own).replace(MASK, own)).ids

    def pieces(self) -> list[str]:
        raw = [self._backend.id_to_token(i) or "" for i in range(self.vocab_size)]
        # WordPiece marks the pieces that continue a word, instead of those that begin one
        if any(piece.startswith("##") for piece in raw):
            said = [piece[2:] if piece.startswith("##") else f" {piece}" for piece in raw]
        else:
            # Byte-level BPE spells bytes as letters, such as the newline as "Ċ". Metaspace spells spaces as "▁".
            said = [piece.replace("Ġ", " ").replace("Ċ", "\n").replace("▁", " ") for piece in raw]
        return ["" if i in self._hidden else piece for i, piece in enumerate(said)]


def _check_growth(part: Any) -> None:
    """Check that the replacements of a normalizer or decoder cannot exhaust memory.

    Each replacement is applied to the result of the previous replacement, so texts can grow exponentially.

    Raises:
        ValueError: If the replacements can make a text more than `MAX_GROWTH` times as long.
    """
    growth, waiting = 1.0, [parse_json(part.__getstate__())] if part is not None else []
    while waiting:
        item = waiting.pop()
        waiting.extend(item.values() if isinstance(item, dict) else item if isinstance(item, list) else ())
        if isinstance(item, dict) and item.get("type") == "Replace":
            found = item["pattern"].get("String")  # a regular expression may match nothing, between any two characters
            growth *= max(1.0, len(item["content"]) / len(found) if found else 1 + len(item["content"]))
            if growth > MAX_GROWTH:
                raise ValueError(f"its replacements make a text more than {MAX_GROWTH:,} times as long")


def _hf_spellings(folder: epath.Path) -> dict[str, str]:
    """Read the texts of special tokens from the configuration files of a Hugging Face folder.

    Raises:
        ValueError: If a file is damaged.
    """
    said: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (file := within(folder, name)).is_file():
            try:
                said |= parse_json(file.read_bytes())
            except (OSError, ValueError, TypeError):
                raise ValueError(f"{name} beside it is damaged") from None
    special = {}
    for name, keys in HF_KEYS.items():
        values = [said[key] for key in keys if said.get(key)]
        if values:
            spelling = values[0].get("content") if isinstance(values[0], dict) else values[0]
            if not isinstance(spelling, str):
                raise ValueError(f"its {name} token in the files beside it is no text")
            special[name] = spelling
    return special
