"""Multiple choice: scores and gradients against whole logits, questions of different sizes, zero-shot verbalizers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmctl.artifacts import artifact
from llmctl.cli.app import run
from llmctl.config.errors import RequestError
from llmctl.config.settings import MeshConfig
from llmctl.data import splits
from llmctl.data.config import DataConfig, TokenizerConfig
from llmctl.data.tokenizers import loading
from llmctl.data.tokenizers.byte_tokenizer import ByteTokenizer
from llmctl.distributed import mesh as meshes
from llmctl.evaluate.setup import Held, Setup
from llmctl.evaluate.tasks.choice import TASK
from llmctl.evaluate.tasks.rows import RowSettings
from llmctl.model import functional
from llmctl.model.config import ModelConfig
from llmctl.model.divergences import Divergence, SoftLoss

SIZES = {"d_model": 16, "layers": 2, "heads": 2, "kv_heads": 2, "head_dim": 8, "d_ff": 24, "vocab_size": 300}
MODELS = {
    "decoder": ModelConfig(preset="llama-tiny", **SIZES),
    "encoder_decoder": ModelConfig(preset="t5-tiny", encoder_layers=1, **SIZES),
    "encoder": ModelConfig(preset="bert-tiny", head="choice", next_sentence=False, head_transform=False, **SIZES),
}
ROWS = [
    {"prompt": "the sky is", "choices": [" blue", " red", " a dog"], "answer": 0},
    {"prompt": "two and two", "choices": [" five", " four"], "answer": "B"},
    {"prompt": "snow", "choices": [" hot", " white"], "answer": " white"},
    {"prompt": "fire", "choices": [" cold", " hot"], "answer": 1},
]


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    file = tmp_path_factory.mktemp("questions") / "x.jsonl"
    file.write_text("\n".join(map(json.dumps, ROWS)))
    return splits.load(DataConfig(source="jsonl", path=str(file), validation=0, test=0))["train"]


def batch_of(model, examples):
    rows = TASK.rows(model, examples, ByteTokenizer.new(), RowSettings(24))
    return {k: jnp.asarray(a) for k, a in rows.batch(np.arange(4)).items()}


def alone(model, params, batch, b, k):
    """Return the score of one choice, read in a batch of its own, from all logits."""
    names = [n for n in batch if n not in ("label", "choices") and not n.startswith("choice")]
    own = {n: batch[(f"choice{k}_" if k else "") + n][b : b + 1] for n in names}
    x = functional.hidden(model, params, own)
    if not model.head_kind.vocabulary:
        return functional.outputs(model, params, x, own)[0]
    log_p = jax.nn.log_softmax(functional.lm_logits(model, params, x))
    log_p = jnp.take_along_axis(log_p, own["targets"][..., None], -1)[..., 0]
    return (log_p * own["weights"]).sum()


@pytest.mark.parametrize(
    "architecture", [n if n != "encoder_decoder" else pytest.param(n, marks=pytest.mark.slow) for n in MODELS]
)
def test_loss_and_gradients_equal_those_of_whole_logits(architecture, examples):
    model = MODELS[architecture]
    params = jax.jit(lambda key: functional.init(model, key))(jax.random.key(0))
    batch = batch_of(model, examples)
    counts, labels = [3, 2, 2, 2], [0, 1, 1, 1]
    assert batch["choices"].tolist() == counts and batch["label"].tolist() == labels

    def whole(params):
        total = 0.0
        for b, (count, label) in enumerate(zip(counts, labels, strict=True)):
            scores = jnp.stack([alone(model, params, batch, b, k) for k in range(count)])
            total -= jax.nn.log_softmax(scores)[label]
        return total

    (total, sums), got = jax.jit(jax.value_and_grad(TASK.loss_of(model), has_aux=True))(params, batch)
    want_total, want = jax.jit(jax.value_and_grad(whole))(params)
    np.testing.assert_allclose(total, want_total, rtol=1e-5)
    assert sums["weight"] == 4
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=5e-4, atol=5e-6), got, want)

    scores = TASK.scorer(model, "float32")(params, batch)
    assert scores.shape == (4, 3, 2) and (scores[1:, 2, 0] < -1e29).all()
    np.testing.assert_allclose(scores[0, 2, 0], alone(model, params, batch, 0, 2), rtol=1e-5)
    if architecture != "encoder":
        assert scores[0, :, 1].tolist() == [5, 4, 6]  # bytes of the choices, without an end


def test_every_choice_reads_the_same_prompt_and_none_is_cut(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text(json.dumps({"prompt": "abcdefghij", "choices": ["1", "12345"], "answer": 0}))
    examples = splits.load(DataConfig(source="jsonl", path=str(file), validation=0, test=0))["train"]
    words = ByteTokenizer.new()
    rows = TASK.rows(MODELS["decoder"], examples, words, RowSettings(10))
    row, setting = rows[0], Setup(meshes.make(MeshConfig()), 10, 10, 8, "tail", "float32")
    assert TASK.protocol(None, Held(examples, "test", tmp_path), setting, rows, {}).endswith(
        "1 prompts without their beginning"
    )
    read = [words.decode(row[p + "tokens"][: int(row[p + "weights"].argmax()) + 1].tolist()) for p in ("", "choice1_")]
    assert read[0] == read[1] != "" and row["choice1_weights"].sum() == 5
    with pytest.raises(RequestError, match="the longest choice has 5 tokens, and a row has room for"):
        TASK.rows(MODELS["decoder"], examples, words, RowSettings(4))
    with pytest.raises(RequestError, match="the longest choice has 5 tokens"):
        TASK.rows(MODELS["encoder_decoder"], examples, words, RowSettings(10, target_len=5))


def test_a_teacher_equal_to_the_student_diverges_by_nothing(examples):
    model = MODELS["decoder"]
    params = jax.jit(lambda key: functional.init(model, key))(jax.random.key(0))
    loss = TASK.soft_loss_of(model, [model], SoftLoss(Divergence(temperature=2.0), soft=1.0, hard=0.0))
    total, sums = jax.jit(loss)(params, batch_of(model, examples), jax.random.key(0), params)
    np.testing.assert_allclose([total, sums["kl"]], 0, atol=1e-5)


def test_words_of_classes_are_measured_without_training(tmp_path):
    """A decoder without a preference answers the first word for every review."""
    file = tmp_path / "x.jsonl"
    rows = [{"text": f"review {i}", "label": "pos" if i % 4 else "neg"} for i in range(40)]
    file.write_text("\n".join(map(json.dumps, rows)))
    data = DataConfig(source="jsonl", path=str(file), validation=0, test=1,
                      template={"prompt": "{{ text }}: "}, words={"neg": "b", "pos": "g"})  # fmt: skip
    words = loading.train((), TokenizerConfig(kind="bytes"))
    words.save(tmp_path / "words")
    model = MODELS["decoder"].model_copy(update={"tied": False, "vocab_size": words.vocab_size})
    params = jax.jit(lambda key: functional.init(model, key))(jax.random.key(0))
    params["lm_head"]["kernel"] = jnp.zeros_like(params["lm_head"]["kernel"])
    about = {"stage": "pretrain", "key": "k", "config": {"train": {"seq_len": 24}}}
    artifact.save(tmp_path / "lm", params, model, tokenizer_dir=tmp_path / "words", **about)
    mesh = meshes.make(MeshConfig())
    held = Held(splits.load(data)["test"], "test", tmp_path / "held")
    found = TASK.evaluate(artifact.load(tmp_path / "lm", mesh), held, Setup(mesh, 24, 24, 8, "tail", "float32"))
    # All logits are zero, so the first word wins: "b" of class neg, a quarter of the reviews.
    interval = {"accuracy_low": pytest.approx(0.1419, abs=1e-4), "accuracy_high": pytest.approx(0.4019, abs=1e-4)}
    assert found.metrics == {"accuracy": 0.25, "accuracy_per_token": 0.25, "baseline_accuracy": 0.5} | interval
    assert "40 examples" in found.protocol


@pytest.mark.parametrize("architecture", MODELS)
def test_predict_gives_the_softmax_of_the_scores_of_each_question_alone(architecture, examples, tmp_path, capsys):
    model = MODELS[architecture]
    params = jax.jit(lambda key: functional.init(model, key))(jax.random.key(0))
    batch = batch_of(model, examples)
    words = tmp_path / "words"
    ByteTokenizer.new().save(words)
    about = {"stage": "finetune", "key": "k", "config": {"train": {"seq_len": 24}, "truncate": "tail"}}
    artifact.save(tmp_path / "model", params, model, task="choice", tokenizer_dir=words, **about)
    rows = [{k: v for k, v in row.items() if k != "answer"} for row in ROWS]
    rows[1]["choices"] = {"text": rows[1]["choices"], "label": ["A", "B"]}
    rows.insert(2, {"prompt": "one choice", "choices": ["a"]})
    (tmp_path / "new.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out, call = tmp_path / "out.jsonl", ["predict", str(tmp_path / "model"), "--file", str(tmp_path / "new.jsonl")]
    assert run([*call, "--probabilities", "--batch-size", "4", "--out", str(out)]) == 0
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert "new.jsonl:3: column 'choices': needs at least two different choices" in answers.pop(2)["error"]
    for b, (row, answer) in enumerate(zip(ROWS, answers, strict=True)):
        scores = jnp.stack([alone(model, params, batch, b, k) for k in range(len(row["choices"]))])
        np.testing.assert_allclose(answer["probabilities"], jax.nn.softmax(scores), rtol=2e-5, atol=1e-6)
        assert answer["choice"] == scores.argmax() and answer["answer"] == row["choices"][answer["choice"]]
    assert run([*call, "--beams", "2"]) == 2 and "generates no text" in capsys.readouterr().err
