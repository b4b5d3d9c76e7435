"""Several seeds of a stage: each is the stage run alone, the best is kept, and a kill loses only the running seed."""

import json
import math
import statistics
from typing import Any

import pytest
from pydantic import BaseModel

from llmctl.artifacts import artifact, integrity
from llmctl.artifacts.workspace import Context
from llmctl.config.errors import RequestError
from llmctl.config.settings import OptimConfig, TrainConfig
from llmctl.pipeline.stages import finetune
from llmctl.train import learner, seeds

TRAIN = TrainConfig(steps=4, batch_size=8, seq_len=32, eval_every=2, log_every=4, tensorboard=False)


def config(reviews, **changes):
    given = {"data": reviews, "train": TRAIN, "optim": OptimConfig(learning_rate=3e-2), "method": "head"}
    return finetune.Config(**given, **changes)


def context(folder):
    ctx = Context(folder / "out", folder / "work", "key", {})
    ctx.work.mkdir(parents=True, exist_ok=True)
    return ctx


def test_the_best_of_three_seeds_is_kept_and_finished_ones_are_not_trained_again(
    artifacts, reviews, tmp_path, monkeypatch, capsys
):
    ran, train = [], learner.run

    def killed(config, *args):
        ran.append(config.seed)
        if len(ran) == 2:
            raise KeyboardInterrupt
        return train(config, *args)

    monkeypatch.setattr(learner, "run", killed)
    ctx, several = context(tmp_path), config(reviews, seed=5, seeds=3)
    with pytest.raises(KeyboardInterrupt):
        finetune.run(several, artifacts / "encoder", ctx)
    finetune.run(several, artifacts / "encoder", ctx)
    assert ran == [5, 6, 6, 7]
    made = artifact.load(ctx.out).manifest
    found = made.metrics["seeds"]
    accuracies = found["metrics"]["validation_accuracy"]
    best = max(found["seeds"], key=lambda s: (accuracies["values"][s - 5], -s))
    assert found["seeds"] == [5, 6, 7] and found["by"] == "accuracy" and found["best"] == best
    assert accuracies["mean"] == pytest.approx(statistics.fmean(accuracies["values"]))
    assert accuracies["deviation"] == pytest.approx(statistics.stdev(accuracies["values"]))
    losses = found["metrics"]["validation_loss"]["values"]
    assert len(set(losses)) == 3 and made.metrics["validation_loss"] == losses[best - 5]
    assert made.config["seeds"] == 3 and made.key == "key" and made.name == "out"
    assert not integrity.quick_check(ctx.out, made).content
    kept = {p.name for p in ctx.work.iterdir()}
    assert {n for n in kept if n.startswith(("seed-", "training-"))} == {f"seed-{best}"}
    shown = capsys.readouterr()
    assert f"the best by accuracy is seed {best}" in shown.err and " ± " in shown.err and not shown.out

    alone = context(tmp_path / "alone")
    finetune.run(config(reviews, seed=best), artifacts / "encoder", alone)
    one = artifact.read_manifest(alone.out)
    assert one.digest == made.digest
    assert {**made.metrics, "seeds": None} == {**one.metrics, "seeds": None}


class Metrics(BaseModel):
    """The field of a manifest that has a result's metrics."""

    metrics: dict[str, Any]


def test_ties_go_to_the_lowest_seed_and_numbers_that_are_none_to_the_last():
    values = {"3": float("nan"), "4": 0.5, "10": 0.7, "7": 0.7}
    finished = {seed: {"validation_accuracy": v, "steps": 4} for seed, v in values.items()}
    assert seeds.best_of(finished, "accuracy") == 7
    found = seeds.summary(finished, "accuracy")
    assert found["seeds"] == [3, 4, 7, 10] and list(found["metrics"]) == ["validation_accuracy"]
    assert json.dumps(found)
    read = json.loads(Metrics(metrics={"validation_accuracy": math.nan, "steps": None}).model_dump_json())["metrics"]
    assert read["validation_accuracy"] is None  # as in a manifest
    assert math.isnan(seeds.with_nan(read)["validation_accuracy"]) and seeds.with_nan(read)["steps"] is None


def test_refusals(artifacts, reviews, tmp_path):
    bare = reviews.model_copy(update={"validation": 0.0})
    with pytest.raises(RequestError, match="the validation split is empty"):
        finetune.run(config(bare, seeds=2), artifacts / "encoder", context(tmp_path))
    with pytest.raises(ValueError, match=r"seeds: the last of 2 seeds from \d+ on is above"):
        config(reviews, seed=2**63 - 1, seeds=2)
