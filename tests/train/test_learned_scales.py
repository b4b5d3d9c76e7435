"""Learned scales of quantization-aware training (LSQ): gradients against NumPy, the integers, meshes, and refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_training import MODEL, TRAIN, Rows, digest, fit, job_of, losses

from llmctl.artifacts import artifact
from llmctl.artifacts.workspace import Context
from llmctl.compress.quantization.formats import Format
from llmctl.compress.quantization.quantize import Target
from llmctl.config.base import keyed
from llmctl.config.errors import RequestError
from llmctl.config.settings import MeshConfig
from llmctl.config.validation import validate
from llmctl.data.tokenizers.byte_tokenizer import ByteTokenizer
from llmctl.distributed import mesh as meshes
from llmctl.model import weights
from llmctl.model.weights import LearnedScale
from llmctl.model.weights.learned_scale import rounded
from llmctl.pipeline.stages import finetune, pretrain
from llmctl.pipeline.stages import quantize as stage
from llmctl.train import fake_quantize, learned_scales
from llmctl.train.fake_quantize_settings import FakeQuantizeConfig

ASKED = FakeQuantizeConfig(format="int4", group=16, scales="learned", embeddings=True, rules={"mlp/up": "int3"})


@pytest.mark.parametrize(("shape", "groups", "bits"), [((2, 12, 3), (2, 3, 3), 4), ((5, 12), (5, 1), 2)])
def test_gradients_are_those_of_the_paper(shape, groups, bits):
    """Of a stack of matrices [L, I, O] with groups of 4 inputs, and of a table [V, D] with one scale per row."""
    rng = np.random.default_rng(0)
    w, g = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    scale = rng.uniform(0.1, 0.4, groups).astype(np.float32)
    low, high = {4: (-7.0, 7.0), 2: (-2.0, 1.0)}[bits]
    _, back = jax.vjp(lambda w, s: rounded(w, s, (low, high)), jnp.asarray(w), jnp.asarray(scale))
    d_w, d_scale = back(jnp.asarray(g))
    axis = next(i for i, (a, b) in enumerate(zip(shape, groups, strict=True)) if a != b)
    size = shape[axis] // groups[axis]
    want_w, want = np.zeros_like(w), np.zeros_like(scale)
    for at in np.ndindex(*shape):  # equations 3 and 5 of the paper, one weight after the other
        group = tuple(i // size if n == axis else i for n, i in enumerate(at))
        v = w[at] / scale[group]
        if v <= low or v >= high:
            slope = low if v <= low else high
        else:
            slope = np.round(v) - v
            want_w[at] = g[at]
        want[group] += g[at] * slope / np.sqrt(size * high)
    np.testing.assert_allclose(d_w, want_w)
    np.testing.assert_allclose(d_scale, want, rtol=1e-4, atol=1e-6)


def job(mesh, rows=None):
    return fake_quantize.attached(ASKED, job_of(mesh, rows=rows))


def test_scales_begin_as_in_the_paper_and_zeros_do_not_count():
    w = np.random.default_rng(1).normal(size=(1, 32, 4)).astype(np.float32)
    w[:, ::4] = 0
    kernel = jax.device_put(w, meshes.replicated(meshes.make(MeshConfig())))
    targets = {"mlp/up/kernel": Target(Format("int3", 16), -2)}
    found = learned_scales.initial({"mlp": {"up": {"kernel": kernel}}}, targets)["mlp/up/kernel"]
    size = np.abs(w.reshape(1, 2, 16, 4))
    np.testing.assert_allclose(np.exp(found), 2 * size.sum(2) / (size > 0).sum(2) / np.sqrt(3), rtol=1e-5)


def test_the_integers_compute_what_was_trained(tmp_path):
    """The loss that training reads, the artifact's, and the one of the integers; other settings are refused."""
    mesh = meshes.make(MeshConfig())
    made, plain, batch = job(mesh), job_of(mesh), Rows().batch(np.arange(8))
    extra = {name: a + 0.1 for name, a in made.extra.items()}
    result = made.result(made.params, extra)
    learned = {p: w for p, w in weights.flatten(result).items() if isinstance(w, LearnedScale)}
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), made.params)
    planned = weights.flatten(learned_scales.as_saved(ASKED, shapes))
    assert {p: weights.describe(w) for p, w in planned.items()} == {
        p: weights.describe(w) for p, w in weights.flatten(result).items()
    }
    assert len(learned) == 8 and learned["decoder/blocks/mlp/up/kernel"].format == "int3"
    ByteTokenizer.new(0).save(tmp_path / "words")
    common = {"stage": "pretrain", "key": "k", "config": {}, "tokenizer_dir": tmp_path / "words"}
    artifact.save(tmp_path / "a", result, MODEL, **common)
    settings = {"format": "int4", "group": 16, "embeddings": True, "rules": {"mlp/up": "int3"}}

    def quantized(name, **more):
        (tmp_path / "work").mkdir(exist_ok=True)
        ctx = Context(tmp_path / name, tmp_path / "work", "key")
        stage.run(stage.Config(**settings | more), tmp_path / "a", ctx)
        return artifact.load(tmp_path / name).params

    integers = weights.flatten(quantized("q"))
    for path, w in learned.items():
        assert not isinstance(integers[path], LearnedScale)
        np.testing.assert_allclose(weights.dense(integers[path]), w.dense(), rtol=1e-6)
    key = jax.random.key(0)
    trained, _ = jax.jit(made.loss)(made.params, batch, key, extra=extra)
    got, _ = jax.jit(plain.loss)(weights.unflatten(integers), batch, key)
    assert float(got) == pytest.approx(float(trained), rel=2e-5)
    for other, line in (
        ({"method": "gptq"}, "method 'gptq' would choose others"), ({"embeddings": False}, "set embeddings = true"),
        ({"group": 8}, "learned for int4 with group 16; quantize with the format"), ({"clip": True}, "clip would"),
    ):  # fmt: skip
        with pytest.raises(RequestError, match=line):
            quantized("refused", **other)
    assert not (tmp_path / "refused").exists()
    config, devices = stage.Config(**settings), meshes.make(MeshConfig(data=2, fsdp=2, tensor=2))
    found, left = stage.programs(config, artifact.abstract(tmp_path / "a", devices), {}, devices)
    assert [program.trace() is not None for program in found] == [True]
    assert left and left.manifest.weights == artifact.read_manifest(tmp_path / "q").weights


@pytest.mark.slow
def test_training_learns_the_scales_on_eight_devices_as_on_one_and_resumes_exactly(tmp_path):
    one, eight = (meshes.make(MeshConfig(**axes)) for axes in ({}, {"data": 2, "fsdp": 2, "tensor": 2}))
    start = {name: np.asarray(a) for name, a in job(one).extra.items()}
    whole, metrics = fit(tmp_path / "whole", one, job(one))
    assert metrics["validation_loss"] < losses(tmp_path / "whole")[1] - 0.5

    def stop(step):
        if step == 6:
            raise KeyError

    with pytest.raises(KeyError):
        fit(tmp_path / "cut", one, job(one, Rows(at=stop)))
    resumed, _ = fit(tmp_path / "cut", one, job(one))
    assert digest(resumed) == digest(whole)
    fit(tmp_path / "eight", eight, job(eight), TRAIN.model_copy(update={"steps": 2}))
    first = losses(tmp_path / "eight")
    np.testing.assert_allclose([losses(tmp_path / "whole")[step] for step in first], list(first.values()), rtol=2e-4)
    learned = [w for w in weights.flatten(whole).values() if isinstance(w, LearnedScale)]
    moved = [np.abs(np.log(w.scale) - a).max() for w, a in zip(learned, start.values(), strict=True)]
    assert min(moved) > 1e-3


def test_refusals_and_keys():
    for given, line in (
        ({"format": "nf4", "scales": "learned"}, "scales = 'learned': not for format 'nf4'"),
        ({"format": "int4", "scales": "learned", "rules": {"up": "mxfp4"}}, "not for format 'mxfp4'"),
        ({"scales": "learned"}, "scales: round nothing without a format"),
    ):
        with pytest.raises(RequestError, match=line):
            validate(finetune.Config, {"fake_quantize": given}, lambda path: path)
    plain = keyed(pretrain.Config(fake_quantize=FakeQuantizeConfig(format="int4")))
    assert "scales" not in plain["fake_quantize"]
