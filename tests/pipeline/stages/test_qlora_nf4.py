"""QLoRA over NF4 as stages: codes stay as they are in training, sizes are right, and exports are dense."""

import jax
import numpy as np
import pytest

from llmctl.artifacts import artifact
from llmctl.artifacts.workspace import Context
from llmctl.config.errors import RequestError
from llmctl.config.settings import OptimConfig, TrainConfig
from llmctl.convert import exporting, importing
from llmctl.model import weights
from llmctl.pipeline.stages import finetune, quantize

TRAIN = TrainConfig(steps=3, batch_size=8, seq_len=32, eval_every=0, log_every=3, tensorboard=False)


def go(module, config, parent, folder):
    ctx = Context(folder / "out", folder / "work", "key", {})
    ctx.work.mkdir(parents=True, exist_ok=True)
    module.run(config, parent, ctx)
    return artifact.load(ctx.out)


@pytest.fixture(scope="module")
def small(artifacts, tmp_path_factory):
    """A language model in NF4, in blocks of 8."""
    return go(quantize, quantize.Config(format="nf4", group=8), artifacts / "lm", tmp_path_factory.mktemp("nf4"))


def test_the_manifest_and_the_size(small, artifacts):
    nodes = {m.path: m.node for m in weights.matrices(small.params, "block")}
    assert {w.kind for w in nodes.values()} == {"nf4"} and small.manifest.config["format"] == "nf4"
    rest = small.manifest.parameters - sum(w.count() for w in nodes.values())
    four = sum(w.count() for w in nodes.values())
    assert small.manifest.bits == pytest.approx((32 * rest + four * (4 + 32 / 8)) / small.manifest.parameters)
    before = artifact.load(artifacts / "lm")
    for path, w in nodes.items():
        lost = np.asarray(w.dense()) - np.asarray(weights.flatten(before.params)[path])
        assert 0 < np.abs(lost).max() <= 0.16 * np.asarray(w.scale).max()  # half of the widest gap of levels


def test_lora_trains_beside_the_codes(small, reviews, tmp_path):
    lora = {"method": "lora", "lora": {"rank": 2, "targets": ["q", "down"]}, "data": reviews, "train": TRAIN}
    config = finetune.Config(**lora, merge=False, task="classify", optim=OptimConfig(learning_rate=1e-2))
    with pytest.raises(RequestError, match="is quantized, and integers cannot be trained"):
        go(finetune, config.model_copy(update={"merge": True}), small.path, tmp_path / "merged")
    made = go(finetune, config, small.path, tmp_path)
    assert len(weights.adapted(made.params)) == 2
    before, after = (weights.flatten(weights.without_adapters(p)) for p in (small.params, made.params))
    for path, w in before.items():
        if path in after:
            jax.tree.map(np.testing.assert_array_equal, w, after[path])
    assert any(np.asarray(w.b).any() for w in weights.adapted(made.params).values())


def test_an_export_is_dense(small, tmp_path):
    exporting.run(small.path, tmp_path / "hf", to="hf")
    importing.run(tmp_path / "hf", tmp_path / "back")
    back = weights.flatten(artifact.load(tmp_path / "back").params)
    for m in weights.matrices(small.params, "block"):
        np.testing.assert_allclose(back[m.path], m.node.dense(), atol=1e-6)
    with pytest.raises(RequestError, match="compressed-tensors does not hold nf4 weights; export --to hf"):
        exporting.run(small.path, tmp_path / "packed", to="compressed-tensors")
