"""Write a small valid input of every kind that llmctl reads. Tests damage copies of them."""

import csv
import gzip
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from llmctl.artifacts import artifact
from llmctl.compress.quantization.quantize import quantize
from llmctl.convert import compressed_tensors, gguf_export, hf_export, safetensors
from llmctl.convert.lazy_tensors import of_array
from llmctl.data.config import DataConfig, TokenizerConfig
from llmctl.data.pretraining.prepare import prepare
from llmctl.data.tokenizers import loading
from llmctl.data.tokenizers.byte_tokenizer import ByteTokenizer
from llmctl.data.tokenizers.tokenizer_json import JsonTokenizer
from llmctl.evaluate.tasks import registry
from llmctl.model import functional, weights
from llmctl.model.config import ModelConfig

TEXT = "The cat sat on the mat and looked at the moon. Numbers like 12 and 345 are cut into digits, it's so!"
ROWS = [{"text": f"row {i} of some text", "label": ("neg", "pos")[i % 2]} for i in range(6)]
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
SIZES = {"d_model": 8, "layers": 1, "heads": 2, "kv_heads": 2, "head_dim": 4, "d_ff": 8, "max_seq_len": 32}
RECIPE = """
name = "fuzz"
run = "runs/fuzz"
seed = 3
data = {source = "jsonl", path = "rows.jsonl", columns = {text = "body"}}
[[stage]]
kind = "pretrain"
model = {preset = "llama-tiny", layers = 2}
tokenizer.vocab_size = 512
train = {steps = 20, batch_size = 4}
[[stage]]
kind = "prune"
method = "magnitude"
sparsity = 0.5
[[stage]]
kind = "quantize"
bits = 8
"""
ADAPTER = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none"}


@dataclass(frozen=True)
class Valid:
    """Folder of valid inputs, and the artifacts in it."""

    folder: Path

    def __truediv__(self, name: str) -> Path:
        return self.folder / name


def write(place: Path) -> Valid:
    """Write the valid inputs into an empty folder; nothing is compiled but small sums.

    art, classifier, masked: artifacts of a decoder, a classifier and an encoder; apart: an adapter of art; hf, shards,
    packed, embedder: model folders; model.gguf; peft; words, pieces, bytes: tokenizers; old: tokenizers as vocab.json
    and merges.txt; rows.*, hf_data, tfds: data; prepared; run: a run with an eval's results; r.toml, model.toml,
    talk.json, prompts.jsonl.
    """
    texts(place)
    words = tokenizers(place)
    models_of(place, words)
    data(place)
    return Valid(place)


def texts(place: Path) -> None:
    """Write recipes, messages and prompts."""
    (place / "r.toml").write_text(RECIPE)
    (place / "model.toml").write_text('[model]\npreset = "llama-tiny"\nlayers = 2\nheads = 4\nkv_heads = 2\n')
    (place / "talk.json").write_text(json.dumps([{"role": "user", "content": "hi"}]))
    (place / "prompts.jsonl").write_text('"a prompt"\n{"prompt": "another"}\n')


def tokenizers(place: Path) -> JsonTokenizer:
    """Write a tokenizer of every kind, and return the one of tokenizer.json."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", "<s>", "</s>", "<mask>"]
    made.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=264, special_tokens=special, initial_alphabet=alphabet)
    )
    words = JsonTokenizer(made.to_str().encode())
    words.save(place / "words")
    (place / "words" / "chat_template.jinja").write_text(TEMPLATE)
    (place / "words" / "generation_config.json").write_text('{"eos_token_id": [2], "bos_token_id": 1}')
    (place / "words" / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "</s>", "bos_token": "<s>", "add_bos_token": True, "chat_template": "x"})
    )
    (place / "words" / "special_tokens_map.json").write_text('{"unk_token": "<unk>"}')
    foreign = shutil.copytree(place / "words", place / "foreign")
    (foreign / loading.DESCRIPTOR).unlink()
    pieces = loading.train([TEXT] * 4, TokenizerConfig(kind="bpe", vocab_size=300, sentinels=2))
    pieces.save(place / "pieces")
    (place / "pieces" / "tokenizer_config.json").write_text('{"add_eos_token": true, "tokenizer_class": "T5"}')
    ByteTokenizer.new().save(place / "bytes")
    old = place / "old"
    old.mkdir()
    content = json.loads(words.model)["model"]
    (old / "vocab.json").write_text(json.dumps(content["vocab"]))
    merges = [m if isinstance(m, str) else " ".join(m) for m in content["merges"]]
    (old / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    (old / "tokenizer_config.json").write_text('{"add_prefix_space": false}')
    (place / "older").mkdir()
    (place / "older" / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "##b"]))
    (place / "older" / "tokenizer_config.json").write_text('{"strip_accents": null, "do_lower_case": true}')
    return words


def parameters(cfg: ModelConfig) -> dict:
    """Return random parameters."""
    rng = np.random.default_rng(0)
    flat = weights.flatten(functional.abstract(cfg))
    return weights.unflatten({name: jnp.asarray(rng.normal(0, 0.15, a.shape), "float32") for name, a in flat.items()})


def models_of(place: Path, words: JsonTokenizer) -> None:
    """Write models as artifacts and in the formats of others."""
    sizes = SIZES | {"vocab_size": words.vocab_size}
    cfg = ModelConfig(family="llama", tied=False, head_bias=False, **sizes)
    params = parameters(cfg)
    about = {"key": "k", "config": {}, "tokenizer_dir": place / "words"}
    base = artifact.save(place / "art", params, cfg, stage="pretrain", **about)
    flat, (L, I, O) = weights.flatten(params), params["decoder"]["blocks"]["attn"]["q"]["kernel"].shape
    q = "decoder/blocks/attn/q/kernel"
    flat[q] = weights.LowRank(flat[q], jnp.ones((L, I, 2)), jnp.ones((L, 2, O)), 0.01)
    adapter = weights.unflatten(flat)
    artifact.save(place / "apart", adapter, cfg, stage="finetune", parent=base, base=params, **about)
    classes = ModelConfig(family="llama", head="classify", labels=2, **sizes)
    artifact.save(place / "classifier", parameters(classes), classes, stage="finetune", labels=["neg", "pos"], **about)
    masked = ModelConfig(family="bert", **sizes)
    artifact.save(place / "masked", parameters(masked), masked, stage="pretrain", **about)
    folders(place, cfg, params)
    plain = artifact.load(place / "art")
    gguf_export.write(plain, place / "model.gguf", "f32")
    run(place)


def folders(place: Path, cfg: ModelConfig, params: dict) -> None:
    """Write Hugging Face folders and an adapter."""
    config = hf_export.config_of(cfg, registry.default(cfg), [], {"eos_token_id": 2}, "float32")
    theirs = hf_export.tensors_of(cfg, params)
    beside = shutil.ignore_patterns(loading.DESCRIPTOR)
    for name, size in (("hf", hf_export.SHARD_BYTES), ("shards", 10_000)):
        shutil.copytree(place / "words", place / name, ignore=beside)
        hf_export.save(place / name, config, theirs, size)
    small, _ = quantize(params, scheme="int8")
    packed, settings = compressed_tensors.pack(cfg, small, hf_export.tensors_of(cfg, small))
    hf_export.save(place / "packed", config | {"quantization_config": settings}, packed)
    bare = ModelConfig(
        family="bert", head="embed", next_sentence=False, pooler=False, head_transform=False, **SIZES, vocab_size=16
    )
    config = hf_export.config_of(bare, registry.default(bare), [], {}, "float32")
    hf_export.save(place / "embedder", config, hf_export.tensors_of(bare, parameters(bare)))
    (place / "embedder" / "1_Pooling").mkdir()
    (place / "embedder" / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    (place / "peft").mkdir()
    (place / "peft" / "adapter_config.json").write_text(json.dumps(ADAPTER))
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    pair = {f"{name}.lora_A.weight": np.ones((2, 8), np.float32), f"{name}.lora_B.weight": np.ones((8, 2), np.float32)}
    safetensors.write_file(
        place / "peft" / "adapter_model.safetensors", {name: of_array(array) for name, array in pair.items()}
    )


def run(place: Path) -> None:
    """Write a run of two artifacts and an eval's report."""
    shutil.copytree(place / "art", place / "run" / "pretrain")
    manifest = artifact.read_manifest(place / "art")
    results = [
        {"artifact": "pretrain", "digest": manifest.digest, "task": "lm", "protocol": "p",
         "metrics": {"perplexity": 3.5}}
    ]  # fmt: skip
    report = place / "run" / "eval"
    report.mkdir()
    (report / "results.json").write_text(json.dumps(results))
    artifact.write_manifest(report, manifest.model_copy(update={"stage": "eval", "name": "eval", "weights": {}}))


def data(place: Path) -> None:
    """Write rows in every format, and prepared text."""
    lines = "\n".join(map(json.dumps, ROWS))
    (place / "rows.jsonl").write_text(lines)
    (place / "rows.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    zst = pa.compress(lines.encode(), codec="zstd", asbytes=True)
    (place / "rows.jsonl.zst").write_bytes(zst)
    (place / "rows.txt").write_text("\n\n".join(r["text"] for r in ROWS))
    with (place / "rows.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, ["text", "label"], quoting=csv.QUOTE_ALL)
        table.writeheader()
        table.writerows(ROWS)
    arrow = pa.table({name: [row[name] for row in ROWS] for name in ("text", "label")})
    pq.write_table(arrow, place / "rows.parquet")
    folder = place / "hf_data"
    folder.mkdir()
    with pa.OSFile(str(folder / "data.arrow"), "wb") as file, pa.ipc.new_stream(file, arrow.schema) as stream:
        stream.write_table(arrow)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
    features = {"text": {"_type": "Value"}, "label": {"_type": "Value"}}
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
    splits = place / "hf_splits"
    shutil.copytree(folder, splits / "train")
    (splits / "dataset_dict.json").write_text('{"splits": ["train"]}')
    cfg = DataConfig(path=str(place / "rows.txt"), documents="line", validation=0.2)
    prepare(cfg, TokenizerConfig(kind="bytes"), place / "prepared")


def tfds(place: Path) -> None:
    """Write the rows as a TFDS data set; apart, because the library takes seconds to import."""
    import tensorflow_datasets as library

    of = library.features
    body = {
        "VERSION": library.core.Version("1.0.0"),
        "_info": lambda self: library.core.DatasetInfo(
            builder=self, features=of.FeaturesDict({"text": of.Text(), "label": of.ClassLabel(names=["neg", "pos"])})
        ),
        "_split_generators": lambda self, manager: {"train": self._generate_examples()},
        "_generate_examples": lambda self: iter(list(enumerate(ROWS))),
    }
    made = type("Tiny", (library.core.GeneratorBasedBuilder,), body)
    made(data_dir=place / "tfds", file_format="array_record").download_and_prepare()
