"""Export tokenizers in Hugging Face formats, with the special tokens, padding and truncation of the model."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from llmctl.convert import post_processor, sentencepiece_json
from llmctl.convert.tokenizers import BESIDE, GENERATION, ids_of, pools_last, read_json, reads_texts
from llmctl.data.tokenizers import loading as tokenizers
from llmctl.data.tokenizers.base import TextTemplate
from llmctl.data.tokenizers.sentencepieces import SentencePieces
from llmctl.data.tokenizers.tokenizer_json import JsonTokenizer
from llmctl.model import weights
from llmctl.model.config import ModelConfig


def _special(words: tokenizers.Tokenizer) -> dict[str, str]:
    """Return the texts of a tokenizer's special tokens, by the names "bos", "eos", "pad", "unk", "mask"."""
    if isinstance(words, JsonTokenizer):
        return dict(words.special)
    if not isinstance(words, SentencePieces):
        return {}
    ids = {"bos": words.bos_id, "eos": words.eos_id, "pad": words.pad_id, "unk": words.unk_id, "mask": words.mask_id}
    return {name: words.piece(i) for name, i in ids.items() if i is not None}


@dataclass(frozen=True)
class Written:
    """Store the result of `export_tokenizer`: ids of special tokens, and the size of the embedding table."""

    ids: dict[str, Any]
    """Ids of special tokens, by the keys of config.json."""
    rows: int
    """Total number of rows that the embedding table needs to include added tokens; 0 if no row has to be added."""
    differences: tuple[str, ...] = ()
    """Differences between the tokenization in llmctl and in other programs, one line each."""


def export_tokenizer(folder: Path, out: Path, model: ModelConfig, seq_len: int = 0) -> Written | None:
    """Write an artifact's tokenizer in formats that other programs read.

    A tokenizer.json is copied. A SentencePiece model is copied, and also converted to a tokenizer.json. If the
    post-processor does not add the special tokens or token types that the model was trained with, the post-processor is
    replaced. The padding token, the sides of padding and truncation, and the maximum length are added to
    tokenizer_config.json. For decoder language models, these entries are not added.

    Args:
        folder: Folder of the artifact's tokenizer.
        out: Folder to write to.
        model: Config of the model.
        seq_len: Length in tokens to which texts were truncated in training; 0 if unknown.

    Returns:
        The exported special tokens, or None if the artifact has no tokenizer.
    """
    if not (folder / tokenizers.DESCRIPTOR).is_file():
        return None
    words = tokenizers.load(folder)
    (out / words.file).write_bytes(words.model)
    for name in BESIDE:
        if (folder / name).is_file():
            shutil.copy(folder / name, out / name)
    special, differences = _special(words), []
    config: dict[str, Any] = read_json(out / "tokenizer_config.json")
    if not config:
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **{f"{k}_token": v for k, v in special.items()}}
        config["clean_up_tokenization_spaces"] = False
    made: Any = words.backend if isinstance(words, JsonTokenizer) else None
    if isinstance(words, SentencePieces):
        made = sentencepiece_json.convert(words)
    if made is None:
        differences.append("transformers has no form of this tokenizer that splits text as llmctl does")
    ids: dict[str, Any] = {"bos_token_id": words.bos_id, "eos_token_id": words.eos_id, "pad_token_id": words.pad_id}
    rows = 0
    if made is not None:
        begin = (words.bos_id,) * words.add_bos
        wanted = words.template if reads_texts(model) else TextTemplate(begin, (), begin)
        changed = not isinstance(words, JsonTokenizer)
        typed = reads_texts(model) and model.token_types > 1
        fits = post_processor.read(made, config, {"bos": words.bos_id, "eos": words.eos_id}) == wanted
        if not fits or (typed and not post_processor.marks_second(made)):
            post_processor.put(made, wanted)
            # With these two keys transformers would replace the post-processor; some classes have one of their own.
            config = {k: v for k, v in config.items() if k not in ("add_bos_token", "add_eos_token")}
            config["tokenizer_class"], changed = "PreTrainedTokenizerFast", True
        if reads_texts(model):
            length = min(model.max_seq_len, seq_len or model.max_seq_len)
            types = ["token_type_ids"] * (model.token_types > 1)
            config |= {"model_max_length": length, "padding_side": "right", "truncation_side": "right"}
            config |= {"model_input_names": ["input_ids", *types, "attention_mask"]}
            config |= {} if model.head_kind.vocabulary else {"split_special_tokens": True}
            pad, fresh = _padding(words, special, made, wanted, model)
            config["pad_token"], ids["pad_token_id"], changed = pad, made.token_to_id(pad), changed or fresh
            if fresh and ids["pad_token_id"] >= model.vocab_size:
                rows = ids["pad_token_id"] + 1
                differences.append(
                    f"has no padding token but its end token; {pad} is added in row {rows - 1:,} of the table"
                )
            _rename_pad(out / "special_tokens_map.json", pad)
        if changed:
            (out / JsonTokenizer.file).write_text(made.to_str(), encoding="utf-8")
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    if len(every := ids_of(read_json(out / GENERATION).get("eos_token_id"))) > 1:
        ids["eos_token_id"] = every
    return Written(ids, rows, tuple(differences))


PAD = "<|pad|>"
"""Text of the padding token that is added on export if a model needs one."""


def _padding(
    words: tokenizers.Tokenizer, special: dict[str, str], made: Any, wanted: TextTemplate, model: ModelConfig
) -> tuple[str, bool]:
    """Return the padding token, and whether it was added to the tokenizer `made`.

    For a decoder with a pooled head, transformers pools at the last token that is not the padding token. Such a model
    needs a padding token that never ends a text.
    """
    eos: str = made.id_to_token(words.eos_id)
    own = special.get("pad", eos)
    if not pools_last(model):
        return own, False
    if own != eos and made.token_to_id(own) not in wanted.end:
        return own, False
    taken = {words.eos_id, words.bos_id, words.unk_id, words.mask_id, *wanted.begin, *wanted.end, *wanted.between}
    added = made.get_added_tokens_decoder().items()
    spare = [t.content for i, t in sorted(added) if t.special and i not in taken]
    if spare:
        return min(spare, key=lambda t: ("pad" not in t, spare.index(t))), False
    made.add_special_tokens([PAD])
    return PAD, True


def _rename_pad(file: Path, pad: str) -> None:
    """Set the padding token in a special_tokens_map.json, if the file exists."""
    if stored := read_json(file):
        file.write_text(json.dumps(stored | {"pad_token": pad}, indent=2) + "\n")


def with_rows(cfg: ModelConfig, params: dict[str, Any], rows: int) -> tuple[ModelConfig, dict[str, Any]]:
    """Extend the embedding table to `rows` rows, by rows of zeros, and return the new config and parameters.

    The new rows belong to tokens that the export adds.
    """
    flat = weights.flatten(params)
    table_VD = weights.dense(flat["embed/tokens"], flat["embed/tokens"].dtype)
    flat["embed/tokens"] = jnp.pad(table_VD, ((0, rows - len(table_VD)), (0, 0)))
    return cfg.model_copy(update={"vocab_size": rows}), weights.unflatten(flat)
