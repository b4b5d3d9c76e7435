"""Bad recipes, settings, flags and places."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from bad_inputs.case import LOST, STAGE, Case, put


def recipes() -> Iterator[Case]:
    texts: dict[str, str | bytes] = {
        "empty": "",
        "no stage": "seed = 1",
        "stage is a table": '[stage]\nkind = "prune"',
        "stage is a list": "stage = [1]",
        "no kind": "[[stage]]\nname = 'a'",
        "kind is a list": '[[stage]]\nkind = ["a"]',
        "kind is unknown": '[[stage]]\nkind = "x"',
        "kind leads out": '[[stage]]\nkind = "../x"',
        "name twice": STAGE + STAGE,
        "name is a path": STAGE + '\nname = "../a"',
        "name is absolute": STAGE + '\nname = "/tmp/a"',
        "name is empty after": STAGE + '\nname = "."',
        "name is long": STAGE + f'\nname = "{"a" * 300}"',
        "name has a zero byte": STAGE + '\nname = "a\\u0000b"',
        "name is a number": STAGE + "\nname = 5",
        "run has a zero byte": 'run = "a\\u0000"' + STAGE,
        "run is a list": "run = [1]" + STAGE,
        "not UTF-8": b"a = '\xe9'",
        "UTF-16": "a = 1".encode("utf-16"),
        "cut string": 'a = "',
        "cut table": "[a",
        "key twice": "a = 1\na = 2",
        "deep list": "a = " + "[" * 100_000,
        "deep list that closes": "a = " + "[" * 300 + "]" * 300 + STAGE,
        "deep keys": ".".join(["a"] * 50_000) + " = 1",
        "deep tables": "[" + ".".join(["a"] * 500) + "]\nb = 1" + STAGE,
        "long number": "seed = " + "9" * 5000 + STAGE,
        "long hexadecimal": "seed = 0x" + "f" * 50_000 + STAGE,
        "seed is a date": "seed = 2020-01-01" + STAGE,
        "seed of 65 bits": f"seed = {2**64}" + STAGE,
        "seed is a text": 'seed = "1"' + STAGE,
        "seed is true": "seed = true" + STAGE,
        "steps are infinite": "train.steps = inf" + STAGE,
        "steps are 0": "train.steps = 0" + STAGE,
        "steps are a fraction": "train.steps = 1.5" + STAGE,
        "rate is NaN": "optim.learning_rate = nan" + STAGE,
        "rate is infinite": "optim.learning_rate = inf" + STAGE,
        "rate is beyond float32": "optim.learning_rate = 1e300" + STAGE,
        "decay is infinite": "optim.weight_decay = inf" + STAGE,
        "unknown key": "trian.steps = 1" + STAGE,
        "unknown key of a section": "train.setps = 1" + STAGE,
        "section is a value": "train = 5" + STAGE,
        "section is a list": "train = []" + STAGE,
        "path has a zero byte": 'data.path = "a\\u0000"' + STAGE,
        "no data": STAGE,
        "columns are a list": "data.columns = [1]" + STAGE,
        "column is unknown": 'data = {path = "/etc/hostname", columns = {txt = "a"}}' + STAGE,
        "mixture is a value": "data.mixture = 5" + STAGE,
        "mixture of numbers": "data.mixture = [1]" + STAGE,
        "source is unknown": 'data.source = "xml"' + STAGE,
        "source leads out": 'data.source = "../csv"' + STAGE,
        "fractions above 1": "data.validation = 0.9\ndata.test = 0.9" + STAGE,
        "classes twice": 'data.classes = ["a", "a"]' + STAGE,
        "delimiter of two": 'data.delimiter = ",,"' + STAGE,
        "from is unknown": '[[stage]]\nkind = "prune"\nfrom = "x"',
        "starts from itself": '[[stage]]\nkind = "prune"\nname = "a"\nfrom = "a"',
        "teacher is unknown": STAGE + '\n[[stage]]\nkind = "distill"\nteacher = "x"',
        "preset is unknown": 'model.preset = "x"' + STAGE,
        "layers of 10^9": "model.layers = 1000000000" + STAGE,
        "width is 0": "model.d_model = 0" + STAGE,
        "heads do not divide": "model.heads = 3\nmodel.kv_heads = 2" + STAGE,
        "vocabulary of 10^12": f"tokenizer.vocab_size = {10**12}\ndata.path = '/etc/hostname'" + STAGE,
        "pattern of mask": '[[stage]]\nkind = "quantize"\nbits = 3',
        "mesh of 10^12": "mesh.data = 1000000000000" + STAGE,
        "two -1 in a mesh": "mesh.data = -1\nmesh.fsdp = -1" + STAGE,
        "profile backwards": 'train.profile = "9:1"' + STAGE,
        "matmuls are a list": "train.matmuls = [1]" + STAGE,
        "steps and epochs": "train = {steps = 1, epochs = 1.0}" + STAGE,
    }
    for name, text in texts.items():
        yield Case(f"recipe: {name}", ["run", "IN/r.toml"], make=put("r.toml", text))
    yield Case("recipe: is a folder", ["run", "IN"])
    yield Case("recipe: is missing", ["run", "IN/r.toml"])
    yield Case("recipe: is a device", ["run", "/dev/zero"])
    yield Case("recipe: is large", ["run", "IN/r.toml"], make=put("r.toml", b"#" * (17 << 20)))
    for name, text in {
        "is a list": "a = [1",
        "no model": "x = 1",
        "layers are a text": '[model]\nlayers = "x"',
        "layers are many": "[model]\nlayers = 10000000",
        "model is a value": "model = 5",
        "stage is a value": "stage = 5",
        "width is huge": f"[model]\nd_model = {2**62}",
    }.items():
        yield Case(f"model.toml: {name}", ["show", "--config", "IN/m.toml"], make=put("m.toml", text))
    for name in ("", "x", "../x", "a\x1b[31m", "a" * 5000, LOST):
        yield Case(f"preset: {name[:20]!r}", ["show", "--config", name])


def sets() -> Iterator[Case]:
    words = [
        "",
        "=",
        "a",
        "a=",
        "=1",
        ".=1",
        "a..b=1",
        "stage=1",
        "stage.0=1",
        "stage.9.kind='prune'",
        "stage.x.kind='prune'",
        "stage.\u00b2.seed=1",
        "stage.-1.seed=1",
        "stage." + "9" * 5000 + ".a=1",
        "train=5",
        "train.steps=x",
        "train.steps=inf",
        "train.steps=[1]",
        "train.steps={}",
        "train.steps=1.5",
        "train.steps=9" + "9" * 400,
        "data=[",
        "a=" + "[" * 100_000,
        ".".join(["a"] * 5000) + "=1",
        LOST + "=1",
        "data.path=" + LOST,
        "data.path=\x00",
        "seed=nan",
        "seed='''",
        "seed=1\nb=2",
        "stage.0.train.steps.x=1",
        "name=5",
        "run=5",
        "stage.pretrain.kind=[]",
    ]
    for word in words:
        if "\0" not in word:  # no argument can hold one
            yield Case(f"--set {word[:30]!r}", ["run", "IN/r.toml", "--set", word], ("r.toml",))
    yield Case("--set on prepare", ["prepare", "--out", "OUT", "--set", "train.steps=x"])


def flags() -> Iterator[Case]:
    generate = ["generate", "IN/art", "--prompt", "a"]
    pairs = [
        ("--beams", "10000"),
        ("--beams", str(2**64)),
        ("--beams", "inf"),
        ("--beams", "0"),
        ("--seed", str(2**64)),
        ("--seed", "x"),
        ("--max-new", str(2**64)),
        ("--max-new", "0"),
        ("--max-new", "1e3"),
        ("--top-k", "-1"),
        ("--top-k", "5"),
        ("--top-p", "0.5"),
        ("--top-p", "nan"),
        ("--min-p", "nan"),
        ("--min-p", "2"),
        ("--temperature", "nan"),
        ("--temperature", "-1"),
        ("--temperature", "1e300"),
        ("--repetition-penalty", "nan"),
        ("--repetition-penalty", "0"),
        ("--repetition-penalty", "inf"),
        ("--length-penalty", "nan"),
        ("--length-penalty", "2"),
        ("--early-stopping", "maybe"),
        ("--dtype", "float31"),
        ("--kv-cache", "int7"),
        ("--batch-size", "0"),
        ("--batch-size", str(2**64)),
        ("--draft", "IN/missing"),
        ("--draft-tokens", "2"),
        ("--draft-tokens", "0"),
        ("--system", "a"),
        ("--chat", ""),
        ("--stop", LOST),
        ("--nonsense", "1"),
        ("--file", "IN/missing"),
    ]
    for flag, value in pairs:
        yield Case(f"generate {flag} {value[:20]!r}", [*generate, flag, *filter(None, [value])], ("art",))
    yield Case("generate: a prompt that is not UTF-8", ["generate", "IN/art", "--prompt", LOST], ("art",))
    yield Case("generate: standard input is not UTF-8", ["generate", "IN/art"], ("art",), stdin=b"caf\xe9\n")
    yield Case("generate: a classifier", ["generate", "IN/classifier", "--prompt", "a"], ("classifier",))
    cached = ["generate", "IN/masked", "--prompt", "a", "--kv-cache", "int8"]
    yield Case("generate: a quantized cache with an encoder", cached, ("masked",))
    yield Case("generate: chat with an encoder", ["generate", "IN/masked", "--chat"], ("masked",), stdin=b"hi\n")
    yield Case(
        "generate: beams of an encoder", ["generate", "IN/masked", "--prompt", "<mask>", "--beams", "2"], ("masked",)
    )
    yield Case(
        "generate: temperature of an encoder",
        ["generate", "IN/masked", "--prompt", "a", "--temperature", "1"],
        ("masked",),
    )
    yield Case("generate: beams and a draft", [*generate, "--draft", "IN/art", "--beams", "2"], ("art",))
    classifier = [*generate, "--draft", "IN/classifier"]
    yield Case("generate: a draft that is a classifier", classifier, ("art", "classifier"))
    yield Case("generate: an empty prompt", [*generate[:2], "--prompt", ""], ("art",))
    yield Case("generate: a prompt that is too long", [*generate[:2], "--prompt", "a" * 100], ("art",))
    for value in ("nan", "inf", "-1", "0", "x", "1e-9"):
        yield Case(
            f"export --shard-size {value}", ["export", "IN/art", "--out", "OUT", "--shard-size", value], ("art",)
        )
    for words in (
        ["--to", "onnx"],
        ["--dtype", "int3"],
        ["--to", "gguf", "--type", "q9"],
        ["--to", "peft"],
        ["--to", "gguf", "--dtype", "float16"],
        ["--type", "q8_0"],
        ["--to", "compressed-tensors"],
    ):
        yield Case(f"export {' '.join(words)}", ["export", "IN/art", "--out", "OUT", *words], ("art",))
    yield Case(
        "export: a classifier to GGUF", ["export", "IN/classifier", "--out", "OUT", "--to", "gguf"], ("classifier",)
    )
    plan = ["plan", "IN/r.toml"]
    for words in (
        ["--topology", "cpu:0"],
        ["--topology", "cpu:" + "9" * 400],
        ["--topology", "9" * 30 + "*v5p:4x4x4"],
        ["--topology", "v5p:0x4x4"],
        ["--topology", "x"],
        ["--topology", LOST],
        ["--topology", "cpu:1", "--tokens", "nan"],
        ["--topology", "cpu:1", "--tokens", "-1"],
        ["--topology", "cpu:1", "--generate", "0x0x0"],
        ["--topology", "cpu:1", "--generate", f"{2**70}x1x1"],
        ["--topology", "cpu:1", "--generate", "x"],
        ["--chips", "-1"],
        ["--chips", str(2**64)],
        ["--chips", str(10**9)],
        ["--chips", "7"],
        ["--chips", "4", "--chip", "x"],
        [],
        ["--topology", "cpu:1", "--stage", "x"],
        ["--topology", "cpu:1", "--chip", "v4"],
        ["--fit", "--tokens", "1"],
    ):
        yield Case(f"plan {' '.join(words)[:40]!r}", [*plan, *words], ("r.toml",))
    pretrain = ["pretrain", "--out", "OUT", "--platform", "cpu"]
    for words in (
        ["--data.path", "IN/missing"],
        ["--data.path", "IN"],
        ["--data.path", "/dev/zero"],
        ["--data.path", "/proc/self/mem"],
        ["--data.path", "http://x/y"],
        ["--data.path", "hf://x/y"],
        ["--data.path", "x://y"],
        ["--data.path", "pkg:llmctl/missing"],
        ["--data.path", "pkg:../x/y"],
        ["--data.path", "pkg:os"],
        ["--data.path", "a" * 5000],
        ["--data.path", "IN/*.zzz"],
        ["--data.path", LOST],
        ["--data.path", "/etc/hostname", "--tokenizer.path", "IN/missing"],
        ["--data.path", "/etc/hostname", "--tokenizer.path", "/dev/zero"],
        ["--data.path", "/etc/hostname", "--tokenizer.path", "/etc/hostname"],
        ["--data.path", "/etc/hostname", "--name", "a/b"],
        ["--data.path", "/etc/hostname", "--name", "a" * 300],
        ["--data.columns", "{text=5}"],
        ["--data.columns", "["],
        ["--data.filter", "5"],
        ["--train.steps", "9" * 300],
        ["--train.no-tensorboard"],
        ["--train.seq-len", "1"],
        ["--platform", "abacus"],
        ["--model.preset", "x"],
        ["--mesh.data", "-5"],
        ["--objective", "x"],
        ["--seed", str(2**63)],
        ["--coordinator", "x"],
        ["--num-processes", "-1"],
        ["--process-id", "5", "--num-processes", "2", "--coordinator", "localhost:1"],
    ):
        yield Case(f"pretrain {' '.join(words)[:50]!r}", [*pretrain, *words])
    for words in (
        ["--sparsity", "1e-9"],
        ["--sparsity", "nan"],
        ["--sparsity", "1.5"],
        ["--pattern", "3:2"],
        ["--method", "x"],
        ["--keep-layers", "0"],
        ["--keep-layers", "5"],
        ["--heads", "2"],
        ["--method", "wanda"],
        ["--method", "sparsegpt", "--damping", "0"],
        ["--method", "wanda", "--allocation", "owl", "--pattern", "2:4"],
        ["--method", "wanda", "--allocation", "sensitivity", "--spread", "0.5"],
        ["--keep-ffn", "2", "--repair"],
    ):
        yield Case(f"prune {' '.join(words)}", ["prune", "IN/art", "--out", "OUT", *words], ("art",))
    for words in (
        ["--bits", "3"],
        ["--bits", "nan"],
        ["--group", "7"],
        ["--group", "-1"],
        ["--format", "x"],
        ["--activations", "int4"],
    ):
        yield Case(f"quantize {' '.join(words)}", ["quantize", "IN/art", "--out", "OUT", *words], ("art",))
    rows = ["--data.source", "jsonl", "--data.path", "IN/rows.jsonl"]
    for words in (
        ["--method", "x"],
        ["--task", "x"],
        ["--lora.rank", "1000000"],
        ["--lora.rank", "0"],
        ["--lora.alpha", "nan"],
        ["--train.batch-size", "1000000000000"],
    ):
        how = ["--method", "lora"] if words[0].startswith("--lora") else []
        yield Case(
            f"finetune {' '.join(words)}",
            ["finetune", "IN/art", "--out", "OUT", *rows, *how, *words],
            ("art", "rows.jsonl"),
        )
    for words in (["--of", "IN/missing"], ["--tasks", '["x"]'], ["--split", "x"], ["--examples", "-1"]):
        yield Case(f"eval {' '.join(words)}", ["eval", "IN/art", "--out", "OUT", *rows, *words], ("art", "rows.jsonl"))
    yield Case("distill: no teacher", ["distill", "IN/art", "--out", "OUT", *rows], ("art", "rows.jsonl"))
    yield Case(
        "distill: teacher is missing",
        ["distill", "IN/art", "--teacher", "x", "--out", "OUT", *rows],
        ("art", "rows.jsonl"),
    )
    for words in (["--workers", str(2**70)], ["--workers", "-1"], ["--name", "x"], ["--splits", "OUT2"]):
        yield Case(f"prepare {' '.join(words)[:30]}", ["prepare", "IN/r.toml", "--out", "OUT", *words], ("r.toml",))
    for words in (
        ["x"],
        ["--x"],
        ["show", "--presets", "--config", "llama-tiny"],
        ["show"],
        ["show", "--config", "llama-tiny", "--seq-len", "-1"],
        ["show", "--config", "llama-tiny", "--seq-len", "9" * 400],
        ["verify"],
        ["verify", "IN"],
        ["doctor", "x"],
        ["run"],
        ["import", "IN"],
        ["predict"],
        ["verify", LOST],
        ["show", "a" * 5000],
        ["show", "IN"],
    ):
        yield Case(f"words {' '.join(words)[:40]!r}", words)


def places() -> Iterator[Case]:
    outs = [
        "/proc/x",
        "/sys/x",
        "/dev/null",
        "/dev/null/x",
        "/etc/hostname/x",
        "gs://b/c",
        "s3://b",
        "http://x/y",
        "file:///tmp/x",
        ".",
        "/",
        "..",
        "a/..",
        "IN/art/sub",
        "IN/art",
        "a[1]",
        "a*",
        "a?b",
        "a\\b",
        "a" * 300,
        LOST,
        "IN/loop/x",
        "IN/loop",
        "IN/file",
        "IN/file/x",
        "IN/full",
    ]

    def make(inputs: Path) -> None:
        (inputs / "loop").symlink_to("loop")
        (inputs / "file").write_text("x")
        (inputs / "full").mkdir()
        (inputs / "full" / "mine").write_text("x")

    for out in outs:
        words = {
            "export": ["export", "IN/art"],
            "import": ["import", "IN/hf"],
            "prune": ["prune", "IN/art", "--sparsity", "0.5"],
        }
        for name, argv in words.items():
            if (
                (name, out) == ("export", "IN/art/sub") or name != "export" or not set(out) & set("[]*?\\")
            ):  # HF files may
                yield Case(f"{name} --out {out[:20]!r}", [*argv, "--out", out], ("art", "hf"), make)
    for out in ("/proc/x", "gs://b/c", "/etc/hostname/x", LOST):
        yield Case(
            f"run --run {out!r}", ["run", "IN/r.toml", "--run", out, "--set", "data.path=/etc/hostname"], ("r.toml",)
        )
    for out in ("/proc/x", "IN/file/x", "IN/full", "IN/loop"):
        words = ["prepare", "--set", "data.path=/etc/hostname", "--set", "tokenizer.kind=bytes"]
        yield Case(f"prepare --out {out}", [*words, "--out", out], make=make)
        yield Case(f"prepare --splits {out}", [*words, "--splits", out], make=make)
    for out in ("/proc/x", "IN/file", "IN/file/x", "IN/full", "gs://b/c", "..", "IN/loop/x"):
        words = ["predict", "IN/classifier", "--out", out]
        yield Case(f"predict --out {out}", words, ("classifier",), make, stdin=b"a\n")
