"""Multi-label classification: loss, F1 and thresholds by hand; a model trained, distilled, pruned and exported."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmctl.artifacts import artifact
from llmctl.artifacts.workspace import Context
from llmctl.config.errors import RequestError
from llmctl.config.settings import MeshConfig, OptimConfig, TrainConfig
from llmctl.convert import exporting, importing
from llmctl.data.config import DataConfig, TokenizerConfig
from llmctl.data.tokenizers import loading
from llmctl.distributed import mesh as meshes
from llmctl.evaluate.tasks import multilabel
from llmctl.evaluate.tasks.losses import Options
from llmctl.model import chunked_loss, functional
from llmctl.model.config import ModelConfig
from llmctl.model.divergences import Divergence, SoftLoss
from llmctl.pipeline.stages import distill, finetune, prune
from llmctl.pipeline.stages import eval as evaluation

TASK = multilabel.TASK
WORDS = {"art": "a", "law": "e", "sea": "u"}
"""A text is about a topic if it has the topic's word."""
SIZES = {"d_model": 16, "layers": 2, "heads": 2, "kv_heads": 2, "head_dim": 8, "d_ff": 24, "max_seq_len": 32}
TRAIN = TrainConfig(steps=60, batch_size=16, seq_len=32, eval_every=30, log_every=30, tensorboard=False)
OPTIM = OptimConfig(learning_rate=1e-2, weight_decay=0.0)


def batch_of(rows, classes, seed=0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (rows, classes)).astype(np.float32)
    return jnp.asarray(logits), {"label": rng.integers(0, 2, (rows, classes)).astype(np.uint8)}


def test_loss_and_gradient_are_those_of_torch():
    torch = pytest.importorskip("torch")
    y, batch = batch_of(6, 5)
    weight = np.array([1, 1, 1, 1, 0, 0], np.float32)  # the last two rows only fill the batch

    def loss(y):
        total, sums = TASK.score(y, batch | {"row_weight": weight}, Options())
        return total / sums["weight"]

    ours, gradient = jax.value_and_grad(loss)(y)
    theirs = torch.tensor(np.asarray(y), requires_grad=True)
    expected = torch.nn.BCEWithLogitsLoss()(theirs[:4], torch.tensor(batch["label"][:4], dtype=torch.float32))
    expected.backward()
    np.testing.assert_allclose(ours, expected.detach(), rtol=1e-6)
    np.testing.assert_allclose(gradient, theirs.grad, rtol=1e-5, atol=1e-8)
    smooth = torch.tensor(batch["label"], dtype=torch.float32) * 0.8 + 0.1
    expected = torch.nn.BCEWithLogitsLoss()(theirs, smooth).detach()
    np.testing.assert_allclose(TASK.score(y, batch, Options(label_smoothing=0.2))[0] / 6, expected, rtol=1e-6)


def test_the_softened_divergence_is_that_of_a_choice_per_class():
    y, batch = batch_of(4, 3)
    teacher = batch_of(4, 3, seed=1)[0]
    p, q = (1 / (1 + np.exp(-np.asarray(x, np.float64) / 2)) for x in (teacher, y))
    kl = 4 * (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)))
    hard = TASK.score(y, batch, Options())[0]
    measure = Divergence(temperature=2.0)
    mixed, sums = TASK.soft_score(teacher, y, batch, SoftLoss(measure, soft=0.75, hard=0.25))
    np.testing.assert_allclose(sums["kl"], kl.mean(1).sum(), rtol=1e-5)
    np.testing.assert_allclose(mixed, 0.75 * kl.mean(1).sum() + 0.25 * hard, rtol=1e-5)
    assert abs(float(TASK.soft_score(y, y, batch, SoftLoss(measure, soft=1.0, hard=0.0))[0])) < 1e-6


TRUTH = np.array([[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]], bool)
SAID = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0]], bool)
# a: 2 right of 2 labels and 3 answers, 4 / 5; b: 1 right of 2 and 2, 1 / 2; c and d never occur. Together 6 / 9.


def test_f1_by_hand():
    found = multilabel.scores(TRUTH, SAID, ["a", "b", "c", "d"])
    assert found["micro_f1"] == pytest.approx(6 / 9) and found["macro_f1"] == pytest.approx((4 / 5 + 1 / 2) / 2)
    assert found["per_class"]["a"] == {"precision": 2 / 3, "recall": 1.0, "f1": 4 / 5, "support": 2}
    assert found["per_class"]["c"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}
    assert found["exact_match"] == 1 / 4 and found["exact_match_low"] < 1 / 4 < found["exact_match_high"]
    # per row: 2 x right = 2, 2, 0, 2 of 3, 2, 1, 3 labels and answers; minus 2/3 of those: 0, 2/3, -2/3, 0
    half = 1.959964 * np.sqrt(2 * (2 / 3) ** 2) / 9
    assert found["micro_f1_low"] == pytest.approx(6 / 9 - half) and found["micro_f1_high"] == pytest.approx(
        6 / 9 + half
    )
    perfect = multilabel.scores(TRUTH, TRUTH, ["a", "b", "c", "d"])
    assert perfect["micro_f1"] == 1 and "micro_f1_low" not in perfect and perfect["exact_match_low"] < 1
    nothing = multilabel.scores(TRUTH & False, SAID & False, ["a", "b", "c", "d"])
    assert nothing["micro_f1"] == nothing["macro_f1"] == 0 and nothing["exact_match"] == 1


def test_validation_counts_as_the_evaluation_does():
    y = np.where(SAID, 2.0, -2.0).astype(np.float32)
    halves = [
        TASK.score(jnp.asarray(y[rows]), {"label": TRUTH[rows], "row_weight": weight}, Options())[1]
        for rows, weight in (([0, 1], np.ones(2)), ([2, 3, 3], np.array([1.0, 1.0, 0.0])))
    ]
    found = chunked_loss.means(jax.tree.map(jnp.add, *halves))
    expected = multilabel.scores(TRUTH, SAID, ["a", "b", "c", "d"])
    for name in ("micro_f1", "macro_f1", "exact_match"):
        assert found[name].shape == () and float(found[name]) == pytest.approx(expected[name]), name


def test_thresholds_by_hand():
    p_NC = np.array([[0.9, 0.3, 0.8, 0.2], [0.6, 0.3, 0.7, 0.1], [0.4, 0.2, 0.2, 0.4], [0.1, 0.1, 0.1, 0.3]])
    truth_NC = np.array([[1, 1, 0, 1], [0, 0, 0, 1], [1, 0, 0, 1], [0, 0, 0, 1]])
    # 0: the first three, F1 = 4 / 5. 1: the first two are alike, F1 = 2 / 3. 2: no row has it. 3: every row has it.
    assert multilabel.thresholds(truth_NC, p_NC) == pytest.approx([0.25, 0.25, 0.5, 0.05])
    # Two equally good ones: the first row alone, or the first three (F1 = 2 / 3 ... 4 / 5 with two labels).
    truth_N1, p_N1 = np.array([[1], [0], [0], [1]]), np.array([[0.9], [0.85], [0.8], [0.5]])
    assert multilabel.thresholds(truth_N1, p_N1) == [0.25]  # F1 is 2 / 3 at 0.875 and at 0.25, which is nearer to 0.5
    # Large logits stay apart.
    far = multilabel.probabilities(np.array([[30.0], [20.0], [-800.0]]))
    assert 0 < multilabel.thresholds(np.array([[1], [0], [0]]), far)[0] > far[1, 0]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rng, rows = np.random.default_rng(0), []
    for i in range(300):
        topics = [t for t in WORDS if rng.random() < 0.4]
        words = [WORDS[t] for t in topics] + list(rng.choice(["w", "x", "g"], 4))
        rows.append({"text": f"{' '.join(rng.permutation(words))} {i}", "label": ", ".join(topics)})
    how = {"label_type": "set", "label_separator": ",", "classes": ["sea", "art", "law"]}
    return written(tmp_path_factory.mktemp("topics"), rows, **how)


def written(folder, rows, **how):
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return DataConfig(source="jsonl", path=str(folder / "data.jsonl"), validation=0.2, test=0.2, **how)


def go(stage, config, parent, out, **siblings):
    ctx = Context(out, out.with_name(out.name + ".work"), "key", siblings)
    ctx.work.mkdir(parents=True, exist_ok=True)
    stage.run(config, parent, ctx)
    return out


@pytest.fixture(scope="module")
def base(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    words = loading.train([], TokenizerConfig(kind="bytes"))
    words.save(folder / "words")
    cfg = ModelConfig(preset="bert-tiny", **{**SIZES, "vocab_size": words.vocab_size})
    params = jax.jit(lambda key: functional.init(cfg, key))(jax.random.key(0))
    artifact.save(folder / "lm", params, cfg, stage="pretrain", key="k", config={}, tokenizer_dir=folder / "words")
    return folder / "lm"


@pytest.fixture(scope="module")
def tuned(data, base, tmp_path_factory):
    config = finetune.Config(data=data, task="multilabel", train=TRAIN, optim=OPTIM)
    return go(finetune, config, base, tmp_path_factory.mktemp("tuned") / "tuned")


def scored(data, parent, out):
    go(evaluation, evaluation.Config(data=data, speed=False, plot=False, seq_len=32), parent, out)
    return json.loads((out / "results.json").read_text())[0]


def test_what_is_learned_is_kept_and_measured(data, tuned, tmp_path):
    manifest = artifact.read_manifest(tuned)
    assert manifest.task == "multilabel" and manifest.labels == ["sea", "art", "law"]
    assert list(manifest.fitted["thresholds"]) == ["sea", "art", "law"]
    assert manifest.metrics["best_step"] and manifest.metrics["validation_micro_f1"] > 0.8
    found = scored(data, tuned, tmp_path / "eval")
    assert found["task"] == "multi-label classification"
    assert found["protocol"].endswith("thresholds chosen on validation")
    assert found["metrics"]["micro_f1"] > 0.8
    # classes are matched by name, in whatever order the data has them; unknown ones and other types are refused
    ordered = data.model_copy(update={"classes": ["art", "law", "sea"]})
    again = scored(ordered, tuned, tmp_path / "again")
    assert again["metrics"]["per_class"] == found["metrics"]["per_class"]
    with pytest.raises(RequestError, match="a label 'sky' that it does not know"):
        scored(data.model_copy(update={"classes": [*data.classes, "sky"]}), tuned, tmp_path / "sky")
    with pytest.raises(RequestError, match=r'predicts sets of classes; set data\.label_type = "set"'):
        single = [{"text": f"a {i}", "label": ["art", "law"][i % 2]} for i in range(30)]
        scored(written(tmp_path, single), tuned, tmp_path / "single")


def test_it_is_distilled_and_calibrated(data, tuned, base, tmp_path):
    train, few = TRAIN.model_copy(update={"steps": 2}), {"examples": 8, "batch_size": 4}
    sizes = ModelConfig(preset="bert-tiny", **{**SIZES, "layers": 1})
    student = distill.Config(data=data, teacher="tuned", model=sizes, train=train, optim=OPTIM)
    made = artifact.read_manifest(go(distill, student, None, tmp_path / "student", tuned=tuned))
    assert made.task == "multilabel" and list(made.fitted["thresholds"]) == made.labels == ["sea", "art", "law"]
    assert 0 <= made.metrics["validation_macro_f1"] <= 1
    plain = data.model_copy(update={"label_type": "class", "classes": []})
    with pytest.raises(RequestError, match=r'labels are sets of classes; set data\.label_type = "set"'):
        go(distill, student.model_copy(update={"data": plain}), None, tmp_path / "plain", tuned=tuned)
    with pytest.raises(RequestError, match=r'task classify: labels are classes; set data\.label_type = "class"'):
        go(finetune, finetune.Config(data=data, train=train), base, tmp_path / "classify")
    for method in ("wanda", "taylor"):
        config = prune.Config(data=data, method=method, sparsity=0.5, **few)
        pruned = artifact.read_manifest(go(prune, config, tuned, tmp_path / method))
        assert pruned.sparsity > 0.3 and pruned.fitted == artifact.read_manifest(tuned).fitted
    # Thresholds that were chosen for another artifact are reported as such.
    result = scored(data, tmp_path / "wanda", tmp_path / "eval")
    assert result["protocol"].endswith("thresholds chosen on validation of tuned")


def test_transformers_answers_alike_and_an_import_is_the_same_task(data, tuned, tmp_path):
    torch, hf = pytest.importorskip("torch"), pytest.importorskip("transformers")
    exporting.run(tuned, tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["problem_type"] == "multi_label_classification"
    assert config["id2label"] == {"0": "sea", "1": "art", "2": "law"}
    model = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf").eval()
    assert type(model).__name__ == "BertForSequenceClassification"
    importing.run(tmp_path / "hf", tmp_path / "back")
    back, before = (artifact.load(folder, meshes.make(MeshConfig())) for folder in (tmp_path / "back", tuned))
    assert back.manifest.task == "multilabel" and back.manifest.labels == before.manifest.labels
    assert back.manifest.digest == before.manifest.digest
    tokens = np.random.default_rng(0).integers(4, before.model.vocab_size, (2, 9))
    batch = {"tokens": tokens, "segments": np.ones((2, 9), int), "positions": np.tile(np.arange(9), (2, 1))}
    ours = TASK.scorer(back.model, "float32")(back.params, {k: jnp.asarray(v, jnp.int32) for k, v in batch.items()})
    with torch.no_grad():
        found = model(input_ids=torch.tensor(tokens), labels=torch.tensor([[1.0, 0, 0], [0, 1, 1]]))
    np.testing.assert_allclose(ours, found.logits, atol=1e-5)
    truth = {"label": np.array([[1, 0, 0], [0, 1, 1]], np.uint8)}
    np.testing.assert_allclose(TASK.score(ours, truth, Options())[0] / 2, found.loss, rtol=1e-5)
    # The thresholds travel in config.json, so the imported model has the same scores.
    assert config["thresholds"] == before.manifest.fitted["thresholds"]
    assert back.manifest.fitted == before.manifest.fitted
    result = scored(data, tmp_path / "back", tmp_path / "eval")
    assert result["protocol"].endswith("thresholds of the imported config.json")
    assert result["metrics"]["micro_f1"] == scored(data, tuned, tmp_path / "own")["metrics"]["micro_f1"]
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"thresholds": {"sea": 2}}))
    with pytest.raises(RequestError, match="is not one number from 0 to 1 for each class"):
        importing.run(tmp_path / "hf", tmp_path / "wrong")
