"""Bad rows, archives, prepared data and rows to predict; and links, pipes and devices in folders of others."""

from __future__ import annotations

import gzip
import io
import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bad_inputs.case import DEEP, IMPORT, Case, Make, both, edit, nested, octets, put


def read_splits(kind: str, path: str, *more: str) -> list[str]:
    """Return a command that reads all rows of a source with their labels."""
    given = {"data.source": kind, "data.path": path}
    words = [word for key, value in given.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    return ["prepare", "--splits", "OUT", *words, *(word for text in more for word in ("--set", text))]


def parquet(table: pa.Table) -> bytes:
    """Return a table as a Parquet file."""
    stream = io.BytesIO()
    pq.write_table(table, stream)
    return stream.getvalue()


def tables() -> Iterator[Case]:
    csvs: dict[str, bytes] = {
        "empty": b"",
        "no text": b"a,b\n1,2\n",
        "header alone": b"text,label\n",
        "too many fields": b"text,label\na,b,c\n",
        "too few fields": b"text,label\na\n",
        "open quote": b'text,label\n"a,b\n',
        "column twice": b"text,text\na,b\n",
        "nameless column": b"text,,label\na,x,b\n",
        "not UTF-8": b"text,label\ncaf\xe9,b\n",
        "UTF-16": "text,label\na,b\n".encode("utf-16"),
        "zero bytes": b"text,label\0\na,b\0\n",
        "no label in a row": b"text,label\na,x\nb,\n",
        "blank": b"\n\n\n",
        "text after a quote": b'text,label\n"a"b,c\n',
    }
    for name, data in csvs.items():
        yield Case(f"csv: {name}", read_splits("csv", "IN/x.csv"), make=put("x.csv", data))
    yield Case(
        "csv: a number that is none",
        read_splits("csv", "IN/x.csv", "data.label_type=number"),
        make=put("x.csv", b"text,label\na,x\nb,1\n"),
    )
    yield Case(
        "csv: a class that is not listed",
        read_splits("csv", "IN/x.csv", 'data.classes=["y"]'),
        make=put("x.csv", b"text,label\na,x\nb,y\n"),
    )
    yield Case(
        "csv: a column that is not there",
        read_splits("csv", "IN/x.csv", 'data.columns={text="z"}'),
        make=put("x.csv", b"text,label\na,x\n"),
    )
    yield Case(
        "csv: a filter of all",
        read_splits("csv", "IN/x.csv", 'data.filter={text="z"}'),
        make=put("x.csv", b"text,label\na,x\n"),
    )
    jsonls: dict[str, bytes] = {
        "empty": b"",
        "a list": b"[1]\n",
        "a number": b"5\n",
        "deep": b"[" * 100_000,
        "cut": b'{"text": "a',
        "key twice": b'{"text": "a", "text": "b"}\n',
        "text is a number": b'{"text": 5}\n',
        "text is null": b'{"text": null}\n',
        "not UTF-8": b'{"text": "\xe9"}\n',
        "surrogate": b'{"text": "\\ud800"}\n',
        "UTF-16": '{"text": "a"}'.encode("utf-16"),
        "a long number": b'{"text": "a", "label": ' + b"9" * 5000 + b"}\n",
        "label is an object": b'{"text": "a", "label": {}}\n',
        "label is a fraction": b'{"text": "a", "label": 0.5}\n{"text": "b", "label": 1}\n',
        "another key in a later row": b'{"text": "a", "label": "x"}\n{"txt": "b", "label": "x"}\n',
        "only blanks": b" \n\n",
        "trailing data": b'{"text": "a"} x\n',
        "tokens without tags": b'{"tokens": ["a"], "tags": []}\n',
        "tokens are a text": b'{"tokens": "ab", "tags": ["x", "y"]}\n',
        "answers without text": b'{"context": "a", "question": "b", "answers": 5}\n',
        "answers beyond": b'{"context": "a", "question": "b", "answers": {"text": ["zz"], "answer_start": [99999]}}\n',
        "answers are negative": b'{"context": "ab", "question": "b", "answers": {"text": ["a"], "answer_start": [-5]}}',
    }
    for name, data in jsonls.items():
        code = 0 if name == "surrogate" else 2  # half a pair becomes U+FFFD
        yield Case(f"jsonl: {name}", read_splits("jsonl", "IN/x.jsonl"), make=put("x.jsonl", data), code=code)
    for name, data in {
        "not UTF-8": b"caf\xe9\n",
        "UTF-16": "a".encode("utf-16"),
        "empty": b"",
        "blank": b" \n",
    }.items():
        yield Case(f"text: {name}", read_splits("text", "IN/x.txt"), make=put("x.txt", data))
    for name, data in {
        "empty": b"",
        "a text": b"PAR1",
        "zero bytes": bytes(500),
        "length is huge": b"PAR1" + bytes(50) + struct.pack("<I", 2**31 - 1) + b"PAR1",
    }.items():
        yield Case(f"parquet: {name}", read_splits("parquet", "IN/x.parquet"), make=put("x.parquet", data))
    cut = octets("rows.parquet", lambda data: data[:-20])
    yield Case("parquet: cut", read_splits("parquet", "IN/rows.parquet"), ("rows.parquet",), cut)
    for name, table in {
        "no text": pa.table({"a": ["x"]}),
        "text is a number": pa.table({"text": [1]}),
        "text is bytes": pa.table({"text": [b"\xe9"]}),
        "no rows": pa.table({"text": pa.array([], pa.string())}),
        "label is a structure": pa.table({"text": ["a"], "label": [{"x": 1}]}),
        "text is null": pa.table({"text": pa.nulls(2)}),
        "text is a date": pa.table({"text": pa.array([10**15], pa.timestamp("us"))}),
        "dates beyond": pa.table({"text": ["a"], "label": pa.array([2**62], pa.timestamp("us"))}),
    }.items():
        make = put("x.parquet", parquet(table))
        yield Case(f"parquet: {name}", read_splits("parquet", "IN/x.parquet"), make=make)
    state: dict[str, tuple[str, Any]] = {
        "state is a list": ("state.json", []),
        "state is empty": ("state.json", {}),
        "files are a text": ("state.json", {"_data_files": "x"}),
        "files are numbers": ("state.json", {"_data_files": [1]}),
        "no file name": ("state.json", {"_data_files": [{}]}),
        "file leads out": ("state.json", {"_data_files": [{"filename": "../../secret"}]}),
        "file is missing": ("state.json", {"_data_files": [{"filename": "x.arrow"}]}),
        "file is a number": ("state.json", {"_data_files": [{"filename": 5}]}),
        "rows by an index": ("state.json", {"_data_files": [], "_indices_files": [1]}),
        "no files": ("state.json", {"_data_files": []}),
        "info is a list": ("dataset_info.json", []),
        "features are a list": ("dataset_info.json", {"features": [1]}),
        "names are a number": ("dataset_info.json", {"features": {"label": {"_type": "ClassLabel", "names": 5}}}),
        "features are deep": ("dataset_info.json", {"features": {"label": nested(200)}}),
        "splits are a list of numbers": ("dataset_dict.json", {"splits": [1]}),
        "splits are missing": ("dataset_dict.json", {}),
        "splits are a number": ("dataset_dict.json", {"splits": 5}),
        "another split": ("dataset_dict.json", {"splits": ["x"]}),
    }
    for name, (file, value) in state.items():
        yield Case(
            f"hf: {name}", read_splits("hf", "IN/hf_data"), ("hf_data",), put(f"hf_data/{file}", json.dumps(value))
        )
    for name, data in {
        "not Arrow": b"abc",
        "empty": b"",
        "lengths are huge": b"\xff\xff\xff\xff\xff\xff\xff\x7f" + bytes(100),
    }.items():
        yield Case(f"hf: {name}", read_splits("hf", "IN/hf_data"), ("hf_data",), put("hf_data/data.arrow", data))
    yield Case("hf: no folder", read_splits("hf", "IN/missing"))
    at, info = "tfds/tiny/1.0.0", "tfds/tiny/1.0.0/dataset_info.json"
    tfds = [
        "prepare",
        "--splits",
        "OUT",
        "--set",
        "data.source=tfds",
        "--set",
        "data.name=tiny",
        "--set",
        "data.data_dir=IN/tfds",
    ]
    for name, data in {
        "features: empty": b"",
        "features: a list": b"[]",
        "features: deep": DEEP,
        "features: not UTF-8": b"\xe9",
        "features: an unknown class": b'{"pythonClassName": "x.y.Z"}',
        "features: a module to import": b'{"pythonClassName": "antigravity.x"}',
        "features: no class": b"{}",
    }.items():
        yield Case(f"tfds: {name}", tfds, ("tfds",), put(f"{at}/features.json", data))
    for name, data in {
        "info: empty": b"",
        "info: a list": b"[]",
        "info: deep": DEEP,
        "info: not UTF-8": b"\xe9",
        "info: no splits": b'{"name": "tiny"}',
    }.items():
        yield Case(f"tfds: {name}", tfds, ("tfds",), put(info, data))
    shard = f"{at}/tiny-train.array_record-00000-of-00001"
    for name, data in {"empty": b"", "zero bytes": bytes(100_000), "a text": b"abc"}.items():
        yield Case(f"tfds: shard, {name}", tfds, ("tfds",), put(shard, data))
    for name in ("x", "../x", "tiny:9.9.9", "tiny/x", "a" * 300):
        yield Case(f"tfds: name {name[:10]}", [word.replace("=tiny", f"={name}") for word in tfds], ("tfds",))
    yield Case("tfds: split is unknown", [*tfds, "--set", "data.split=x"], ("tfds",))
    yield Case("tfds: split is no split", [*tfds, "--set", "data.split=train[:x%]"], ("tfds",))


def archives() -> Iterator[Case]:
    line = b'{"text": "a", "label": "x"}\n'
    gz = {
        "not gzip": b"abc",
        "empty": b"",
        "cut": gzip.compress(line * 1000)[:-20],
        "checksum": gzip.compress(line)[:-8] + bytes(8),
        "a bomb": gzip.compress(bytes(200 << 20), 9),
        "not JSON": gzip.compress(b"abc"),
    }
    for name, data in gz.items():
        yield Case(f"gzip: {name}", read_splits("jsonl", "IN/x.jsonl.gz"), make=put("x.jsonl.gz", data))
    bomb = pa.compress(bytes(200 << 20), codec="zstd", asbytes=True)
    whole = pa.compress(line * 100, codec="zstd", asbytes=True)
    for name, data in {"not zstd": b"abc", "cut": whole[:-5], "a bomb": bomb}.items():
        yield Case(f"zstd: {name}", read_splits("jsonl", "IN/x.jsonl.zst"), make=put("x.jsonl.zst", data))


def prepared() -> Iterator[Case]:
    file = "prepared/prepared.json"
    train = [
        "pretrain",
        "--out",
        "OUT",
        "--data.source",
        "prepared",
        "--data.path",
        "IN/prepared",
        "--tokenizer.path",
        "IN/prepared/tokenizer",
        "--model.preset",
        "llama-tiny",
        "--train.seq-len",
        "8",
        "--train.batch-size",
        "8",
        "--train.steps",
        "1",
    ]
    part = lambda **new: lambda p: p["splits"]["train"][0].update(new) or (p.pop("digest") and None)  # noqa: E731
    shard = lambda **new: lambda p: p["splits"]["train"][0]["shards"][0].update(new) or (p.pop("digest") and None)  # noqa: E731
    changes: dict[str, Callable[[Any], Any]] = {
        "a field": lambda p: p.update(dtype="<u4"),
        "format is later": lambda p: p.update(format=99),
        "dtype is an object": lambda p: p.update(dtype="O") or (p.pop("digest") and None),
        "dtype is unknown": lambda p: p.update(dtype="x") or (p.pop("digest") and None),
        "dtype is wide": lambda p: p.update(dtype="<u8") or (p.pop("digest") and None),
        "dtype is huge": lambda p: p.update(dtype="V1000000000") or (p.pop("digest") and None),
        "dtype is float": lambda p: p.update(dtype="<f2") or (p.pop("digest") and None),
        "no splits": lambda p: p.update(splits={}) or (p.pop("digest") and None),
        "splits are a list": lambda p: p.update(splits=[]),
        "a list": lambda p: [],
        "lengths lead out": part(lengths="../../secret"),
        "lengths are missing": part(lengths="x.npy"),
        "lengths are absolute": part(lengths="/etc/passwd"),
        "no shards": part(shards=[]),
        "weight is negative": part(weight=-1.0),
        "weight is NaN": part(weight=float("nan")),
        "epochs are infinite": part(epochs=float("inf")),
        "shard leads out": shard(file="../../secret"),
        "shard is missing": shard(file="x"),
        "shard is long": shard(bytes=5),
        "documents are many": shard(documents=10**12),
        "documents are negative": shard(documents=-1),
        "another tokenizer": lambda p: p.update(tokenizer="0") or (p.pop("digest") and None),
        "deep": lambda p: p.update(data=nested(200)),
        "words lead out": lambda p: p.update(words={"../../../secret": "0"}) or (p.pop("digest") and None),
    }
    for name, change in changes.items():
        yield Case(f"prepared: {name}", train, ("prepared",), edit(file, change))
    for name, data in {"deep": DEEP, "not UTF-8": b"\xe9", "empty": b""}.items():
        yield Case(f"prepared, verify: {name}", ["verify", "IN/prepared"], ("prepared",), put(file, data))

    unsummed = edit(
        file,
        lambda p: (
            [one.update(lengths_sha256="") for parts in p["splits"].values() for one in parts]
            and p.pop("digest")
            and None
        ),
    )

    def array(values: Any, dtype: str = "<i8") -> Callable[[bytes], bytes]:

        stream = io.BytesIO()
        np.save(stream, np.asarray(values, dtype))
        return lambda data: stream.getvalue()

    lengths: dict[str, Callable[[bytes], bytes]] = {
        "empty": lambda b: b"",
        "a text": lambda b: b"abc",
        "a pickle": lambda b: (
            b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"
            + b" " * 60
            + b"\n"
            + b"cos\nsystem\n(S'echo'\ntR."
        ),
        "one": array([1]),
        "negative": array([-5] * 4),
        "huge": array([2**62] * 4),
        "flat": array(5),
        "two axes": array([[1, 2], [3, 4]]),
        "texts": array(["a"] * 4, "<U1"),
        "fractions": array([1.5] * 4, "<f8"),
        "a shape of 10^15": lambda b: (
            b.replace(b"(4,), ", b"(10**15,), ")[:60] + b[60:]
            if b"(4,), " in b
            else b"\x93NUMPY\x01\x00v\x00{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000000,), }"
            + b" " * 45
            + b"\n"
        ),
    }
    for name, data in lengths.items():
        yield Case(f"lengths: {name}", train, ("prepared",), both(unsummed, octets("prepared/*.npy", data)))
    for name, data in {
        "empty": lambda b: b"",
        "zero bytes": lambda b: bytes(len(b)),
        "a flipped bit": lambda b: b[:70] + bytes([b[70] ^ 1]) + b[71:],
    }.items():
        for argv in (train, ["verify", "IN/prepared"]):
            yield Case(f"shard, {argv[0]}: {name}", argv, ("prepared",), octets("prepared/*.arrayrecord", data))


def predictions() -> Iterator[Case]:
    argv = ["predict", "IN/classifier"]
    strict: dict[str, tuple[str, bytes]] = {
        "not UTF-8": ("text", b"caf\xe9\n"),
        "not JSON": ("jsonl", b"{x\n"),
        "a number": ("jsonl", b"5\n"),
        "a list": ("jsonl", b"[]\n"),
        "no text": ("jsonl", b'{"a": 1}\n'),
        "text is a number": ("jsonl", b'{"text": 5}\n'),
        "surrogate": ("jsonl", b'{"text": "\\ud800"}\n'),
        "deep": ("jsonl", b"[" * 100_000 + b"\n"),
        "too few cells": ("csv", b"text,x\na\n"),
        "open quote": ("csv", b'text\n"a'),
        "column twice": ("csv", b"text,text\na,b\n"),
        "no column": ("csv", b"a\nb\n"),
        "blank text": ("jsonl", b'{"text": "  "}\n'),
        "tokens are a text": ("jsonl", b'{"tokens": "a"}\n'),
        "tokens are empty": ("jsonl", b'{"tokens": []}\n'),
        "a long line": ("text", b"a" * (17 << 20)),
    }
    for name, (kind, data) in strict.items():
        words = [*argv, "--strict", "--format", kind]
        yield Case(f"predict --strict: {name}", words, ("classifier",), stdin=data)
    # a bad row has an answer with its error, and the command goes on
    yield Case("predict: a bad row", [*argv, "--format", "jsonl"], ("classifier",), stdin=b"{x\n", code=0)
    for words in (
        ["--format", "xml"],
        ["--to", "xml"],
        ["--dtype", "float31"],
        ["--column", "x"],
        ["--column", "x=y"],
        ["--column", "=y"],
        ["--batch-size", "0"],
        ["--seq-len", "-1"],
        ["--seq-len", "100000"],
        ["--file", "IN/missing"],
        ["--file", "IN"],
        ["--file", "/dev/zero"],
        ["--column", "label=a"],
        ["--batch-size", str(2**62)],
    ):
        code = 0 if words[-1] == "label=a" else 2  # no label is read
        yield Case(f"predict {' '.join(words)}", [*argv, *words], ("classifier",), stdin=b"a\n", code=code)
    for words in (["IN/art", "--max-new", "100000"], ["IN/art", "IN/art"], ["IN/classifier", "--beams", "2"]):
        yield Case(f"predict {' '.join(words)}", ["predict", *words], ("art", "classifier"), stdin=b"a\n")
    yield Case("predict: no artifact", ["predict", "IN/hf"], ("hf",), stdin=b"a\n")
    yield Case("predict: two kinds", ["predict", "IN/classifier", "IN/art"], ("classifier", "art"), stdin=b"a\n")


def links() -> Iterator[Case]:
    """Links, pipes and devices in folders of others."""

    def link(name: str, target: str = "../secret") -> Make:
        def make(inputs: Path) -> None:
            (inputs / name).unlink(missing_ok=True)
            (inputs / name).symlink_to(
                Path(os.path.relpath(inputs.parent / "secret", (inputs / name).parent))
                if target == "../secret"
                else target
            )

        return make

    def pipe(name: str) -> Make:
        return lambda inputs: ((inputs / name).unlink(missing_ok=True), os.mkfifo(inputs / name))

    for name in (
        "manifest.json",
        "tokenizer/chat_template.jinja",
        "tokenizer/tokenizer.json",
        "tokenizer/new",
        "log.jsonl",
    ):
        for argv in (["generate", "IN/art", "--prompt", "a"], ["quantize", "IN/art", "--out", "OUT"]):
            yield Case(f"link, {argv[0]}: art/{name}", argv, ("art",), link(f"art/{name}"))
            yield Case(f"pipe, {argv[0]}: art/{name}", argv, ("art",), pipe(f"art/{name}"))
    for name in (
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
        "generation_config.json",
        "vocab.txt",
    ):
        yield Case(f"link: hf/{name}", IMPORT, ("hf",), link(f"hf/{name}"))
        yield Case(f"pipe: hf/{name}", IMPORT, ("hf",), pipe(f"hf/{name}"))
        yield Case(f"device: hf/{name}", IMPORT, ("hf",), link(f"hf/{name}", "/dev/zero"))
    for name in ("prepared.json", "tokenizer/llmctl_tokenizer.json"):
        yield Case(f"link: prepared/{name}", ["verify", "IN/prepared"], ("prepared",), link(f"prepared/{name}"))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        yield Case(
            f"link: peft/{name}",
            ["import", "IN/peft", "--base", "IN/art", "--out", "OUT"],
            ("peft", "art"),
            link(f"peft/{name}"),
        )
    for name in ("state.json", "data.arrow", "dataset_info.json"):
        yield Case(f"link: hf_data/{name}", read_splits("hf", "IN/hf_data"), ("hf_data",), link(f"hf_data/{name}"))
        yield Case(f"pipe: hf_data/{name}", read_splits("hf", "IN/hf_data"), ("hf_data",), pipe(f"hf_data/{name}"))
    for kind in ("csv", "jsonl", "text", "parquet"):
        yield Case(f"pipe: {kind}", read_splits(kind, "IN/x"), make=pipe("x"))
    yield Case("pipe: prompts", ["generate", "IN/art", "--file", "IN/x"], ("art",), pipe("x"))
    yield Case("pipe: messages", ["generate", "IN/art", "--chat", "--file", "IN/x"], ("art",), pipe("x"))
    yield Case("pipe: gguf", ["import", "IN/x.gguf", "--out", "OUT"], make=pipe("x.gguf"))
