"""Finetuning methods as stages: what is left, what stays integer, and optimizer bytes as arithmetic says."""

import json

import jax
import numpy as np
import pytest

from llmctl.artifacts import artifact
from llmctl.artifacts.workspace import Context
from llmctl.compress.quantize import quantize
from llmctl.config.errors import RequestError
from llmctl.config.settings import MeshConfig, OptimConfig, TrainConfig
from llmctl.convert import peft, safetensors
from llmctl.distributed import mesh as meshes
from llmctl.model import weights
from llmctl.pipeline.stages import finetune
from llmctl.train.adapters.settings import AdaLoraConfig, LoraConfig

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
        "head": 8 * head,
    }
    for method, size in expected.items():
        more = {"lora": LORA} if method in ("lora", "dora", "adalora") else {}
        programs, left = finetune.programs(config(reviews, method=method, **more), base, {}, mesh)
        state = jax.tree.leaves(programs[0].optimizer)
        assert sum(a.size * a.dtype.itemsize for a in state) == size + 5 * 4, method
        assert not weights.adapted(left.params), method
