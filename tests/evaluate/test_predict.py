"""Predictions of new rows equal those of one row alone at full length, in order, whatever is between the rows."""

import io
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from llmctl.artifacts import artifact
from llmctl.cli.app import run
from llmctl.config.errors import RequestError
from llmctl.data import row_stream
from llmctl.data.tokenizers.byte_tokenizer import ByteTokenizer
from llmctl.evaluate.predict import Ensemble, Predictor
from llmctl.evaluate.tasks.registry import TASKS, of
from llmctl.evaluate.tasks.rows import RowSettings
from llmctl.model import functional
from llmctl.model.config import ModelConfig

SIZES = {"d_model": 16, "layers": 1, "heads": 2, "d_ff": 24, "max_seq_len": 64}
LABELS = ["no", "perhaps", "yes"]
TEXTS = ["a", "of many words " * 3, "näme 漢", "x" * 200, "short one", "b c"]
ROWS = {
    "tokens": [{"tokens": t.split()} for t in TEXTS],
    "span": [{"question": "who?", "context": t + " and Ann, of course"} for t in TEXTS],
}


@pytest.fixture(scope="module")
def save(tmp_path_factory):
    """Saves a random model for a task, and returns its folder."""
    folder = tmp_path_factory.mktemp("models")
    words = ByteTokenizer.new(0)
    words.save(folder / "words")

    def saved(task: str, seed: int = 0, labels=tuple(LABELS)):
        out = folder / f"{task}{seed}"
        if not out.exists():
            head, pooling = TASKS[task].head, TASKS[task].pooling or "mean"
            about = {"head": head, "labels": len(labels) if TASKS[task].classes else 0, "next_sentence": False}
            about |= {"pooler": False, "head_transform": False}
            cfg = ModelConfig(preset="bert-tiny", **SIZES, vocab_size=words.vocab_size, **about, pooling=pooling)
            params = functional.init(cfg, jax.random.key(seed))
            config = {"train": {"seq_len": 48}, "truncate": "tail"}
            names = list(labels) if TASKS[task].classes else []
            common = {"stage": "finetune", "key": "k", "config": config, "tokenizer_dir": folder / "words"}
            artifact.save(out, params, cfg, task=task, labels=names, **common)
        return out

    return saved


@pytest.mark.parametrize("task", ["classify", "multilabel", "regress", "tokens", "span", "embed"])
def test_answers_equal_those_of_each_row_alone_at_full_length(save, task):
    rows = ROWS.get(task) or [{"text": t} for t in TEXTS]
    model = Predictor(save(task), batch_size=8)
    together = model.predictions(rows)
    found = artifact.load(save(task))
    step, settings = of(found.manifest).prediction_step(found.model, "float32"), RowSettings(48, labels=tuple(LABELS))
    for row, prediction in zip(rows, together, strict=True):
        made = model.task.new_rows(found.model, [row], model._tokenizer, settings)
        batch = made.batch(np.arange(len(made)))
        outputs = jax.tree.map(np.asarray, step(found.params, {k: batch[k] for k in model.task.reads if k in batch}))
        (alone,) = model.task.predictions(1, made, [(np.arange(len(made)), batch, outputs)])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), prediction, alone)
    answers = Ensemble([model]).answers(rows, every=True)
    json.dumps(answers, allow_nan=False)
    said = answers[1]
    if task == "classify":
        assert said["label"] == max(said["probabilities"], key=said["probabilities"].get)
        assert sum(said["probabilities"].values()) == pytest.approx(1, abs=1e-4)
    elif task == "multilabel":
        assert said["labels"] == [n for n, p in said["probabilities"].items() if p >= 0.5]
    elif task == "tokens":
        assert [len(a["tags"]) for a in answers] == [len(r["tokens"]) for r in rows]
        assert answers[3]["tags"] != [None] and set(said["tags"]) <= {*LABELS, None}
    elif task == "span":
        assert all(r["context"][a["start"] : a["end"]] == a["answer"] for r, a in zip(rows, answers, strict=True))
    elif task == "embed":
        assert np.linalg.norm(said["embedding"]) == pytest.approx(1, abs=1e-4)


def test_an_ensemble_averages_probabilities_by_class_name(save):
    rows = [{"text": t} for t in TEXTS]
    one, two = Predictor(save("classify", 0)), Predictor(save("classify", 1, ("yes", "no", "perhaps")))
    own, other = ([a["probabilities"] for a in Ensemble([m]).answers(rows, True)] for m in (one, two))
    for a, b, both in zip(own, other, Ensemble([one, two]).answers(rows, True), strict=True):
        assert both["probabilities"] == pytest.approx({n: (a[n] + b[n]) / 2 for n in LABELS}, abs=1e-5)
    with pytest.raises(RequestError, match="have no average"):
        Ensemble([Predictor(save("embed"))] * 2)
    with pytest.raises(RequestError, match="another task or other classes"):
        Ensemble([one, Predictor(save("multilabel"))])


def test_a_row_does_not_depend_on_whether_others_have_a_second_text(save):
    model = Predictor(save("classify"))
    rows = [{"text": "a"}, {"text": "a", "pair": "b"}, {"text": "c d"}, {"text": "a", "pair": ""}]
    together = model.predictions(rows)
    for row, prediction in zip(rows, together, strict=True):
        np.testing.assert_allclose(model.predictions([row])[0], prediction, atol=1e-6)
    assert abs(together[0] - together[1]).max() > 1e-4


def test_bad_rows_are_named_and_the_others_keep_their_order(save, tmp_path, capsys):
    lines = [b'{"text": "a"}', b"{", b"", b'{"text": 3}', b'"just text"', b'{"other": 1}']
    lines += [b'{"text": "\xff"}', b'{"text": "z"}']
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
    call = ["predict", str(save("classify")), "--file", str(tmp_path / "in.jsonl")]
    assert run([*call, "--out", str(tmp_path / "out.jsonl")]) == 0
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [f["row"] for f in found] == [1, 2, 3, 4, 5, 6, 7]
    assert ["error" in f for f in found] == [False, True, True, False, True, True, False]
    err = capsys.readouterr().err
    for place in ("2: not JSON", "4: column 'text' holds int", "6: no text", "7: not UTF-8"):
        assert f"in.jsonl:{place}" in err
    assert "7 rows" in err and "4 could not be read" in err
    assert run([*call, "--strict"]) == 2
    assert run([*call, "--out", str(tmp_path / "out.jsonl")]) == 2  # it exists
    assert run([*call, "--to", "csv", "--out", str(tmp_path / "out.csv")]) == 0
    assert (tmp_path / "out.csv").read_text().splitlines()[0] == "row,label,probability,error"


@pytest.mark.parametrize(("kind", "text", "rows"), [
    ("", "one\n\ntwo\u2028more\r\n", [{"text": "one"}, {"text": "two\u2028more"}]),
    ("csv", 'text,n\n"a\n\nb",1\nc\n"d",2\n', [{"text": "a\n\nb"}, "in:5: 1 cells", {"text": "d"}]),
    ("tsv", "\ufefftext\tpair\na\tb\n", [{"text": "a", "pair": "b"}]),
    ("csv", "premise,hypothesis,n\na,b,1\n", [{"text": "a", "pair": "b"}]),
    ("", '{"sentence1": "a", "sentence2": "b"}\n{"text": "a", "sentence1": "b", "sentence2": "c"}',
     [{"text": "a", "pair": "b"}, {"text": "a"}]),
    ("", '{"text": "a", "tokens": ["b", 1]}\n{"text": "c"}', ["in:1: column 'tokens' is not a list", {"text": "c"}]),
    ("", '{"text": "\\ud800"}', ["in:1: column 'text' holds a lone surrogate"]),
    ("jsonl", "[1]\n" + "[" * 100_000, ["in:1: a JSON list", "in:2: not JSON"]),
    ("", "", []),
])  # fmt: skip
def test_streams_of_rows(kind, text, rows):
    found = [row for _, row in row_stream.rows(io.BytesIO(text.encode()), "in", kind, {})]
    assert len(found) == len(rows)
    for got, wanted in zip(found, rows, strict=True):
        assert got == wanted if isinstance(wanted, dict) else str(got).startswith(wanted)


def test_a_table_without_a_text_column_is_refused_as_a_whole():
    table = b"package,summary\na,b\n"
    with pytest.raises(RequestError, match=r"in: none of its columns is a text column; set --column, .* text=pack"):
        list(row_stream.rows(io.BytesIO(table), "in", "csv", {}))
    assert list(row_stream.rows(io.BytesIO(table), "in", "csv", {"text": "summary"})) == [("in:2", {"text": "b"})]


def test_an_endless_stream_is_read_in_windows_and_not_far_ahead():
    given = iter(range(10**9))
    windows = row_stream.in_windows((("", {"text": str(n)}) for n in given), 4)
    assert [len(next(windows)) for _ in range(3)] == [4, 4, 4]
    assert next(given) < 40  # the thread reads two lists ahead at most


def test_a_command_that_ends_while_a_thread_waits_for_standard_input_does_not_abort():
    """Python aborts if a daemon thread holds `sys.stdin` at the end: exit code 134 in place of 2 or 3."""
    script = """
import sys
from llmctl.data import row_stream
windows = row_stream.in_windows(row_stream.rows(row_stream.standard_input(), "stdin", "text", {}), 8)
assert [row for _, row in next(windows)] == [{"text": "one"}]
sys.exit(3)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin and process.stderr
        process.stdin.write(b"one\n")
        process.stdin.flush()
        assert process.wait(60) == 3, process.stderr.read()
