"""QLoRA over NF4 as stages: codes stay as they are in training, sizes are right, and exports are dense."""

import jax
import numpy as np
import pytest

from llmctl.artifacts import artifact
from llmctl.artifacts.workspace import Context
from llmctl.config.errors import RequestError
from llmctl.config.settings import MeshConfig, OptimConfig, TrainConfig
from llmctl.convert import exporting, importing
from llmctl.model import weights
from llmctl.pipeline.stages import finetune, quantize

TRAIN = TrainConfig(steps=3, batch_size=8, seq_len=32, eval_every=0, log_every=3, tensorboard=False)


def go(module, config, parent, folder):
    ctx = Context(folder / "out", folder / "work", "key", {})
    ctx.work.mkdir(parents=True, exist_ok=True)
    module.run(config, parent, ctx)
    return artifact.load(ctx.out)


NF4 = quantize.Config(format="nf4", group=8)
DOUBLE = quantize.Config(format="nf4", group=8, double_quantize=True)


@pytest.fixture(scope="module")
def small(artifacts, tmp_path_factory):
    """A language model in NF4 with scales in 8 bits, in blocks of 8."""
    return go(quantize, DOUBLE, artifacts / "lm", tmp_path_factory.mktemp("nf4"))


@pytest.mark.parametrize("config", [NF4, DOUBLE], ids=["float32 scales", "8-bit scales"])
def test_the_manifest_and_the_size(small, artifacts, tmp_path, config):
    small = small if config is DOUBLE else go(quantize, config, artifacts / "lm", tmp_path)
    nodes = {m.path: m.node for m in weights.matrices(small.params, "block")}
    assert {w.kind for w in nodes.values()} == {"nf4"} and small.manifest.config["format"] == "nf4"
    rest = small.manifest.parameters - sum(w.count() for w in nodes.values())
    four = sum(w.count() for w in nodes.values())
    scales = sum(w.count() / 8 for w in nodes.values())
    bits = 32 * scales
    if config is DOUBLE:  # the rows of scales have fewer than 256 outputs: one float32 per row, and one per matrix
        bits = 8 * scales + sum(32 * w.scale[..., 0].size + 32 * len(w.scale) for w in nodes.values())
    assert small.manifest.bits == pytest.approx((32 * rest + 4 * four + bits) / small.manifest.parameters)
    before = artifact.load(artifacts / "lm")
    for path, w in nodes.items():
        lost = np.asarray(w.dense()) - np.asarray(weights.flatten(before.params)[path])
        assert 0 < np.abs(lost).max() <= 0.16 * np.asarray(w.scales()).max()  # half of the widest gap of levels


def test_eight_devices_store_what_one_stores(small, artifacts, tmp_path):
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    many = go(quantize, DOUBLE.model_copy(update={"mesh": mesh}), artifacts / "lm", tmp_path)
    for one, other in zip(*(weights.matrices(a.params, "block") for a in (small, many)), strict=True):
        for (name, a), b in zip(one.node.parts().items(), other.node.parts().values(), strict=True):
            np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (a, b)), rtol=1e-6, err_msg=name)


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
