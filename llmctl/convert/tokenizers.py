"""Find the tokenizers of imported models, check them against the embedding table, and copy them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmctl.config.containment import within
from llmctl.config.errors import RequestError
from llmctl.config.text_input import parse_json
from llmctl.convert import post_processor, sentencepiece_json
from llmctl.convert.lazy_tensors import listed
from llmctl.data.tokenizers import loading as tokenizers
from llmctl.data.tokenizers.base import TextTemplate
from llmctl.data.tokenizers.sentencepieces import SentencePieces
from llmctl.data.tokenizers.tokenizer_json import JsonTokenizer
from llmctl.model.config import ModelConfig

GENERATION = "generation_config.json"
"""Name of the file that lists the end tokens, if a model has several. Generation stops at each end token."""
BESIDE = (
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("vocab.txt", "vocab.json", "merges.txt", GENERATION, "sentence_bert_config.json"),
)
"""Tokenizer files that only other programs read. The files are copied unchanged."""
LEAST = 0.9
"""Minimum number of tokens in a tokenizer, as a fraction of the embedding table's rows. Tables with more rows than
tokens are usually padded to a round number."""


def import_tokenizer(
    source: Path, work: Path, model: ModelConfig, config: Mapping[str, Any] | None = None, of: Path | None = None
) -> Path | None:
    """Convert the tokenizer of an imported model to the tokenizer folder of an artifact.

    The folder also records which special tokens transformers adds before and after a text. For decoder language models,
    it does not record them. All end tokens, at which generation stops, are written to generation_config.json.

    Args:
        source: Folder or file of the tokenizer.
        work: Folder to write to.
        model: Config of the model.
        config: The model's config.json.
        of: Folder of the model, if the tokenizer is from another folder.

    Returns:
        The folder `work`, or None if `source` contains no tokenizer.

    Raises:
        RequestError: If the tokenizer is damaged, or does not fit the model's embedding table. If the file of the added
            tokens is missing. If a file is a link that leads out of the folder.
    """
    folder = source if source.is_dir() else source.parent
    for name in (*BESIDE, SentencePieces.file):
        within(folder, name)
    if of:
        within(of, GENERATION)
    found = _find(source)
    if found is None:
        return None
    check(found, model, str(source))
    added = read_json(folder / "added_tokens.json")
    if beyond := [t for t, i in added.items() if not isinstance(i, int) or i >= found.vocab_size]:
        raise RequestError(
            f"{source}: its added tokens ({listed(beyond)}) are only read from a tokenizer.json; make one with "
            "transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    config = config or {}
    if reads_texts(model) and not (folder / tokenizers.DESCRIPTOR).is_file():
        found.own_template = _recorded(found, folder, model, config)
    found.save(work)
    for name in BESIDE:
        if (folder / name).is_file():
            shutil.copy(folder / name, work / name)
    ends = [config.get("eos_token_id"), read_json((of or folder) / GENERATION).get("eos_token_id")]
    if odd := [i for end in ends for i in ids_of(end) if i >= 2**31]:
        raise RequestError(f"{of or folder}: eos_token_id {odd[0]} is no token")
    tokenizers.chat_template(folder)
    _write_ends(work, found, ends)
    if isinstance(found, JsonTokenizer) and sentencepiece_json.model_beside(found, folder):
        shutil.copy(folder / SentencePieces.file, work / SentencePieces.file)  # GGUF export needs it
    return work


def unread_files(folder: Path) -> tuple[str, ...]:
    """Return the names of files in an artifact's tokenizer folder that no stage reads.

    If the folder has both a tokenizer.json and a SentencePiece model, no stage reads the SentencePiece model.
    """
    return (SentencePieces.file,) if (folder / JsonTokenizer.file).is_file() else ()


def reads_texts(model: ModelConfig) -> bool:
    """Return True if the model reads complete texts, and False for a decoder language model, which continues texts."""
    return not model.head_kind.vocabulary or model.architecture != "decoder"


def projects_pooled(model: ModelConfig) -> bool:
    """Return True if the model pools each text to one vector and projects it to outputs (classes or a number)."""
    kind = model.head_kind
    return not (kind.vocabulary or kind.per_token or kind.bare)


def pools_last(model: ModelConfig) -> bool:
    """Return True if transformers pools the model's outputs at the last token that is not the padding token."""
    return model.architecture == "decoder" and projects_pooled(model)


def _recorded(
    words: tokenizers.Tokenizer, folder: Path, model: ModelConfig, config: Mapping[str, Any]
) -> TextTemplate | None:
    """Return the special tokens that transformers adds around a text, or None if llmctl adds the same tokens by
    default."""
    found = _template(words, folder)
    pad = config.get("pad_token_id")
    if pools_last(model) and isinstance(pad, int):
        # Pooling in transformers skips padding tokens at the end of a text, also those that the template puts there.
        # A decoder's states at the tokens before them are the same with and without them.
        end = list(found.end)
        while end and end[-1] == pad:
            end.pop()
        found = replace(found, end=tuple(end))
    return None if found == words.template else found


def _template(words: tokenizers.Tokenizer, folder: Path) -> TextTemplate:
    """Return the special tokens that transformers adds around a text, according to the files in a folder."""
    settings = read_json(folder / "tokenizer_config.json")
    ids: dict[str, int | None] = {"bos": words.bos_id, "eos": words.eos_id}
    if isinstance(words, JsonTokenizer):
        return post_processor.read(words.backend, settings, ids)
    if not isinstance(words, SentencePieces):  # only llmctl reads byte tokenizers
        return words.template
    if str(settings.get("tokenizer_class", "")).startswith("T5") or (folder / "spiece.model").is_file():
        return TextTemplate((), (words.eos_id,), (words.eos_id,))  # T5's class appends the end token by itself
    begin = (words.bos_id,) * words.add_bos
    end = (words.eos_id,) * bool(settings.get("add_eos_token", False))
    return TextTemplate(begin, end, (*end, *begin))


def _write_ends(folder: Path, words: tokenizers.Tokenizer, end_ids: Iterable[Any]) -> None:
    """Add end tokens, at which generation stops, to the generation_config.json of a tokenizer's folder.

    Args:
        folder: Folder of the tokenizer.
        words: The tokenizer. If the file has no end token, the tokenizer's end token is added.
        end_ids: Values of `eos_token_id` in other files.
    """
    content = read_json(folder / GENERATION)
    own = ids_of(content.get("eos_token_id"))
    every = list(dict.fromkeys([*(own or [words.eos_id]), *(i for ids in end_ids for i in ids_of(ids))]))
    if set(every) - set(own) - {words.eos_id}:
        (folder / GENERATION).write_text(json.dumps(content | {"eos_token_id": every}, indent=2) + "\n")


def ids_of(value: Any) -> list[int]:
    """Return the token ids in a JSON field as a list. The field may contain one id, a list of ids, or null."""
    return [i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int)]


def check(words: tokenizers.Tokenizer, model: ModelConfig, where: str) -> None:
    """Check that the model's embedding table has a row for every token, and not many more rows than tokens.

    Raises:
        RequestError: If the table has fewer rows than tokens. If the number of tokens is less than the fraction `LEAST`
            of the rows.
    """
    if not LEAST * model.vocab_size <= words.vocab_size <= model.vocab_size:
        raise RequestError(
            f"{where}: the tokenizer has {words.vocab_size:,} tokens and the model's table {model.vocab_size:,} rows; "
            "they do not belong together (--tokenizer names another one)"
        )


def _find(source: Path) -> tokenizers.Tokenizer | None:
    if source.is_file():
        return tokenizers.load(source)
    names = [n for kind in tokenizers.KINDS.values() for n in (kind.file, *kind.other_files)]
    if any((source / n).is_file() for n in (tokenizers.DESCRIPTOR, *names)):
        return tokenizers.load(source)
    try:
        made = _from_vocabulary(source)
        return JsonTokenizer.open(made, {}, _epath(source)) if made else None
    except (OSError, ValueError, TypeError) as e:
        raise RequestError(f"{source}: not a usable tokenizer ({' '.join(str(e).split())[:200]})") from None


def _epath(path: Path) -> Any:
    from etils import epath

    return epath.Path(path)


def _from_vocabulary(folder: Path) -> bytes | None:
    """Build a tokenizer.json from the vocabulary files of an older folder.

    The files are vocab.txt (WordPiece), or vocab.json with merges.txt (byte-level BPE).

    Returns:
        The content of the tokenizer.json, or None if the folder contains neither.

    Raises:
        RequestError: If vocab.json and merges.txt do not fit together.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    settings = read_json(folder / "tokenizer_config.json")
    if (folder / "vocab.txt").is_file():
        vocab = {token: i for i, token in enumerate(_lines(folder / "vocab.txt"))}
        made = Tokenizer(models.WordPiece(vocab, unk_token=str(settings.get("unk_token", "[UNK]"))))
        lower = bool(settings.get("do_lower_case", True))
        made.normalizer = normalizers.BertNormalizer(  # pyright: ignore[reportAttributeAccessIssue]
            handle_chinese_chars=bool(settings.get("tokenize_chinese_chars", True)),
            strip_accents=settings.get("strip_accents"),
            lowercase=lower,
        )
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # pyright: ignore[reportAttributeAccessIssue]
        made.decoder = decoders.WordPiece()  # pyright: ignore[reportAttributeAccessIssue]
        special = [t for t in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if t in vocab]
        ends = ("[CLS]", "[SEP]")
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        vocab, most = read_json(folder / "vocab.json"), (folder / "vocab.json").stat().st_size
        if odd := [i for i in vocab.values() if type(i) is not int or not 0 <= i < most]:
            raise ValueError(f"vocab.json: {str(odd[0])[:40]} is no id of so few tokens")
        lines = _lines(folder / "merges.txt")
        pairs = (line.partition(" ") for line in lines if line and not line.startswith("#version"))
        merges = [(left, right) for left, _, right in pairs]
        try:
            made = Tokenizer(models.BPE(vocab, merges))
        except Exception as e:  # the library raises bare Exception
            raise RequestError(f"{folder}: vocab.json and merges.txt do not fit ({e})") from None
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=bool(settings.get("add_prefix_space", False)))
        made.pre_tokenizer = byte_level  # pyright: ignore[reportAttributeAccessIssue]
        made.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
        special = [t for t in ("<s>", "<pad>", "</s>", "<unk>", "<mask>", "<|endoftext|>") if t in vocab]
        ends = ("<s>", "</s>")  # RoBERTa has these tokens; GPT-2's vocabulary has neither
    else:
        return None
    made.add_special_tokens(special)
    if all(t in vocab for t in ends):
        begin, end = (vocab[t] for t in ends)
        # RoBERTa separates the texts of a pair by two end tokens.
        post_processor.put(made, TextTemplate((begin,), (end,), (end,) * (2 if ends[1] == "</s>" else 1)))
    return made.to_str().encode()


def _lines(file: Path) -> list[str]:
    """Return the lines of a file, split only at line feeds.

    Some vocabularies contain other line separators as tokens.
    """
    return file.read_text("utf-8").removesuffix("\n").split("\n")


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Return {} if the file is missing, or if its JSON value is no object.

    Raises:
        RequestError: If the file is no valid JSON.
    """
    if not path.is_file():
        return {}
    try:
        content = parse_json(path.read_bytes())
    except (OSError, ValueError) as e:
        raise RequestError(f"{path}: not readable JSON ({e})") from None
    return content if isinstance(content, dict) else {}
