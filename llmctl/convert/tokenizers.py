"""Tokenizers of imported and exported models: find them, check them against the embedding table, and write them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmctl.config.errors import RequestError
from llmctl.convert import sentencepiece_json
from llmctl.convert.lazy_tensors import listed
from llmctl.data.tokenizers import loading as tokenizers
from llmctl.data.tokenizers.sentencepieces import SentencePieces
from llmctl.data.tokenizers.tokenizer_json import JsonTokenizer
from llmctl.model.config import ModelConfig

BESIDE = (
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("vocab.txt", "vocab.json", "merges.txt", "generation_config.json", "sentence_bert_config.json"),
)
"""Files that belong to a tokenizer and that other programs read; they are copied unchanged."""
LEAST = 0.9
"""Minimum fraction of the embedding table that the tokenizer must cover. Tables are padded to round numbers only."""


def bring(source: Path, work: Path, model: ModelConfig) -> Path | None:
    """Copy the tokenizer of `source` (a folder or a file) into `work` for an artifact.

    Returns:
        The folder, or None if the source has no tokenizer.

    Raises:
        RequestError: If the tokenizer is damaged, does not fit the model's table, or lacks its added tokens.
    """
    found = _find(source)
    if found is None:
        return None
    check(found, model, str(source))
    folder = source if source.is_dir() else source.parent
    if beyond := [t for t, i in _json(folder / "added_tokens.json").items() if i >= found.vocab_size]:
        raise RequestError(
            f"{source}: its added tokens ({listed(beyond)}) are only read from a tokenizer.json; make one with "
            "transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    found.save(work)
    for name in BESIDE:
        if (folder / name).is_file():
            shutil.copy(folder / name, work / name)
    return work


def check(words: tokenizers.Tokenizer, model: ModelConfig, where: str) -> None:
    """Check that the model has an embedding row for every token.

    Raises:
        RequestError: If the table has another size.
    """
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
    """Build a tokenizer.json from the files of older folders: vocab.txt, or vocab.json and merges.txt."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    said = _json(folder / "tokenizer_config.json")
    if (folder / "vocab.txt").is_file():
        vocab = {token: i for i, token in enumerate(_lines(folder / "vocab.txt"))}
        made = Tokenizer(models.WordPiece(vocab, unk_token=str(said.get("unk_token", "[UNK]"))))
        lower = bool(said.get("do_lower_case", True))
        made.normalizer = normalizers.BertNormalizer(  # pyright: ignore[reportAttributeAccessIssue]
            handle_chinese_chars=bool(said.get("tokenize_chinese_chars", True)),
            strip_accents=said.get("strip_accents"),
            lowercase=lower,
        )
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # pyright: ignore[reportAttributeAccessIssue]
        made.decoder = decoders.WordPiece()  # pyright: ignore[reportAttributeAccessIssue]
        special = [t for t in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if t in vocab]
        ends = ("[CLS]", "[SEP]")
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        vocab = _json(folder / "vocab.json")
        lines = _lines(folder / "merges.txt")
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
        ends = ("<s>", "</s>")  # RoBERTa has these tokens; GPT-2's vocabulary has neither
    else:
        return None
    made.add_special_tokens(special)
    if all(t in vocab for t in ends):
        _put_between(made, ends[:1], ends[1:])
    return made.to_str().encode()


def _lines(file: Path) -> list[str]:
    """Return the lines of a file, split at line feeds only.

    Some vocabularies contain other line separators as tokens.
    """
    return file.read_text("utf-8").removesuffix("\n").split("\n")


def _put_between(made: Any, begin: Sequence[str], end: Sequence[str]) -> None:
    """Make a tokenizer of the `tokenizers` library add `begin` and `end` tokens when it encodes with special tokens."""
    from tokenizers import processors

    made.post_processor = processors.TemplateProcessing(
        single=[*begin, "$A", *end],
        pair=[*begin, "$A", *end, "$B:1", *(f"{t}:1" for t in end)],
        special_tokens=[(t, made.token_to_id(t)) for t in dict.fromkeys([*begin, *end])],
    )


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as e:
        raise RequestError(f"{path}: not readable JSON ({e})") from None
    return content if isinstance(content, dict) else {}


def _special(words: tokenizers.Tokenizer) -> dict[str, str]:
    """Return the spellings of a SentencePiece model's special tokens."""
    if not isinstance(words, SentencePieces):
        return {}
    ids = {"bos": words.bos_id, "eos": words.eos_id, "pad": words.pad_id, "unk": words.unk_id, "mask": words.mask_id}
    return {name: words.piece(i) for name, i in ids.items() if i is not None}


def _untold(words: tokenizers.Tokenizer) -> Any:
    """Return a `tokenizers` tokenizer that still needs a rule for the first token; None if it needs none."""
    from tokenizers import Tokenizer

    if isinstance(words, SentencePieces):
        return sentencepiece_json.convert(words)
    if not isinstance(words, JsonTokenizer) or not words.add_bos:
        return None
    made = Tokenizer.from_buffer(words.model)
    return made if made.post_processor is None else None


def hand_on(folder: Path, out: Path, ends: bool) -> dict[str, int]:
    """Write an artifact's tokenizer in formats that other programs read.

    A tokenizer.json stays one. A SentencePiece model is also converted to one. If the file has no rule for the first
    token, the rule is added. The other files of the tokenizer are copied.

    Args:
        folder: Folder of the artifact's tokenizer.
        out: Folder to write to.
        ends: Whether encoded texts end with the end token, as models that read complete texts need.

    Returns:
        Ids of the special tokens under the names of config.json.
    """
    if not (folder / tokenizers.DESCRIPTOR).is_file():
        return {}
    words = tokenizers.load(folder)
    (out / words.file).write_bytes(words.model)
    for name in BESIDE:
        if (folder / name).is_file():
            shutil.copy(folder / name, out / name)
    special = words.special if isinstance(words, JsonTokenizer) else _special(words)
    made = _untold(words)
    if made is not None:
        if words.add_bos or ends:
            _put_between(made, [special["bos"]] * words.add_bos, [special["eos"]] * ends)
        (out / JsonTokenizer.file).write_text(made.to_str(), encoding="utf-8")
    if not (out / "tokenizer_config.json").is_file():
        content: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{f"{k}_token": v for k, v in special.items()},
        }
        content["clean_up_tokenization_spaces"] = False
        (out / "tokenizer_config.json").write_text(json.dumps(content, indent=2) + "\n")
    return {"bos_token_id": words.bos_id, "eos_token_id": words.eos_id, "pad_token_id": words.pad_id}
