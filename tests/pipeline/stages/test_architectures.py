"""Every stage on encoders and encoder-decoders, one after the other."""

import csv
import json

import numpy as np
import pytest

from llmctl.artifacts import artifact
from llmctl.artifacts.workspace import Context
from llmctl.config.errors import RequestError
from llmctl.config.settings import OptimConfig, TrainConfig
from llmctl.data.config import DataConfig, TokenizerConfig
from llmctl.model.config import ModelConfig
from llmctl.pipeline.stages import distill, finetune, pretrain, prune, quantize
from llmctl.pipeline.stages import eval as evaluation

SIZES = {"d_model": 16, "layers": 2, "heads": 4, "kv_heads": 4, "head_dim": 8, "d_ff": 24}
PRESETS = {"bert": {**SIZES, "preset": "bert-tiny", "max_seq_len": 64},
           "t5": {**SIZES, "preset": "t5-tiny", "encoder_layers": 2}}  # fmt: skip
GOOD, BAD = ("fine", "grand", "bright", "warm"), ("dull", "poor", "grey", "cold")
TRAIN = TrainConfig(steps=24, batch_size=16, seq_len=24, eval_every=12, log_every=12, tensorboard=False)
EVAL = evaluation.Config(seq_len=24, speed=False, plot=False)
OPTIM = OptimConfig(learning_rate=1e-2, weight_decay=0.0)


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    file = tmp_path_factory.mktemp("reviews") / "reviews.csv"
    rng = np.random.default_rng(0)
    with file.open("w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["text", "label", "prompt", "completion"])
        for i in range(300):
            good = i % 2 == 0
            words = [" ".join(rng.choice(GOOD if good else BAD, 4)) for _ in range(3)]
            writer.writerow([". ".join([f"{i}", *words]), "pos" if good else "neg", words[0], "yes" if good else "no"])
    return DataConfig(
        source="csv", path=str(file), validation=0.15, test=0.2, columns={"text": "text", "label": "label"}
    )


def go(stage, config, parent, folder, **siblings):
    ctx = Context(folder / "out", folder / "work", "key", siblings)
    ctx.work.mkdir(parents=True, exist_ok=True)
    stage.run(config, parent, ctx)
    return ctx.out


@pytest.fixture(scope="module", params=["bert", "t5"])
def base(request, reviews, tmp_path_factory):
    config = pretrain.Config(
        data=reviews, tokenizer=TokenizerConfig(kind="bpe", vocab_size=330),
        model=ModelConfig(**PRESETS[request.param]),
        train=TRAIN, optim=OPTIM,
    )  # fmt: skip
    return go(pretrain, config, None, tmp_path_factory.mktemp(request.param))


def scores(folder):
    return json.loads((folder / "results.json").read_text())[0]


def test_the_chain(base, reviews, tmp_path):
    made = artifact.load(base)
    encoder = made.model.architecture == "encoder"
    found = made.manifest.metrics
    assert found["validation_loss"] < np.log(made.model.vocab_size) and 0 < found["baseline_accuracy"] < 1
    assert ("validation_next_sentence_accuracy" in found) == encoder
    measured = scores(go(evaluation, EVAL.model_copy(update={"data": reviews}), base, tmp_path / "eval-base"))
    assert measured["task"] == ("masked tokens, next sentences" if encoder else "spans")
    assert measured["metrics"]["predicted_tokens"] > 50

    # the language model: pruned, and taught by what it was
    smaller = go(prune, prune.Config(data=reviews, ffn=0.25, heads=0.5, examples=32), base, tmp_path / "prune")
    assert artifact.load(smaller).model.heads == 2
    taught = go(
        distill, distill.Config(data=reviews, teacher="base", train=TRAIN, optim=OPTIM), smaller, tmp_path / "distill",
        base=base,
    )  # fmt: skip
    after = artifact.load(taught)
    assert after.model.d_ff == 18 and np.isfinite(after.manifest.metrics["validation_loss"])
    assert ("validation_next_sentence_accuracy" in after.manifest.metrics) == encoder

    # a classifier: an encoder-decoder keeps its encoder
    chosen = go(finetune, finetune.Config(data=reviews, train=TRAIN, optim=OPTIM), taught, tmp_path / "finetune")
    classifier = artifact.load(chosen)
    assert (classifier.model.architecture, classifier.model.head) == ("encoder", "classify")
    assert classifier.model.pooling == ("first" if encoder else "mean") and "decoder" not in classifier.params
    assert classifier.manifest.metrics["validation_accuracy"] > 0.9
    small = go(quantize, quantize.Config(), chosen, tmp_path / "quantize")
    zeros = go(prune, prune.Config(data=reviews, method="wanda", examples=32), chosen, tmp_path / "wanda")
    assert artifact.read_manifest(zeros).sparsity > 0.1
    for name in (small, zeros):
        result = scores(
            go(evaluation, EVAL.model_copy(update={"data": reviews}), name, tmp_path / f"e-{name.parent.name}")
        )
        assert result["task"] == "classification" and result["metrics"]["accuracy"] > 0.8


@pytest.mark.parametrize("base", ["bert"], indirect=True)
def test_an_encoder_writes_no_completions(base, reviews, tmp_path):
    pairs = reviews.model_copy(update={"columns": {"prompt": "prompt", "completion": "completion"}})
    with pytest.raises(RequestError, match="text"):
        go(finetune, finetune.Config(data=pairs, task="lm", train=TRAIN, optim=OPTIM), base, tmp_path / "finetune")


def test_objectives_that_do_not_fit_are_refused(base, reviews, tmp_path):
    with pytest.raises(RequestError, match="objective 'causal' is not for"):
        go(pretrain, pretrain.Config(data=reviews, objective="causal", train=TRAIN), base, tmp_path / "again")


@pytest.mark.parametrize("base", ["bert", pytest.param("t5", marks=pytest.mark.slow)], indirect=True)
def test_numbers_are_told_from_pairs_of_texts(base, tmp_path):
    file = tmp_path / "pairs.csv"
    rng = np.random.default_rng(1)
    with file.open("w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["text", "pair", "label"])
        for i in range(300):
            good = i % 2 == 0
            first, second = (" ".join(rng.choice(GOOD if good else BAD, 4)) for _ in range(2))
            writer.writerow([f"{first} {i}", second, 1.0 if good else -1.0])
    data = DataConfig(source="csv", path=str(file), validation=0.15, test=0.2, label_type="number")
    train = TRAIN.model_copy(update={"steps": 100, "eval_every": 50})
    config = finetune.Config(data=data, task="regress", train=train, optim=OPTIM)
    made = go(finetune, config, base, tmp_path / "finetune")
    assert artifact.read_manifest(made).model.head == "regress"
    result = scores(go(evaluation, EVAL.model_copy(update={"data": data}), made, tmp_path / "eval"))
    assert result["task"] == "regression" and result["metrics"]["rmse"] < 0.6 * result["metrics"]["baseline_rmse"]
    student = distill.Config(data=data, teacher="made", train=TRAIN.model_copy(update={"steps": 2}), optim=OPTIM)
    taught = go(distill, student, made, tmp_path / "distill", made=made)
    assert artifact.read_manifest(taught).metrics["validation_loss"] < 0.4
    with pytest.raises(RequestError, match="label_type"):
        go(
            finetune,
            config.model_copy(update={"data": data.model_copy(update={"label_type": "class"})}),
            base,
            tmp_path,
        )


def test_generate_answers_or_fills(base, capsys):
    from llmctl.cli import app

    encoder = artifact.read_manifest(base).model.architecture == "encoder"
    argv = ["generate", str(base), "--prompt", "fine <mask> grand.", "--prompt", "dull <mask>", "--max-new", "5"]
    assert app.run([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["results"]
    assert [f["prompt"] for f in found] == ["fine <mask> grand.", "dull <mask>"]
    if encoder:
        assert all("<mask>" not in f["text"] and len(f["masks"][0]) == 5 for f in found)
        assert app.run(["generate", str(base), "--prompt", "no gap"]) == 2
        assert "has no <mask>" in capsys.readouterr().err
    else:
        assert all(1 <= f["tokens"] <= 5 for f in found)
    assert app.run(argv) == 0
    said = capsys.readouterr().out.splitlines()
    assert said == [f["text"] for f in found] or not encoder
