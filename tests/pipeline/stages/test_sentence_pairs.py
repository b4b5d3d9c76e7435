"""Sentence pairs from training to prediction, by the column names of a well-known data set."""

import json

import pytest

from llmctl.artifacts import artifact
from llmctl.artifacts.workspace import Context
from llmctl.cli import app
from llmctl.config.settings import OptimConfig, TrainConfig
from llmctl.data.config import DataConfig
from llmctl.evaluate.predict import Predictor
from llmctl.pipeline.stages import eval as evaluation
from llmctl.pipeline.stages import finetune


@pytest.mark.parametrize("base", ["encoder", "lm"])
def test_entailment_is_trained_measured_and_predicted_by_its_own_columns(base, artifacts, tmp_path, capsys):
    rows = [
        {"premise": f"good {i}", "hypothesis": f"film {i % 7}", "label": "yes" if i % 3 else "no"} for i in range(60)
    ]
    file = tmp_path / "nli.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(source="jsonl", path=str(file), validation=0.2, test=0.2)
    train = TrainConfig(steps=2, batch_size=8, seq_len=32, tensorboard=False)
    config = finetune.Config(data=data, train=train, optim=OptimConfig(), method="head")
    for stage, settings, name in (
        (finetune, config, "model"),
        (evaluation, evaluation.Config(data=data, batch_size=8, seq_len=32), "measured"),
    ):
        ctx = Context(tmp_path / name, tmp_path / f"work-{name}", "key", {})
        ctx.work.mkdir()
        stage.run(settings, artifacts / base if name == "model" else tmp_path / "model", ctx)
    assert artifact.read_manifest(tmp_path / "model").labels == ["no", "yes"]
    (result,) = json.loads((tmp_path / "measured" / "results.json").read_text())
    assert 0 <= result["metrics"]["accuracy"] <= 1
    capsys.readouterr()
    assert app.run(["predict", str(tmp_path / "model"), "--file", str(file), "--probabilities"]) == 0
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    model = Predictor(tmp_path / "model")
    both, first = ({"text": rows[0]["premise"], **more} for more in ({"pair": rows[0]["hypothesis"]}, {}))
    expected, alone = model.predictions([both, first])
    assert len(said) == 60
    assert list(said[0]["probabilities"].values()) == pytest.approx(expected.tolist(), abs=1e-5)
    assert abs(expected - alone).max() > 1e-6  # the second text is read
