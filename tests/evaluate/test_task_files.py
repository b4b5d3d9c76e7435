"""Task files: what a model is asked, against log-likelihoods of texts that are put together by hand."""

import json
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from llmctl.artifacts import artifact
from llmctl.cli import app
from llmctl.config.settings import MeshConfig
from llmctl.data.config import DataConfig
from llmctl.data.tokenizers.byte_tokenizer import ByteTokenizer
from llmctl.distributed import mesh as meshes
from llmctl.evaluate import programs, task_files
from llmctl.evaluate.likelihood import Query, Scorer
from llmctl.evaluate.settings import MeasureConfig
from llmctl.evaluate.setup import Setup
from llmctl.model import functional
from llmctl.model.config import ModelConfig

CHOICE = """
task = "choice"
[shots]
count = 1
separator = "#"
[data]
source = "jsonl"
path = "{folder}/train.jsonl"
test_path = "{folder}/test.jsonl"
validation = 0.0
columns = {{ prompt = "question", choices = "options", answer = "answer" }}
template = {{ prompt = "Q{{{{ prompt }}}}" }}
"""
WRITE = """
task = "seq2seq"
metrics = ["word_f1", "normalized_match"]
[generation]
max_new = 6
stops = ["e"]
[data]
source = "jsonl"
path = "{folder}/pairs.jsonl"
test = 1.0
"""
TRAIN = [{"question": "0", "options": "A. no\nB. yes", "answer": "B. yes"}]
TEST = [
    {"question": "1", "options": "A. one\nB. two", "answer": "A. one"},
    {"question": "2", "options": "A. three \nB. four five\nC. six", "answer": "C. six"},
    {"question": "3", "options": "A. no\nB. eight", "answer": "B. eight"},
]
PAIRS = [{"prompt": "one", "completion": " two"}, {"prompt": "three", "completion": " a four"}]


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny decoder, and two task files with their data."""
    root = tmp_path_factory.mktemp("tasks")
    words = ByteTokenizer.new()
    model = ModelConfig(preset="llama-tiny", vocab_size=words.vocab_size, d_model=16, layers=1, d_ff=24, max_seq_len=64)
    params = jax.jit(lambda key: functional.init(model, key))(jax.random.key(0))
    params = jax.tree.map(lambda w: w * 6 if w.ndim > 1 else w, params)
    words.save(root / "words")
    common = {"stage": "pretrain", "key": "k", "config": {}, "tokenizer_dir": root / "words"}
    artifact.save(root / "model", params, model, **common)
    for name, rows in (("train", TRAIN), ("test", TEST), ("pairs", PAIRS)):
        lines(root / f"{name}.jsonl", rows)
    (root / "choose.toml").write_text(CHOICE.format(folder=root))
    (root / "write.toml").write_text(WRITE.format(folder=root))
    return root


def evaluated(folder, *more):
    assert app.run(["eval", str(folder / "model"), "--no-plot", "--no-speed", *more]) == 0


def test_two_task_files_are_measured_in_one_evaluation(folder, tmp_path, capsys):
    out = tmp_path / "report"
    tasks = ["--tasks", f"{folder / 'choose.toml'},{folder / 'write.toml'}"]
    evaluated(folder, *tasks, "--out", str(out))
    choose, write = json.loads((out / "results.json").read_text())
    assert (choose["task"], write["task"]) == ("choose", "write")
    assert "multiple choice, test split, 3 examples" in choose["protocol"]
    mesh = meshes.make(MeshConfig())
    with meshes.use(mesh):
        there = artifact.load(folder / "model", mesh)
        score = Scorer(there.model, there.params, Setup(mesh, 64, 64, 4, "tail", "float32"))
        words = ByteTokenizer.new()
        right = []
        for row, choices, answer in zip(
            TEST, (["one", "two"], ["three", "four five", "six"], ["no", "eight"]), (0, 2, 1), strict=True
        ):
            context = words.prompt(f"Q0 yes#Q{row['question']}")
            found = score([Query(context, words.encode(f" {choice}")) for choice in choices])
            right.append(np.argmax([s.log_likelihood for s in found]) == answer)
    assert choose["metrics"]["accuracy"] == np.mean(right)
    answers = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    answers = [a for a in answers if a["task"] == "write"]
    assert [a["prompt"] for a in answers] == ["one", "three"]
    assert not any("e" in a["prediction"] for a in answers)
    assert {"word_f1", "normalized_match", "bleu", "exact_match"} <= {*write["metrics"]}
    # The same tasks on the same weights are not scored again; a change of the data is another task.
    capsys.readouterr()
    evaluated(folder, *tasks, "--seed", "1", "--out", str(out))
    assert "2 results are there and are kept" in capsys.readouterr().err
    lines(folder / "test.jsonl", TEST[:2])
    evaluated(folder, *tasks, "--seed", "1", "--out", str(out))
    assert "1 results are there and are kept" in capsys.readouterr().err
    lines(folder / "test.jsonl", TEST)


def test_solved_examples_are_chosen_by_their_texts_and_the_seed(folder):
    lines(folder / "train.jsonl", [{"question": str(i), "options": "A. no\nB. yes", "answer": "A"} for i in range(9)])
    file = folder / "seeds.toml"
    found = {}
    for count, seed in ((2, 0), (3, 0), (3, 1)):
        file.write_text(CHOICE.format(folder=folder).replace("count = 1", f"count = {count}\nseed = {seed}"))
        found[count, seed] = task_files.load(str(file)).solved
    lines(folder / "train.jsonl", TRAIN)
    assert found[3, 0].startswith(found[2, 0])
    assert found[3, 0] != found[3, 1]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (('task = "choice"', 'task = "chioce"'), "wrong.toml: task: unknown task 'chioce'"),
        (("[shots]", 'metrics = ["accuracie"]\n[shots]'), "wrong.toml: metrics.0: unknown metric 'accuracie'"),
        (("[shots]", 'metrics = ["word_f1"]\n[shots]'), "multiple choice has no answers"),
        (("count = 1", "count = 2"), "the train split has 1 examples"),
        (("count = 1", 'count = 1\nsplit = "test"'), "shots.split is the measured split 'test'"),
        (("test.jsonl", "none.jsonl"), "no such file"),
        (('columns = {', 'filter = { question = "9" }\ncolumns = {'), "no text in it"),
        (("[data]", "[data"), "not valid TOML"),
    ],
)  # fmt: skip
def test_refusals_end_with_one_line_and_write_nothing(folder, tmp_path, capsys, change, line):
    file = tmp_path / "wrong.toml"
    file.write_text(CHOICE.format(folder=folder).replace(*change))
    command = ["eval", str(folder / "model"), "--no-plot", "--tasks", str(file), "--out", str(tmp_path / "report")]
    assert app.run(command) == 2
    assert re.search(line, capsys.readouterr().err.splitlines()[-1])
    assert not (tmp_path / "report").exists()


def test_a_task_file_has_a_program_for_plan(folder):
    """Imports do not know the length of their training texts; they are planned with the length of the evaluation."""
    mesh = meshes.make(MeshConfig())
    cfg = ModelConfig(preset="llama-tiny", vocab_size=300, layers=1, max_seq_len=64)
    about = {"model": cfg, "task": "", "seq_len": 32, "truncate": "", "config": {}, "generation": {}}
    manifest = SimpleNamespace(name="a", base=None, content="", digest="", **about)
    chosen = {"a": SimpleNamespace(model=cfg, params=functional.abstract(cfg), manifest=manifest)}
    config = MeasureConfig(tasks=[str(folder / "choose.toml")], batch_size=2)
    found = programs.scoring(config, DataConfig(), "a", chosen, mesh)  # pyright: ignore[reportArgumentType]
    assert [p.title for p in found] == ["scoring of a: choose"]
    assert found[0].batch["choice1_tokens"].shape == (2, 32)
    manifest.seq_len = 0
    (found,) = programs.scoring(config, DataConfig(), "a", chosen, mesh)  # pyright: ignore[reportArgumentType]
    assert found.batch["choice1_tokens"].shape == (2, 64)
