"""Sequence to sequence: validated and measured by generation, with the scores of sacrebleu and rouge-score."""

import json

import jax
import numpy as np
import pytest

from llmctl.artifacts import artifact
from llmctl.artifacts.workspace import Context
from llmctl.cli import app
from llmctl.config.settings import MeshConfig, OptimConfig, TrainConfig
from llmctl.data.config import DataConfig
from llmctl.data.tokenizers.byte_tokenizer import ByteTokenizer
from llmctl.distributed import mesh as meshes
from llmctl.evaluate import measurements
from llmctl.evaluate.tasks.settings import GenerationConfig
from llmctl.model import functional
from llmctl.model.array_bytes import bytes_of
from llmctl.model.config import ModelConfig
from llmctl.pipeline.stages import eval as evaluation
from llmctl.pipeline.stages import finetune

WORDS = {"a": "k(l)m!n?", "b": "p;q:r%s&", "c": "t+u=v*w"}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [{"prompt": f"{'abc'[i % 3]} {i}", "completion": WORDS["abc"[i % 3]]} for i in range(240)]
    file.write_text("\n".join(map(json.dumps, rows)))
    return DataConfig(source="jsonl", path=str(file), validation=0.15, test=0.15)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    words = ByteTokenizer.new()
    words.save(folder / "words")
    sizes = {"d_model": 32, "layers": 1, "encoder_layers": 1, "heads": 2, "kv_heads": 2, "head_dim": 16, "d_ff": 64}
    model = ModelConfig(preset="t5-tiny", **sizes, vocab_size=words.vocab_size, max_seq_len=40, dropout=0.0)
    params = jax.jit(lambda key: functional.init(model, key))(jax.random.key(0))
    about = {"stage": "pretrain", "key": "k", "config": {"train": {"seq_len": 28}}}
    artifact.save(folder / "base", params, model, tokenizer_dir=folder / "words", **about)
    return folder / "base"


@pytest.fixture(scope="module")
def tuned(base, pairs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned")
    train = TrainConfig(
        steps=100, batch_size=16, seq_len=28, eval_every=50, log_every=50, tensorboard=False, best_by="bleu"
    )
    config = finetune.Config(
        data=pairs, task="seq2seq", train=train, optim=OptimConfig(learning_rate=1e-2, weight_decay=0.0),
        generation=GenerationConfig(max_new=12, examples=20),
    )  # fmt: skip
    ctx = Context(folder / "out", folder / "work", "key", {})
    ctx.work.mkdir()
    finetune.run(config, base, ctx)
    return ctx.out


def test_validation_generates_and_chooses(tuned):
    found = artifact.read_manifest(tuned).metrics
    names = {"bleu", "chrf", "rouge_1", "rouge_2", "rouge_l", "exact_match"}
    assert names <= {name.removeprefix("validation_") for name in found}
    assert found["validation_exact_match"] > 0.8 and found["validation_bleu"] > 80
    lines = [json.loads(line) for line in (tuned / "log.jsonl").read_text().splitlines()]
    seen = {line["step"]: line["validation_bleu"] for line in lines if "validation_bleu" in line}
    assert set(seen) == {50, 100} and found["best_step"] == max(seen, key=seen.__getitem__)


def test_scores_are_those_of_the_packages_on_the_written_answers(tuned, pairs, tmp_path):
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    ctx = Context(tmp_path / "out", tmp_path / "work", "key", {})
    ctx.work.mkdir()
    generation = GenerationConfig(max_new=12)
    evaluation.run(evaluation.Config(data=pairs, speed=False, plot=False, generation=generation), tuned, ctx)
    result = json.loads((ctx.out / "results.json").read_text())[0]
    rows = [json.loads(line) for line in (ctx.out / "predictions.jsonl").read_text().splitlines()]
    said, true = ([row[k] for row in rows] for k in ("prediction", "reference"))
    assert all(row["reference"] == WORDS[row["prompt"][0]] and row["artifact"] == "out" for row in rows)
    metrics = result["metrics"]
    np.testing.assert_allclose(metrics["bleu"], sacrebleu.corpus_bleu(said, [true]).score, rtol=1e-9)
    np.testing.assert_allclose(metrics["chrf"], sacrebleu.corpus_chrf(said, [true]).score, rtol=1e-9)
    scorer = RougeScorer(["rougeL"])
    rouge = np.mean([scorer.score(t, s)["rougeL"].fmeasure for t, s in zip(true, said, strict=True)])
    np.testing.assert_allclose(metrics["rouge_l"], rouge, rtol=1e-9)
    np.testing.assert_allclose(metrics["exact_match"], np.mean([s == t for s, t in zip(said, true, strict=True)]))
    assert metrics["exact_match"] > 0.8 and metrics["perplexity"] < 1.5
    assert "BLEU nrefs:1|case:mixed|eff:no|tok:13a" in result["protocol"] and "greedy" in result["protocol"]
    assert artifact.read_manifest(ctx.out).checksums.record.files.keys() >= {"predictions.jsonl"}


def test_later_stages_keep_the_settings_of_generated_answers(tuned, tmp_path):
    found = artifact.load(tuned)
    saved = {"stage": "prune", "key": "k", "config": {}}
    heir = artifact.save(tmp_path / "pruned", found.params, found.model, parent=found.manifest, **saved)
    settings = [measurements.setup(evaluation.Config(), None, tuned, m).generation for m in (found.manifest, heir)]  # pyright: ignore[reportArgumentType]
    assert settings == [GenerationConfig(max_new=12, examples=20)] * 2
    # An older llmctl recorded them in the config of the stage only.
    old = found.manifest.model_copy(update={"generation": {}})
    assert GenerationConfig(**artifact.generation_settings(old)) == settings[0]
    other = found.model.model_copy(update={"head": "embed"})
    assert artifact.save(tmp_path / "embed", found.params, other, parent=found.manifest, **saved).generation == {}


def test_plan_has_the_programs_of_generated_answers(base, pairs):
    mesh = meshes.make(MeshConfig())
    about, train = artifact.abstract(base, mesh), TrainConfig(steps=2, batch_size=16, seq_len=28)
    config = finetune.Config(data=pairs, task="seq2seq", train=train, generation=GenerationConfig(max_new=12, beams=2))
    (step, prefill, decode), left = finetune.programs(config, about, {}, mesh)
    assert left and left.manifest.generation["max_new"] == 12
    assert [p.title for p in (prefill, decode)] == ["answers: prefill", "answers: decoding step"]
    assert (prefill.rows, prefill.seq_len, decode.steps) == (32, 28, 11)  # two beams per prompt
    assert bytes_of(prefill.beside) == bytes_of([step.parameters, step.optimizer]) > 0
    none = config.model_copy(update={"generation": GenerationConfig(examples=0)})
    assert len(finetune.programs(none, about, {}, mesh)[0]) == 1
    measured = evaluation.Config(data=pairs, batch_size=4)
    found = evaluation.programs(measured, None, {"tuned": left}, mesh)[0]
    assert [(p.title, p.rows) for p in found[1:]] == [("answers: prefill", 8), ("answers: decoding step", 8)]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--task", "lm", "--generation.beams", "2"], "generation: not for task 'lm'"),
        (["--task", "seq2seq", "--generation.max-new", "40"], "40 new tokens leave no room within the model's longest"),
        (
            ["--task", "seq2seq", "--train.best-by", "bleu", "--generation.examples", "0"],
            "bleu needs generated answers, and generation.examples is 0",
        ),
        (["--task", "seq2seq", "--train.best-by", "bleus"], "train.best_by: unknown metric 'bleus'"),
    ],
)
def test_wrong_requests_are_refused_in_one_line(flags, said, base, pairs, tmp_path, capsys):
    argv = ["finetune", "--from", str(base), "--out", str(tmp_path / "out"), "--data.source", "jsonl",
            "--data.path", pairs.path, "--train.seq-len", "28"]  # fmt: skip
    assert app.run([*argv, *flags]) == 2
    out, err = capsys.readouterr()
    assert [said in line for line in err.splitlines() if line.startswith("llmctl: ")] == [True] and not out, err
    assert not list(tmp_path.iterdir())


def test_packages_that_are_missing_are_named(monkeypatch, capsys, base, pairs, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    argv = ["finetune", "--from", str(base), "--out", str(tmp_path / "out"), "--task", "seq2seq", "--data.source",
            "jsonl", "--data.path", pairs.path, "--train.seq-len", "28"]  # fmt: skip
    assert app.run([*argv, "--generation.max-new", "9"]) == 2
    assert "pip install 'llmctl[seq2seq]'" in capsys.readouterr().err
