"""The quantize stage with calibration data: reports, resumed layers, meshes, keys and refusals."""

import jax
import numpy as np
import pytest
from pydantic import ValidationError

from llmctl.artifacts import artifact
from llmctl.artifacts.workspace import Context
from llmctl.compress.quantization import gptq, quantize_walk
from llmctl.config.base import keyed
from llmctl.config.errors import RequestError
from llmctl.config.settings import MeshConfig
from llmctl.distributed import mesh as meshes
from llmctl.model import functional, weights
from llmctl.pipeline.stages import prune
from llmctl.pipeline.stages import quantize as stage


def run(artifacts, tmp_path, parent, **settings):
    (tmp_path / "work").mkdir(exist_ok=True, parents=True)
    ctx = Context(tmp_path / "out", tmp_path / "work", "key")
    stage.run(stage.Config(**settings), artifacts / parent, ctx)
    return artifact.load(ctx.out)


GPTQ = {"method": "gptq", "format": "int4", "examples": 20}


@pytest.mark.parametrize("parent", ["classifier", "encoder"])
def test_layers_are_reported(artifacts, tmp_path, reviews, parent, capsys):
    made = run(artifacts, tmp_path, parent, **GPTQ, data=reviews, embeddings=True, head=True)
    metrics, stack = made.manifest.metrics, "encoder" if parent == "encoder" else "decoder"
    layers = metrics["quantized_layers"]
    assert [(r["stack"], r["layer"]) for r in layers] == [*((stack, i) for i in range(3)), ("head", 0)]
    assert metrics["layer_error"][stack] == [r["error"] for r in layers[:3]]
    q = f"{stack}/blocks/attn/q/kernel"
    assert metrics["weight_error"][q] == max(r["matrices"]["attn/q"]["weight_error"] for r in layers[:3])
    assert not any("fallback" in found for r in layers for found in r["matrices"].values())
    integers = {p for p, w in weights.flatten(made.params).items() if isinstance(w, weights.Quantized)}
    assert integers == set(metrics["weight_error"]) and "embed/tokens" in integers
    assert (made.path / "log.jsonl").read_text().count("\n") == 4
    assert "fell back" not in capsys.readouterr().err


def test_eight_devices_choose_what_one_chooses(artifacts, tmp_path, reviews):
    settings = {**GPTQ, "data": reviews, "group": 8, "rules": {"attn/*": "int8", "mlp/up": "none"}, "head": True}
    settings |= {"activations": "int8", "static_activations": "mse"}
    one = run(artifacts, tmp_path / "one", "lm", **settings)
    many = run(artifacts, tmp_path / "many", "lm", **settings, mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    assert {m.name: m.node.format_name for m in weights.matrices(one.params, "block") if m.node.is_integer} == {
        "q": "int8", "k": "int8", "v": "int8", "o": "int8", "gate": "int4", "down": "int4",
    }  # fmt: skip
    layers = one.manifest.metrics["quantized_layers"]
    for a, b in zip(*(weights.matrices(m.params, "block", "head") for m in (one, many)), strict=True):
        np.testing.assert_array_equal(np.asarray(a.node.values(), int), np.asarray(b.node.values(), int))
        if a.node.is_integer:
            np.testing.assert_allclose(a.weight.input_scale, b.weight.input_scale, rtol=1e-5)
            reported = [r["matrices"][a.module]["input_scale"] for r in layers if a.module in r["matrices"]]
            np.testing.assert_allclose(a.weight.input_scale.reshape(-1), reported, rtol=1e-6)


@pytest.mark.slow
def test_eight_devices_tune_nearly_as_one(artifacts, tmp_path, reviews):
    """Sums over devices have another order, so the sign of a gradient near 0 differs, and later layers more so."""
    settings = {"method": "autoround", "format": "int3", "group": 8, "tuning_steps": 8, "examples": 20, "data": reviews}
    one = run(artifacts, tmp_path / "one", "lm", **settings)
    many = run(artifacts, tmp_path / "many", "lm", **settings, mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    errors = [made.manifest.metrics["layer_error"]["decoder"] for made in (one, many)]
    np.testing.assert_allclose(errors[1][0], errors[0][0], rtol=0.01)
    np.testing.assert_allclose(errors[1], errors[0], rtol=0.15)


@pytest.mark.parametrize("method", [
    {"method": "gptq"}, pytest.param({"method": "autoround", "tuning_steps": 6}, marks=pytest.mark.slow),
    pytest.param({"method": "rtn", "activations": "int8", "static_activations": "max", "rules": {"mlp/*": "int8"}},
                 marks=pytest.mark.slow),
], ids=str)  # fmt: skip
def test_a_killed_stage_goes_on_at_its_layer(artifacts, tmp_path, reviews, monkeypatch, method):
    """Of three layers the first is done when the stage is killed; the others get the same bits when it runs again."""
    settings = {**GPTQ, "rules": {"mlp/*": "int2"}, **method, "data": reviews}
    whole = run(artifacts, tmp_path / "whole", "lm", **settings)
    quantize_layer, done = quantize_walk.quantize_layer, []

    def killed(*args):
        done.append(len(done))
        if len(done) == 2:
            raise KeyboardInterrupt
        return quantize_layer(*args)

    monkeypatch.setattr(quantize_walk, "quantize_layer", killed)
    with pytest.raises(KeyboardInterrupt):
        run(artifacts, tmp_path / "killed", "lm", **settings)
    made = run(artifacts, tmp_path / "killed", "lm", **settings)
    assert len(done) == 4
    assert made.manifest.digest == whole.manifest.digest and made.manifest.metrics == whole.manifest.metrics


def test_zeros_of_a_pruned_parent_stay(artifacts, tmp_path, reviews):
    (tmp_path / "work").mkdir()
    pruning = prune.Config(method="magnitude", pattern="2:4")
    prune.run(pruning, artifacts / "lm", Context(tmp_path / "sparse", tmp_path / "work", "key"))
    made = run(tmp_path, tmp_path, "sparse", **GPTQ, data=reviews, symmetric=False)
    assert made.manifest.sparsity >= 0.5 and made.manifest.pruned
    sparse = weights.flatten(artifact.load(tmp_path / "sparse").params)
    for m in weights.matrices(made.params, "block"):
        assert np.all(np.asarray(weights.dense(m.weight))[np.asarray(sparse[m.path]) == 0] == 0)


@pytest.mark.parametrize("name", ["int3", "fp8_e5m2"])
def test_formats_are_saved_and_run(artifacts, tmp_path, reviews, name):
    """The stored artifact has the values that the method chose, and a second stage reads it."""
    made = run(artifacts, tmp_path, "lm", method="gptq", format=name, embeddings=True, examples=20, data=reviews)
    kinds = {m.node.kind for m in weights.matrices(made.params, "block", "embedding")}
    assert kinds == {"quantized" if name == "fp8_e5m2" else "packed"}
    errors = made.manifest.metrics["weight_error"]
    assert 0 < max(errors.values()) < 0.5 and "embed/tokens" in errors
    assert made.manifest.bits == pytest.approx(8 * made.manifest.weight_bytes / made.manifest.parameters)
    pruning = prune.Config(method="wanda", data=reviews, examples=20)
    prune.run(pruning, made.path, Context(tmp_path / "pruned", tmp_path / "work2", "key"))
    assert artifact.load(tmp_path / "pruned").manifest.sparsity >= 0.5


@pytest.mark.parametrize(("name", "group", "settings", "bits"), [
    ("int3", 128, {}, 3.25), ("mxfp4", 0, {}, 4.25), ("nvfp4", 0, {}, 4.5),
    ("int4", 128, {"symmetric": False}, 4.28125), ("int2", 64, {"symmetric": False}, 2.5625),
    ("nf4", 64, {"double_quantize": True}, 4 + 8 / 64 + 32 / (64 * 256)),
])  # fmt: skip
def test_bytes_on_disk_are_those_of_arithmetic(artifacts, tmp_path, name, group, settings, bits):
    """All matrices of the layers; the table and the norms stay as they are."""
    base = artifact.load(artifacts / "lm")
    model = base.model.model_copy(update={"d_model": 256, "head_dim": 64, "d_ff": 1024, "layers": 2})
    params = jax.jit(lambda key: functional.init(model, key))(jax.random.key(0))
    common = {"stage": "pretrain", "key": "k", "config": {}, "tokenizer_dir": base.tokenizer_dir}
    artifact.save(tmp_path / "wide", params, model, **common)
    made = run(tmp_path, tmp_path, "wide", format=name, group=group, **settings)
    matrices = sum(m.weight.size for m in weights.matrices(params, "block"))
    rest = artifact.read_manifest(tmp_path / "wide").parameters - matrices
    expected = matrices * bits / 8 + 4 * rest
    assert made.manifest.weight_bytes == pytest.approx(expected, rel=0.005)
    assert made.manifest.bytes < 1.02 * expected  # compression saves a few percent


def test_matrices_without_a_producer_are_named(artifacts, tmp_path, reviews, capsys):
    """The norms of a post-norm encoder feed the residual stream too, and gelu is between the feed-forward matrices."""
    made = run(artifacts, tmp_path, "encoder", method="awq+gptq", format="int4", examples=20, data=reviews)
    layer = made.manifest.metrics["quantized_layers"][0]["matrices"]
    assert {path for path, found in layer.items() if "unscaled" not in found} == {"attn/o"}
    assert 0 <= layer["attn/o"]["exponent"] <= 1
    said = " ".join(capsys.readouterr().err.split())
    assert "encoder: no scales for attn/k, attn/q, attn/v, mlp/down, mlp/up" in said


def test_smoothing_reads_data_also_for_rounding(artifacts, tmp_path, reviews):
    made = run(artifacts, tmp_path, "lm", activations="int8", smooth=True, alpha=0.6, examples=20, data=reviews)
    assert len(made.manifest.metrics["quantized_layers"]) == 3
    config = stage.Config(activations="int8", smooth=True, data=reviews)
    assert keyed(config)["data"]["path"] == reviews.path and config.alpha == 0.5


def test_a_rotated_model_is_saved_with_its_own_output_projection(artifacts, tmp_path, reviews, capsys):
    """Of a tied parent, on one device and on eight, and with calibration data."""
    base = artifact.load(artifacts / "lm")
    settings = {"rotate": True, "format": "int4", "method": "gptq", "examples": 20, "data": reviews, "head": True}
    made = [run(artifacts, tmp_path / str(n), "lm", **settings, mesh=mesh) for n, mesh in (
        (1, MeshConfig()), (8, MeshConfig(data=2, fsdp=2, tensor=2)),
    )]  # fmt: skip
    assert base.model.tied and not made[0].model.tied
    assert "the output projection becomes a matrix of its own" in " ".join(capsys.readouterr().err.split())
    for a, b in zip(*(weights.flatten(m.params).items() for m in made), strict=True):
        one, other = (np.asarray(weights.dense(w)) for w in (a[1], b[1]))
        assert np.linalg.norm(one - other) <= 0.02 * np.linalg.norm(one), a[0]
    assert made[0].manifest.metrics["quantized_layers"][-1]["matrices"].keys() == {"lm_head"}


@pytest.mark.parametrize(("settings", "title"), [
    ({"rotate": True, "symmetric": False, "double_quantize": True, "group": 8, "rules": {"up": "nf4"}},
     "rotation of decoder/blocks/attn/o"),
    ({"method": "autoround", "tuning_steps": 2, "examples": 20}, "gradient step of a layer's rounding"),
    ({"activations": "int8", "static_activations": "mse", "examples": 20}, "rounding of"),
])  # fmt: skip
def test_plans_trace_the_programs_and_know_the_result(artifacts, tmp_path, reviews, settings, title):
    mesh = meshes.make(MeshConfig(data=2, fsdp=2, tensor=2))
    settings = {"format": "int4", "head": True, "data": reviews, **settings}
    config = stage.Config(**settings)
    found, left = stage.programs(config, artifact.abstract(artifacts / "lm", mesh), {}, mesh)
    assert left and any(program.title.startswith(title) for program in found)
    assert all(program.trace() is not None for program in found)
    made = run(artifacts, tmp_path, "lm", **settings)
    assert made.manifest.weights == left.manifest.weights and made.model == left.model


def test_a_fallback_is_named(artifacts, tmp_path, reviews, monkeypatch, capsys):
    solve = gptq.quantize
    monkeypatch.setattr(gptq, "quantize", lambda *args, **settings: solve(*args, **settings)._replace(attempts=4))
    made = run(artifacts, tmp_path, "lm", **GPTQ, data=reviews)
    assert "no inverse" in made.manifest.metrics["quantized_layers"][2]["matrices"]["mlp/up"]["fallback"]
    said = capsys.readouterr().err
    assert "decoder layer 2, mlp/up: fell back to rounding to nearest: the Hessian has no inverse" in said


def test_data_is_no_part_of_the_key_without_calibration(reviews):
    """A recipe's shared data reached no quantize stage before methods read data."""
    plain = keyed(stage.Config(bits=4))
    assert keyed(stage.Config(bits=4, data=reviews, examples=3)) == plain
    assert not {"method", "data", "examples", "clip", "damping"} & plain.keys()
    assert keyed(stage.Config(method="gptq", bits=4, data=reviews))["data"]["path"] == reviews.path


@pytest.mark.parametrize(("settings", "message"), [
    ({"damping": 0.1}, "damping: not for method 'rtn'; set method to 'gptq'"),
    ({"method": "gptq", "static_groups": True}, "static_groups: only with groups"),
    ({"method": "gptq", "group": 8, "static_groups": False}, "not with act_order = true"),
    ({"method": "gptq", "group": 8, "static_groups": False, "act_order": False, "clip": True}, "not with clip = true"),
    ({"method": "gtpq"}, "Input should be 'rtn', 'gptq', 'awq'"),
    ({"method": "awq", "damping": 0.1}, "damping: not for method 'awq'; set method to 'gptq'"),
    ({"method": "awq", "activations": "int8", "smooth": True}, "smooth: not with method 'awq'"),
    ({"smooth": True}, "smooth: only with quantized activations"),
    ({"format": "mxfp4", "group": 16}, "group 16: mxfp4 has one scale for every 32 inputs"),
    ({"format": "int3", "activations": "int8"}, "activations: not for format 'int3'; choose int8 or int4"),
    ({"alpha": 0.2}, "alpha: only with smooth = true"),
    ({"rules": {"mlp/*": "int5"}}, "unknown scheme 'int5'"),
    ({"tuning_steps": 5}, "tuning_steps: not for method 'rtn'; set method to 'autoround'"),
    ({"method": "autoround", "format": "nf4"}, "method 'autoround': not for format 'nf4'; choose one of int8"),
    ({"method": "autoround", "clip": True}, "clip: not with method 'autoround'"),
    ({"symmetric": False, "format": "nf4"}, "symmetric = false: not for format 'nf4'; choose one of int8, int4"),
    ({"symmetric": False, "activations": "int8"}, "symmetric = false: not with quantized activations"),
    ({"double_quantize": True, "format": "mxfp4"}, "double_quantize: not for format 'mxfp4'; set format to 'nf4'"),
    ({"double_quantize": True, "average_bits": 4.5}, "double_quantize: not for format 'int8'; set format to 'nf4'"),
    ({"rules": {"": "int4"}}, "a pattern is empty"),
    ({"rules": {"mlp/*": "nf4"}, "activations": "int8"}, "activations: not for format 'nf4'"),
    ({"plot": True}, "plot: only with average_bits or max_perplexity_increase"),
    ({"static_activations": "max"}, "static_activations: only with quantized activations"),
    ({"activations": "fp8_e4m3"}, "activations: not for format 'int8'; choose fp8_e4m3"),
])  # fmt: skip
def test_settings_that_contradict_one_another(settings, message):
    with pytest.raises(ValidationError, match=message):
        stage.Config(**settings)


def test_requests_that_cannot_be_met_write_nothing(artifacts, tmp_path, reviews):
    with pytest.raises(RequestError, match="group 7 does not divide the 16 inputs of decoder/blocks/attn/k/kernel"):
        run(artifacts, tmp_path, "lm", **GPTQ, data=reviews, group=7)
    run(artifacts, tmp_path / "once", "lm", clip=True)
    with pytest.raises(RequestError, match="quantized already"):
        run(tmp_path / "once", tmp_path, "out", **GPTQ, data=reviews)
    assert not (tmp_path / "out").exists()


def test_the_clipping_search_lowers_the_error_of_weights(artifacts, tmp_path):
    plain, clipped = (run(artifacts, tmp_path / str(c), "lm", bits=4, embeddings=True, clip=c) for c in (False, True))
    errors = [m.manifest.metrics["weight_error"] for m in (plain, clipped)]
    assert all(errors[1][path] < error for path, error in errors[0].items())
    assert plain.manifest.bits == clipped.manifest.bits
