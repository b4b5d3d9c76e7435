"""Read and write the post-processors of tokenizer.json files, which add special tokens around a text.

Example:
    >>> from tokenizers import Tokenizer, models
    >>> made = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2}, unk_token="a"))
    >>> put(made, TextTemplate((0,), (1,), (1, 1)))
    >>> read(made, {}, {})
    TextTemplate(begin=(0,), end=(1,), between=(1, 1))
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer

from llmctl.data.tokenizers.base import TextTemplate

SAMPLES = ("a", "the", "A", "0", ".", "e")
"""Texts that are encoded to find out which tokens a post-processor adds. At least one text has tokens in any
vocabulary."""


def read(made: Tokenizer, config: Mapping[str, Any], special: Mapping[str, int | None]) -> TextTemplate:
    """Return the special tokens that transformers adds around a text.

    Args:
        made: Tokenizer of the tokenizer.json.
        config: Content of the tokenizer_config.json in the same folder. If the config has `add_bos_token` or
            `add_eos_token`, transformers replaces the post-processor.
        special: Token ids of "bos" and "eos", or None.
    """
    if "add_bos_token" in config or "add_eos_token" in config:
        bos, eos = (
            (i,) if config.get(f"add_{name}_token") and (i := special.get(name)) is not None else ()
            for name in ("bos", "eos")
        )
        return TextTemplate(bos, eos, (*eos, *bos))
    made = Tokenizer.from_str(made.to_str())
    made.no_padding()  # files of sentence-transformers pad every text to 128 tokens; a template has no padding
    made.no_truncation()
    text = next((s for s in SAMPLES if made.encode(s, add_special_tokens=False).ids), SAMPLES[0])
    begin, end, _ = _around(made.encode(text))
    _, _, between = _around(made.encode(text, text))
    return TextTemplate(begin, end, between)


def _around(encoded: Any) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Return the special tokens of an encoded text or pair: before the first text, after the last, and between them."""
    of_text = [i for i, s in enumerate(encoded.sequence_ids) if s is not None]
    if not of_text:
        return tuple(encoded.ids), (), ()
    first, last = of_text[0], of_text[-1]
    inner = [encoded.ids[i] for i in range(first, last) if encoded.sequence_ids[i] is None]
    return tuple(encoded.ids[:first]), tuple(encoded.ids[last + 1 :]), tuple(inner)


def marks_second(made: Tokenizer) -> bool:
    """Return True if the second text of a pair has the token type 1, and the first text has the type 0."""
    made = Tokenizer.from_str(made.to_str())
    made.no_padding()
    made.no_truncation()
    text = next((s for s in SAMPLES if made.encode(s, add_special_tokens=False).ids), SAMPLES[0])
    pair = made.encode(text, text)
    return all(s is None or s == t for s, t in zip(pair.sequence_ids, pair.type_ids, strict=True))


def put(made: Any, template: TextTemplate) -> None:
    """Set the post-processor of a tokenizer, so that it adds the tokens of a template.

    If the tokenizer has a ByteLevel post-processor, which corrects the offsets of tokens, the ByteLevel post-processor
    is kept.
    """
    from tokenizers import processors

    begin, end, between = (
        [made.id_to_token(i) for i in ids] for ids in (template.begin, template.end, template.between)
    )
    around: Any = processors.TemplateProcessing(
        single=[*begin, "$A", *end],
        pair=[*begin, "$A", *between, "$B:1", *(f"{t}:1" for t in end)],
        special_tokens=[(t, made.token_to_id(t)) for t in dict.fromkeys([*begin, *end, *between])],
    )
    content = json.loads(made.to_str())["post_processor"] or {}
    steps = [p for p in content.get("processors", [content]) if p.get("type") == "ByteLevel"]
    if steps:
        offsets: Any = processors.ByteLevel(trim_offsets=steps[0].get("trim_offsets", True))
        around = processors.Sequence([offsets, around])
    made.post_processor = around  # pyright: ignore[reportAttributeAccessIssue]
