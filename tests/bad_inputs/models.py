"""Bad artifacts, model folders, GGUF files and adapters."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bad_inputs.case import DEEP, HUGE, IMPORT, Case, Make, both, edit, header, nested, octets, put, shown

UNREAD = [("architectures", []), ("auto_map", {"AutoModel": "code.Model"})]
"""Values in config.json that say nothing about a Llama language model, which it is by default."""


def manifests() -> Iterator[Case]:
    def weight(record: Any) -> Callable[[Any], None]:
        return lambda m: m["weights"].update({next(iter(m["weights"])): record})

    changes: dict[str, Callable[[Any], Any]] = {
        "dtype is unknown": weight({"parts": {"": ["float31", [1]]}}),
        "dtype is object": weight({"parts": {"": ["object", [1]]}}),
        "dtype is text": weight({"parts": {"": ["U5", [1]]}}),
        "dtype is null": weight({"parts": {"": [None, [1]]}}),
        "dtype is a list": weight({"parts": {"": [["float32"], [1]]}}),
        "shape is negative": weight({"parts": {"": ["float32", [-1]]}}),
        "shape is huge": weight({"parts": {"": ["float32", [HUGE]]}}),
        "shape of 10^12": weight({"parts": {"": ["float32", [10**12]]}}),
        "shape is a text": weight({"parts": {"": ["float32", "ab"]}}),
        "shape is deep": weight({"parts": {"": ["float32", [[1]]]}}),
        "parts are empty": weight({"parts": {}}),
        "parts are a list": weight({"parts": [1]}),
        "record is empty": weight({}),
        "record is null": weight(None),
        "node is unknown": weight({"node": "nope", "parts": {"a": ["float32", [1]]}}),
        "node is a list": weight({"node": ["x"], "parts": {"a": ["float32", [1]]}}),
        "node lacks parts": weight({"node": "quantized", "parts": {"a": ["float32", [1]]}}),
        "scale is a text": weight({"node": "low_rank", "scale": "x", "parts": {"a": ["float32", [1]]}}),
        "node is deep": weight(nested(90)),
        "a name too many": lambda m: m["weights"].update({"a/b/c": {"parts": {"": ["float32", [1]]}}}),
        "an empty name": lambda m: m["weights"].update({"": {"parts": {"": ["float32", [1]]}}}),
        "a name missing": lambda m: m["weights"].pop(next(iter(m["weights"]))),
        "weights are a list": lambda m: m.update(weights=[1]),
        "weights are empty": lambda m: m.update(weights={}),
        "format is a text": lambda m: m.update(format="x"),
        "format is later": lambda m: m.update(format=99),
        "format is missing": lambda m: m.pop("format"),
        "format is huge": lambda m: m.update(format=HUGE),
        "model is a list": lambda m: m.update(model=[]),
        "model is null": lambda m: m.update(model=None),
        "labels are numbers": lambda m: m.update(labels=[5]),
        "task is unknown": lambda m: m.update(task="x"),
        "task is a list": lambda m: m.update(task=[]),
        "fitted is a list": lambda m: m.update(fitted=[1]),
        "pruned is a text": lambda m: m.update(pruned="maybe"),
        "digest is null": lambda m: m.update(digest=None),
        "digest is another": lambda m: m.update(digest="0" * 64),
        "parent is a list": lambda m: m.update(parent=[1]),
        "parent is a text": lambda m: m.update(parent="x"),
        "tokenizer is a list": lambda m: m.update(tokenizer=[1]),
        "tokenizer is another": lambda m: m.update(tokenizer="0" * 64),
        "sequence length is a text": lambda m: m.update(seq_len="x"),
        "truncation is unknown": lambda m: m.update(truncate="x"),
        "config is a list": lambda m: m.update(config=[1]),
        "metrics are a list": lambda m: m.update(metrics=[1]),
        "bits are a text": lambda m: m.update(bits="x"),
        "bytes are huge": lambda m: m.update(bytes=10**400),
        "name is surrogate": lambda m: m.update(name="\ud800"),
        "is a list": lambda m: [m],
        "is null": lambda m: "null",
        "checksums are a text": lambda m: m.update(checksums="x"),
        "checksums are empty": lambda m: m.update(checksums={}),
        "is deep": lambda m: m.update(config=nested(200)),
    }
    sizes: list[tuple[str, Any]] = [
        ("layers", 0),
        ("layers", 10**9),
        ("layers", HUGE),
        ("layers", 2),
        ("vocab_size", HUGE),
        ("vocab_size", 0),
        ("family", "x"),
        ("family", "../x"),
        ("family", 5),
        ("norm_eps", 1e400),
        ("norm_eps", -1),
        ("heads", 0),
        ("heads", 3),
        ("kv_heads", 0),
        ("head_dim", -4),
        ("d_model", "8"),
        ("d_ff", [1]),
        ("max_seq_len", 0),
        ("activation", "x"),
        ("head", "x"),
        ("rope_theta", "nan"),
        ("rope_scaling", {"rope_type": "x"}),
        ("rope_scaling", [1]),
        ("preset", "x"),
        ("unknown", 1),
        ("tied", "maybe"),
        ("labels", HUGE),
    ]
    for key, value in sizes:
        changes[f"model.{key} = {shown(value)}"] = lambda m, k=key, v=value: m["model"].update({k: v})
    for name, change in changes.items():
        unsummed = edit("art/manifest.json", lambda m: m.pop("checksums") and None)
        argv = ["generate", "IN/art", "--prompt", "a", "--max-new", "1"]
        # The text of the right number is that number, and generate does not read the task.
        code = 0 if name in ('model.d_model = "8"', "task is unknown") else 2
        yield Case(f"manifest: {name}", argv, ("art",), both(unsummed, edit("art/manifest.json", change)), code=code)
    for name in ("layers are others", "labels are others", "digest is another", "tokenizer is another"):
        change = {
            "layers are others": lambda m: m["model"].update(norm_eps=0.1),
            "labels are others": lambda m: m.update(labels=["x"]),
        }.get(name) or changes[name]
        for argv in (["show", "IN/art"], ["quantize", "IN/art", "--out", "OUT"], ["verify", "IN/art"]):
            yield Case(f"manifest with checksums, {argv[0]}: {name}", argv, ("art",), edit("art/manifest.json", change))
    raw = {
        "deep": DEEP,
        "deep list": b"[" * 100_000,
        "not UTF-8": b"\xe9",
        "a list": b"[]",
        "null": b"null",
        "a text": b'"format"',
        "long": b'{"format": ' + b"9" * 5000,
        "empty": b"",
        "cut": b'{"format": 1, "na',
        "two values": b"{} {}",
        "NaN": b'{"format": NaN}',
        "zero bytes": bytes(100),
    }
    for name, data in raw.items():
        for argv in (["show", "IN/art"], ["prune", "IN/art", "--out", "OUT"]):
            yield Case(f"manifest, {argv[0]}: {name}", argv, ("art",), put("art/manifest.json", data))
    for name, change in {
        "a list": lambda r: {"a": 1},
        "no metrics": lambda r: r[0].pop("metrics") and None,
        "metrics are a list": lambda r: r[0].update(metrics=[1]),
        "metrics are a text": lambda r: r[0].update(metrics="x"),
        "of numbers": lambda r: [1],
        "deep": lambda r: nested(200),
    }.items():
        yield Case(f"results.json: {name}", ["show", "IN/run"], ("run",), edit("run/eval/results.json", change))


def descriptions() -> Iterator[Case]:
    values: list[tuple[str, Any]] = [
        *[("num_attention_heads", v) for v in (0, -1, "2", 2.5, HUGE, None, [2])],
        *[("num_hidden_layers", v) for v in (0, 10**9, HUGE, "x", 2)],
        *[("hidden_size", v) for v in (0, [1], HUGE, 9)],
        *[("vocab_size", v) for v in (-5, 10**12, 0, "x")],
        *[("head_dim", v) for v in (0, 3, "x")],
        *[("rms_norm_eps", v) for v in ("x", 1e300, -1, [0])],
        *[("rope_theta", v) for v in ([1], -1, "x", 0)],
        *[
            ("rope_scaling", v)
            for v in (
                "x",
                {"rope_type": ["x"]},
                {"rope_type": "linear", "factor": "x"},
                {"rope_type": "linear", "factor": 1e400},
                {"rope_type": "yarn"},
                nested(200),
            )
        ],
        ("rope_parameters", [1]),
        ("rope_parameters", "x"),
        ("layer_types", "x"),
        ("model_type", ["llama"]),
        ("model_type", {}),
        ("model_type", "x"),
        ("model_type", None),
        ("architectures", [5]),
        ("architectures", ["x"]),
        ("architectures", "LlamaForCausalLM"),
        ("architectures", []),
        ("hidden_act", ["x"]),
        ("hidden_act", {}),
        ("hidden_act", "x"),
        ("quantization_config", "x"),
        ("quantization_config", {"a": 1}),
        ("quantization_config", {"quant_method": "gptq", "bits": 4}),
        ("quantization_config", {"quant_method": "compressed-tensors", "format": "x", "config_groups": [1]}),
        ("quantization_config", {"quant_method": ["x"]}),
        ("tie_word_embeddings", "x"),
        ("max_position_embeddings", HUGE),
        ("max_position_embeddings", 0),
        ("id2label", {"a": 1}),
        ("num_labels", 10**12),
        ("eos_token_id", 10**12),
        ("intermediate_size", None),
        ("intermediate_size", 9),
        ("attention_bias", 3),
        ("attention_bias", True),
        ("unknown_key", 5),
        ("\ud800", 5),
        ("sliding_window", "x"),
        ("auto_map", {"AutoModel": "code.Model"}),
    ]
    for key, value in values:
        newer = edit("hf/config.json", lambda c: c.pop("rope_parameters") and None)  # which the older keys follow
        make = edit("hf/config.json", lambda c, k=key, v=value: c.update({k: v}))
        make = both(newer, make) if key in ("rope_theta", "rope_scaling") else make
        code = 0 if (key, value) in UNREAD else 2
        yield Case(f"config.json: {key!a} = {shown(value)}", IMPORT, ("hf",), make, code=code)
    for file in ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"):
        for name, data in {"deep": DEEP, "not UTF-8": b"\xe9", "a list": b"[1]", "cut": b'{"a', "empty": b""}.items():
            harmless = name == "a list" and file.endswith("n_config.json")  # holds no end tokens
            yield Case(f"{file} of import: {name}", IMPORT, ("hf",), put(f"hf/{file}", data), code=0 if harmless else 2)
    yield Case("config.json: is missing", IMPORT, ("hf",), lambda i: (i / "hf/config.json").unlink())
    yield Case(
        "config.json: is a folder",
        IMPORT,
        ("hf",),
        lambda i: ((i / "hf/config.json").unlink(), (i / "hf/config.json").mkdir()),
    )
    yield Case(
        "import: a pickle", IMPORT, ("hf",), lambda i: (i / "hf/model.safetensors").rename(i / "hf/pytorch_model.bin")
    )
    yield Case("import: no weights", IMPORT, ("hf",), lambda i: (i / "hf/model.safetensors").unlink())
    yield Case("import: --drop is no pattern", [*IMPORT, "--drop", "("], ("hf",))
    yield Case("import: --drop of all", [*IMPORT, "--drop", ".*"], ("hf",))
    yield Case("import: --dtype is unknown", [*IMPORT, "--dtype", "float31"], ("hf",))
    yield Case("import: --base without an adapter", [*IMPORT, "--base", "IN/art"], ("hf", "art"))
    yield Case("import: --tokenizer is missing", [*IMPORT, "--tokenizer", "IN/missing"], ("hf",))
    yield Case("import: --tokenizer of another size", [*IMPORT, "--tokenizer", "IN/pieces"], ("hf", "pieces"))
    yield Case("import: --reference is missing", [*IMPORT, "--reference", "IN/missing"], ("hf",))
    yield Case("import: --reference is no safetensors", [*IMPORT, "--reference", "IN/r.toml"], ("hf", "r.toml"))
    pooling = {
        "two kinds": {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True},
        "unknown": {"pooling_mode_x": True},
        "none": {},
        "a list": [1],
    }
    for name, value in pooling.items():
        argv = ["import", "IN/embedder", "--out", "OUT"]
        yield Case(f"pooling: {name}", argv, ("embedder",), put("embedder/1_Pooling/config.json", json.dumps(value)))


def tensors() -> Iterator[Case]:
    def first(**new: Any) -> Callable[[dict], None]:
        return lambda h: h[next(k for k in h if k != "__metadata__")].update(new)

    def renamed(name: str) -> Callable[[dict], None]:
        return lambda h: h.update({name: h.pop(next(k for k in h if k != "__metadata__"))})

    changes: dict[str, Callable[[dict], Any]] = {
        "dtype is unknown": first(dtype="X"),
        "dtype is a list": first(dtype=["F32"]),
        "dtype is complex": first(dtype="C64"),
        "dtype is another": first(dtype="F64"),
        "shape is negative": first(shape=[-1, -2]),
        "shape is a fraction": first(shape=[1.5]),
        "shape is huge": first(shape=[10**20, 0], data_offsets=[0, 0]),
        "shape is null": first(shape=None),
        "shape is a text": first(shape="ab"),
        "shape is another": first(shape=[2, 2], data_offsets=[0, 16]),
        "shape is infinite": first(shape=[float("inf")]),
        "offsets are few": first(data_offsets=[0]),
        "offsets are texts": first(data_offsets=["a", "b"]),
        "offsets are backwards": first(data_offsets=[8, 0]),
        "offsets are beyond": first(data_offsets=[2**60, 2**60 + 4]),
        "offsets are huge": first(data_offsets=[HUGE, HUGE + 4]),
        "a list": lambda h: b"[]",
        "a number": lambda h: b"5",
        "deep": lambda h: DEEP,
        "not UTF-8": lambda h: b'{"\xe9": 1}',
        "an entry is a number": lambda h: {"a": 5},
        "a tensor too many": lambda h: h.update(
            extra=dict(next(v for k, v in h.items() if k != "__metadata__"), shape=[0], data_offsets=[0, 0])
        ),
        "a tensor missing": lambda h: h.pop(next(k for k in h if k != "__metadata__")) and None,
        "a name that is surrogate": renamed("\ud800"),
        "a name with a path": renamed("../x"),
        "tensors that overlap": lambda h: (
            [
                v.update(data_offsets=[0, v["data_offsets"][1] - v["data_offsets"][0]])
                for k, v in h.items()
                if k != "__metadata__"
            ]
            and None
        ),
        "empty": lambda h: {},
        "a long number": lambda h: b'{"a": ' + b"9" * 5000 + b"}",
    }
    for name, change in changes.items():
        yield Case(f"safetensors: {name}", IMPORT, ("hf",), header(change, "hf/model.safetensors"))
    for name, data in {
        "empty": b"",
        "short": b"abc",
        "length is huge": struct.pack("<Q", 2**63) + b"{}",
        "zero bytes": bytes(1000),
    }.items():
        yield Case(f"safetensors file: {name}", IMPORT, ("hf",), put("hf/model.safetensors", data))
    file = "hf/model.safetensors"
    yield Case("safetensors: cut", IMPORT, ("hf",), octets(file, lambda data: data[:-10]))
    # weights are looked at while they are read
    yield Case("safetensors: NaN", IMPORT, ("hf",), octets(file, lambda data: data[:-4] + b"\0\0\xc0\x7f"), code=1)
    index = "shards/model.safetensors.index.json"
    argv = ["import", "IN/shards", "--out", "OUT"]
    shards: dict[str, Callable[[Any], Any]] = {
        "no map": lambda x: x.pop("weight_map") and None,
        "map is a list": lambda x: x.update(weight_map=[1]),
        "file is a number": lambda x: x["weight_map"].update(dict.fromkeys(x["weight_map"], 5)),
        "file leads out": lambda x: x["weight_map"].update(dict.fromkeys(x["weight_map"], "../secret")),
        "file is absolute": lambda x: x["weight_map"].update(dict.fromkeys(x["weight_map"], "/etc/passwd")),
        "file is missing": lambda x: x["weight_map"].update(dict.fromkeys(x["weight_map"], "x.safetensors")),
        "file has a zero byte": lambda x: x["weight_map"].update(dict.fromkeys(x["weight_map"], "a\x00")),
        "file is surrogate": lambda x: x["weight_map"].update(dict.fromkeys(x["weight_map"], "�")),
        "a tensor too many": lambda x: x["weight_map"].update(a=next(iter(x["weight_map"].values()))),
        "a tensor missing": lambda x: x["weight_map"].pop(next(iter(x["weight_map"]))) and None,
        "deep": lambda x: nested(200),
        "empty": lambda x: x["weight_map"].clear(),
    }
    for name, change in shards.items():
        yield Case(f"index: {name}", argv, ("shards",), edit(index, change))
    scheme = lambda **new: lambda c: c["quantization_config"]["config_groups"]["group_0"]["weights"].update(new)  # noqa: E731
    packed: dict[str, Callable[[Any], Any]] = {
        "bits are 3": scheme(num_bits=3),
        "bits are a text": scheme(num_bits="8"),
        "bits are 4": scheme(num_bits=4),
        "type is float": scheme(type="float"),
        "not symmetric": scheme(symmetric=False),
        "no groups": lambda c: c["quantization_config"].update(config_groups={}),
        "groups are a list": lambda c: c["quantization_config"].update(config_groups=[1]),
    }
    for name, change in packed.items():
        yield Case(
            f"compressed-tensors: {name}",
            ["import", "IN/packed", "--out", "OUT"],
            ("packed",),
            edit("packed/config.json", change),
        )


def gguf() -> Iterator[Case]:
    argv = ["import", "IN/model.gguf", "--out", "OUT"]

    def keyed(key: str, value: int) -> Make:
        def make(inputs: Path) -> None:
            data, name = (inputs / "model.gguf").read_bytes(), key.encode()
            at = data.index(struct.pack("<Q", len(name)) + name) + 8 + len(name)
            kind = {4: "<I", 5: "<i", 6: "<f", 10: "<Q", 11: "<q"}[struct.unpack("<I", data[at : at + 4])[0]]
            new = struct.pack(kind, value)
            (inputs / "model.gguf").write_bytes(data[: at + 4] + new + data[at + 4 + len(new) :])

        return make

    keys = (
        "attention.head_count",
        "attention.head_count_kv",
        "embedding_length",
        "block_count",
        "feed_forward_length",
        "attention.key_length",
        "rope.dimension_count",
    )
    for key in keys:
        for value in (0, 2**31 - 1, 7):
            yield Case(f"gguf: {key} = {value}", argv, ("model.gguf",), keyed(f"llama.{key}", value))
    yield Case("gguf: context_length = 0", argv, ("model.gguf",), keyed("llama.context_length", 0))
    yield Case("gguf: vocab_size = 7", argv, ("model.gguf",), keyed("llama.vocab_size", 7))
    yield Case("gguf: eps = 0", argv, ("model.gguf",), keyed("llama.attention.layer_norm_rms_epsilon", 0))
    for key in ("bos_token_id", "eos_token_id"):
        yield Case(f"gguf: {key} is beyond", argv, ("model.gguf",), keyed(f"tokenizer.ggml.{key}", 2**31 - 1))
    raw: dict[str, Callable[[bytes], bytes]] = {
        "magic": lambda b: b"GGUX" + b[4:],
        "version 99": lambda b: b[:4] + struct.pack("<I", 99) + b[8:],
        "tensors 2^60": lambda b: b[:8] + struct.pack("<Q", 2**60) + b[16:],
        "keys 2^60": lambda b: b[:16] + struct.pack("<Q", 2**60) + b[24:],
        "short": lambda b: b"G",
        "cut": lambda b: b[: len(b) // 2],
        "empty": lambda b: b"",
        "big endian": lambda b: b[:4] + struct.pack(">I", 3) + b[8:],
        "zero bytes": lambda b: b[:24] + bytes(len(b) - 24),
        "cut in its weights": lambda b: b[:-100],
        "an unknown tensor": lambda b: b.replace(b"token_embd.weight", b"token_embx.weight"),
        "an unknown architecture": lambda b: b.replace(b"llama", b"lloma"),
        "an unknown pre-tokenizer": lambda b: b.replace(b"gpt-2", b"gpt-9"),
        "a vocabulary of another kind": lambda b: b.replace(b"gpt2", b"bert"),
        "a key twice": lambda b: b.replace(b"llama.block_count", b"llama.head_count_"),
    }
    for name, change in raw.items():
        yield Case(f"gguf: {name}", argv, ("model.gguf",), octets("model.gguf", change))


def adapters() -> Iterator[Case]:
    argv = ["import", "IN/peft", "--base", "IN/art", "--out", "OUT"]
    values: list[tuple[str, Any]] = [
        ("lora_alpha", "x"),
        ("lora_alpha", float("nan")),
        ("lora_alpha", 1e400),
        ("lora_alpha", [1]),
        ("lora_alpha", None),
        ("lora_alpha", True),
        ("alpha_pattern", [1]),
        ("alpha_pattern", {".*": "x"}),
        ("alpha_pattern", "x"),
        ("alpha_pattern", {"(": 1}),
        ("peft_type", ["LORA"]),
        ("peft_type", {}),
        ("peft_type", "PREFIX_TUNING"),
        ("peft_type", "PROMPT_TUNING"),
        ("peft_type", None),
        ("use_dora", True),
        ("bias", "all"),
        ("lora_bias", True),
        ("layer_replication", [[0, 1]]),
        ("init_lora_weights", "pissa"),
        ("peft_type", "IA3"),
        ("peft_type", "ADALORA"),
    ]
    for key, value in values:
        yield Case(
            f"adapter_config: {key} = {shown(value)}",
            argv,
            ("peft", "art"),
            edit("peft/adapter_config.json", lambda c, k=key, v=value: c.update({k: v})),
        )
    for name, data in {"deep": DEEP, "a list": b"[]", "not UTF-8": b"\xe9"}.items():
        yield Case(f"adapter_config: {name}", argv, ("peft", "art"), put("peft/adapter_config.json", data))
    file = "peft/adapter_model.safetensors"
    yield Case("adapter: no tensors", argv, ("peft", "art"), lambda i: (i / file).unlink())
    yield Case("adapter: empty", argv, ("peft", "art"), header(lambda h: {}, file))
    yield Case(
        "adapter: half a pair",
        argv,
        ("peft", "art"),
        header(lambda h: h.pop(next(k for k in h if "lora_B" in k)) and None, file),
    )
    yield Case(
        "adapter: of another matrix",
        argv,
        ("peft", "art"),
        header(lambda h: {k.replace("q_proj", "x_proj"): v for k, v in h.items()}, file),
    )
    yield Case(
        "adapter: of another shape",
        argv,
        ("peft", "art"),
        header(lambda h: [v.update(shape=[16]) for k, v in h.items() if k != "__metadata__"] and None, file),
    )
    yield Case("adapter: no base", argv[:2] + argv[4:], ("peft",))
    yield Case("adapter: base is missing", argv, ("peft",))
    yield Case("adapter: base is no artifact", ["import", "IN/peft", "--base", "IN/hf", "--out", "OUT"], ("peft", "hf"))
    yield Case("adapter: --dtype", [*argv, "--dtype", "float16"], ("peft", "art"))


def stored_adapters() -> Iterator[Case]:
    """Adapters that are artifacts of their own: without their base, with another, or damaged."""
    generate = ["generate", "IN/apart", "--prompt", "a", "--max-new", "1"]
    missing = {
        "generate": generate,
        "verify": ["verify", "IN/apart"],
        "export": ["export", "IN/apart", "--to", "peft", "--out", "OUT"],
        "merge": ["export", "IN/apart", "--to", "artifact", "--merge", "--out", "OUT"],
        "quantize": ["quantize", "IN/apart", "--out", "OUT"],
        "predict": ["predict", "IN/apart", "--file", "IN/apart/manifest.json"],
    }
    for name, argv in missing.items():
        yield Case(f"apart: {name} without its base", argv, ("apart",))
        wrong = [*argv, "--base", "IN/classifier"]
        yield Case(f"apart: {name} on the wrong base", wrong, ("apart", "art", "classifier"))
    for base, adapter in (("classifier", "apart"), ("art", "art"), ("art", "peft")):
        several = ["generate", f"IN/{base}", "--adapter", f"IN/{adapter}", "--prompt", "a"]
        yield Case(f"apart: --adapter {adapter} of {base}", several, ("apart", "art", "classifier", "peft"))
    yield Case("apart: --base is no artifact", [*generate, "--base", "IN/peft"], ("apart", "art", "peft"))
    yield Case("apart: --base of an artifact that is whole", ["generate", "IN/art", "--base", "IN/art"], ("art",))
    yield Case("apart: merge of none", ["export", "IN/art", "--to", "artifact", "--merge", "--out", "OUT"], ("art",))
    uses = ("apart", "art")
    for name in uses:
        yield Case(f"apart: arrays of {name} are damaged", generate, uses, lambda i, n=name: _halve(i / n / "params"))
    for key, value in (("stored", []), ("stored", ["x"]), ("stored", None), ("content", ""), ("digest", 1)):
        change = edit("apart/manifest.json", lambda m, k=key, v=value: m["base"].update({k: v}))
        yield Case(f"apart: base.{key} = {shown(value)}", generate, uses, change)

    def own_base(manifest: Any) -> None:
        manifest["checksums"] = None
        manifest["base"].update({"content": "", "digest": manifest["digest"]})

    yield Case("apart: its own base", generate, uses, edit("apart/manifest.json", own_base))


def _halve(folder: Path) -> None:
    """Truncate every file in a folder."""
    for file in (p for p in folder.rglob("*") if p.is_file()):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
