"""pretrain, finetune and distill as stages: what they learn, what they keep, what they refuse."""

import csv
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from llmctl.artifacts import artifact
from llmctl.artifacts.workspace import Context
from llmctl.compress.quantization.quantize import quantize
from llmctl.config.errors import RequestError
from llmctl.config.settings import MeshConfig, OptimConfig, TrainConfig
from llmctl.data import splits
from llmctl.data.config import DataConfig, TokenizerConfig
from llmctl.distributed import mesh as meshes
from llmctl.model import functional, weights
from llmctl.model.config import ModelConfig, family
from llmctl.pipeline.stages import distill, finetune, pretrain
from llmctl.train import task_head

SIZES = {"d_model": 16, "layers": 3, "heads": 4, "kv_heads": 2, "head_dim": 8, "d_ff": 24}

GOOD, BAD = ("fine", "grand", "bright", "warm"), ("dull", "poor", "grey", "cold")
TRAIN = TrainConfig(steps=40, batch_size=16, seq_len=24, eval_every=20, log_every=20, tensorboard=False)
OPTIM = OptimConfig(learning_rate=1e-2, weight_decay=0.0)


@pytest.fixture(scope="module")
def sentiment(tmp_path_factory):
    """Texts whose label is told by their words; a question and its answer stand beside them."""
    file = tmp_path_factory.mktemp("sentiment") / "reviews.csv"
    rng = np.random.default_rng(0)
    with file.open("w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["text", "label", "prompt", "completion"])
        for i in range(300):
            good = i % 2 == 0
            text = f"{i} " + " ".join(rng.choice(GOOD if good else BAD, 6))
            writer.writerow([text, "pos" if good else "neg", f"{text}? ", "yes" if good else "no"])
    return DataConfig(
        source="csv", path=str(file), validation=0.15, test=0.1, columns={"text": "text", "label": "label"}
    )


def go(stage, config, parent, folder, **siblings):
    ctx = Context(folder / "out", folder / "work", "key", siblings)
    ctx.work.mkdir(parents=True, exist_ok=True)
    stage.run(config, parent, ctx)
    return artifact.load(ctx.out)


@pytest.fixture(scope="module")
def base(sentiment, tmp_path_factory):
    config = pretrain.Config(
        data=sentiment,
        tokenizer=TokenizerConfig(kind="bpe", vocab_size=320),
        model=ModelConfig(preset="llama-tiny", **SIZES),
        train=TRAIN,
        optim=OPTIM,
    )
    return go(pretrain, config, None, tmp_path_factory.mktemp("base"))


def classify(sentiment, **changes):
    return finetune.Config(**{"data": sentiment, "pooling": "mean", "train": TRAIN, "optim": OPTIM, **changes})


@pytest.fixture(scope="module")
def classifier(sentiment, base, tmp_path_factory):
    return go(finetune, classify(sentiment), base.path, tmp_path_factory.mktemp("classifier"))


def test_pretraining_learns_and_says_what_it_made(base):
    metrics = base.manifest.metrics
    assert metrics["validation_loss"] < 0.7 * np.log(base.model.vocab_size)
    assert base.manifest.tokenizer and base.manifest.parent is None
    assert (base.path / "log.jsonl").read_text().count("\n") >= 2


def test_finetuning_learns_the_task(classifier, base):
    assert classifier.manifest.labels == ["neg", "pos"]
    assert classifier.manifest.metrics["validation_accuracy"] > 0.95
    assert classifier.manifest.parent.digest == base.manifest.digest


def test_epochs_decide_the_steps_and_padding_is_said(sentiment, base, tmp_path, capsys):
    train = TrainConfig(epochs=1, batch_size=64, seq_len=64, tensorboard=False)
    made = go(finetune, classify(sentiment, train=train), base.path, tmp_path)
    rows = len(splits.load(sentiment)["train"])
    assert made.manifest.metrics["steps"] == -(-rows // 64)
    said = " ".join(capsys.readouterr().err.split())
    assert f"1 epochs of {rows} rows in batches of 64: {-(-rows // 64)} steps" in said
    assert "of the positions are padding: 95% of the rows have at most" in said
    limited = sentiment.model_copy(update={"epochs": 2.0})
    with pytest.raises(RequestError, match=r"train.epochs and data.epochs exclude each other"):
        go(finetune, classify(limited, train=train), base.path, tmp_path / "limited")


def test_weights_of_classes_are_refused_where_there_are_none(sentiment, base, tmp_path):
    config = finetune.Config(data=sentiment, task="lm", regularize={"class_weights": "balanced"})
    with pytest.raises(RequestError, match=r"regularize.class_weights: not for task 'lm'"):
        go(finetune, config, base.path, tmp_path)


def test_a_first_token_that_no_pretraining_has_trained_is_mentioned(base):
    first = base.model.model_copy(update={"architecture": "encoder", "pooling": "first"})
    parent, head = SimpleNamespace(model=first, params=base.params), first.model_copy(update={"head": "classify"})
    assert 'pooling = "mean"' in task_head.pooling_hint(finetune.Config(), parent, head)
    assert not task_head.pooling_hint(finetune.Config(pooling="first"), parent, head)
    trained = SimpleNamespace(model=first, params=base.params | {"head": {"pooler": {}}})
    assert not task_head.pooling_hint(finetune.Config(), trained, head)


@pytest.mark.parametrize("positions", ["relative", "learned"])
def test_the_prefix_of_a_decoder_goes_with_it(positions):
    """A task of the encoder alone, from a T5 whose decoder has trained keys and values."""
    small = {"d_model": 16, "heads": 2, "head_dim": 8, "kv_heads": 2, "d_ff": 16, "layers": 1, "encoder_layers": 1}
    small |= {"family": "t5", "vocab_size": 32, "prefix_tokens": 2, "positions": positions, "max_seq_len": 14}
    t5 = ModelConfig(**{**family("t5").FLAGS, **small})
    about = SimpleNamespace(task="", labels=[], model=t5)
    parent = SimpleNamespace(model=t5, params=functional.init(t5, jax.random.key(0)), manifest=about, path="t5")
    config = finetune.Config(task="classify")
    model, params = task_head.with_head(config, parent, ["no", "yes"], meshes.make(MeshConfig()))
    assert model.prefix_tokens == 0 and "its trained prefix with it" in task_head.prefix_notice(t5, model)
    shapes = ({n: a.shape for n, a in weights.flatten(p).items()} for p in (params, functional.abstract(model)))
    assert next(shapes) == next(shapes)


def test_a_trained_head_that_does_not_fit_is_said_to_be_new(base):
    def parent(head, **about):
        model = base.model.model_copy(update={"head": head, "pooling": "last"})
        return SimpleNamespace(
            model=model, manifest=SimpleNamespace(model=model, **{"task": head, "labels": []} | about)
        )

    def notice(parent, labels, **given):
        return task_head.notice(finetune.Config(**given), parent, labels)

    two = parent("classify", labels=["no", "yes"])
    assert notice(two, ["no", "yes"]) == notice(parent("lm"), ["no", "yes"]) == notice(two, [], task="lm") == ""
    assert notice(parent("embed"), ["no", "yes"]) == ""  # vectors have no trained head
    new = "the task's head is new and begins untrained: the parent"
    assert notice(two, ["a", "b", "c", "d"]) == f"{new}'s classes are no, yes, the data's a, b, c and 1 more"
    assert notice(two, [], task="regress") == f"{new}'s is for task classify"
    assert notice(two, ["no", "yes"], pooling="mean") == f"{new} pools by last"


def test_frozen_layers_are_the_parents(sentiment, base, tmp_path):
    made = go(finetune, classify(sentiment, freeze_layers=2), base.path, tmp_path)
    before, after = (weights.flatten(a.params) for a in (base, made))
    for path, w in before.items():
        same = np.asarray(w == after[path])
        if "/blocks/" in path:
            assert same[:2].all() and not same[2:].all()
        elif path.startswith("embed"):
            assert same.all()


def test_lora_merged_and_apart_answer_alike(sentiment, base, tmp_path):
    shapes = {}
    for merge in (True, False):
        made = go(finetune, classify(sentiment, method="lora", merge=merge), base.path, tmp_path / str(merge))
        assert made.manifest.metrics["validation_accuracy"] > 0.9
        kinds = {type(w).__name__ for w in weights.flatten(made.params).values()}
        assert ("LowRank" in kinds) is not merge
        shapes[merge] = made.manifest.metrics["validation_loss"]
    assert abs(shapes[True] - shapes[False]) < 1e-4


def test_completions_are_learned(sentiment, base, tmp_path):
    data = sentiment.model_copy(update={"columns": {"prompt": "prompt", "completion": "completion"}})
    longer = TRAIN.model_copy(update={"steps": 90, "eval_every": 45})
    made = go(finetune, classify(data, task="lm", train=longer), base.path, tmp_path)
    assert made.manifest.metrics["validation_accuracy"] > 0.8


@pytest.mark.parametrize("source", ["scratch", "itself"])
def test_students_learn_from_their_teacher(sentiment, base, classifier, tmp_path, source):
    small = ModelConfig(preset="llama-tiny", **{**SIZES, "layers": 1}) if source == "scratch" else None
    config = distill.Config(teacher="t", model=small, data=sentiment, train=TRAIN, optim=OPTIM)
    made = go(distill, config, classifier.path, tmp_path, t=classifier.path)
    assert made.manifest.metrics["validation_accuracy"] > 0.9
    assert made.manifest.labels == classifier.manifest.labels
    assert made.manifest.metrics["teacher"] == classifier.manifest.digest


def test_a_language_model_teaches_one(sentiment, base, tmp_path):
    config = distill.Config(
        teacher="t",
        model=ModelConfig(preset="llama-tiny", **{**SIZES, "layers": 1}),
        data=sentiment,
        train=TRAIN,
        optim=OPTIM,
    )
    made = go(distill, config, None, tmp_path, t=base.path)
    assert made.manifest.metrics["validation_loss"] < 0.7 * np.log(base.model.vocab_size)


def changed(base, folder, params, pruned=None, **model):
    artifact.save(
        folder,
        params,
        base.model.model_copy(update=model),
        stage="made",
        key="k",
        config={},
        parent=base.manifest,
        labels=base.manifest.labels,
        pruned=pruned,
        tokenizer_dir=base.tokenizer_dir,
    )
    return folder


def test_zeros_are_kept_or_refused_and_integers_are_not_trained(sentiment, base, tmp_path):
    def half(path, a):
        return jax.numpy.where(abs(a) < abs(a).mean(), 0, a) if "kernel" in str(path) else a

    sparse = changed(base, tmp_path / "sparse", jax.tree_util.tree_map_with_path(half, base.params), pruned=True)
    made = go(finetune, classify(sentiment), sparse, tmp_path / "full")
    assert made.manifest.sparsity > 0.5
    with pytest.raises(RequestError, match="which merged low-rank pairs would fill"):
        go(finetune, classify(sentiment, method="lora"), sparse, tmp_path / "filled")
    integers = quantize(base.params, scheme="int8", group=0, embeddings=False, head=False, activations="")[0]
    integers = changed(base, tmp_path / "integers", integers)
    with pytest.raises(RequestError, match="integers cannot be trained"):
        go(finetune, classify(sentiment), integers, tmp_path / "trained")
    made = go(finetune, classify(sentiment, method="lora", merge=False), integers, tmp_path / "qlora")
    assert made.manifest.metrics["validation_accuracy"] > 0.9 and made.manifest.bits < 32
    pairs = [w for w in weights.flatten(made.params).values() if isinstance(w, weights.LowRank)]
    assert pairs and all(bool((w.b != 0).any()) for w in pairs)
    apart = go(finetune, classify(sentiment, method="lora", merge=False), sparse, tmp_path / "apart")
    pairs = [w for w in weights.flatten(apart.params).values() if isinstance(w, weights.LowRank)]
    assert pairs and all(bool((w.b != 0).any()) for w in pairs) and apart.manifest.pruned
    assert not made.manifest.pruned


def test_bad_requests_name_what_is_wrong(sentiment, base, classifier, tmp_path):
    with pytest.raises(RequestError, match="no language-model head"):
        go(finetune, classify(sentiment, task="lm"), classifier.path, tmp_path / "a")
    with pytest.raises(RequestError, match="freeze_layers: 9 of 3"):
        go(finetune, classify(sentiment, freeze_layers=9), base.path, tmp_path / "b")
    once = sentiment.model_copy(update={"columns": {"text": "text"}, "epochs": 1.0})
    with pytest.raises(RequestError, match="640 rows are to be read"):
        go(finetune, classify(once, task="lm"), base.path, tmp_path / "c")
    with pytest.raises(RequestError, match="640 rows are to be read"):
        go(distill, distill.Config(teacher="t", data=once, train=TRAIN), base.path, tmp_path / "f", t=base.path)
    short = changed(classifier, tmp_path / "short", classifier.params, max_seq_len=16)
    with pytest.raises(RequestError, match=r"more than model\.max_seq_len = 16"):
        config = distill.Config(teacher="t", data=sentiment, train=TRAIN)
        go(distill, config, classifier.path, tmp_path / "g", t=short)
    with pytest.raises(RequestError, match="they must agree"):
        config = distill.Config(teacher="t", data=sentiment)
        go(distill, config, base.path, tmp_path / "d", t=classifier.path)
    with pytest.raises(RequestError, match="label"):
        data = sentiment.model_copy(update={"classes": ["pos", "meh"]})
        go(finetune, classify(data), base.path, tmp_path / "e")


@pytest.mark.parametrize(("stage", "settings", "line"), [
    (finetune, {"lora": {"rank": 4}, "merge": False}, "lora, merge: not for method 'full'"),
    (distill, {}, "no teacher"),
    (distill, {"teacher": "t", "train": {"z_loss": 1e-4}}, "for training on labels"),
])  # fmt: skip
def test_settings_that_contradict_one_another(stage, settings, line):
    with pytest.raises(ValueError, match=line):
        stage.Config(**settings)
