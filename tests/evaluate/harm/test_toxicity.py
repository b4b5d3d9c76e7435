"""Toxicity of continuations: golden values by hand, and the filter's effect on a model whose words are known."""

import gzip
import json

import numpy as np
import pytest
from scipy import stats
from tiny_memorizer import sentences

from llmctl.cli import app
from llmctl.evaluate.harm import toxicity
from llmctl.evaluate.harm.detector import Finding
from llmctl.evaluate.harm.settings import ToxicityConfig

(TEXT,) = (text for text in sentences(0) if "darn" in text)
BEFORE = TEXT.partition(" darn")[0]


def test_metrics_by_hand():
    """Three prompts of two continuations: maxima 0.9, 1 and 0.2; two prompts have a toxic one."""
    found = [Finding((), 0.1, False), Finding((), 0.9, True), Finding(("darn",), 0.3, True), Finding((), 0.6, True)]
    found += [Finding((), 0.2, False), Finding((), 0.0, False)]
    metrics, values = toxicity.scores(found, 3)
    assert metrics["expected_max_toxicity"] == pytest.approx(2.1 / 3)
    assert metrics["toxicity_probability"] == pytest.approx(2 / 3)
    assert metrics["toxic_fraction"] == pytest.approx(0.5)
    assert values["expected_max_toxicity"].tolist() == [0.9, 1.0, 0.2]
    assert values["toxicity_probability"].tolist() == [True, True, False]
    wilson = stats.binomtest(2, 3).proportion_ci(method="wilson")
    ends = [metrics[f"toxicity_probability_{end}"] for end in ("low", "high")]
    assert ends == pytest.approx([wilson.low, wilson.high])
    assert 0.2 <= metrics["expected_max_toxicity_low"] < 0.7 < metrics["expected_max_toxicity_high"] <= 1


@pytest.fixture
def files(tmp_path):
    """Prompts of which the model continues one by "darn", and a harmless prompt."""
    others = [text for text in sentences(0) if text != TEXT]
    (tmp_path / "prompts.txt").write_text("\n".join([BEFORE, *(" ".join(t.split()[:6]) for t in others[:3])]))
    (tmp_path / "benign.jsonl").write_text(json.dumps({"prompt": " ".join(others[4].split()[:6])}) + "\n")
    (tmp_path / "words.txt").write_text("darn\n")
    (tmp_path / "other.txt").write_text(others[4].split()[7] + "\n")
    return tmp_path


def evaluated(capsys, model, *flags, code=0):
    argv = ["eval", str(model), "--tasks", "toxicity", "--no-speed", "--no-plot", "--json", *map(str, flags)]
    assert app.run(argv) == code
    said = capsys.readouterr()
    return json.loads(said.out) if code == 0 else said.err


def flags_of(files, **more):
    given = {"prompts": files / "prompts.txt", "judge.words": files / "words.txt", "samples": 3, "max-new": 4} | more
    return [part for name, value in given.items() for part in (f"--toxicity.{name}", value)]


def test_what_the_model_says_and_what_the_filter_leaves(memorizer, files, capsys):
    """Greedily, one prompt of four is continued by the word; the filter removes it, and refuses nothing else."""
    greedy = {"temperature": 0, "filter.words": files / "words.txt", "benign": files / "benign.jsonl"}
    result = evaluated(capsys, memorizer, *flags_of(files, **greedy), "--out", files / "out", "--batch-size", 8)
    metrics = result["metrics"]
    assert metrics["expected_max_toxicity"] == metrics["toxicity_probability"] == metrics["toxic_fraction"] == 0.25
    assert metrics["filtered_toxicity_probability"] == metrics["filtered_expected_max_toxicity"] == 0
    assert metrics["filtered"] == 0.25 and metrics["false_refusals"] == 0
    assert result["task"] == "toxicity" and "4 prompts, 3 continuations each" in result["protocol"]
    records = [json.loads(line) for line in (files / "out" / "predictions.jsonl").read_text().splitlines()]
    assert records[0]["words"] == ["darn"] and records[0]["filtered"]["action"] == "refused"
    assert (BEFORE + records[0]["continuation"]) in TEXT and all("words" not in r for r in records[1:])
    (values,) = map(json.loads, (files / "out" / "example_values.jsonl").read_text().splitlines())
    assert values["values"]["toxicity_probability"] == [1, 0, 0, 0]
    # Truncated prompts are counted without those of harmless continuations and of further samples.
    short = evaluated(capsys, memorizer, *flags_of(files, **greedy), "--seq-len", 5, "--batch-size", 8)
    assert "4 tokens (12 with a truncated prompt), temperature" in short["protocol"]
    # A filter with another list removes nothing of it, and refuses what is harmless.
    other = greedy | {"filter.words": files / "other.txt"}
    found = evaluated(capsys, memorizer, *flags_of(files, **other), "--batch-size", 8)["metrics"]
    assert found["filtered_toxicity_probability"] == 0.25 and found["filtered"] == 0 and found["false_refusals"] == 1


def test_samples_depend_on_the_seed_alone_and_are_taken_again(memorizer, files, capsys):
    rules = {"temperature": 5, "top-p": 0.9, "max-new": 1, "samples": 16, "filter.words": files / "words.txt"}
    flags = flags_of(files, **rules | {"filter.action": "resample", "filter.attempts": 6})
    one, two = (evaluated(capsys, memorizer, *flags, "--batch-size", n)["metrics"] for n in (8, 64))
    assert one == two and 0 < one["toxic_fraction"] < 0.25
    assert one["filtered"] == one["toxic_fraction"] and one["filtered_toxic_fraction"] == 0
    other = evaluated(capsys, memorizer, *flags, "--toxicity.seed", 1, "--batch-size", 8)["metrics"]
    assert other["toxic_fraction"] != one["toxic_fraction"] or other["filtered"] != one["filtered"]


def test_a_classifier_judges(memorizer, judge, files, capsys):
    rules = {"judge.words": "", "judge.classifier": judge, "judge.classes": "toxic", "temperature": 0, "samples": 1}
    metrics = evaluated(capsys, memorizer, *flags_of(files, **rules), "--batch-size", 8)["metrics"]
    from llmctl.evaluate.predict import Predictor

    argv = ["generate", str(memorizer), "--file", str(files / "prompts.txt"), "--max-new", "4", "--json"]
    assert app.run(argv) == 0
    said = [{"text": result["text"]} for result in json.loads(capsys.readouterr().out)["results"]]
    expected = np.array(Predictor(judge).predictions(said))[:, 1]
    assert metrics["expected_max_toxicity"] == pytest.approx(np.mean(expected), abs=1e-6)
    assert metrics["toxicity_probability"] == np.mean(expected >= 0.5)


def test_compressed_prompts_are_those_of_the_file(files):
    text = (files / "benign.jsonl").read_bytes()
    (files / "more.jsonl.gz").write_bytes(gzip.compress(text))
    (files / "benign.txt").write_bytes(text)
    plain, packed, raw = (
        toxicity.definition(ToxicityConfig(prompts=str(files / name)))
        for name in ("benign.jsonl", "more.jsonl.gz", "benign.txt")
    )
    assert plain == packed != raw


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"prompts": ""}, "toxicity.prompts: name a file"),
        ({"prompts": "nowhere.txt"}, "nowhere.txt"),
        ({"prompts": "EMPTY"}, "has no prompts"),
        ({"judge.words": ""}, "toxicity.judge: name a list"),
        ({"judge.words": "EMPTY"}, "toxicity.judge.words: EMPTY has no words"),
        ({"judge.classifier": "JUDGE", "judge.classes": "rude"}, "has no class 'rude'"),
        ({"benign": "WORDS"}, "name a list or classifier in the filter"),
        ({"filter.words": "WORDS", "filter.action": "resample", "temperature": 0}, "at temperature 0"),
    ],
)
def test_refusals(memorizer, judge, files, capsys, more, said):
    (files / "empty.txt").write_text("\n")
    named = {"EMPTY": str(files / "empty.txt"), "JUDGE": str(judge), "WORDS": str(files / "words.txt")}
    flags = flags_of(files, **{name: named.get(value, value) for name, value in more.items()})
    error = evaluated(capsys, memorizer, *flags, code=2)
    assert said.replace("EMPTY", named["EMPTY"]) in error and error.count("llmctl: ") == 1


def test_a_classifier_has_no_continuations(judge, files, capsys):
    assert "'toxicity' needs a model that generates text" in evaluated(capsys, judge, *flags_of(files), code=2)
