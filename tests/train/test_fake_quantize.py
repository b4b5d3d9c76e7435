"""Quantization-aware training: rounding against NumPy, the integer artifact, meshes, exact resume, and refusals."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_training import TRAIN, Rows, digest, fit, job_of, losses

from llmctl.compress.quantization.quantize import quantize
from llmctl.compress.quantization.schemes import NAMES
from llmctl.compress.quantization.settings import QuantizeConfig
from llmctl.config.base import keyed
from llmctl.config.errors import RequestError
from llmctl.config.settings import MeshConfig
from llmctl.config.validation import validate
from llmctl.distributed import mesh as meshes
from llmctl.model import functional, weights
from llmctl.model.config import ModelConfig
from llmctl.pipeline.stages import distill, finetune, pretrain
from llmctl.train import fake_quantize
from llmctl.train.fake_quantize_settings import FakeQuantizeConfig

ASKED = FakeQuantizeConfig(format="int4", group=16)
SIZES = {"d_model": 32, "layers": 1, "heads": 2, "kv_heads": 2, "head_dim": 16, "d_ff": 32, "vocab_size": 31}
FAMILIES = {
    "decoder": {"preset": "llama-tiny", "tied": True},
    "encoder": {"preset": "bert-tiny", "next_sentence": False},
    "encoder-decoder": {"preset": "t5-v1.1-tiny", "encoder_layers": 1},
}


def model_of(name, **more):
    model = ModelConfig(**FAMILIES[name], **SIZES, max_seq_len=32, dropout=0.0, **more)
    rng = np.random.default_rng(0)
    flat = weights.flatten(functional.abstract(model))
    return model, weights.unflatten({p: jnp.asarray(rng.normal(0, 0.2, w.shape), jnp.float32) for p, w in flat.items()})


def test_rounded_weights_and_their_gradients_by_hand():
    w = np.random.default_rng(1).normal(size=(2, 32, 3)).astype(np.float32)
    scale = np.abs(w.reshape(2, 2, 16, 3)).max(axis=2, keepdims=True) / np.float32(7.5)
    want = (np.clip(np.round(w.reshape(2, 2, 16, 3) / scale), -7, 7) * scale).reshape(w.shape)
    rounded = lambda w: fake_quantize.straight_through(w, "int4", -2, 16)  # noqa: E731
    lowest = np.isclose(w, want / 7 * 7.5) & (want < 0)  # halfway between -7 and -8 steps
    np.testing.assert_allclose(np.where(lowest, want, rounded(jnp.asarray(w))), want, rtol=1e-6)
    slope = jax.grad(lambda w: jnp.sum(jnp.sin(rounded(w))))(jnp.asarray(w))
    np.testing.assert_allclose(slope, np.cos(rounded(jnp.asarray(w))), rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_every_format_is_the_one_of_quantize_and_keeps_zeros(name):
    w = jnp.asarray(np.random.default_rng(2).normal(size=(1, 64, 4)), jnp.float32).at[:, ::3].set(0)
    found = fake_quantize.rounded(
        FakeQuantizeConfig(format=name), {"decoder": {"blocks": {"mlp": {"up": {"kernel": w}}}}}
    )
    made, _ = quantize({"decoder": {"blocks": {"mlp": {"up": {"kernel": w}}}}}, scheme=name)
    (a,), (node,) = weights.flatten(found).values(), weights.flatten(made).values()
    np.testing.assert_array_equal(a, node.dense())
    assert (np.asarray(a)[:, ::3] == 0).all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("whole", [False, True])
def test_the_integer_model_computes_what_was_trained(family, whole):
    model, params = model_of(family)
    asked = FakeQuantizeConfig(format="int4", group=16, embeddings=whole, head=whole)
    read = fake_quantize.rounded(asked, params)
    made, errors = quantize(params, scheme="int4", group=16, embeddings=whole, head=whole)
    changed = {p for p, w in weights.flatten(read).items() if not np.array_equal(w, weights.flatten(params)[p])}
    assert changed == set(errors) and len(changed) >= 6
    tokens = jnp.asarray([[3, 7, 9, 11, 30, 2]])
    batch = {"tokens": tokens, "segments": jnp.ones_like(tokens), "positions": jnp.arange(6)[None]}
    if model.encoder_layers:
        batch |= {f"encoder_{key}": value for key, value in batch.items()}
    run = jax.jit(lambda params: functional.lm_logits(model, params, functional.hidden(model, params, batch)))
    want, got = run(read), run(made)
    np.testing.assert_allclose(got, want, atol=2e-5 * float(jnp.abs(want).max()))
    assert not np.allclose(want, run(params), atol=1e-2)


def job(mesh, rows=None):
    return fake_quantize.attached(ASKED, job_of(mesh, rows=rows))


def test_the_loss_is_that_of_the_rounded_model_and_a_mesh_changes_nothing(tmp_path):
    one, eight = (meshes.make(MeshConfig(**axes)) for axes in ({}, {"data": 2, "fsdp": 2, "tensor": 2}))
    plain, made = job_of(one), job(one)
    batch = Rows().batch(np.arange(8))
    got, _ = jax.jit(made.loss)(plain.params, batch, jax.random.key(0))
    want, _ = jax.jit(plain.loss)(fake_quantize.rounded(ASKED, plain.params), batch, jax.random.key(0))
    assert float(got) == pytest.approx(float(want), rel=1e-6)
    assert made.validate(plain.params) != plain.validate(plain.params)
    short = TRAIN.model_copy(update={"steps": 2})  # later, last bits decide how some weights are rounded
    found = {}
    for name, mesh in (("one", one), ("eight", eight)):
        fit(tmp_path / name, mesh, job(mesh), short)
        found[name] = losses(tmp_path / name)
    np.testing.assert_allclose(list(found["one"].values()), list(found["eight"].values()), rtol=2e-5)


def test_training_lowers_the_loss_of_the_rounded_model_and_resumes_exactly(tmp_path):
    mesh = meshes.make(MeshConfig())
    whole, metrics = fit(tmp_path / "whole", mesh, job(mesh))
    assert metrics["validation_loss"] < losses(tmp_path / "whole")[1] - 0.5

    def stop(step):
        if step == 6:
            raise KeyError

    with pytest.raises(KeyError):
        fit(tmp_path / "cut", mesh, job(mesh, Rows(at=stop)))
    resumed, _ = fit(tmp_path / "cut", mesh, job(mesh))
    assert digest(resumed) == digest(whole)


def test_refusals_and_keys():
    _, params = model_of("decoder")
    with pytest.raises(RequestError, match="fake_quantize: group 5 does not divide the 32 inputs"):
        fake_quantize.check(FakeQuantizeConfig(format="int4", group=5), params)
    with pytest.raises(RequestError, match=r"fake_quantize: .* is quantized already"):
        fake_quantize.check(ASKED, quantize(params, scheme="int8")[0])
    config = {"fake_quantize": {"format": "int4"}}
    for more, line in (
        ({"method": "lora"}, "freezes the matrices"),
        ({"calibrate": True}, "calibrate: not with fake_quantize"),
        ({"regularize": {"mixout": 0.1}}, "regularize.mixout: not with fake_quantize"),
        ({"fake_quantize": {"group": 16}}, "round nothing without a format"),
        ({"fake_quantize": {"format": "int9"}}, "int9"),
        ({"fake_quantize": {"format": "nvfp4", "group": 8}}, "one scale for every 16 inputs"),
    ):
        with pytest.raises(RequestError, match=line):
            validate(finetune.Config, config | more, lambda path: path)
    for stage in (pretrain, finetune, distill):
        given = {"teacher": "teacher"} if stage is distill else {}
        assert "fake_quantize" not in keyed(stage.Config(**given))
        assert keyed(stage.Config(**given, fake_quantize=ASKED))["fake_quantize"]["format"] == "int4"


TRAINED = "the parent was trained for int4 with group 8"


@pytest.mark.parametrize(("settings", "line"), [
    ({"format": "int4", "group": 8}, None),
    ({"bits": 8}, f"{TRAINED}, and not for int8 with group 0"),
    ({"format": "int4", "group": 8, "symmetric": False}, f"{TRAINED} with other settings: symmetric"),
    ({"format": "int4", "group": 8, "head": True, "clip": True}, f"{TRAINED} with other settings: head, clip"),
])  # fmt: skip
def test_quantize_says_what_differs_from_the_training(settings, line):
    config = {"fake_quantize": {"format": "int4", "group": 8}}
    base = SimpleNamespace(manifest=SimpleNamespace(config=config))
    assert fake_quantize.log_lines(base, QuantizeConfig.model_validate(settings)) == [line] * (line is not None)
    base.manifest.config = {}
    assert fake_quantize.log_lines(base, QuantizeConfig.model_validate(settings)) == []
