"""Finetuning methods as stages: what is left, what stays integer, and optimizer bytes as arithmetic says."""

import json

import jax
import numpy as np
import pytest

from llmctl.artifacts import artifact
from llmctl.artifacts.workspace import Context
from llmctl.compress.quantization.quantize import quantize
from llmctl.config.errors import RequestError
from llmctl.config.settings import MeshConfig, OptimConfig, TrainConfig
from llmctl.convert import peft, safetensors
from llmctl.distributed import mesh as meshes
from llmctl.model import weights
from llmctl.pipeline.stages import finetune
from llmctl.train.adapters.registry import METHODS
from llmctl.train.adapters.settings import AdaLoraConfig, LoraConfig
from llmctl.train.robust.settings import RegularizeConfig

TRAIN = TrainConfig(steps=12, batch_size=8, seq_len=32, eval_every=4, log_every=6, tensorboard=False)
LORA = LoraConfig(rank=2, targets=["q", "v", "down"])


def config(reviews, **changes):
    return finetune.Config(**{"data": reviews, "train": TRAIN, "optim": OptimConfig(learning_rate=1e-2), **changes})


def go(settings, parent, folder):
    ctx = Context(folder / "out", folder / "work", "key", {})
    ctx.work.mkdir(parents=True, exist_ok=True)
    finetune.run(settings, parent, ctx)
    return artifact.load(ctx.out)


def test_adalora_leaves_pairs_of_different_ranks_within_its_budget(artifacts, reviews, tmp_path):
    """12 steps: ranks fall after step 1 and are fixed from step 8 on, from which the best is chosen."""
    adalora = AdaLoraConfig(interval=2, final=0.35)
    settings = config(reviews, task="lm", method="adalora", lora=LORA, adalora=adalora, merge=False)
    made = go(settings, artifacts / "lm", tmp_path)
    pairs = weights.adapted(made.params)
    assert made.manifest.metrics["best_step"] >= 8 and {w.kind for w in pairs.values()} == {"low_rank"}
    ranks = [int((np.asarray(w.a[layer]) != 0).any(axis=0).sum()) for w in pairs.values() for layer in range(len(w.a))]
    matrices = 3 * made.model.layers
    assert sum(ranks) == 2 * matrices and len({*ranks, *[0] * (matrices - len(ranks))}) > 1
    peft.export(made, tmp_path)
    said = json.loads((tmp_path / peft.CONFIG).read_text())
    stored = safetensors.read_file(tmp_path / peft.WEIGHTS)
    assert said["peft_type"] == "LORA"
    assert sum(t.shape[0] for n, t in stored.items() if n.endswith("lora_A.weight")) == 2 * matrices


MOVED = {
    "full": lambda name: True,
    "head": lambda name: False,
    "bitfit": lambda name: name.bias,
    "prompt": lambda name: False,
    "prefix": lambda name: False,
    "houlsby": lambda name: name.stacked and name.norm,
    "ia3": lambda name: (
        name.module in ("attn/k", "attn/v", "mlp/down") and name.leaf == "kernel"
    ),  # the biases are zero
    **dict.fromkeys(
        ("lora", "dora", "adalora"),
        lambda name: name.module in ("attn/q", "attn/v", "mlp/down") and name.leaf == "kernel",
    ),
}
"""Arrays of the parent that each method changes, merging included, beside the task's head. The biases of `encoder` are
zero, so that factors do not change them."""

CHEAP = ("bitfit",)
"""Methods whose stage is not among the slow tests, one of which suffices."""


@pytest.mark.parametrize("method", [pytest.param(m, marks=[pytest.mark.slow] * (m not in CHEAP)) for m in METHODS.own])
def test_every_method_is_a_whole_stage(method, artifacts, reviews, tmp_path):
    sections = {"lora": LORA} if method in ("lora", "dora", "adalora") else {}
    sections |= {"houlsby": {"size": 4}} if method == "houlsby" else {}
    sections |= {"prompt": {"tokens": 3}} if method == "prompt" else {}
    sections |= {"prefix": {"tokens": 3, "projection": 4}} if method == "prefix" else {}
    train = TRAIN.model_copy(update={"steps": 6, "eval_every": 0})
    made = go(config(reviews, method=method, train=train, pooling="mean", **sections), artifacts / "encoder", tmp_path)
    assert made.manifest.metrics["validation_accuracy"] > 0 and not weights.adapted(made.params)
    before, after = (weights.arrays(p) for p in (artifact.load(artifacts / "encoder").params, made.params))
    shared = {n for n in before.keys() & after.keys() if not n.startswith("head/")}
    moved = {n for n in shared if not np.array_equal(before[n], after[n])}
    assert moved == {n for n in shared if MOVED[method](weights.parse(n))}
    new = {n for n in after.keys() - before.keys() if not n.startswith("head/")}
    parsed = {n: weights.parse(n) for n in after}
    assert new == {n for n, name in parsed.items() if name.bottleneck or name.prompt or name.prefix}
    assert bool(new) is (method in ("houlsby", "prompt", "prefix")) and all(np.asarray(after[n]).any() for n in new)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dora", "ia3"])
def test_merged_and_apart_answer_alike_and_integers_stay(method, artifacts, reviews, tmp_path):
    common = {"method": method, **({"lora": LORA} if method == "dora" else {})}
    losses = {}
    for merge in (True, False):
        made = go(config(reviews, **common, merge=merge), artifacts / "lm", tmp_path / str(merge))
        losses[merge] = made.manifest.metrics["validation_loss"]
        assert bool(weights.adapted(made.params)) is not merge
    assert abs(losses[True] - losses[False]) < 1e-4
    base = artifact.load(artifacts / "lm")
    integers = quantize(base.params, scheme="int8", group=0, embeddings=False, head=False, activations="")[0]
    folder = tmp_path / "integers"
    artifact.save(folder, integers, base.model, stage="quantize", key="k", config={}, parent=base.manifest,
                  tokenizer_dir=base.tokenizer_dir)  # fmt: skip
    with pytest.raises(RequestError, match="integers cannot be trained"):
        go(config(reviews, **common), folder, tmp_path / "no")
    made = go(config(reviews, **common, merge=False), folder, tmp_path / "over")
    before, after = (weights.arrays(p) for p in (integers, made.params))
    for name, a in before.items():
        if name.endswith(":qvalue"):
            stored = after.get(name, after.get(name.replace(":qvalue", ":base.qvalue")))
            assert stored.dtype == np.int8
            np.testing.assert_array_equal(stored, a)


def test_classes_are_counted_and_sampled_from_the_training_split(artifacts, reviews, tmp_path, monkeypatch):
    """Two thirds of the reviews are positive; the stage ends where it would begin to train."""

    class Begins(Exception):
        pass

    def run(config, ctx, mesh, learner, rows, *_):
        raise Begins(learner, rows)

    monkeypatch.setattr("llmctl.train.learner.run", run)
    with pytest.raises(Begins) as caught:
        go(config(reviews, regularize=RegularizeConfig(class_weights="balanced")), artifacts / "lm", tmp_path / "a")
    made, rows = caught.value.args
    labels = rows.batch(np.arange(len(rows)))["label"]
    share = np.mean(labels)
    assert 0.6 < share < 0.75
    batch = made.adapt_job.args[1].prepare({"label": labels}, jax.random.key(0))
    np.testing.assert_allclose(batch["row_weight"], np.where(labels, 0.5 / share, 0.5 / (1 - share)), rtol=1e-5)
    with pytest.raises(Begins) as caught:
        go(config(reviews, regularize=RegularizeConfig(balance=True)), artifacts / "lm", tmp_path / "b")
    assert caught.value.args[1].batch(np.arange(100))["label"].tolist() == [0, 1] * 50


def test_optimizer_bytes_are_those_of_what_is_trained(artifacts, reviews):
    """Two moments in float32 per trained entry; AdaLoRA also two averages, and a byte per triplet."""
    mesh = meshes.make(MeshConfig())
    base = artifact.abstract(artifacts / "classifier", mesh)
    cfg, head = base.model, sum(a.size for n, a in weights.arrays(base.params).items() if n.startswith("head/"))
    D, F, Q, KV, L = cfg.d_model, cfg.d_ff, cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim, cfg.layers
    pairs = L * ((D + Q) + (D + KV) + (F + D))  # per rank
    svd = 3 * (pairs + 3 * L)
    expected = {
        "lora": 8 * (2 * pairs + head),
        "dora": 8 * (2 * pairs + L * (Q + KV + D) + head),
        "adalora": 8 * (svd + head) + 8 * svd + 3 * 3 * L + 1,
        "ia3": 8 * (L * (2 * KV + F) + head),
        "houlsby": 8 * (L * (2 * (2 * D * 4 + D + 4) + 2 * D) + head),  # RMSNorm has no bias
        "prompt": 8 * (3 * D + head),
        "head": 8 * head,
    }
    for method, size in expected.items():
        more = {"lora": LORA} if method in ("lora", "dora", "adalora") else {}
        more |= {"houlsby": {"size": 4}} if method == "houlsby" else {}
        more |= {"prompt": {"tokens": 3}} if method == "prompt" else {}
        programs, left = finetune.programs(config(reviews, method=method, **more), base, {}, mesh)
        state = jax.tree.leaves(programs[0].optimizer)
        assert sum(a.size * a.dtype.itemsize for a in state) == size + 5 * 4, method
        assert not weights.adapted(left.params), method
        if method in ("lora", "prompt"):  # the planned adapter has what is trained, in float32, without moments
            _, left = finetune.programs(config(reviews, method=method, store="adapter", **more), base, {}, mesh)
            assert left.manifest.bytes == size // 2, method


@pytest.mark.parametrize(
    ("method", "parent"), [("bitfit", "encoder"), pytest.param("lora", "lm", marks=pytest.mark.slow)]
)
def test_an_adapter_is_stored_apart_and_answers_as_the_whole(method, parent, artifacts, reviews, tmp_path, capsys):
    """The biases that training changed and the head; or the pairs alone."""
    train = TRAIN.model_copy(update={"steps": 2, "eval_every": 0})
    common = {"method": method, "train": train}
    common |= {"lora": LORA, "task": "lm"} if method == "lora" else {}
    out = artifacts / f"stored_{method}"
    ctx = Context(out, tmp_path / "work", "key", {})
    ctx.work.mkdir()
    finetune.run(config(reviews, **common, store="adapter"), artifacts / parent, ctx)
    assert "--base" not in capsys.readouterr().err
    made = artifact.load(out)
    merge = {"merge": False} if method == "lora" else {}
    whole = go(config(reviews, **common, **merge), artifacts / parent, tmp_path / "whole")
    assert made.manifest.digest == whole.manifest.digest and made.manifest.metrics == whole.manifest.metrics
    stored = {*made.manifest.base.stored}
    if method == "lora":
        assert stored == weights.adapter_names(whole.params)
    else:
        assert "head/out/kernel" in stored and all(weights.parse(n).bias or weights.parse(n).task_head for n in stored)
    assert made.manifest.bytes < whole.manifest.bytes / 3 and "base" not in whole.manifest.model_dump()
    for name, a in weights.arrays(whole.params).items():
        assert np.array_equal(weights.arrays(made.params)[name], a), name


def test_what_has_no_adapter_is_refused(reviews):
    with pytest.raises(ValueError, match="store: method 'full' trains the base itself"):
        config(reviews, store="adapter")
    with pytest.raises(ValueError, match="store = 'adapter' and merge = true exclude each other"):
        config(reviews, method="lora", store="adapter", merge=True)
    assert not METHODS["lora"].merges(config(reviews, method="lora", store="adapter"))


@pytest.mark.parametrize("scheme", ["int8", pytest.param("int4", marks=pytest.mark.slow)])
def test_integers_stay_integers_in_memory_through_training(scheme, artifacts, reviews, tmp_path, monkeypatch):
    """QLoRA on live arrays, between steps: one copy of the integers, no float of their shape, two moments per pair."""
    base = artifact.load(artifacts / "lm")
    group = 8 if scheme == "int4" else 0
    integers = quantize(base.params, scheme=scheme, group=group, embeddings=False, head=False, activations="")[0]
    folder = artifacts / scheme
    about = {"stage": "quantize", "key": scheme, "config": base.manifest.config, "parent": base.manifest}
    artifact.save(folder, integers, base.model, tokenizer_dir=base.tokenizer_dir, **about)
    shapes = {w.shape for w in weights.of_type(integers, weights.Quantized).values()}
    matrices = sum(w.size for n, w in weights.arrays(integers).items() if n.endswith(":qvalue"))
    before, seen = {id(a): a for a in jax.live_arrays()}, []

    def validate(self, done, state, meta):
        live = {a.unsafe_buffer_pointer(): a for a in jax.live_arrays() if id(a) not in before and a.shape in shapes}
        assert not [a for a in live.values() if jax.numpy.issubdtype(a.dtype, jax.numpy.floating)]
        whole = [a for a in live.values() if str(a.dtype) == scheme]
        moments = [a for n, a in jax.tree.leaves_with_path(state["optimizer"]) if a.ndim]
        trained = sum(a.size for a in state["params"].values())
        assert sum(a.size * a.dtype.itemsize for a in moments) == 2 * 4 * trained
        seen.append((done, sum(a.size for a in whole), trained))
        return meta

    monkeypatch.setattr("llmctl.train.loop._Loop.validate", validate)
    train = TRAIN.model_copy(update={"steps": 3, "eval_every": 1})
    ctx = Context(artifacts / f"{scheme}_pairs", tmp_path / "work", "key", {})
    ctx.work.mkdir()
    settings = config(reviews, task="lm", method="lora", lora=LORA, train=train, store="adapter")
    finetune.run(settings, folder, ctx)
    D, F, Q, KV, L = (base.model.d_model, base.model.d_ff, 32, 16, base.model.layers)
    assert [s[1:] for s in seen] == [(matrices, 2 * L * ((D + Q) + (D + KV) + (F + D)))] * len(seen)
    assert {done for done, *_ in seen} >= {1, 2}
    made = artifact.load(ctx.out)
    assert made.manifest.base.name == scheme and made.manifest.bytes < artifact.read_manifest(folder).bytes
    after = weights.arrays(made.params)
    for name, a in weights.arrays(integers).items():
        twin = after.get(name, after.get(name.replace(":", ":base.")))
        assert twin is not None and np.array_equal(twin, a), name
