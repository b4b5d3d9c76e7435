"""A model that learned its texts by heart repeats them, and not the held-out ones."""

import json
from difflib import SequenceMatcher
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_memorizer import COUNT, LENGTH, WORDS, sentences, tokenizer

from llmctl.cli import app
from llmctl.config.errors import RequestError
from llmctl.evaluate.harm import memorization
from llmctl.evaluate.harm.memorization import agreement, common_run
from llmctl.evaluate.harm.settings import MemorizationConfig


def test_runs_equal_those_of_difflib():
    rng = np.random.default_rng(0)
    for _ in range(50):
        one, other = (rng.integers(4, size=n).tolist() for n in rng.integers(0, 12, size=2))
        match = SequenceMatcher(None, one, other, autojunk=False).find_longest_match()
        assert common_run(one, other) == match.size


def test_agreement_by_hand():
    exact, runs = agreement(np.array([[1, 2, 3], [1, 2, 3], [4, 5, 6]]), [[1, 2, 3], [1, 2], [5, 6, 4]])
    assert exact.tolist() == [True, False, False] and runs.tolist() == [3, 2, 2]


@pytest.fixture
def texts(tmp_path):
    """The training texts, and as many held-out texts of the same words in another order."""
    for name, seed in (("train", 0), ("test", 1)):
        (tmp_path / f"{name}.txt").write_text("\n\n".join(sentences(seed)))
    data = {"path": tmp_path / "train.txt", "test-path": tmp_path / "test.txt", "documents": "paragraph"}
    return [part for name, value in data.items() for part in (f"--data.{name}", str(value))]


def evaluated(capsys, model, texts, *flags, code=0):
    argv = ["eval", str(model), "--tasks", "memorization", *texts, "--no-speed", "--no-plot", "--json", "--batch-size"]
    assert app.run([*argv, "16", *map(str, flags)]) == code
    said = capsys.readouterr()
    return json.loads(said.out) if code == 0 else said.err


def test_what_was_learned_is_found_and_the_control_is_not(memorizer, texts, capsys, tmp_path):
    rules = ("--memorization.prompts", "3,6", "--memorization.continuation", 5)
    result = evaluated(capsys, memorizer, texts, *rules, "--out", tmp_path / "out")
    metrics = result["metrics"]
    # 11 tokens fit into a text of 16 words at 6 positions.
    assert metrics["sequences"] == metrics["control_sequences"] == COUNT * (LENGTH - 11 + 1)
    assert metrics["extracted"] > 0.75 and metrics["extracted_low"] > 0.6 and metrics["common_run"] > 4
    assert metrics["control_extracted"] == 0 and metrics["control_common_run"] < 1.5
    three, six = (metrics["by_prompt_tokens"][k] for k in ("3", "6"))
    assert six["extracted"] == metrics["extracted"] and three["extracted"] > 0.6 and three["control_extracted"] == 0
    assert "prompts of 3, 6 tokens" in result["protocol"]
    (values,) = map(json.loads, (tmp_path / "out" / "example_values.jsonl").read_text().splitlines())
    assert np.mean(values["values"]["extracted"]) == metrics["extracted"]
    assert np.mean(values["values"]["common_run"]) == pytest.approx(metrics["common_run"])
    few = evaluated(capsys, memorizer, texts, *rules, "--memorization.sequences", 4)["metrics"]
    assert few["sequences"] == 4


def test_the_greedy_continuation_is_that_of_generate(memorizer, texts, capsys):
    """The fraction equals the one that `generate` gives for the same prompts."""
    prompts = [part for text in sentences(0) for part in ("--prompt", " ".join(text.split()[:11]))]
    assert app.run(["generate", str(memorizer), *prompts, "--max-new", "5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["results"]
    hits = sum(said["text"].split() == text.split()[11:] for said, text in zip(found, sentences(0), strict=True))
    rules = ("--memorization.prompts", 11, "--memorization.continuation", 5)
    assert evaluated(capsys, memorizer, texts, *rules)["metrics"]["extracted"] == hits / COUNT


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--memorization.prompts", "12"], "the longest document of the train split 16; lower"),
        (
            ["--memorization.prompts", "100"],
            "are 151 tokens, and the model reads 128",
        ),
        (["--memorization.prompts", "[]"], "needs at least one length"),
        (["--memorization.prompts", "3,3"], "each positive and different"),
        (["--memorization.prompts", "3", "--memorization.continuation", "3", "--split", "train"], "set split to test"),
    ],
)
def test_refusals(memorizer, texts, capsys, flags, said):
    error = evaluated(capsys, memorizer, texts, *flags, code=2)
    assert said in error and error.count("llmctl: ") == 1


def test_a_trained_prompt_takes_room(monkeypatch):
    words = tokenizer()
    words.prefix = tuple(range(20))
    monkeypatch.setattr(memorization.tokenizers, "load", lambda _: words)
    there = SimpleNamespace(model=SimpleNamespace(max_seq_len=128), tokenizer_dir=None)
    held = SimpleNamespace(split="test", training=(), examples=())
    with pytest.raises(RequestError, match="64 tokens after 20 first tokens, and its continuation, are 134 tokens"):
        memorization.measure("memorization", there, held, None, MemorizationConfig())


def test_words_are_tokens():
    assert len(tokenizer().encode(" ".join(WORDS))) == len(WORDS)
