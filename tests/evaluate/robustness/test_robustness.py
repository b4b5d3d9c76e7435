"""The figures under a change equal those that `predict` gives for the changed texts, for each task and family."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from llmctl.artifacts import artifact
from llmctl.config.errors import RequestError
from llmctl.config.settings import MeshConfig
from llmctl.data import splits
from llmctl.data.config import DataConfig
from llmctl.data.tokenizers.byte_tokenizer import ByteTokenizer
from llmctl.distributed import mesh as meshes
from llmctl.evaluate import programs
from llmctl.evaluate.metrics import base, classification
from llmctl.evaluate.predict import Predictor
from llmctl.evaluate.probes.registry import PROBES
from llmctl.evaluate.robustness import perturbations, summary
from llmctl.evaluate.robustness.settings import RobustnessConfig
from llmctl.evaluate.settings import MeasureConfig
from llmctl.evaluate.setup import Held, Setup
from llmctl.evaluate.tasks.registry import TASKS
from llmctl.model import functional
from llmctl.model.config import ModelConfig

SIZES = {"d_model": 16, "layers": 1, "heads": 2, "kv_heads": 2, "head_dim": 8, "d_ff": 24, "max_seq_len": 64}
LABELS = ["bad", "fair", "good"]
FAMILIES = {
    "decoder": {"preset": "llama-tiny"},
    "encoder": {"preset": "bert-tiny", "pooler": False, "head_transform": False, "next_sentence": False},
    "t5": {"preset": "t5-tiny", "architecture": "encoder", "encoder_layers": 0},
}
SETTINGS = RobustnessConfig(changes=["typos", "drops", "case"], rate=0.6, seed=3)
PROBE = PROBES["robustness"]


@pytest.fixture(scope="module")
def save(tmp_path_factory):
    """Saves a random model, and returns the loaded artifact."""
    folder = tmp_path_factory.mktemp("models")
    words = ByteTokenizer.new(0)
    words.save(folder / "words")

    def saved(task: str, family: str, **about):
        classes = TASKS[task].classes
        cfg = ModelConfig(
            **(SIZES | {"vocab_size": words.vocab_size, "head": TASKS[task].head, "pooling": "mean"}
            | FAMILIES.get(family, {}) | {"labels": len(LABELS) if classes else 0} | about)
        )  # fmt: skip
        params = jax.jit(lambda key: functional.init(cfg, key))(jax.random.key(1))
        params = jax.tree.map(lambda a: 3 * a, params)  # predictions that differ between texts
        out = folder / f"{task}-{family}"
        artifact.save(
            out, params, cfg, stage="finetune", task=task, labels=LABELS if classes else [], key="k",
            config={"train": {"seq_len": 48}}, tokenizer_dir=folder / "words",
        )  # fmt: skip
        return artifact.load(out, meshes.make(MeshConfig()))

    return saved


def held(tmp_path, lines, header, **data):
    file = tmp_path / "data.csv"
    file.write_text("\n".join([header, *lines]) + "\n")
    found = splits.load(DataConfig(source="csv", path=str(file), test=1.0, dedup=False, **data))["test"]
    return Held(found, "test", tmp_path / "corpus")


def setup(**changes):
    return Setup(meshes.make(MeshConfig()), 48, 48, 8, "tail", "float32", **changes)


def texts(tmp_path, **data):
    rng = np.random.default_rng(0)
    some = [" ".join(rng.choice(["grand", "dull", "Fine", "slow", "POOR", "warm"], 5)) for _ in range(40)]
    labels = {"classify": LABELS, "multilabel": ["bad|good", "fair"], "regress": ["0.5", "2.5"]}[data.pop("task")]
    return held(tmp_path, [f"{t},{labels[i % len(labels)]}" for i, t in enumerate(some)], "text,label", **data)


def under(change, rows, columns=("text",)):
    """Rows with changed texts, made without the code of the probe."""
    options = perturbations.Options(SETTINGS.rate, {}, SETTINGS.templates, SETTINGS.neutral)
    return [r | {c: perturbations.changed(change, r[c], options, SETTINGS.seed) for c in columns} for r in rows]


@pytest.mark.parametrize(
    ("task", "family"), [*(("classify", family) for family in FAMILIES), ("multilabel", "encoder"), ("regress", "t5")]
)
def test_figures_under_a_change_are_those_of_the_changed_texts(save, tmp_path, task, family):
    model = save(task, family)
    kinds = {
        "classify": {},
        "multilabel": {"label_type": "set", "label_separator": "|"},
        "regress": {"label_type": "number"},
    }
    data = texts(tmp_path, task=task, **kinds[task])
    PROBE.check_model(model.manifest, SETTINGS, "m")
    measured = PROBE.measure(model, data, setup(), SETTINGS)
    predictor, rows = Predictor(model, 8), [dict(row) for row in data.examples]
    metric = {"classify": "accuracy", "multilabel": "micro_f1", "regress": "mae"}[task]
    found = {"": predictor.predictions(rows)}
    found |= {change: predictor.predictions(under(change, rows)) for change in SETTINGS.changes}
    label = np.array([row["label"] for row in rows])
    order = [LABELS.index(name) for name in data.examples.classes]
    for change, p in found.items():
        p = np.array(p)
        name = f"{metric}_under_{change}" if change else metric
        if task == "classify":
            said, expected = p.argmax(-1), np.mean(p.argmax(-1) == np.array(order)[label])
        elif task == "multilabel":
            said, true = p >= 0.5, label[:, np.argsort(order)] > 0
            expected = 2 * (said & true).sum() / (said.sum() + true.sum())
        else:
            said, expected = p, np.mean(np.abs(p - label))
        assert measured.metrics[name] == pytest.approx(expected, abs=1e-6), name
        assert measured.metrics[f"{name}_low"] <= expected <= measured.metrics[f"{name}_high"]
        if not change:
            clean = said
        elif task == "regress":
            assert measured.metrics[f"shift_under_{change}"] == pytest.approx(np.mean(np.abs(said - clean)), abs=1e-5)
        else:
            flips = (said != clean).reshape(len(rows), -1).any(1)
            assert measured.metrics[f"flips_under_{change}"] == flips.mean()
            assert {r["row"] for r in measured.written or () if r["change"] == change} <= {
                data.examples.source.where(int(i)) for i in np.flatnonzero(flips)
            }
    before = [row["text"] for row in rows]
    after = [row["text"] for row in under("case", rows)]
    assert measured.metrics["changed_under_case"] == np.mean([a != b for a, b in zip(before, after, strict=True)])
    assert measured.metrics["changed_under_case"] > 0.9 and "rate 0.6, seed 3" in measured.protocol
    if task != "regress":
        assert max(v for k, v in measured.metrics.items() if k.startswith("flips_under")) > 0
    assert PROBE.measure(model, data, setup(), SETTINGS).metrics == measured.metrics


@pytest.mark.parametrize("family", ["decoder", "encoder_decoder"])
def test_a_language_model_is_measured_on_choices(save, tmp_path, family):
    about = {"preset": "llama-tiny"} if family == "decoder" else {"preset": "t5-tiny", "encoder_layers": 1}
    model = save("lm", family, **about)
    file = tmp_path / "data.jsonl"
    ends = ["red", "blue", "grand", "small", "wet", "new", "rare", "kind"]
    rows = [{"prompt": f"which one is {w}?", "choices": [f"a {w}", "no"], "answer": i % 2} for i, w in enumerate(ends)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = splits.load(DataConfig(source="jsonl", path=str(file), test=1.0))["test"]
    data = Held(found, "test", tmp_path / "corpus")
    with pytest.raises(RequestError, match=r"m: tasks: 'robustness' changes the texts .*not of task 'lm'"):
        PROBE.check_model(model.manifest, SETTINGS, "m")
    settings = SETTINGS.model_copy(update={"task": "choice"})
    PROBE.check_model(model.manifest, settings, "m")
    measured = PROBE.measure(model, data, setup(), settings)
    lines = [
        {**row, "prompt": changed["prompt"]}
        for row, changed in zip(found, under("typos", [dict(r) for r in found], ("prompt",)), strict=True)
    ]
    again = tmp_path / "changed.jsonl"
    again.write_text("".join(json.dumps({k: r[k] for k in ("prompt", "choices", "answer")}) + "\n" for r in lines))
    changed = splits.load(DataConfig(source="jsonl", path=str(again), test=1.0, dedup=False))["test"]
    alone = TASKS["choice"].evaluate(model, Held(changed, "test", tmp_path / "other"), setup())
    assert measured.metrics["accuracy_under_typos"] == alone.metrics["accuracy"]
    assert "flips_under_typos" in measured.metrics


def test_intervals_are_wilsons_for_shares_and_of_a_bootstrap_for_other_values():
    rng = np.random.default_rng(0)
    value_N, right_N = rng.exponential(2.0, 400), rng.random(400) < 0.3
    found = summary.with_intervals({"mae": value_N, "flips": right_N}, seed=0)
    assert (found["flips_low"], found["flips_high"]) == classification.wilson_interval(int(right_N.sum()), 400)
    half = 1.96 * value_N.std() / 20  # the normal approximation
    assert found["mae_low"] == pytest.approx(value_N.mean() - half, abs=0.05)
    assert found["mae_high"] == pytest.approx(value_N.mean() + half, abs=0.05)


def test_metrics_under_a_change_have_titles_and_formats():
    record = base.find("accuracy_under_word_drops")
    assert record and record.title == "accuracy under word drops"
    assert base.text("accuracy_under_typos", 0.5) == "50.00%" and base.find("nothing_under_typos") is None


def test_the_program_is_planned_as_that_of_the_task(save):
    model = save("classify", "encoder")
    there = SimpleNamespace(model=model.model, params=functional.abstract(model.model), manifest=model.manifest)
    config = MeasureConfig(tasks=["classify", "robustness"], batch_size=4)
    both = programs.scoring(config, DataConfig(), "a", {"a": there}, meshes.make(MeshConfig()))  # pyright: ignore[reportArgumentType]
    assert [p.title for p in both] == ["robustness of a", "scoring of a"]
    assert both[0].flops == both[1].flops > 0 and both[0].trace().out_info.shape == (4, 3)


def test_the_definition_has_the_synonyms_but_not_their_path(tmp_path):
    files = [tmp_path / name for name in ("a.txt", "b.txt", "c.txt")]
    for file, text in zip(files, ("big, large", "big, large", "big, huge"), strict=True):
        file.write_text(text)
    a, b, c = (PROBE.definition(RobustnessConfig(synonyms=str(file))) for file in files)
    assert a == b != c and PROBE.definition(RobustnessConfig(seed=1)) != PROBE.definition(RobustnessConfig())
