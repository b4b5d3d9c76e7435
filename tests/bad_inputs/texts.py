"""Bad tokenizers, chat templates, conversations and prompts."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

from bad_inputs.case import DEEP, IMPORT, Case, both, edit, nested, put


def tokenizers() -> Iterator[Case]:
    def model(**new: Any) -> Callable[[Any], Any]:
        return lambda t: t.update(model=new)

    replace = {"type": "Replace", "pattern": {"Regex": "(?<"}, "content": ""}
    long = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa" * 100}
    changes: dict[str, Callable[[Any], Any]] = {
        "a regular expression that is none": lambda t: t.update(normalizer=replace),
        "no vocabulary": lambda t: t["model"].update(vocab={}),
        "an id of 10^9": lambda t: t["added_tokens"][2].update(id=10**9),
        "an id of 10^12": lambda t: t["added_tokens"][2].update(id=10**12),
        "an id of 4 * 10^9 in the vocabulary": lambda t: t["model"]["vocab"].update(zzz=4 * 10**9),
        "an id that is negative": lambda t: t["model"]["vocab"].update(zzz=-1),
        "a template of unknown tokens": lambda t: t.update(
            post_processor={
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "X", "type_id": 0}}],
                "pair": [],
                "special_tokens": {},
            }
        ),
        "a charsmap that panics": lambda t: t.update(
            normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}
        ),
        "a charsmap that is cut": lambda t: t.update(
            normalizer={"type": "Precompiled", "precompiled_charsmap": "/////w=="}
        ),
        "an empty unigram": model(type="Unigram", unk_id=5, vocab=[]),
        "a unigram without its unknown token": model(type="Unigram", unk_id=5, vocab=[["</s>", 0.0]]),
        "merges of unknown tokens": lambda t: t["model"].update(merges=[["qq", "zz"]]),
        "merges are numbers": lambda t: t["model"].update(merges=[1]),
        "an unknown model": model(type="X"),
        "an unknown normalizer": lambda t: t.update(normalizer={"type": "X"}),
        "an unknown decoder": lambda t: t.update(decoder={"type": "X"}),
        "added tokens are a text": lambda t: t.update(added_tokens="x"),
        "no end token": lambda t: (
            t.update(added_tokens=[a for a in t["added_tokens"] if a["content"] != "</s>"])
            or (t["model"]["vocab"].pop("</s>", None) and None)
        ),
        "a list": lambda t: [],
        "deep": lambda t: nested(200),
        "normalizers without end": lambda t: t.update(normalizer={"type": "Sequence", "normalizers": [long] * 20}),
    }
    prepare = both(
        edit("art/manifest.json", lambda m: m.update(tokenizer="") or (m.pop("checksums") and None)),
        lambda i: (i / "art/tokenizer/llmctl_tokenizer.json").unlink(),
    )
    argv = ["generate", "IN/art", "--prompt", "a", "--max-new", "1"]
    for name, change in changes.items():
        make = both(prepare, edit("art/tokenizer/tokenizer.json", change))
        code = 0 if name == "an id of 10^9" else 2  # the library numbers added tokens itself
        yield Case(f"tokenizer.json: {name}", argv, ("art",), make, code=code)
        if name in ("a charsmap that panics", "no end token", "merges of unknown tokens", "deep"):
            yield Case(f"tokenizer.json, import: {name}", IMPORT, ("hf",), edit("hf/tokenizer.json", change))
    beside: dict[str, bytes] = {
        "tokenizer_config.json: deep": DEEP,
        "tokenizer_config.json: a list": b"[1]",
        "tokenizer_config.json: end token is a number": b'{"eos_token": {"content": 5}}',
        "tokenizer_config.json: end token is an object": b'{"eos_token": {"a": 5}}',
        "tokenizer_config.json: end token is unknown": b'{"eos_token": "<x>"}',
        "tokenizer_config.json: not UTF-8": b'{"eos_token": "\xe9"}',
        "tokenizer_config.json: surrogate": b'{"eos_token": "\\ud800"}',
        "special_tokens_map.json: deep": DEEP,
        "special_tokens_map.json: a list": b"[5]",
        "generation_config.json: end of 10^12": b'{"eos_token_id": 1000000000000}',
        "generation_config.json: deep": DEEP,
        "generation_config.json: not UTF-8": b"\xe9",
        "llmctl_tokenizer.json: empty": b"",
        "llmctl_tokenizer.json: a list": b"[]",
        "llmctl_tokenizer.json: leads out": b'{"kind": "json", "file": "../../../secret", "digest": "0"}',
        "llmctl_tokenizer.json: kind is unknown": b'{"kind": "x", "file": "tokenizer.json", "digest": "0"}',
        "llmctl_tokenizer.json: another digest": b'{"kind": "json", "file": "tokenizer.json", "digest": "0"}',
        "llmctl_tokenizer.json: kind is a list": b'{"kind": [], "file": "tokenizer.json", "digest": "0"}',
        "llmctl_tokenizer.json: file is a number": b'{"kind": "json", "file": 5, "digest": "0"}',
    }
    for name, data in beside.items():
        yield Case(
            f"beside the tokenizer, {name}",
            argv,
            ("art",),
            both(prepare, put(f"art/tokenizer/{name.partition(':')[0]}", data)),
        )
    yield Case(
        "tokenizer: a file was changed", argv, ("art",), lambda i: (i / "art/tokenizer/tokenizer.json").write_text("{}")
    )
    yield Case("tokenizer: is missing", argv, ("art",), lambda i: shutil.rmtree(i / "art/tokenizer"))
    pretrain = ["pretrain", "--out", "OUT", "--data.path", "IN/rows.txt", "--tokenizer.path", "IN/t"]
    pieces: dict[str, bytes] = {
        "empty": b"",
        "zero bytes": bytes(100),
        "a text": b"abc",
        "varints": b"\xff" * 100,
        "a field that is cut": b"\x0a\xff\xff\xff\xff\x0f",
    }
    for name, data in pieces.items():
        yield Case(f"sentencepiece: {name}", pretrain, ("rows.txt",), put("t/tokenizer.model", data))
    yield Case(
        "sentencepiece: cut",
        pretrain,
        ("rows.txt", "pieces"),
        lambda i: put("t/tokenizer.model", (i / "pieces/tokenizer.model").read_bytes()[:500])(i),
    )
    old = {
        "vocab.json: a list": ("vocab.json", b"[]"),
        "vocab.json: ids are texts": ("vocab.json", b'{"a": "x"}'),
        "vocab.json: ids are huge": ("vocab.json", b'{"a": 1000000000000}'),
        "merges.txt: not UTF-8": ("merges.txt", b"\xe9"),
        "merges.txt: of unknown tokens": ("merges.txt", b"qq zz"),
        "merges.txt: a word": ("merges.txt", b"a"),
        "tokenizer_config.json: a list": ("tokenizer_config.json", b"["),
    }
    for name, (file, data) in old.items():
        yield Case(
            f"older tokenizer, {name}", [*IMPORT, "--tokenizer", "IN/old"], ("hf", "old"), put(f"old/{file}", data)
        )
    older = {
        "vocab.txt: not UTF-8": ("vocab.txt", b"\xe9"),
        "vocab.txt: empty": ("vocab.txt", b""),
        "strip_accents is a text": ("tokenizer_config.json", b'{"strip_accents": "x"}'),
        "unk_token is missing": ("tokenizer_config.json", b'{"unk_token": "zzz"}'),
    }
    for name, (file, data) in older.items():
        yield Case(
            f"older tokenizer, {name}",
            [*IMPORT, "--tokenizer", "IN/older"],
            ("hf", "older"),
            put(f"older/{file}", data),
        )


def templates() -> Iterator[Case]:
    texts: dict[str, str | bytes] = {
        "empty": "",
        "blank": "   ",
        "without output": "{% if 0 %}x{% endif %}",
        "deep blocks": "{% if 1 %}" * 2000 + "{% endif %}" * 2000,
        "deep brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "deep lists": "{{ " + "[" * 50_000 + "]" * 50_000 + " }}",
        "many signs": "{{ " + "-" * 50_000 + "1 }}",
        "not UTF-8": b"\xe9",
        "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "surrogate": '{{ "\\ud800" }}',
        "syntax": "{% x",
        "a date of a number": "{{ strftime_now(5) }}",
        "a date of any width": "{{ strftime_now('%999999999d') }}",
        "division": "{{ 1/0 }}",
        "raises": '{{ raise_exception("a\\nb") }}',
        "raises a number": "{{ raise_exception(5) }}",
        "includes": '{% include "x" %}',
        "extends": '{% extends "x" %}',
        "imports": '{% import "/etc/passwd" as x %}',
        "half a block": "{% generation %}",
        "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "a long text": "{{ 'a' * 10**10 }}",
        "doubling": "{% set n = namespace(a='a') %}{% for i in range(99) %}{% set n.a = n.a ~ n.a %}{% endfor %}",
        "powers": "{{ 9**9**9 }}",
        "a long range": "{{ range(10**12)|list|length }}",
        "attributes": "{{ ''.__class__.__mro__ }}",
        "globals": "{{ lipsum.__globals__ }}",
        "centre": "{{ 'a'|center(10**10) }}",
        "format": "{{ '%9999999999d'|format(1) }}",
        "replaces": "{% set n = namespace(a='a') %}{% for i in range(60) %}"
        "{% set n.a = n.a|replace('a', 'aaaaaaaa') %}{% endfor %}",
        "joins": "{{ (range(100000)|list * 10000)|join(',') }}",
        "unknown name": "{{ nothing.at.all }}",
        "large": "x" * 2_000_000,
    }
    prepare = edit("art/manifest.json", lambda m: m.pop("checksums") and None)
    for name, text in texts.items():
        argv = ["generate", "IN/art", "--chat", "--max-new", "1"]
        code = 0 if name == "blank" else 2  # three spaces are a prompt
        yield Case(
            f"template: {name}",
            argv,
            ("art",),
            both(prepare, put("art/tokenizer/chat_template.jinja", text)),
            stdin=b"hi\n",
            code=code,
        )


def talk() -> Iterator[Case]:
    values: dict[str, bytes] = {
        "empty": b"",
        "a list that is empty": b"[]",
        "an object": b"{}",
        "a number": b"5",
        "deep": b"[" * 100_000,
        "not UTF-8": b'[{"role": "user", "content": "\xe9"}]',
        "surrogate": b'[{"role": "user", "content": "\\ud800"}]',
        "no role": b'[{"content": "a"}]',
        "content is a list": b'[{"role": "user", "content": ["a"]}]',
        "role is a number": b'[{"role": 5, "content": "a"}]',
        "cut": b'[{"role": "us',
        "messages are a text": b'{"messages": "x"}',
        "a long number": b"9" * 5000,
    }
    chat = ["generate", "IN/art", "--chat", "--max-new", "1", "--file", "IN/m.json"]
    for name, data in values.items():
        yield Case(f"messages: {name}", chat, ("art",), put("m.json", data))
    yield Case("messages: standard input is not UTF-8", chat[:-2], ("art",), stdin=b"\xff\n")
    lines: dict[str, bytes] = {
        "empty": b"",
        "blank": b"\n \n",
        "a number": b"5\n",
        "no prompt": b'{"a": 1}\n',
        "prompt is empty": b'{"prompt": ""}\n',
        "deep": b"[" * 100_000,
        "not UTF-8": b'"\xe9"\n',
        "surrogate": b'"\\udce9"\n',
        "cut": b'{"prompt": "a',
        "a list": b"[]\n",
    }
    for name, data in lines.items():
        yield Case(f"prompts: {name}", ["generate", "IN/art", "--file", "IN/p.jsonl"], ("art",), put("p.jsonl", data))
    for name, data in {"not UTF-8": b"caf\xe9\n", "UTF-16": "hi".encode("utf-16"), "empty": b""}.items():
        yield Case(
            f"prompts as text: {name}", ["generate", "IN/art", "--file", "IN/p.txt"], ("art",), put("p.txt", data)
        )
    for place in ("IN", "http://x/y", "gs://x/y", "/dev/zero"):
        yield Case(f"prompts: {place}", ["generate", "IN/art", "--file", place], ("art",))
