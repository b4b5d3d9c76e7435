"""Contaminated examples are those that share an n-gram, and the metrics without them are those of a subset."""

import json
import random

import numpy as np
import pytest
from tiny_memorizer import sentences

from llmctl.artifacts import artifact
from llmctl.cli import app
from llmctl.config.errors import RequestError
from llmctl.config.settings import MeshConfig
from llmctl.data import splits
from llmctl.data.config import DataConfig
from llmctl.distributed import mesh as meshes
from llmctl.evaluate import measurements
from llmctl.evaluate.harm import ngrams
from llmctl.evaluate.harm.contamination import on_part
from llmctl.evaluate.predict import Predictor
from llmctl.evaluate.settings import MeasureConfig
from llmctl.evaluate.tasks.settings import GenerationConfig


def brute(texts, corpus, ngram, shortest):
    """Every n-gram of every document, as text."""
    found = []
    for text in texts:
        own = ngrams.words(text)
        size = min(ngram, len(own))
        grams = {" ".join(own[i : i + size]) for i in range(len(own) - size + 1)} if len(own) >= shortest else set()
        documents = [f" {' '.join(ngrams.words(document))} " for document in corpus]
        found.append(any(f" {gram} " in document for gram in grams for document in documents))
    return found


@pytest.mark.parametrize("part", [2**18, 20])
def test_the_search_equals_one_by_text(monkeypatch, part):
    monkeypatch.setattr(ngrams, "PART", part)
    rng = random.Random(0)
    texts, corpus = ([" ".join(rng.choices(list("abc"), k=rng.randrange(12))) for _ in range(60)] for _ in "12")
    for ngram, shortest in ((5, 2), (6, 3), (3, 1), (8, 6)):
        found = ngrams.find_shared(texts, iter(corpus), ngram=ngram, shortest=shortest)
        assert [one is not None for one in found] == brute(texts, corpus, ngram, shortest)
        assert any(found) != all(found)
        for text, one in zip(texts, found, strict=True):
            if one:
                assert f" {' '.join(one.words)} " in f" {corpus[one.document]} " and " ".join(one.words) in text


def test_normalization_and_gaps():
    """Case, punctuation and line breaks do not matter; an n-gram never spans two documents."""
    find = lambda text, *corpus: ngrams.find_shared([text], corpus, ngram=3, shortest=3)[0]  # noqa: E731
    assert find("It's HERE, now", "well - it’s here now!").words == ("it", "s", "here")
    assert find("one two three", "one two", "three") is None
    assert find("one two", "one two three") is None
    assert find("今天天气", "我说今天天气很好").words == ("今", "天", "天")
    assert ngrams.sizes(["a b c d", "a b", "a"], 3, 2) == [3, 2, 0]


def test_metrics_on_a_part_are_those_of_the_part():
    label, predicted = np.array([0, 1, 1, 0, 1]), np.array([0, 0, 1, 0, 0])
    values = {"accuracy": label == predicted, "label": label, "prediction": predicted}
    part = np.array([True, False, True, True, True])
    found = on_part(values, part, ["accuracy", "macro_f1", "other"])
    from sklearn.metrics import f1_score

    assert found["accuracy"] == 0.75
    assert found["macro_f1"] == pytest.approx(f1_score(label[part], predicted[part], average="macro"))
    assert found["accuracy_low"] < 0.75 < found["accuracy_high"]
    assert on_part(values, np.zeros(5, bool), ["accuracy"]) == {}


def evaluated(capsys, model, *flags, code=0):
    argv = ["eval", str(model), "--no-speed", "--no-plot", "--json", *map(str, flags)]
    assert app.run(argv) == code
    said = capsys.readouterr()
    return json.loads(said.out) if code == 0 else said.err


def test_a_language_model_is_measured_on_the_clean_texts(memorizer, tmp_path, capsys):
    """Three of eight held-out texts have a part of a training text; the others have the same words."""
    train, test = sentences(0), sentences(1)
    for i in range(3):
        test[i] = test[i][:25] + " " + " ".join(train[i].upper().split()[3:11])
    files = {"train": train, "test": test, "clean": test[3:]}
    for name, texts in files.items():
        (tmp_path / f"{name}.txt").write_text("\n\n".join(texts))
    data = ["--data.documents", "paragraph", "--data.path", tmp_path / "train.txt", "--data.test-path"]
    rules = ("--contamination.ngram", 8, "--contamination.shortest", 8)
    out = ("--out", tmp_path / "out")
    result = evaluated(capsys, memorizer, *data, tmp_path / "test.txt", "--tasks", "contamination", *rules, *out)
    metrics = result["metrics"]
    assert metrics["contaminated"] == 3 / 8 and metrics["judged_examples"] == 8 and metrics["short_examples"] == 0
    clean = evaluated(capsys, memorizer, *data, tmp_path / "clean.txt", "--tasks", "lm")["metrics"]
    every = evaluated(capsys, memorizer, *data, tmp_path / "test.txt", "--tasks", "lm")["metrics"]
    assert metrics["clean_perplexity"] == pytest.approx(clean["perplexity"], rel=1e-5)
    assert metrics["parts"]["all"]["perplexity"] == pytest.approx(every["perplexity"], rel=1e-5)
    assert metrics["clean_perplexity_low"] <= metrics["clean_perplexity"] <= metrics["clean_perplexity_high"]
    assert {name: part["perplexity"] for name, part in metrics["parts"].items()}["clean"] == metrics["clean_perplexity"]
    records = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert [r["ngram"] for r in records] == [" ".join(text.split()[3:11]) for text in train[:3]]
    # A training text of its own, and a task file.
    (tmp_path / "task.toml").write_text(
        f'task = "lm"\n[data]\npath = "{tmp_path}/test.txt"\ndocuments = "paragraph"\ntest = 1.0\nvalidation = 0\n'
    )
    corpus = ["--contamination.corpus.documents", "paragraph", "--contamination.corpus.path", tmp_path / "clean.txt"]
    corpus += ["--contamination.corpus.test", 0, "--contamination.corpus.validation", 0]
    corpus += ["--contamination.task-files", tmp_path / "task.toml"]
    found = evaluated(capsys, memorizer, *data, tmp_path / "clean.txt", "--tasks", "contamination", *rules, *corpus)
    assert found["metrics"]["contaminated"] == 1
    assert found["metrics"]["task_files"]["task"]["contaminated"] == 5 / 8


def test_a_classifier_is_measured_on_the_clean_texts(judge, tmp_path, capsys):
    """Contaminated rows lie between clean ones; the accuracy of the others is that of their predictions."""
    train, test = sentences(0), sentences(1)
    for i in (1, 2, 6):
        test[i] = train[i]
    labels = ["fine", "toxic"] * 4
    for name, texts in (("train", train), ("test", test)):
        end = "!" * (name == "test")  # duplicates are removed from the train split
        rows = [{"text": text + end, "label": label} for text, label in zip(texts, labels, strict=True)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = ["--data.source", "jsonl", "--data.path", tmp_path / "train.jsonl", "--data.test-path"]
    metrics = evaluated(capsys, judge, *data, tmp_path / "test.jsonl", "--tasks", "contamination")["metrics"]
    p_NC = np.array(Predictor(judge).predictions([{"text": f"{text}!"} for text in test]))
    right = [labels[i] == ("fine", "toxic")[p_NC[i].argmax()] for i in range(8)]
    clean = [right[i] for i in (0, 3, 4, 5, 7)]
    assert metrics["contaminated"] == 3 / 8 and metrics["clean_accuracy"] == np.mean(clean)
    assert metrics["parts"]["contaminated"]["accuracy"] == np.mean([right[i] for i in (1, 2, 6)])
    assert 0 < sum(right) < 8


def test_settings_of_generation_and_tokenizers_are_part_of_the_measurement(memorizer, tmp_path):
    """A task that generates answers has another definition with other settings; others ignore them."""
    (tmp_path / "train.txt").write_text("\n\n".join(sentences(0)))
    data = splits.load(DataConfig(documents="paragraph", path=str(tmp_path / "train.txt"), test=0.5), labels=False)
    mesh, told = meshes.make(MeshConfig()), artifact.read_manifest(memorizer)

    def made(probe, manifest, **generation):
        config = MeasureConfig(tasks=[probe], generation=GenerationConfig(**generation))
        found = measurements.of_probes(config, mesh, memorizer, manifest, data["test"], tmp_path, data["train"])
        return found, measurements.probes_generate(config, manifest)

    answers, other = told.model_copy(update={"task": "seq2seq"}), told.model_copy(update={"tokenizer": "other"})
    ((one,), generates), ((two,), _) = (made("contamination", answers, max_new=n) for n in (3, 4))
    assert generates and one.definition != two.definition and one.setup.generation.max_new == 3
    ((one,), generates), ((two,), _) = (made("contamination", told, max_new=n) for n in (3, 4))
    assert not generates and one.definition == two.definition
    sides = {name: made("memorization", manifest)[0] for name, manifest in (("a", told), ("b", other))}
    with pytest.raises(RequestError, match="a and b have different tokenizers, and memorization is measured on tokens"):
        measurements.check_comparable(sides, {"a": told, "b": other}, "b")


def test_refusals(memorizer, tmp_path, capsys):
    (tmp_path / "train.txt").write_text("\n\n".join(sentences(0)))
    data = ("--tasks", "contamination", "--data.documents", "paragraph", "--data.path", tmp_path / "train.txt")
    more = ("--data.test", 0.5)
    for flags, said in (
        (("--split", "train"), "set split to test"),
        (("--contamination.ngram", 40, "--contamination.shortest", 30), "no example has 30 words"),
        (("--contamination.corpus.path", "nowhere.txt"), "no such file: 'nowhere.txt'"),
        (("--contamination.task-files", "x.json"), "'x.json' is no task file"),
        (("--contamination.task-files", "x.toml"), "x.toml: no such file"),
        (("--contamination.task-files", "x.toml,a/x.toml"), "two task files are named 'x'"),
        (("--generation.max-new", 3), "generation: not for task contamination"),
    ):
        error = evaluated(capsys, memorizer, *data, *more, *flags, code=2)
        assert said in error and error.count("llmctl: ") == 1, error
