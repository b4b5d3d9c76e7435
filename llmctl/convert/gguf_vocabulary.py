"""Convert vocabularies of GGUF files: byte-level BPE (tokenizer.json) and SentencePiece (tokenizer.model)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmctl.config.errors import RequestError
from llmctl.convert import sentencepiece_json
from llmctl.convert.tokenizers import GENERATION
from llmctl.data.tokenizers import loading as tokenizers
from llmctl.data.tokenizers.base import DESCRIPTOR, Tokenizer
from llmctl.data.tokenizers.sentencepieces import SentencePieces
from llmctl.data.tokenizers.tokenizer_json import JsonTokenizer
from llmctl.model.generate.continuations import end_ids

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)
"""Token types of GGUF, which are numbered as in SentencePiece."""
ABSENT = -1000.0
"""Score of tokens that are not in the SentencePiece model, as in llama.cpp's converter."""

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {"llama-bpe": CONTRACTIONS + r"\p{N}{1,3}" + REST, "qwen2": CONTRACTIONS + r"\p{N}" + REST}
DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell")
WHOLE = ("gpt-2", "default")
"""llama.cpp's names of the pre-tokenizers that only split texts by GPT-2's pattern."""

ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
"""Metadata keys of the end tokens, at which generation stops. These tokens end a text, a turn, or a message to a
tool."""
TURNS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<EOT>")
"""Control tokens that may end a turn. If the metadata names no such token, the first token of this list in the
vocabulary is used, as in llama.cpp."""
SPECIAL = {"bos": "bos_token_id", "eos": "eos_token_id", "pad": "padding_token_id", "unk": "unknown_token_id"}


def read(file: Path, work: Path) -> Path:
    """Convert the vocabulary of a GGUF file to a tokenizer in the folder `work`, and return that folder.

    Raises:
        RequestError: If the type of the vocabulary is unknown.
    """
    import gguf

    fields = gguf.GGUFReader(file).fields

    def get(key: str, default: Any = None) -> Any:
        return fields[f"tokenizer.ggml.{key}"].contents() if f"tokenizer.ggml.{key}" in fields else default

    work.mkdir(parents=True, exist_ok=True)
    kind, tokens = get("model"), get("tokens", [])
    kinds = get("token_type") or [NORMAL] * len(tokens)
    if kind == "gpt2":
        special = {name: tokens[i] for name, key in SPECIAL.items() if (i := get(key)) is not None}
        made = _bpe(file, get("pre", "default"), tokens, kinds, get("merges", []))
        # without this key, llama.cpp decides by the pre-tokenizer
        words = JsonTokenizer(made, bool(get("add_bos_token", get("pre") == "llama-bpe")), special)
        words.save(_epath(work))
    elif kind == "llama":
        SentencePieces(_sentencepiece(tokens, get("scores"), kinds, get), bool(get("add_bos_token", True))).save(
            _epath(work)
        )
    else:
        raise RequestError(f"{file}: a vocabulary of kind {kind!r} is not understood; --tokenizer names another one")
    ends = [i for key in ENDS if (i := get(key)) is not None]
    if get("eot_token_id") is None:
        control = {t: i for i, (t, k) in enumerate(zip(tokens, kinds, strict=True)) if k == CONTROL}
        ends += [control[t] for t in TURNS if t in control][:1]
    if len(set(ends)) > 1:
        generation = {"eos_token_id": sorted(set(ends))}
        (work / GENERATION).write_text(json.dumps(generation, indent=2) + "\n")
    if "tokenizer.chat_template" in fields:
        template = {"chat_template": fields["tokenizer.chat_template"].contents()}
        (work / "tokenizer_config.json").write_text(json.dumps(template, indent=2) + "\n")
    return work


def _epath(path: Path) -> Any:
    from etils import epath

    return epath.Path(path)


def _bpe(file: Path, pre: str, tokens: list[str], kinds: list[int], merges: list[str]) -> bytes:
    byte_level: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    if pre in SPLITS:
        split = {"type": "Split", "pattern": {"Regex": SPLITS[pre]}, "behavior": "Isolated", "invert": False}
        cut: list[dict[str, Any]] = [split, byte_level | {"use_regex": False}]
    elif pre in DIGITS:
        cut = [{"type": "Digits", "individual_digits": True}, byte_level | {"use_regex": True}]
    elif pre in WHOLE:
        cut = [byte_level | {"use_regex": True}]
    else:
        known = ", ".join(sorted([*SPLITS, *DIGITS, *WHOLE]))
        raise RequestError(
            f"{file}: text is cut as {pre!r}, which is not understood (known: {known}); --tokenizer names another one"
        )
    added = [
        {"id": i, "content": t, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": kinds[i] == CONTROL}
        for i, t in enumerate(tokens) if kinds[i] in (CONTROL, USER)
    ]  # fmt: skip
    content = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": cut},
        "post_processor": None,
        "decoder": byte_level | {"use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            "ignore_merges": pre == "llama-bpe",
            "vocab": {t: i for i, t in enumerate(tokens)}, "merges": merges,
        },
    }  # fmt: skip
    return json.dumps(content, ensure_ascii=False).encode()


def _protobuf() -> Any:
    """Return the protobuf classes of the SentencePiece file format."""
    from sentencepiece import sentencepiece_model_pb2

    return sentencepiece_model_pb2


def _sentencepiece(tokens: list[str], scores: list[float] | None, kinds: list[int], get: Any) -> bytes:
    pb = _protobuf()
    model = pb.ModelProto()
    for token, score, kind in zip(tokens, scores or [0.0] * len(tokens), kinds, strict=True):
        model.pieces.add(piece=token, score=score, type=kind)
    spec = model.trainer_spec
    spec.model_type = pb.TrainerSpec.BPE
    spec.vocab_size, spec.byte_fallback = len(tokens), BYTE in kinds
    for name, key in SPECIAL.items():
        setattr(spec, f"{name}_id", get(key, -1))
        if get(key) is not None:
            setattr(spec, f"{name}_piece", tokens[get(key)])
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = bool(get("add_space_prefix", True))
    model.normalizer_spec.remove_extra_whitespaces = False
    return model.SerializeToString()


# --- export ----------------------------------------------------------------------------------------------------------


def write(writer: Any, folder: Path, rows: int) -> str:
    """Add an artifact's tokenizer to a GGUF writer.

    Args:
        writer: A `gguf.GGUFWriter`.
        folder: Folder of the tokenizer.
        rows: Number of rows of the model's embedding table. The vocabulary is padded to this size.

    Returns:
        A description of the differences between tokenization in llama.cpp and in llmctl; "" if there are none.

    Raises:
        RequestError: If GGUF cannot express the tokenizer.
    """
    if not (folder / DESCRIPTOR).is_file():
        return "the artifact has no tokenizer, and neither has the file"
    words = tokenizers.load(folder)
    pieces = sentencepiece_json.model_beside(words, folder) if isinstance(words, JsonTokenizer) else words
    if isinstance(pieces, SentencePieces):
        tokens, kinds = _write_sentencepiece(writer, pieces, words, rows)
    elif isinstance(words, JsonTokenizer):
        tokens, kinds = _write_bpe(writer, words, str(folder))
    else:
        raise RequestError(f"{folder}: GGUF has no kind for a tokenizer of kind {words.kind!r}")
    filler = [f"[PAD{i}]" for i in range(len(tokens), rows)]
    writer.add_token_list(tokens + filler)
    writer.add_token_types(kinds + [UNUSED] * len(filler))
    writer.add_bos_token_id(words.bos_id)
    writer.add_eos_token_id(words.eos_id)
    if others := [i for i in end_ids(folder, words) if i != words.eos_id]:
        writer.add_eot_token_id(others[0])
    if others[1:]:
        writer.add_eom_token_id(others[1])
    writer.add_pad_token_id(words.pad_id)
    writer.add_unk_token_id(words.unk_id)
    writer.add_add_bos_token(words.add_bos)
    if template := tokenizers.chat_template(folder):
        writer.add_chat_template(template)
    more = f"llama.cpp has no key for the end tokens {others[2:]}" if others[2:] else ""
    return "; ".join(
        filter(None, (more, _tokenization_difference(words, pieces) if isinstance(pieces, SentencePieces) else ""))
    )


def _tokenization_difference(words: Tokenizer, pieces: SentencePieces) -> str:
    """Describe how llama.cpp tokenizes differently from the artifact's tokenizer; return "" if there is no difference.

    Args:
        words: Tokenizer of the artifact.
        pieces: Exported SentencePiece model, with which llama.cpp tokenizes.
    """
    if isinstance(words, JsonTokenizer) and sentencepiece_json.spaces_differ(words, pieces):
        return "llama.cpp adds a space before a text that begins with one, and this tokenizer.json does not"
    return _difference(pieces)


def _difference(words: SentencePieces) -> str:
    """Describe the feature of a SentencePiece model that llama.cpp does not support; return "" if there is none."""
    pb = _protobuf()
    model = pb.ModelProto.FromString(words.model)
    if model.trainer_spec.model_type == pb.TrainerSpec.UNIGRAM:
        return "llama.cpp has no bytes for what no piece of a unigram tokenizer covers: it reads an unknown token there"
    if model.normalizer_spec.precompiled_charsmap:
        return (
            f"llama.cpp does not normalize text ({model.normalizer_spec.name}) for this kind of tokenizer: do it first"
        )
    return ""


def _write_bpe(writer: Any, words: JsonTokenizer, where: str) -> tuple[list[str], list[int]]:
    content = json.loads(words.model)
    model = content["model"]
    if model.get("type") != "BPE":
        raise RequestError(f"{where}: GGUF export knows byte-level BPE and SentencePiece, not {model.get('type')}")
    added = {a["id"]: a for a in content.get("added_tokens", [])}
    named = {i: t for t, i in model["vocab"].items()} | {i: a["content"] for i, a in added.items()}
    tokens = [named.get(i, f"[PAD{i}]") for i in range(words.vocab_size)]
    kinds = [NORMAL if i in named else UNUSED for i in range(words.vocab_size)]
    for i, a in added.items():
        kinds[i] = CONTROL if a["special"] else USER
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre(content.get("pre_tokenizer"), where))
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in model["merges"]])
    return tokens, kinds


def _pre(cut: Any, where: str) -> str:
    """Return llama.cpp's name for the pre-tokenizer of a tokenizer.json.

    Raises:
        RequestError: If llama.cpp has no equal pre-tokenizer.
    """
    steps = (cut or {}).get("pretokenizers", [cut] if cut else [])
    kinds = [s["type"] for s in steps]
    if kinds == ["ByteLevel"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"]:
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        pattern = steps[0]["pattern"].get("Regex")
        found = next((name for name, regex in SPLITS.items() if regex == pattern), None)
        if found:
            return found
    raise RequestError(
        f"{where}: llama.cpp has no name for how this tokenizer cuts text ({', '.join(kinds) or 'not'}); "
        "import the model again from a folder that also has a tokenizer.model of the same tokens"
    )


def _write_sentencepiece(
    writer: Any, pieces: SentencePieces, words: Tokenizer, rows: int
) -> tuple[list[str], list[int]]:
    """Write SentencePiece's pieces to a GGUF writer, and return all tokens and their types.

    `words` is the same tokenizer as the SentencePiece model, or a tokenizer.json with additional tokens.
    """
    pb = _protobuf()
    model = pb.ModelProto.FromString(pieces.model)
    unigram = model.trainer_spec.model_type == pb.TrainerSpec.UNIGRAM
    writer.add_tokenizer_model("t5" if unigram else "llama")
    writer.add_tokenizer_pre("default")
    if unigram:
        writer.add_remove_extra_whitespaces(model.normalizer_spec.remove_extra_whitespaces)
        writer.add_precompiled_charsmap(model.normalizer_spec.precompiled_charsmap)
    writer.add_add_space_prefix(model.normalizer_spec.add_dummy_prefix)
    tokens, kinds = [p.piece for p in model.pieces], [p.type for p in model.pieces]
    added = json.loads(words.model).get("added_tokens", []) if isinstance(words, JsonTokenizer) else []
    tokens += [f"[PAD{i}]" for i in range(len(tokens), words.vocab_size)]
    kinds += [UNUSED] * (len(tokens) - len(kinds))
    for token in added:
        i = token["id"]
        tokens[i] = token["content"]
        if kinds[i] in (NORMAL, USER, UNUSED):
            kinds[i] = CONTROL if token["special"] else USER
    writer.add_token_scores([p.score for p in model.pieces] + [ABSENT] * (rows - len(model.pieces)))
    return tokens, kinds
