"""Identity terms: swapped texts, gaps between groups by hand, and an evaluation of a classifier."""

import json

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix
from tiny_distillation import MODELS, classifier, made

from llmctl.cli import app
from llmctl.config.errors import RequestError
from llmctl.evaluate.bias import identity_swaps, identity_terms
from llmctl.evaluate.bias.identity_swaps import Versions
from llmctl.evaluate.bias.identity_terms import Attribute
from llmctl.evaluate.bias.intervals import with_intervals
from llmctl.evaluate.bias.settings import IdentitySwapsConfig

FAITH = Attribute("faith", ("a", "b", "c"), (("red", "green", "blue"), ("red hat", "cap", "blue hat")))


def test_terms_are_replaced_as_whole_words_in_their_letter_case():
    (gender, *others) = identity_terms.read(IdentitySwapsConfig().terms)
    assert (gender.name, gender.groups) == ("gender", ("female", "male"))
    assert {a.name for a in others} >= {"religion", "age"}
    assert (
        gender.swapped("SHE told her sisters' heroine: mother!", "female", "male")
        == "HE told his brothers' hero: father!"
    )
    assert gender.swapped("The theme of him", "male", "female") == "The theme of her"
    assert gender.named("The theme ushers") == []
    # If case is ignored, these letters match "s" and "i".
    assert gender.swapped("\u017fhe saw h\u0131m and H\u0130M", "female", "male") == "he saw h\u0131m and H\u0130M"
    assert gender.swapped("h\u0131m and H\u0130M", "male", "female") == "her and HER"
    assert FAITH.swapped("A red hat, Red; credit", "a", "b") == "A cap, Green; credit"
    rows = [{"text": "red hat", "pair": "Red"}, {"text": "red or blue"}, {"text": "none"}]
    (found,) = identity_swaps.of_attribute(FAITH, rows)
    assert found == Versions(0, 0, [rows[0], {"text": "cap", "pair": "Green"}, {"text": "blue hat", "pair": "Blue"}])


def test_gaps_equal_those_of_confusion_matrices():
    """Random probabilities: rates per group, from sklearn, and the largest differences between groups."""
    rng = np.random.default_rng(0)
    label_N, at_M, own_M = rng.integers(3, size=60), np.sort(rng.permutation(60)[:40]), rng.integers(3, size=40)
    p_MGC = rng.dirichlet([1, 1, 1], size=(40, 3))
    versions = [Versions(n, g, []) for n, g in zip(at_M.tolist(), own_M.tolist(), strict=True)]
    metrics = with_intervals(identity_swaps.compared(FAITH, versions, p_MGC, label_N, positive=2))
    class_MG = p_MGC.argmax(-1)
    rates = {"true_positive_rate": [], "false_positive_rate": [], "accuracy": [], "probability": []}
    for g in range(3):
        (tn, fp), (fn, tp) = confusion_matrix(label_N[at_M] == 2, class_MG[:, g] == 2)
        rates["true_positive_rate"].append(tp / (tp + fn))
        rates["false_positive_rate"].append(fp / (fp + tn))
        rates["accuracy"].append((class_MG[:, g] == label_N[at_M]).mean())
        rates["probability"].append(p_MGC[:, g, 2].mean())
    for name, own in rates.items():
        assert [metrics[f"{name}/faith/{g}"] for g in "abc"] == pytest.approx(own)
        assert metrics[f"{name}_gap/faith"] == pytest.approx(max(own) - min(own))
        assert metrics[f"{name}_gap/faith_low"] < metrics[f"{name}_gap/faith_high"]
    flips = [class_MG[m, k] != class_MG[m, g] for m, g in enumerate(own_M) for k in range(3) if k != g]
    changes = [abs(p_MGC[m, k, 2] - p_MGC[m, g, 2]) for m, g in enumerate(own_M) for k in range(3) if k != g]
    assert metrics["flip_rate/faith"] == pytest.approx(np.mean(flips))
    assert metrics["probability_change/faith"] == pytest.approx(np.mean(changes))


TERMS = '[color]\ngroups = ["r", "g"]\nterms = [["red", "emerald"]]\n'


def evaluated(tmp_path, *more, terms=TERMS, texts=("red a", "b emerald", "Red and emerald", "none", "red c")):
    rows = [{"text": f"{text} {i}", "label": "np"[i % 2]} for i, text in enumerate(texts)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "terms.toml").write_text(terms)
    data = ["--data.source", "jsonl", "--data.path", str(tmp_path / "rows.jsonl"), "--data.test", "1"]
    return app.run(
        ["eval", *more, *data, "--tasks", "identity_swaps", "--identity-swaps.terms", str(tmp_path / "terms.toml"),
         "--no-plot", "--no-speed", "--out", str(tmp_path / "report")]
    )  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(classifier(tmp_path_factory.mktemp("classifier"), "encoder"))


def test_a_classifier_is_measured_on_swapped_texts(model, tmp_path):
    assert evaluated(tmp_path, model) == 0
    (result,) = json.loads((tmp_path / "report" / "results.json").read_text())
    metrics = result["metrics"]
    assert "5 examples, 3 name one group of color, probability of class 'p'" in result["protocol"]
    assert metrics["flip_rate"] == metrics["flip_rate/color"]
    assert 0 < metrics["probability_change"] < 1
    gap = abs(metrics["probability/color/r"] - metrics["probability/color/g"])
    assert metrics["probability_gap/color"] == pytest.approx(gap)


@pytest.mark.parametrize(
    ("terms", "more", "line"),
    [
        (TERMS.replace('"red"', '"mauve"').replace("emerald", "teal"), [], "no text names exactly one group"),
        (TERMS, ["--identity-swaps.positive", "q"], "identity_swaps.positive: the model has no class 'q'"),
        (TERMS.replace(', "emerald"', ""), [], "[color]: ['red'] must be a list of one term per group (2)"),
        (TERMS.replace('"g"', '"r"'), [], "groups must be a list of two or more different names"),
        (TERMS.replace(']]', '], ["Emerald", "x"]]'), [], "'emerald' is a term of g and of r"),
        (TERMS + "more = 1\n", [], "[color]: must be a table with `groups` and `terms` alone"),
        ("[color", [], "not valid TOML"),
        ("", [], "has no tables"),
    ],
)  # fmt: skip
def test_wrong_terms_are_refused_with_one_line(model, tmp_path, capsys, terms, more, line):
    assert evaluated(tmp_path, model, *more, terms=terms) == 2
    assert line in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "report").exists()


def test_long_texts_are_truncated_as_the_settings_say(model, tmp_path, monkeypatch):
    given = []
    real = identity_swaps.Predictor
    monkeypatch.setattr(identity_swaps, "Predictor", lambda *a, **k: given.append(k) or real(*a, **k))
    assert evaluated(tmp_path, model, "--truncate", "head_tail") == 0
    assert given[0]["truncate"] == "head_tail" and given[0]["mesh"] is not None


def test_a_language_model_is_refused(tmp_path, capsys):
    model = made(tmp_path, MODELS["encoder"])
    assert evaluated(tmp_path, str(model)) == 2
    assert "task 'identity_swaps' needs a model of task classify" in capsys.readouterr().err.splitlines()[-1]


def test_terms_of_two_files_are_refused(tmp_path):
    for name in ("a.toml", "b.toml"):
        (tmp_path / name).write_text(TERMS)
    with pytest.raises(RequestError, match="2 files match; name one"):
        identity_terms.read(str(tmp_path / "*.toml"))
