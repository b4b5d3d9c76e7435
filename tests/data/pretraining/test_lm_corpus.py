"""Check that raw and prepared text give the same rows, with any number of workers and after an interruption."""

import json
import os
import resource

import numpy as np
import pytest

from llmctl.config.errors import RequestError
from llmctl.data.config import DataConfig, SourceConfig, TokenizerConfig
from llmctl.data.pretraining import prepare
from llmctl.data.pretraining.lm_corpus import Text
from llmctl.data.pretraining.mixing import MixedRows
from llmctl.data.pretraining.packing import PackedRows
from llmctl.data.splits import load
from llmctl.data.tokenizers import loading
from llmctl.evaluate.tasks.registry import default
from llmctl.evaluate.tasks.rows import RowSettings
from llmctl.model.config import ModelConfig

WORDS = TokenizerConfig(vocab_size=300)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(prepare, "LEAST_DOCUMENTS", 60)


@pytest.fixture
def data(reviews):
    return DataConfig(source="csv", path=str(reviews), columns={"text": "review"}, validation=0.2, test=0.1)


@pytest.fixture
def mixture(tmp_path, sentences):
    for name, part in (("one", sentences[:400]), ("two", sentences[400:])):
        (tmp_path / f"{name}.txt").write_text("\n".join(part))
    sources = [
        SourceConfig(path=str(tmp_path / f"{n}.txt"), documents="line", weight=w) for n, w in (("one", 3), ("two", 1))
    ]
    return DataConfig(mixture=sources, validation=0.2, test=0.1)


def content(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


@pytest.mark.parametrize("kind", ["data", "mixture"])
def test_prepared_text_gives_the_rows_of_raw_text(kind, request, tmp_path):
    raw = Text(request.getfixturevalue(kind))
    words = raw.tokenizer(WORDS)
    prepare.prepare(request.getfixturevalue(kind), WORDS, tmp_path / "p")
    stored = Text(DataConfig(source="prepared", path=str(tmp_path / "p")))
    assert stored.tokenizer(TokenizerConfig()).digest == words.digest
    for split, shuffle in (("train", True), ("validation", False)):
        made = [t.rows(split, words, 32, tmp_path / "cache", seed=4, shuffle=shuffle) for t in (raw, stored)]
        assert isinstance(made[0], MixedRows if kind == "mixture" and shuffle else PackedRows)
        assert len(made[0]) == len(made[1])
        rows = np.arange(3 * len(made[0]))
        for name, values in made[0].batch(rows).items():
            np.testing.assert_array_equal(values, made[1].batch(rows)[name])


def test_validation_of_a_mixture_reads_every_document_once(mixture, tmp_path):
    text = Text(mixture)
    words = text.tokenizer(WORDS)
    rows = text.rows("validation", words, 32, tmp_path, shuffle=False)
    seen = rows.batch(np.arange(len(rows)))["tokens"]
    assert (seen == words.eos_id).sum() == len(text.splits["validation"])
    joined = words.decode(seen.ravel())
    assert all(t in joined for t in text.splits["validation"].texts())


def test_preparing_is_the_same_for_any_number_of_workers(data, tmp_path):
    told = []
    found = prepare.prepare(data, WORDS, tmp_path / "one", progress=lambda done, total: told.append((done, total)))
    prepare.prepare(data, WORDS, tmp_path / "two", workers=2)
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert told[0] == (0, 600)
    assert told[-1] == (600, 600)
    text = load(data)
    assert {s: found.documents(s) for s in found.splits} == {s: len(e) for s, e in text.examples.items()}
    assert len(found.splits["train"][0].shards) > 3
    assert not list(tmp_path.glob(".*llmctl*"))


def test_preparing_goes_on_where_it_stopped(data, tmp_path, monkeypatch):
    prepare.prepare(data, WORDS, tmp_path / "whole")
    write, written = prepare._shard, []

    def stopping(worker, job):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(job.name)
        return write(worker, job)

    monkeypatch.setattr(prepare, "_shard", stopping)
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare(data, WORDS, tmp_path / "p")
    assert not (tmp_path / "p").exists()
    first = list(written)
    again = []
    monkeypatch.setattr(prepare, "_shard", lambda worker, job: again.append(job.name) or write(worker, job))
    prepare.prepare(data, WORDS, tmp_path / "p")
    assert not set(first) & set(again)
    assert content(tmp_path / "p") == content(tmp_path / "whole")
    again.clear()
    said = []
    prepare.prepare(data, WORDS, tmp_path / "p", say=said.append)
    assert not again
    assert "up to date" in said[0]


def test_a_folder_with_something_else_is_left_alone(data, tmp_path):
    prepare.prepare(data, WORDS, tmp_path / "p")
    before = content(tmp_path / "p")
    with pytest.raises(RequestError, match=r"is there already, with something else"):
        prepare.prepare(data.model_copy(update={"test": 0.2}), WORDS, tmp_path / "p")
    assert content(tmp_path / "p") == before
    (tmp_path / "file").touch()
    with pytest.raises(RequestError, match=r"file: is there already, with something else"):
        prepare.prepare(data, WORDS, tmp_path / "file")
    with pytest.raises(RequestError, match=r"the data is prepared already"):
        prepare.prepare(DataConfig(source="prepared", path=str(tmp_path / "p")), WORDS, tmp_path / "q")


def test_what_cannot_be_trained_on(data, mixture, tmp_path, sentences):
    prepare.prepare(data, WORDS, tmp_path / "p")
    cfg = DataConfig(source="prepared", path=str(tmp_path / "p"))
    assert cfg.inputs() == [str(tmp_path / "p" / "prepared.json")]
    other = loading.train(sentences[:300], WORDS)
    with pytest.raises(RequestError, match=r"prepared with another tokenizer"):
        Text(cfg).rows("train", other, 32, tmp_path)
    other.save(tmp_path / "other")
    with pytest.raises(RequestError, match=r"prepared with another tokenizer"):
        Text(cfg).tokenizer(TokenizerConfig(path=str(tmp_path / "other")))
    asked = {"validation": 0.3, "filter": {"site": "a"}, "replace": {"a": "b"}, "columns": {"text": "site"}}
    for name, value in asked.items():
        with pytest.raises(RequestError, match=rf"was prepared with data.{name}.* = .*; prepare it again"):
            Text(cfg.model_copy(update={name: value}))
    # The recipe of the preparation is accepted, although other stages need other columns.
    columns = data.columns | {"label": "stars"}
    Text(data.model_copy(update={"source": "prepared", "path": cfg.path, "columns": columns}))
    with pytest.raises(RequestError, match=r"prepared data holds tokens"):
        load(cfg)
    with pytest.raises(RequestError, match=r"no prepared data there"):
        Text(DataConfig(source="prepared", path=str(tmp_path)))
    half = [SourceConfig(source="prepared", path=str(tmp_path / "p")), mixture.mixture[0]]
    with pytest.raises(RequestError, match=r"prepared sources or of raw ones"):
        Text(DataConfig(mixture=half))
    words = loading.load(tmp_path / "p" / "tokenizer")
    shard = next((tmp_path / "p").glob("train-*.arrayrecord"))
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(RequestError, match=r"arrayrecord: missing or damaged"):
        Text(cfg).rows("train", words, 32, tmp_path)
    note = tmp_path / "p" / "prepared.json"
    said = json.loads(note.read_text())
    note.write_text(json.dumps(said | {"format": 99}))
    with pytest.raises(RequestError, match=r"prepared by a newer llmctl \(format 99"):
        Text(cfg)
    note.write_text("{")
    with pytest.raises(RequestError, match=r"prepared.json: damaged"):
        Text(cfg)


def test_there_may_be_more_shards_than_a_shell_lets_a_process_open(data, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "LEAST_DOCUMENTS", 4)
    prepare.prepare(data, WORDS, tmp_path / "p")
    text = Text(DataConfig(source="prepared", path=str(tmp_path / "p")))
    words = text.tokenizer(WORDS)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 30, limits[1]))
    try:
        rows = text.rows("train", words, 32, tmp_path)
        rows.batch(np.arange(len(rows)))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_epochs_that_do_not_suffice_are_said_at_once(data, tmp_path):
    text = Text(data.model_copy(update={"epochs": 2.0}))
    words = text.tokenizer(WORDS)
    rows = text.rows("train", words, 32, tmp_path, needed=10)
    assert rows.total == 2 * len(rows)
    with pytest.raises(RequestError, match=r"100000 rows are to be read and the sources' epochs hold"):
        text.rows("train", words, 32, tmp_path, needed=100_000)
    # Labeled examples have the same limit.
    columns = {"text": "review", "label": "stars"}
    text = Text(data.model_copy(update={"epochs": 2.0, "columns": columns}))
    most, model = 2 * len(text.splits["train"]), ModelConfig(head="classify", labels=2)
    given = (model, text, "train", words, tmp_path, RowSettings(32, shuffle=True))
    assert 2 * len(default(model).stage_rows(*given, needed=most)) == most
    with pytest.raises(RequestError, match=rf"{most + 1} rows are to be read and the sources' epochs hold {most}:"):
        default(model).stage_rows(*given, needed=most + 1)
