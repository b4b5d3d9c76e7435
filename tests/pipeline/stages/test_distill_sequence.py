"""distill from a teacher's answers: the answers are those of the teacher, a killed run goes on, other tokenizers."""

import json
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_distillation as tiny

from llmctl.artifacts import artifact
from llmctl.config.errors import RequestError
from llmctl.config.settings import MeshConfig
from llmctl.data import answers as answer_files
from llmctl.data.tokenizers import loading
from llmctl.distributed import mesh as meshes
from llmctl.model import functional
from llmctl.pipeline.stages import distill
from llmctl.train import distillation, teacher_answers

ONE = MeshConfig()
ASK = {"mode": "sequence", "answers": {"max_new": 5}, "mesh": ONE}


class Filled(Exception):
    """The answers are complete, and training would begin."""


@pytest.fixture
def untrained(monkeypatch):
    """Stop each run when training would begin."""

    def stop(*_):
        raise Filled

    monkeypatch.setattr("llmctl.train.learner.run", stop)


def lines(folder, split="train"):
    return [json.loads(line) for p in sorted(folder.glob(f"{split}-*.jsonl")) for line in p.read_text().splitlines()]


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def greedy(model, prompt, steps):
    """Return the most probable continuation, by a full forward pass for every token."""
    words = loading.load(model.tokenizer_dir)
    ids = words.prompt(prompt)
    begin = len(ids)
    for _ in range(steps):
        n = jnp.arange(len(ids))[None]
        batch = {"tokens": jnp.array([ids]), "segments": jnp.ones_like(n), "positions": n}
        x = functional.hidden(model.model, model.params, batch)
        ids = [*ids, int(np.asarray(functional.lm_logits(model.model, model.params, x))[0, -1].argmax())]
        if ids[-1] == words.eos_id:
            break
    return words.decode(ids)[len(words.decode(ids[:begin])) :]


def test_a_student_of_another_tokenizer_learns_the_answers_of_its_teacher(tmp_path, monkeypatch):
    """Answers equal a greedy search by full passes; the student keeps its tokenizer; a second one needs no teacher."""
    teacher = tiny.made(tmp_path, tiny.MODELS["decoder"])
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.setattr(tiny.ByteTokenizer, "new", lambda new=tiny.ByteTokenizer.new: new(sentinels=3))
    student = tiny.made(other, tiny.MODELS["decoder"], seed=1)
    digests = [artifact.read_manifest(path).tokenizer for path in (teacher, student)]
    assert digests[0] != digests[1]
    given = {**ASK, "data": tiny.data(tmp_path, "prompt", "completion")}
    made = tiny.go(tmp_path / "run", teacher, student, **given)
    assert made.manifest.tokenizer == digests[1]
    answers = lines(tmp_path / "run" / "out-answers")
    asked = 16  # 2 steps of 8 rows
    assert len(answers) == asked == made.manifest.metrics["answers"]
    assert made.manifest.metrics["answer_tokens"] <= 5 * asked and "validation_agreement" not in made.manifest.metrics
    source = artifact.load(teacher)
    for row in answers[:3]:
        assert row["completion"] == greedy(source, row["prompt"], 5)
    monkeypatch.setattr(distillation, "load_teachers", lambda *_: pytest.fail("the teacher is loaded"))
    again = tiny.go(tmp_path / "run", teacher, student, **given)
    assert tiny.digest(again) == tiny.digest(made)


@pytest.mark.parametrize("architecture", ["decoder", pytest.param("encoder_decoder", marks=pytest.mark.slow)])
def test_killed_generation_goes_on_at_its_file(architecture, tmp_path, monkeypatch, untrained):
    """Samples of every prompt depend on its number only; validation prompts without completions are answered too."""
    teacher = tiny.made(tmp_path, tiny.MODELS[architecture])
    monkeypatch.setattr(teacher_answers, "SHARD_BATCHES", 1)
    sampled = {"max_new": 5, "temperature": 0.9, "top_k": 50}
    given = {**ASK, "data": tiny.data(tmp_path, "prompt"), "train": tiny.TRAIN.model_copy(update={"steps": 3})}

    def fill(name, **changes):
        answers = {**sampled, "folder": str(tmp_path / name), **changes}
        tiny.go(tmp_path / "run", teacher, teacher, **given | {"answers": answers})

    with pytest.raises(Filled):
        fill("whole")
    whole = contents(tmp_path / "whole")
    assert [len(lines(tmp_path / "whole", split)) for split in ("train", "validation")] == [24, 16]
    add = teacher_answers.AnswerFiles.add

    def killed(self, *rest):
        if len(self.texts) == 16:
            (self.folder / "train-00002.jsonl").write_text('{"row": 16')
            raise KeyboardInterrupt
        add(self, *rest)

    monkeypatch.setattr(teacher_answers.AnswerFiles, "add", killed)
    with pytest.raises(KeyboardInterrupt):
        fill("killed")
    monkeypatch.setattr(teacher_answers.AnswerFiles, "add", add)
    with pytest.raises(Filled):
        fill("killed")
    assert contents(tmp_path / "killed") == whole
    for changes, line in (
        ({"max_new": 6}, r"answers: .* was written with answers.max_new = 5, not 6; choose another folder"),
        ({"temperature": 0.5}, r"was written with answers.temperature = 0.9, not 0.5"),
    ):
        with pytest.raises(RequestError, match=line):
            fill("killed", **changes)
    file = tmp_path / "killed" / "train-00001.jsonl"
    file.write_text(file.read_text().replace("row", "raw", 1))
    with pytest.raises(RequestError, match=r"train-00001.jsonl: does not match what was saved"):
        fill("killed")


@pytest.mark.slow
def test_answers_and_logits_of_the_teacher_together(tmp_path):
    """signals.logits compares the student with its teacher on the answers, also by a cache; plan knows the programs."""
    teacher = tiny.made(tmp_path, tiny.MODELS["decoder"])
    data = tiny.data(tmp_path, "prompt")
    given = {**ASK, "data": data, "signals": {"logits": 1.0, "hard": 0.1}, "top_k": 8}
    made = tiny.go(tmp_path / "run", teacher, teacher, cache=str(tmp_path / "cache"), **given)
    assert "validation_agreement" in made.manifest.metrics and (tmp_path / "cache" / "cache.json").exists()
    there = artifact.abstract(teacher, meshes.make(ONE))
    config = distill.Config(teacher="t", **given, train=tiny.TRAIN, cache="c")
    programs, _ = distill.programs(config, there, {"t": there}, meshes.make(ONE))
    assert [p.title for p in programs] == ["prefill", "decoding step", "outputs of the teacher", "train step"]


@pytest.mark.parametrize(("settings", "line"), [
    ({"mode": "sequence", "hard": 0.3}, 'hard: mode = "sequence" trains on the answers alone'),
    ({"mode": "sequence", "top_k": 5}, 'top_k: mode = "sequence" reads it only if signals.logits is set'),
    ({"mode": "sequence", "teacher": "", "teachers": ["a", "b"]}, "one teacher generates the answers"),
    ({"answers": {"beams": 2}}, 'answers: only mode = "sequence" and mode = "on_policy" generate answers'),
    ({"mode": "sequence", "answers": {"beams": 2, "temperature": 1.0}}, "temperature and beams exclude each other"),
    ({"mode": "sequence", "answers": {"top_p": 0.5}}, "top_p: restricts sampling"),
])  # fmt: skip
def test_settings_of_answers_that_contradict_one_another(settings, line):
    with pytest.raises(ValueError, match=line):
        distill.Config(**{"teacher": "t", **settings})


def test_teachers_and_data_without_answers_are_refused(tmp_path):
    decoder = tiny.made(tmp_path, tiny.MODELS["decoder"])
    for teacher, data, line in (
        (tiny.classifier(tmp_path, "decoder"), ("prompt",), r'mode = "sequence": .* generates no answers to prompts'),
        (tiny.made(tmp_path, tiny.MODELS["encoder"]), ("prompt",), "generates no answers to prompts"),
        (decoder, ("text",), 'mode = "sequence": the data has no prompts'),
    ):
        with pytest.raises(RequestError, match=line):
            tiny.go(tmp_path / "run", teacher, teacher, data=tiny.data(tmp_path, *data), **ASK)
    assert not (tmp_path / "run" / "out-answers").exists()


def test_a_folder_with_a_setting_of_a_later_version_is_refused(tmp_path):
    asked = {"train.seq_len": 16}
    answer_files.describe(tmp_path, asked | {"answers.later": 3})
    there: Any = SimpleNamespace(folder=tmp_path, own=False)
    with pytest.raises(RequestError, match=r"was written with answers.later = 3, not None"):
        teacher_answers.TeacherAnswers._check(there, asked, print)
