"""Tokenizers that come with a model, and go with it: found, checked against the model's table, handed on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from llmctl.bridge import sentencepiece_json
from llmctl.data import tokenizer as tokenizers
from llmctl.data.json_tokenizer import JsonTokenizer
from llmctl.data.sentencepieces import SentencePieces
from llmctl.errors import RequestError
from llmctl.model import ModelConfig

BESIDE = (
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("vocab.txt", "vocab.json", "merges.txt", "generation_config.json", "sentence_bert_config.json"),
)
"""Files that go with a tokenizer and that others read: they are kept as they are."""
LEAST = 0.9
"""Part of the table that a model's tokenizer covers at least; tables are padded to round numbers, but not by more."""


def bring(source: Path, work: Path, model: ModelConfig) -> Path | None:
    """The tokenizer in `source` (a folder or a file), put into `work` for an artifact; None where there is none.

    Raises:
      RequestError: a tokenizer that is damaged, or of another size than the model's table.
    """
    found = _find(source)
    if found is None:
        return None
    check(found, model, str(source))
    found.save(work)
    folder = source if source.is_dir() else source.parent
    for name in BESIDE:
        if (folder / name).is_file():
            shutil.copy(folder / name, work / name)
    return work


def check(words: tokenizers.Tokenizer, model: ModelConfig, where: str) -> None:
    """The model has a row for every token. Raises RequestError where its table has another size."""
    if not LEAST * model.vocab_size <= words.vocab_size <= model.vocab_size:
        raise RequestError(
            f"{where}: the tokenizer has {words.vocab_size:,} tokens and the model's table {model.vocab_size:,} rows; "
            "they do not belong together (--tokenizer names another one)"
        )


def _find(source: Path) -> tokenizers.Tokenizer | None:
    if source.is_file():
        return tokenizers.load(source)
    names = [n for kind in tokenizers.KINDS.values() for n in (kind.file, *kind.foreign)]
    if any((source / n).is_file() for n in (tokenizers.DESCRIPTOR, *names)):
        return tokenizers.load(source)
    made = _from_vocabulary(source)
    return JsonTokenizer.open(made, {}, _epath(source)) if made else None


def _epath(path: Path) -> Any:
    from etils import epath

    return epath.Path(path)


def _from_vocabulary(folder: Path) -> bytes | None:
    """A tokenizer.json from the files that older folders have instead: vocab.txt, or vocab.json and merges.txt."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    said = _json(folder / "tokenizer_config.json")
    if (folder / "vocab.txt").is_file():
        vocab = {t.rstrip("\n"): i for i, t in enumerate((folder / "vocab.txt").read_text("utf-8").splitlines())}
        made = Tokenizer(models.WordPiece(vocab, unk_token=str(said.get("unk_token", "[UNK]"))))
        lower = bool(said.get("do_lower_case", True))
        made.normalizer = normalizers.BertNormalizer(lowercase=lower)  # pyright: ignore[reportAttributeAccessIssue]
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # pyright: ignore[reportAttributeAccessIssue]
        made.decoder = decoders.WordPiece()  # pyright: ignore[reportAttributeAccessIssue]
        special = [t for t in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if t in vocab]
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        vocab = _json(folder / "vocab.json")
        lines = (folder / "merges.txt").read_text("utf-8").splitlines()
        pairs = (line.partition(" ") for line in lines if line and not line.startswith("#version"))
        merges = [(left, right) for left, _, right in pairs]
        try:
            made = Tokenizer(models.BPE(vocab, merges))
        except Exception as e:  # the library raises bare Exception
            raise RequestError(f"{folder}: vocab.json and merges.txt do not fit ({e})") from None
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=bool(said.get("add_prefix_space", False)))
        made.pre_tokenizer = byte_level  # pyright: ignore[reportAttributeAccessIssue]
        made.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
        special = [t for t in ("<s>", "<pad>", "</s>", "<unk>", "<mask>", "<|endoftext|>") if t in vocab]
    else:
        return None
    made.add_special_tokens(special)
    return made.to_str().encode()


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as e:
        raise RequestError(f"{path}: not readable JSON ({e})") from None
    return content if isinstance(content, dict) else {}


def _special(words: tokenizers.Tokenizer) -> dict[str, str]:
    """How the special tokens of a SentencePiece model are written."""
    if not isinstance(words, SentencePieces):
        return {}
    ids = {"bos": words.bos_id, "eos": words.eos_id, "pad": words.pad_id, "unk": words.unk_id, "mask": words.mask_id}
    return {name: words.piece(i) for name, i in ids.items() if i is not None}


def hand_on(folder: Path, out: Path) -> dict[str, int]:
    """Writes an artifact's tokenizer as others read it; returns its special ids, as a config.json names them.

    A tokenizer.json stays one; a SentencePiece model also becomes one. What else came with it is copied.
    """
    if not (folder / tokenizers.DESCRIPTOR).is_file():
        return {}
    words = tokenizers.load(folder)
    (out / words.file).write_bytes(words.model)
    for name in BESIDE:
        if (folder / name).is_file():
            shutil.copy(folder / name, out / name)
    if isinstance(words, SentencePieces) and (made := sentencepiece_json.convert(words)):
        (out / JsonTokenizer.file).write_bytes(made)
    if not (out / "tokenizer_config.json").is_file():
        special = words.special if isinstance(words, JsonTokenizer) else _special(words)
        content: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{f"{k}_token": v for k, v in special.items()},
        }
        content["clean_up_tokenization_spaces"] = False
        (out / "tokenizer_config.json").write_text(json.dumps(content, indent=2) + "\n")
    return {"bos_token_id": words.bos_id, "eos_token_id": words.eos_id, "pad_token_id": words.pad_id}
