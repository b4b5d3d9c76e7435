"""The eval stage on tiny artifacts: what it counts is what a person would count, and it names the weights it scored."""

import csv
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmctl.artifacts import artifact
from llmctl.artifacts.workspace import Context
from llmctl.cli import app
from llmctl.config.errors import RequestError
from llmctl.config.settings import MeshConfig
from llmctl.data import splits
from llmctl.data.config import DataConfig, TokenizerConfig
from llmctl.data.tokenizers import loading
from llmctl.distributed import mesh as meshes
from llmctl.evaluate import report
from llmctl.evaluate.metrics import resampling
from llmctl.evaluate.setup import Setup
from llmctl.evaluate.tasks.registry import TASKS
from llmctl.evaluate.tasks.rows import RowSettings
from llmctl.model import functional, weights
from llmctl.model.config import ModelConfig
from llmctl.pipeline import runner
from llmctl.pipeline.stages import eval as stage

WORDS = ("fine", "dull", "grand", "poor", "bright", "grey", "warm", "cold", "quick", "slow")
SIZES = {"d_model": 16, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 8, "d_ff": 24, "max_seq_len": 64}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "reviews.csv"
    rng = np.random.default_rng(0)
    with file.open("w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["text", "label"])
        for i in range(300):
            writer.writerow([f"{i} " + " ".join(rng.choice(WORDS, 12)), "pos" if i % 3 else "neg"])
    return DataConfig(source="csv", path=str(file), validation=0.1, test=0.2)


@pytest.fixture(scope="module")
def run_folder(data, tmp_path_factory):
    """A language model, a classifier that always says "pos", the same in int8."""
    run = tmp_path_factory.mktemp("run")
    words = loading.train(splits.examples(data, "train").texts(), TokenizerConfig(vocab_size=300))
    words.save(run / "words")
    lm = ModelConfig(vocab_size=words.vocab_size, **SIZES)
    config = {"train": {"seq_len": 32}}
    common = {"key": "k", "tokenizer_dir": run / "words"}
    base = artifact.save(
        run / "lm",
        jax.jit(lambda key: functional.init(lm, key))(jax.random.key(0)),
        lm,
        stage="pretrain",
        config=config,
        **common,
    )
    model = lm.model_copy(update={"head": "classify", "labels": 2})
    params = jax.jit(lambda key: functional.init(model, key))(jax.random.key(1))
    params["head"]["out"]["bias"] = jnp.array([0.0, 50.0])
    labels = ["neg", "pos"]
    trained = config | {"truncate": "head_tail"}
    big = artifact.save(
        run / "big", params, model, stage="finetune", config=trained, labels=labels, parent=base, **common
    )
    import qwix

    flat = weights.flatten(params)
    for path, w in flat.items():
        if path.endswith("/q/kernel"):
            flat[path] = weights.Quantized(qwix.quantize(w, "int8", channelwise_axes=[0, 2]))
    shorter = {"train": {"seq_len": 16}, "truncate": "head_tail"}
    artifact.save(run / "cut", params, model, stage="finetune", config=shorter, labels=labels, **common)
    artifact.save(
        run / "small", weights.unflatten(flat), model, stage="quantize", config={}, labels=labels, parent=big, **common
    )
    return run


def measured(run_folder, tmp_path, data, names, **settings):
    config = stage.Config(data=data, batch_size=16, repeats=2, **settings)
    work = tmp_path / "work"
    work.mkdir(exist_ok=True)
    ctx = Context(tmp_path / "out", work, "key", {n: run_folder / n for n in names})
    stage.run(config, None, ctx)
    return json.loads((ctx.out / "results.json").read_text())


def test_what_is_timed_elsewhere_is_measured_anew(data):
    config = stage.Config(data=data)
    assert runner.key(config, None) != runner.key(config.model_copy(update={"platform": "tpu"}), None)
    assert runner.key(config, None) == runner.key(config.model_copy(update={"name": "again"}), None)


def test_classifiers_are_scored_on_every_held_out_example(run_folder, tmp_path, data):
    big, small = measured(run_folder, tmp_path, data, ["big", "small"])
    held = splits.examples(data, "test")
    positive = int((held.labels == 1).sum())
    assert big["task"] == "classification"
    assert big["metrics"]["confusion"] == [[0, len(held) - positive], [0, positive]]
    assert big["metrics"]["accuracy"] == positive / len(held)
    assert big["timed_on"] == "1 x cpu"
    assert big["digest"] == artifact.read_manifest(run_folder / "big").digest != small["digest"]
    # What the trained artifact was cut to holds for what was made from it, though only its ancestor says so.
    assert big["protocol"] == small["protocol"]
    assert big["protocol"].startswith(f"test split, {len(held)} examples, first and last halves of 32 tokens")
    assert all(r["metrics"][m] > 0 for r in (big, small) for m in ("latency_p50", "latency_p90", "examples_per_second"))

    out = tmp_path / "out"
    manifest = artifact.read_manifest(out)
    assert (manifest.stage, manifest.key, manifest.parameters) == ("eval", "key", 0)
    # Times and bytes on disk vary between equal measurements, and the digest must not.
    again = report.determined([{**r, "bytes": 1, "metrics": r["metrics"] | {"latency_p50": 1.0}} for r in (big, small)])
    assert report.determined([big, small]) == again and "confusion" in again[0]["metrics"]
    assert (out / "tradeoff.png").read_bytes().startswith(b"\x89PNG")
    table = (out / "table.md").read_text()
    assert big["digest"] in table and f"{big['metrics']['accuracy']:.2%}" in table and big["protocol"] in table


def test_wrong_predictions_are_written_and_calibration_scales_the_head(run_folder, tmp_path, data):
    ctx = Context(tmp_path / "out", tmp_path / "work", "key", {"big": run_folder / "big"})
    ctx.work.mkdir()
    stage.run(stage.Config(data=data, speed=False), None, ctx)
    found = json.loads((ctx.out / "results.json").read_text())[0]["metrics"]
    lines = [json.loads(line) for line in (ctx.out / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == found["confusion"][0][1] and (ctx.out / "classes.png").stat().st_size > 5000
    assert {(r["label"], r["prediction"]) for r in lines} == {("neg", "pos")}
    assert lines[0]["probability"] > 0.99 and lines[0]["row"].startswith(data.path) and lines[0]["text"]
    # The classifier is certain, and right as often as its class occurs.
    np.testing.assert_allclose(found["ece"], 1 - found["accuracy"], atol=1e-6)

    big = artifact.load(run_folder / "big")
    rows = TASKS["classify"].rows(
        big.model, splits.examples(data, "test"), loading.load(big.tokenizer_dir), RowSettings(32)
    )
    setup = Setup(meshes.make(MeshConfig()), 32, 32, 16, "tail", "float32")
    head = big.params["head"]
    sure = {**head["out"], "bias": jnp.array([0.0, 2.0])}  # too sure: "pos" is right in 57 % of the cases
    scaled, metrics = TASKS["classify"].calibrated(
        big.model, {**big.params, "head": {**head, "out": sure}}, rows, setup
    )
    for name in ("kernel", "bias"):
        want = np.array(sure[name]) / metrics["temperature"]
        np.testing.assert_allclose(scaled["head"]["out"][name], want, rtol=1e-6)
    assert metrics["temperature"] > 3 and metrics["ece"] < 0.2 < metrics["ece_uncalibrated"]


def test_language_models_get_a_perplexity_with_its_protocol(run_folder, tmp_path, data):
    (got,) = measured(run_folder, tmp_path, data, ["lm"], stride=8, examples=10, speed=False, plot=False)
    assert got["task"] == "perplexity"
    assert got["protocol"].startswith("test split, 10 documents each alone, context 32, stride 8, every token once")
    # Fresh weights know next to nothing: near the size of the vocabulary.
    vocab = artifact.read_manifest(run_folder / "lm").model.vocab_size
    assert 0.5 * vocab < got["metrics"]["perplexity"] < 2 * vocab
    texts = list(splits.examples(data, "test").sample(10).texts())
    assert got["metrics"]["text_bytes"] == sum(len(t) for t in texts)
    assert not (tmp_path / "out" / "tradeoff.png").exists()


def test_artifacts_are_compared_on_the_same_examples(run_folder, tmp_path, data, capsys):
    """From the shell: two classifiers with equal predictions; a second time, nothing is scored again."""
    out = tmp_path / "out"
    command = ["eval", str(run_folder / "big"), "--against", str(run_folder / "small"), "--out", str(out), "--json"]
    command += ["--no-speed", "--no-plot", "--bootstrap", "200", "--data.source", "csv", "--data.path", data.path]
    command += ["--data.test", "0.2"]
    assert app.run(command) == 0
    found = json.loads(capsys.readouterr().out)
    (compared,), results = found["comparisons"], found["results"]
    assert (compared["artifact"], compared["against"]) == ("big", str(run_folder / "small"))
    accuracy = results[0]["metrics"]["accuracy"]
    same = {"difference": 0.0, "difference_low": 0.0, "difference_high": 0.0, "p_value": 1.0, "test": "McNemar"}
    assert compared["metrics"]["accuracy"] == {
        "value": accuracy, "against": accuracy, **same, "only_artifact": 0, "only_against": 0,
    }  # fmt: skip
    assert compared["metrics"].keys() == {"accuracy", "macro_f1", "weighted_f1", "log_loss"}
    assert results[0]["metrics"]["macro_f1_low"] < results[0]["metrics"]["macro_f1"]
    for result, line in zip(results, (out / "example_values.jsonl").read_text().splitlines(), strict=True):
        values = {k: np.array(v) for k, v in json.loads(line)["values"].items()}
        for name in compared["metrics"]:
            value = resampling.estimators(values)[name](np.ones((1, len(values["label"]))))[0]
            assert value == pytest.approx(result["metrics"][name])
    assert "| accuracy |" in (out / "table.md").read_text()
    (out / "manifest.json").write_text((out / "manifest.json").read_text().replace('"key": "', '"key": "0'))
    assert app.run(command) == 0
    captured = capsys.readouterr()
    assert "1 results are there and are kept" in captured.err and json.loads(captured.out) == found


@pytest.mark.parametrize("axes", [{}, {"data": 4, "fsdp": 2}], ids=str)
def test_the_acceptance_of_a_draft_is_that_of_full_distributions(run_folder, tmp_path, data, axes):
    """The means of sum(min(p, q)) and of equal most probable tokens, over all rows; the target is not measured."""
    lm, run = artifact.load(run_folder / "lm"), tmp_path / "run"
    sharper = jax.tree.map(lambda w: 1.5 * w, lm.params)
    about = {"stage": "pretrain", "key": "k", "config": {"train": {"seq_len": 32}}, "tokenizer_dir": lm.tokenizer_dir}
    artifact.save(run / "target", sharper, lm.model, **about)
    settings = {"examples": 20, "speed": False, "plot": False, "mesh": MeshConfig(**axes)}
    siblings = {"lm": run_folder / "lm", "target": run / "target"}
    config = stage.Config(data=data, batch_size=16, draft_of="target", **settings)
    (tmp_path / "work").mkdir()
    stage.run(config, None, Context(tmp_path / "out", tmp_path / "work", "key", siblings))
    (got,) = json.loads((tmp_path / "out" / "results.json").read_text())
    examples = splits.examples(data, "test").sample(20)
    rows = TASKS["lm"].rows(lm.model, examples, loading.load(lm.tokenizer_dir), RowSettings(32))
    batch = rows.batch(np.arange(len(rows)))

    @jax.jit
    def probabilities(params):
        return jax.nn.softmax(functional.lm_logits(lm.model, params, functional.hidden(lm.model, params, batch)))

    q, p = (np.asarray(probabilities(params), np.float64) for params in (lm.params, sharper))
    weight = batch["weights"] / batch["weights"].sum()
    assert got["artifact"] == "lm"
    assert got["metrics"]["acceptance"] == pytest.approx(np.sum(np.minimum(p, q).sum(-1) * weight), rel=1e-4)
    same = q.argmax(-1) == p.argmax(-1)
    assert got["metrics"]["greedy_acceptance"] == pytest.approx(np.sum(same * weight), abs=1e-3)
    assert 0 < got["metrics"]["acceptance"] < 0.99


@pytest.mark.parametrize("axes", [{"data": 4, "fsdp": 2}, {"data": 4, "context": 2}], ids=str)
def test_eight_devices_count_what_one_counts(run_folder, tmp_path, data, axes):
    settings = {"examples": 20, "speed": False, "plot": False}
    (tmp_path / "one").mkdir()
    one = measured(run_folder, tmp_path / "one", data, ["lm", "small"], **settings)
    many = measured(run_folder, tmp_path, data, ["lm", "small"], mesh=MeshConfig(**axes), **settings)
    assert one[1]["metrics"]["confusion"] == many[1]["metrics"]["confusion"]
    assert one[0]["metrics"]["nll"] == pytest.approx(many[0]["metrics"]["nll"], rel=1e-5)
    (a, b), (c, d) = (
        [json.loads(line)["values"] for line in (folder / "out" / "example_values.jsonl").read_text().splitlines()]
        for folder in (tmp_path / "one", tmp_path)
    )
    np.testing.assert_allclose(a["document_nll"], c["document_nll"], rtol=1e-5)
    assert len(a["document_nll"]) == 20 and (a["document_tokens"], b["label"]) == (c["document_tokens"], d["label"])


def test_requests_that_cannot_be_met_are_refused_before_anything_is_written(run_folder, tmp_path, data):
    cases = [
        ({"names": ["big"], "data": data.model_copy(update={"columns": {"text": "text"}})}, "no labels"),
        ({"names": ["lm"], "seq_len": 128}, "longest sequence"),
        ({"names": ["big"], "seq_len": 128}, "longest sequence"),
        ({"names": ["lm"], "stride": 64}, "stride"),
        ({"names": []}, "nothing to measure"),
        ({"names": ["lm"], "draft_of": "lm"}, "nothing to measure"),
        ({"names": ["big", "lm"], "draft_of": "lm"}, "a draft continues texts as its target"),
        ({"names": ["lm", "big"], "draft_of": "big"}, "has the head 'classify', and continues no text"),
        ({"names": ["lm"], "of": ["lm"], "draft_of": "lm", "tasks": ["choice"]}, "task choice predicts no tokens"),
        ({"names": ["lm"], "against": "lm"}, "nothing to compare with lm"),
        ({"names": ["big", "lm"], "against": "lm"}, "against: big is measured on classify, and lm on lm"),
        (
            {"names": ["big", "cut"], "against": "cut"},
            r"on classify \(seq_len 32 and 16, stride 32 and 16\)",
        ),
    ]
    for i, (case, message) in enumerate(cases):
        (tmp_path / str(i)).mkdir()
        with pytest.raises(RequestError, match=message):
            measured(run_folder, tmp_path / str(i), case.pop("data", data), case.pop("names"), **case)
        assert not (tmp_path / str(i) / "out").exists()


def test_a_probe_is_measured_beside_a_task_and_kept(run_folder, tmp_path, data, capsys):
    """The classifier always answers "pos", so no change of a text changes its prediction. A probe has no times."""
    task, probe = measured(run_folder, tmp_path, data, ["big"], tasks=["classify", "robustness"], plot=False)
    assert task["task"] == "classification" and "latency_p50" in task["metrics"] and "timed_on" not in probe
    assert (probe["task"], probe["record"]) == ("robustness", "robustness")
    assert probe["metrics"]["accuracy"] == task["metrics"]["accuracy"]
    assert probe["digest"] == task["digest"] and probe["definition"] != task["definition"]
    capsys.readouterr()
    again = measured(run_folder, tmp_path, data, ["big"], tasks=["robustness"], plot=False)
    assert again == [probe] and "1 results are there and are kept" in capsys.readouterr().err
    with pytest.raises(RequestError, match=r"lm: tasks: 'robustness' changes the texts of .*, not of task 'lm'"):
        stage.run(
            stage.Config(data=data, tasks=["robustness"], plot=False),
            None,
            Context(tmp_path / "refused", tmp_path / "work", "key", {"lm": run_folder / "lm"}),
        )
    with pytest.raises(ValueError, match="unknown task 'robustnes', did you mean 'robustness'"):
        stage.Config(tasks=["robustnes"])
