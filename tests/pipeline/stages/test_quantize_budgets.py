"""The quantize stage with average_bits and max_perplexity_increase: budgets, rules, resumed scans and refusals."""

import itertools

import numpy as np
import pytest
from pydantic import ValidationError

from llmctl.artifacts import artifact
from llmctl.artifacts.workspace import Context
from llmctl.cli import app
from llmctl.compress.calibration import calibration_data
from llmctl.compress.quantization import format_scan
from llmctl.config.base import keyed
from llmctl.config.errors import RequestError
from llmctl.config.settings import MeshConfig
from llmctl.distributed import mesh as meshes
from llmctl.evaluate.tasks.registry import of
from llmctl.model import weights
from llmctl.pipeline.stages import quantize as stage


def run(artifacts, tmp_path, parent, **settings):
    (tmp_path / "work").mkdir(exist_ok=True, parents=True)
    ctx = Context(tmp_path / "out", tmp_path / "work", "key")
    stage.run(stage.Config(**settings), artifacts / parent, ctx)
    return artifact.load(ctx.out)


def loss_of(made, reviews, examples):
    """Return the mean loss, computed batch by batch from the stored artifact."""
    config = stage.Config(average_bits=5, data=reviews, examples=examples)
    batches = calibration_data.load(config, made, meshes.make(MeshConfig()), labels=True)
    loss, parts = of(made.manifest).loss_of(made.model, dtype="float32"), []
    for batch in batches:
        total, found = loss(made.params, batch)
        parts.append([float(total), float(found["weight"])])
    return np.sum(parts, 0)[0] / np.sum(parts, 0)[1]


SMALL = {"examples": 16, "group": 8}


def bits_of(made):
    """Return the stored bits per weight of the quantized matrices, from the arrays."""
    nodes = [m.node for m in weights.matrices(made.params) if not weights.is_plain(m.weight)]
    return sum(map(weights_bits, nodes)) / sum(node.count() for node in nodes)


def weights_bits(node):
    return sum(a.size * {"int8": 8, "int4": 4, "uint8": 8, "float32": 32}[str(a.dtype)] for a in node.parts().values())


def test_average_bits_choose_the_best_mixture_of_the_scan(artifacts, tmp_path, reviews, capsys):
    """All combinations are compared by the measured losses; the result is what was measured."""
    made = run(artifacts, tmp_path, "lm", average_bits=9.5, candidates=["int8", "int4"], data=reviews, **SMALL)
    found = made.manifest.metrics["format_budget"]
    assert found["bits"] == pytest.approx(bits_of(made), abs=1e-5) and found["bits"] <= 9.5
    assert found["kind"] == "average_bits" and found["limit"] == 9.5
    kinds = {m.path.removesuffix("/kernel"): m.node.format_name for m in weights.matrices(made.params, "block")}
    assert kinds == found["formats"] and len({*kinds.values()}) > 1
    per_weight = {"int8": 12.0, "int4": 8.0}  # one float32 scale per 8 weights
    sizes = {m.path.removesuffix("/kernel"): m.node.count() for m in weights.matrices(made.params, "block")}
    tried = []
    for chosen in itertools.product(per_weight, repeat=len(sizes)):
        bits = sum(per_weight[name] * size for name, size in zip(chosen, sizes.values(), strict=True))
        if bits <= 9.5 * sum(sizes.values()):
            pairs = zip(sizes, chosen, strict=True)
            tried.append(sum(max(0.0, found["losses"][module][name]) for module, name in pairs))
    predicted = np.log1p(found["predicted"])
    assert predicted == pytest.approx(min(tried), abs=2e-5)
    base = loss_of(artifact.load(artifacts / "lm"), reviews, 16)
    assert np.expm1(loss_of(made, reviews, 16) - base) == pytest.approx(found["measured"], abs=2e-5)
    said = " ".join(capsys.readouterr().err.split())
    assert (made.path / "formats.png").read_bytes().startswith(b"\x89PNG")
    assert "mixtures of formats" in said and "bits per weight; perplexity on the calibration data" in said


@pytest.mark.parametrize("parent", ["classifier", "encoder"])
def test_a_limit_of_perplexity_is_met_and_rules_hold(artifacts, tmp_path, reviews, parent):
    settings = {"rules": {"attn/q": "int8", "mlp/down": "none"}, "candidates": ["int8", "int2"], "data": reviews}
    settings["plot"] = False
    made = run(artifacts, tmp_path, parent, max_perplexity_increase="0.5%", embeddings=True, **settings, **SMALL)
    found = made.manifest.metrics["format_budget"]
    formats = {module.rpartition("blocks/")[2]: name for module, name in found["formats"].items()}
    assert formats["attn/q"] == "int8" and "mlp/down" not in formats and "embed/tokens" in formats
    assert found["measured"] <= 0.005 and not (made.path / "formats.png").exists()
    front, at = found["front"], next(i for i, m in enumerate(found["front"]) if m.get("chosen"))
    assert front[at]["bits"] == found["bits"] and (at == 0 or front[at - 1]["measured"] > 0.005)
    assert made.manifest.config["max_perplexity_increase"] == 0.005


@pytest.mark.slow
def test_eight_devices_a_rotation_and_gptq_report_the_result(artifacts, tmp_path, reviews):
    settings = {"method": "gptq", "rotate": True, "max_perplexity_increase": 0.02, "head": True, "data": reviews}
    settings |= {"candidates": ["int8", "int3"], "mesh": MeshConfig(data=2, fsdp=2, tensor=2)}
    made = run(artifacts, tmp_path, "lm", **settings, **SMALL)
    found = made.manifest.metrics["format_budget"]
    base = loss_of(artifact.load(artifacts / "lm"), reviews, 16)
    assert np.expm1(loss_of(made, reviews, 16) - base) == pytest.approx(found["measured_after"], abs=2e-5)
    assert found["bits"] == pytest.approx(bits_of(made), abs=1e-5) and "lm_head" in found["formats"]


@pytest.mark.slow
def test_quantized_activations_are_measured(artifacts, tmp_path, reviews):
    made = run(artifacts, tmp_path, "lm", activations="int8", average_bits=10, data=reviews, **SMALL)
    found = made.manifest.metrics["format_budget"]
    assert {*found["formats"].values()} <= {"int8", "int4"}
    base = loss_of(artifact.load(artifacts / "lm"), reviews, 16)
    assert np.expm1(loss_of(made, reviews, 16) - base) == pytest.approx(found["measured"], abs=2e-5)


def test_a_killed_scan_measures_only_what_is_missing(artifacts, tmp_path, reviews, monkeypatch):
    settings = {"method": "gptq", "average_bits": 9, "data": reviews, **SMALL}
    whole = run(artifacts, tmp_path / "whole", "lm", **settings)
    measured, done = format_scan.FormatScan._measured, []

    def killed(*args):
        done.append(len(done))
        if len(done) == 6:
            raise KeyboardInterrupt
        return measured(*args)

    monkeypatch.setattr(format_scan.FormatScan, "_measured", killed)
    with pytest.raises(KeyboardInterrupt):
        run(artifacts, tmp_path / "killed", "lm", **settings)
    made = run(artifacts, tmp_path / "killed", "lm", **settings)
    assert len(done) == 1 + (1 + 7 * 3 + 1)  # the interrupted one was measured again
    assert made.manifest.digest == whole.manifest.digest and made.manifest.metrics == whole.manifest.metrics


@pytest.mark.parametrize("budget", [{"average_bits": 9.5}, {"max_perplexity_increase": 0.01}], ids=str)
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_plans_count_the_losses(artifacts, reviews, budget, method):
    mesh = meshes.make(MeshConfig())
    config = stage.Config(**budget, method=method, data=reviews, **SMALL)
    found, left = stage.programs(config, artifact.abstract(artifacts / "lm", mesh), {}, mesh)
    losses = next(program for program in found if program.title == "loss with rounded matrices")
    assert losses.trace() is not None and losses.steps >= 1 + 7 * 3 + 1 and len(found) > 1
    nodes = [m.node for m in weights.matrices(left.params, "block")]
    bits = sum(weights_bits(node) for node in nodes) / sum(node.count() for node in nodes)
    assert bits <= 9.5 if "average_bits" in budget else bits == 12


@pytest.mark.parametrize(("settings", "message"), [
    ({"average_bits": 4.5, "max_perplexity_increase": 0.1}, "average_bits and max_perplexity_increase: say one"),
    ({"average_bits": 4.5, "format": "nf4"}, "average_bits chooses the formats; leave out format"),
    ({"max_perplexity_increase": "1%", "bits": 4}, "max_perplexity_increase chooses the formats; leave out bits"),
    ({"candidates": ["int8", "int4"]}, "candidates: only with average_bits or max_perplexity_increase"),
    ({"average_bits": 4.5, "candidates": ["int4", "int4"]}, "candidates: name at least two formats"),
    ({"average_bits": 4.5, "candidates": ["int4", "int5"]}, "unknown scheme 'int5'"),
    ({"average_bits": 4.5, "candidates": ["int4", "nf4"], "method": "autoround"}, "not for format 'nf4'"),
    ({"average_bits": 5, "candidates": ["int4", "int3"], "activations": "int8"}, "not for format 'int3'"),
    ({"average_bits": -1}, "greater than or equal to 0"),
    ({"max_perplexity_increase": "x%"}, "a percentage such as '1%'"),
])  # fmt: skip
def test_settings_that_contradict_one_another(settings, message):
    with pytest.raises(ValidationError, match=message):
        stage.Config(**settings)


def test_keys_without_a_budget_stay(reviews):
    assert not {"average_bits", "max_perplexity_increase", "candidates"} & keyed(stage.Config(bits=4)).keys()
    told = [keyed(stage.Config(max_perplexity_increase=limit, data=reviews)) for limit in ("1%", 0.01, "0.01")]
    assert told[0] == told[1] == told[2] and told[0]["data"]["path"] == reviews.path


@pytest.mark.parametrize(("settings", "message"), [
    ({"average_bits": 6.5}, "average_bits 6.5 is below 7.083, the fewest bits per weight"),
    ({"average_bits": 9, "rules": {"*": "int8"}}, "rules set the format of every matrix"),
    ({"average_bits": 9, "rules": {"mlp/upp": "int8"}}, "matches no matrix"),
    ({"average_bits": 9, "group": 7}, "group 7 does not divide the 16 inputs"),
    ({"max_perplexity_increase": "1%"}, "the best mixture of int8, int4, int3 has 1.014"),
])  # fmt: skip
def test_budgets_that_cannot_be_met_write_nothing(artifacts, tmp_path, reviews, monkeypatch, settings, message):
    """Every rounded matrix adds 0.1 to the loss, and exp(7 * 0.1) - 1 = 1.014."""
    monkeypatch.setattr(format_scan.FormatScan, "_measured", lambda scan, chosen: 5 + 0.1 * len(chosen))
    with pytest.raises(RequestError, match=message):
        run(artifacts, tmp_path, "lm", data=reviews, **SMALL | settings)
    assert not (tmp_path / "out").exists()


def test_a_budget_without_data_is_one_line(artifacts, tmp_path, capsys):
    command = ["quantize", "--from", str(artifacts / "lm"), "--out", str(tmp_path / "out")]
    assert app.run([*command, "--max-perplexity-increase", "1%"]) == 2
    said = capsys.readouterr().err.strip()
    assert said.count("\n") == 0 and "data" in said and not (tmp_path / "out").exists()
