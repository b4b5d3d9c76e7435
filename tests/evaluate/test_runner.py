"""Requests that an evaluation refuses before it scores an artifact."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from llmctl.artifacts import artifact
from llmctl.config.errors import RequestError
from llmctl.evaluate import measurements, runner
from llmctl.evaluate.metrics.base import METRICS, Metric
from llmctl.evaluate.settings import MeasureConfig
from llmctl.evaluate.tasks.registry import TASKS
from llmctl.evaluate.tasks.settings import GenerationConfig
from llmctl.model.config import ModelConfig


@pytest.fixture
def half(monkeypatch):
    """A metric with a function."""
    monkeypatch.setitem(METRICS.own, "half", Metric("half", "half", "maximize", compute=lambda truth, predicted: 0.5))


@pytest.mark.parametrize(
    ("task", "metric", "refusal"),
    [
        ("classify", "accuracy", "metrics: 'accuracy' is computed by its task alone"),
        ("lm", "half", "language model has no answers to compute 'half' from"),
        ("embed", "half", "embedding has no answers"),
        ("span", "half", "answers has no answers"),
        ("tokens", "half", "token classification has no answers"),
    ],
)
def test_metrics_that_cannot_be_computed_are_refused(half, task, metric, refusal):
    with pytest.raises(RequestError, match=refusal):
        runner.check_metrics([metric], TASKS[task], "runs/a")
    for able in ("classify", "multilabel", "regress"):
        runner.check_metrics(["half"], TASKS[able], "runs/a")


def test_no_artifact_is_loaded_before_all_can_be_measured(half, monkeypatch):
    loaded = []
    monkeypatch.setattr(artifact, "load", lambda *_: loaded.append(1))
    manifests = {
        "a": SimpleNamespace(model=ModelConfig(preset="llama-tiny", head="classify", labels=2), task="classify"),
        "b": SimpleNamespace(model=ModelConfig(preset="llama-tiny"), task="lm"),
    }
    monkeypatch.setattr(artifact, "read_manifest", lambda path: manifests[path.name])
    config = MeasureConfig(metrics=["half"])
    chosen = {name: Path(name) for name in manifests}
    with pytest.raises(RequestError, match="b: metrics: language model has no answers"):
        runner.results(config, chosen, None, None, Path("work"), print)  # pyright: ignore[reportArgumentType]
    assert not loaded


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({}, {"beams": 4, "max_new": 7}),
        ({"beams": 2}, {"beams": 2, "max_new": 7}),
        ({"beams": 1, "max_new": 0}, {"beams": 1, "max_new": 0}),
    ],
)
def test_answers_are_generated_as_in_training_unless_the_user_says_otherwise(said, expected):
    trained = {"beams": 4, "max_new": 7, "a_setting_of_an_older_version": 1}
    model = ModelConfig(preset="llama-tiny")
    manifest = SimpleNamespace(model=model, seq_len=8, truncate="", config={"generation": trained}, generation={})
    config = MeasureConfig(**({"generation": said} if said else {}))
    found = measurements.setup(config, None, Path("a"), manifest)  # pyright: ignore[reportArgumentType]
    assert found.generation == GenerationConfig(**expected)
    older = SimpleNamespace(model=model, seq_len=8, truncate="", config={}, generation={})
    assert measurements.setup(config, None, Path("a"), older).generation == GenerationConfig(**said)  # pyright: ignore[reportArgumentType]


def test_generation_without_a_task_that_generates_is_refused(monkeypatch):
    manifest = SimpleNamespace(model=ModelConfig(preset="llama-tiny"), task="lm")
    monkeypatch.setattr(artifact, "read_manifest", lambda path: manifest)
    config = MeasureConfig(generation=GenerationConfig(beams=2))
    with pytest.raises(RequestError, match="generation: not for task lm"):
        runner.results(config, {"a": Path("a")}, None, None, Path("work"), print)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("settings", [{"max_new": "abc"}, {"beams": [1]}, [1], "x"])
def test_settings_of_generation_of_other_types_are_refused(settings):
    with pytest.raises(RequestError, match="settings of generation"):
        GenerationConfig.of(settings)
