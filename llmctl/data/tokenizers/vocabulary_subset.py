"""Remove tokens from a tokenizer's vocabulary, so that texts without these tokens are tokenized as before.

BPE builds a token by merging shorter tokens. If a token is kept, all tokens from which BPE builds this token are
therefore kept too. Every kind of tokenizer keeps its special tokens, added tokens and bytes.

Example:
    vocabulary = of(tokenizer)
    kept = vocabulary.fixed | {i for used in counts for i in vocabulary.needed(used)}
    model = vocabulary.subset(sorted(kept))  # content of the new tokenizer's file
"""

from __future__ import annotations

import itertools
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from llmctl.config.errors import RequestError
from llmctl.data.tokenizers.base import Tokenizer
from llmctl.data.tokenizers.sentencepieces import SentencePieces
from llmctl.data.tokenizers.tokenizer_json import JsonTokenizer

NORMAL = 1
"""Type of ordinary pieces in SentencePiece models."""
CONTINUES = "##"
"""Prefix of WordPiece tokens that continue a word, if the file specifies no prefix."""


class Vocabulary(ABC):
    """Describe the tokens of a tokenizer, and build the model file of a tokenizer with fewer tokens."""

    tokens: dict[int, str]
    """Text of each token, as spelled in the model file, by id."""
    fixed: set[int]
    """Ids of the tokens that are always kept: special tokens, added tokens and bytes. A token is also kept if its score
    determines the scores of unknown characters or of user-defined tokens."""

    def needed(self, i: int) -> set[int]:
        """Return the token `i` and all tokens from which the tokenizer builds it."""
        return {i}

    def characters(self, used: Iterable[int]) -> set[int]:
        """Return the single-character tokens for all characters of the tokens `used`."""
        texts = {c for i in used for c in self.tokens[i]}
        return {i for i, token in self.tokens.items() if token in texts}

    def on_the_way(self, text: str) -> set[int]:
        """Return the intermediate tokens that the tokenizer finds in `text`, but that are not in the encoded text.

        These tokens are parts of unknown words. They must be kept, so that the words stay unknown.
        """
        return set()

    @abstractmethod
    def subset(self, kept: Sequence[int]) -> bytes:
        """Return a model file with only the tokens `kept` (ascending ids). Token kept[n] gets the id n."""


def of(tokenizer: Tokenizer) -> Vocabulary:
    """Return the vocabulary of a tokenizer.

    Raises:
      RequestError: If no tokens can be removed from this kind of tokenizer.
    """
    if isinstance(tokenizer, SentencePieces):
        return _SentencePieces(tokenizer)
    if isinstance(tokenizer, JsonTokenizer):
        kind, content = _kind(tokenizer)
        if kind in JSON_KINDS:
            return JSON_KINDS[kind](tokenizer, content)
        raise RequestError(f"vocabulary: a tokenizer.json of type {kind} cannot lose tokens exactly")
    raise RequestError(f"vocabulary: a tokenizer of kind {tokenizer.kind!r} has bytes only, and they stay")


def _special(tokenizer: Tokenizer) -> set[int]:
    """Return the ids of all special tokens, and of all tokens that the tokenizer adds around texts."""
    ends = (*tokenizer.template.begin, *tokenizer.template.end, *tokenizer.template.between)
    named = (tokenizer.pad_id, tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.mask_id)
    ids = {*tokenizer.special_ids.values(), *tokenizer.sentinel_ids, *ends, *named} - {None}
    return {i for i in ids if i is not None and i < tokenizer.vocab_size}


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _formed(symbols: list[str], rank: Callable[[str, str], float | None]) -> set[str]:
    """Return all tokens that occur when BPE merges symbols: the symbols, and the result of each merge.

    >>> sorted(_formed(list("abab"), lambda a, b: {"ab": 0, "abab": 1}.get(a + b)))
    ['a', 'ab', 'abab', 'b']
    """
    found = set(symbols)
    while len(symbols) > 1:
        ranked = ((rank(a, b), n) for n, (a, b) in enumerate(itertools.pairwise(symbols)))
        best = min(((r, n) for r, n in ranked if r is not None), default=None)
        if best is None:
            break
        n = best[1]
        symbols = [*symbols[:n], symbols[n] + symbols[n + 1], *symbols[n + 2 :]]
        found.add(symbols[n])
    return found


class _SentencePieces(Vocabulary):
    """Remove tokens from SentencePiece models, unigram or BPE."""

    def __init__(self, tokenizer: SentencePieces) -> None:
        from sentencepiece import sentencepiece_model_pb2

        proto: Any = sentencepiece_model_pb2
        self.model = proto.ModelProto.FromString(tokenizer.model)
        pieces = self.model.pieces
        self.tokens = {i: p.piece for i, p in enumerate(pieces)}
        normal = [i for i, p in enumerate(pieces) if p.type == NORMAL]
        self.fixed = _special(tokenizer) | (set(self.tokens) - set(normal))
        self.score: dict[str, float] = {}
        kind = self.model.trainer_spec.model_type
        if kind == proto.TrainerSpec.BPE:
            self.score = {pieces[i].piece: pieces[i].score for i in normal}
        elif kind == proto.TrainerSpec.UNIGRAM:
            # The scores of unknown characters and of user-defined pieces follow the lowest and the highest score.
            self.fixed |= {f(normal, key=lambda i: pieces[i].score) for f in (min, max) if normal}
        else:
            raise RequestError("vocabulary: a SentencePiece model of words or characters cannot lose tokens exactly")
        self.ids = {token: i for i, token in self.tokens.items()}

    def needed(self, i: int) -> set[int]:
        if not self.score or i in self.fixed:
            return {i}
        formed = _formed(list(self.tokens[i]), lambda a, b: -self.score[a + b] if a + b in self.score else None)
        return {i, *(self.ids[token] for token in formed if token in self.ids)}

    def subset(self, kept: Sequence[int]) -> bytes:
        new = type(self.model)()
        new.CopyFrom(self.model)
        del new.pieces[:]
        new.pieces.extend(self.model.pieces[i] for i in kept)
        at = {old: n for n, old in enumerate(kept)}
        spec = new.trainer_spec
        spec.vocab_size = len(kept)
        for name in ("unk_id", "bos_id", "eos_id", "pad_id"):
            setattr(spec, name, at.get(getattr(spec, name), -1))
        return new.SerializeToString()


def _kind(tokenizer: JsonTokenizer) -> tuple[str, dict[str, Any]]:
    """Return the type of the model in a tokenizer.json, such as "BPE", and the content of the file."""
    content = json.loads(tokenizer.backend.to_str())
    model = content["model"]
    kind = str(model.get("type") or "unknown")
    if (model.get("continuing_subword_prefix") and kind == "BPE") or model.get("end_of_word_suffix"):
        kind += " with marks at the ends of words"
    return kind, content


class _Json(Vocabulary):
    """Remove tokens from `tokenizer.json` files."""

    def __init__(self, tokenizer: JsonTokenizer, content: dict[str, Any]) -> None:
        self.content, self.model = content, content["model"]
        self.tokens = {i: token for token, i in tokenizer.backend.get_vocab(with_added_tokens=True).items()}
        self.ids = {token: i for i, token in self.tokens.items()}
        added = {token["id"] for token in content.get("added_tokens") or ()}
        self.fixed = _special(tokenizer) | added | {i for i, token in self.tokens.items() if _is_byte(token)}
        unknown = self.ids.get(self.model.get("unk_token") or "")
        self.fixed |= {i for i in (unknown, self.model.get("unk_id")) if i is not None}

    def subset(self, kept: Sequence[int]) -> bytes:
        at = {old: n for n, old in enumerate(kept)}
        new = json.loads(json.dumps(self.content))
        new["model"] |= self.model_of(at)
        new["added_tokens"] = [{**t, "id": at[t["id"]]} for t in new.get("added_tokens") or ()]
        for name in ("post_processor", "padding"):
            new[name] = _with_ids(new.get(name), at)
        return json.dumps(new, ensure_ascii=False).encode()

    def model_of(self, at: dict[int, int]) -> dict[str, Any]:
        """Return the entries of the object `model` in tokenizer.json whose values change, with the new values. `at`
        maps the ids of kept tokens to their new ids."""
        return {"vocab": {token: at[i] for token, i in self.model["vocab"].items() if i in at}}


class _Bpe(_Json):
    def __init__(self, tokenizer: JsonTokenizer, content: dict[str, Any]) -> None:
        super().__init__(tokenizer, content)
        self.merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in self.model["merges"]]
        self.rank = {pair: n for n, pair in enumerate(self.merges)}
        if '"ByteLevel"' in json.dumps([content.get("pre_tokenizer"), content.get("decoder")]):
            from tokenizers import pre_tokenizers

            self.fixed |= {self.ids[c] for c in pre_tokenizers.ByteLevel.alphabet() if c in self.ids}

    def needed(self, i: int) -> set[int]:
        if i in self.fixed:
            return {i}
        formed = _formed(list(self.tokens[i]), lambda a, b: self.rank.get((a, b)))
        return {i, *(self.ids[token] for token in formed if token in self.ids)}

    def model_of(self, at: dict[int, int]) -> dict[str, Any]:
        def stays(pair: tuple[str, ...]) -> bool:
            return all(self.ids.get(token) in at for token in (*pair, "".join(pair)))

        kept = [m for m, pair in zip(self.model["merges"], self.merges, strict=True) if stays(pair)]
        return super().model_of(at) | {"merges": kept}


class _WordPiece(_Json):
    def __init__(self, tokenizer: JsonTokenizer, content: dict[str, Any]) -> None:
        super().__init__(tokenizer, content)
        self.backend = tokenizer.backend
        self.mark: str = self.model.get("continuing_subword_prefix", CONTINUES)

    def characters(self, used: Iterable[int]) -> set[int]:
        texts = {c for i in used for c in self.tokens[i].removeprefix(self.mark)}
        return {i for i, token in self.tokens.items() if token.removeprefix(self.mark) in texts}

    def on_the_way(self, text: str) -> set[int]:
        """Return the tokens that WordPiece finds in the unknown words of `text` before it fails.

        WordPiece splits a word into the longest known tokens. A word is unknown if no token matches the next
        characters. If the tokens before this position were removed, WordPiece would find shorter tokens, and might
        split the complete word.
        """
        backend, found = self.backend, set[int]()
        text = backend.normalizer.normalize_str(text) if backend.normalizer else text
        parts = backend.pre_tokenizer.pre_tokenize_str(text) if backend.pre_tokenizer else [(text, (0, 0))]
        for word in {word for word, _ in parts}:
            at, ids = 0, set[int]()
            while at < len(word):
                texts = ((end, (self.mark if at else "") + word[at:end]) for end in range(len(word), at, -1))
                end, i = next(((end, self.ids[t]) for end, t in texts if t in self.ids), (0, -1))
                if not end:
                    found |= ids
                    break
                ids.add(i)
                at = end
        return found


class _Unigram(_Json):
    def __init__(self, tokenizer: JsonTokenizer, content: dict[str, Any]) -> None:
        super().__init__(tokenizer, content)
        # The score of unknown characters follows the lowest score.
        self.fixed.add(min(range(len(self.model["vocab"])), key=lambda i: self.model["vocab"][i][1]))

    def model_of(self, at: dict[int, int]) -> dict[str, Any]:
        unknown = self.model.get("unk_id")
        vocab = [entry for i, entry in enumerate(self.model["vocab"]) if i in at]
        return {"vocab": vocab, "unk_id": None if unknown is None else at[unknown]}


JSON_KINDS: dict[str, Callable[[JsonTokenizer, dict[str, Any]], Vocabulary]] = {
    "BPE": _Bpe, "WordPiece": _WordPiece, "Unigram": _Unigram, "WordLevel": _Json,
}  # fmt: skip
"""Map from the type of the model in a tokenizer.json to the class that removes tokens."""


def _with_ids(value: Any, at: dict[int, int]) -> Any:
    """Return a part of a tokenizer.json with new token ids. `at` maps old ids to new ids."""
    if isinstance(value, list):
        return [_with_ids(v, at) for v in value]
    if not isinstance(value, dict):
        return value
    out = {k: _with_ids(v, at) for k, v in value.items()}
    for name in ("sep", "cls"):  # [token, id] of the post-processors of BERT and RoBERTa
        if isinstance(value.get(name), list) and len(value[name]) == 2:
            out[name] = [value[name][0], at[value[name][1]]]
    if isinstance(value.get("ids"), list):
        out["ids"] = [at[i] for i in value["ids"]]
    if isinstance(value.get("pad_id"), int):
        out["pad_id"] = at[value["pad_id"]]
    return out
