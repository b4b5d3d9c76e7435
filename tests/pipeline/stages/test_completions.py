"""Encoder-decoders from prompts to completions: finetuned, measured as decoders are, and generating, beams included."""

import csv
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmctl.artifacts import artifact
from llmctl.artifacts.workspace import Context
from llmctl.cli import app
from llmctl.config.errors import RequestError
from llmctl.config.settings import OptimConfig, TrainConfig
from llmctl.data import splits
from llmctl.data.config import DataConfig, TokenizerConfig
from llmctl.data.tokenizers import loading
from llmctl.evaluate.tasks.rows import RowSettings
from llmctl.model import functional
from llmctl.model.config import ModelConfig
from llmctl.pipeline.stages import eval as evaluation
from llmctl.pipeline.stages import finetune

SIZES = {"d_model": 16, "layers": 1, "encoder_layers": 1, "heads": 2, "kv_heads": 2, "head_dim": 8, "d_ff": 24}
FAMILIES = {"t5": "t5-tiny", "original": "transformer-tiny"}
ANSWERS = {"b": "yes, it is", "d": "no"}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    file = tmp_path_factory.mktemp("pairs") / "pairs.csv"
    rng = np.random.default_rng(0)
    with file.open("w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["prompt", "completion"])
        for i in range(240):
            letter = "bd"[i % 2]
            prompt = "".join([*rng.choice(list("aceg"), 3), letter, *rng.choice(list("aceg"), rng.integers(3))])
            writer.writerow([f"{prompt} {i}", ANSWERS[letter]])
    return DataConfig(source="csv", path=str(file), validation=0.15, test=0.2,
                      columns={"prompt": "prompt", "completion": "completion"})  # fmt: skip


@pytest.fixture(scope="module", params=["t5", pytest.param("original", marks=pytest.mark.slow)])
def tuned(request, pairs, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    words = loading.train((), TokenizerConfig(kind="bytes"))
    words.save(folder / "words")
    given = {**SIZES, "preset": FAMILIES[request.param], "vocab_size": words.vocab_size, "max_seq_len": 32}
    model = ModelConfig(**given, dropout=0.0)
    params = jax.jit(lambda key: functional.init(model, key))(jax.random.key(0))
    about = {"stage": "pretrain", "key": "k", "config": {"train": {"seq_len": 16}}}
    artifact.save(folder / "base", params, model, tokenizer_dir=folder / "words", **about)
    train = TrainConfig(steps=120, batch_size=16, seq_len=16, eval_every=60, log_every=60, tensorboard=False)
    optim = OptimConfig(learning_rate=1e-2, weight_decay=0.0)
    ctx = Context(folder / "tuned", folder / "work", "key", {})
    ctx.work.mkdir()
    finetune.run(finetune.Config(data=pairs, task="lm", train=train, optim=optim), folder / "base", ctx)
    return ctx.out


def measured(folder, where, data, **more):
    ctx = Context(where / "out", where / "work", "key", {})
    ctx.work.mkdir(parents=True)
    evaluation.run(evaluation.Config(data=data, speed=False, plot=False, **more), folder, ctx)
    return json.loads((ctx.out / "results.json").read_text())[0]


def test_perplexity_is_that_of_each_completion_alone(tuned, pairs, tmp_path):
    result = measured(tuned, tmp_path, pairs)
    found, made = result["metrics"], artifact.load(tuned)
    words = loading.load(made.tokenizer_dir)
    rows = list(splits.examples(pairs, "test"))
    nll, count, texts = 0.0, 0, [row["completion"] for row in rows]

    @jax.jit
    def log_p(params, batch):
        x_BTD = functional.hidden(made.model, params, batch)
        return jax.nn.log_softmax(functional.lm_logits(made.model, params, x_BTD))[0]

    for row in rows:
        source = [*words.prompt(row["prompt"])[:15], words.eos_id]
        target = words.encode_batch([row["completion"]])[0]
        told = [words.pad_id, *target[:-1]]
        batch = {
            "encoder_tokens": source, "encoder_segments": [1] * len(source), "encoder_positions": range(len(source)),
            "tokens": told, "segments": [1] * len(told), "positions": range(len(told)),
        }  # fmt: skip
        said_TV = log_p(made.params, {k: jnp.array(list(v))[None] for k, v in batch.items()})
        nll -= float(said_TV[np.arange(len(target)), np.array(target)].sum())
        count += len(target)
    assert (result["task"], found["text_tokens"]) == ("completions", count)
    assert found["text_bytes"] == sum(len(t.encode()) for t in texts)
    np.testing.assert_allclose(found["nll"], nll / count, rtol=1e-4)
    np.testing.assert_allclose(found["perplexity"], np.exp(nll / count), rtol=1e-4)
    np.testing.assert_allclose(found["bits_per_byte"], nll / np.log(2) / found["text_bytes"], rtol=1e-4)
    assert found["perplexity"] < 1.2 < np.exp(found["baseline_loss"]) and found["token_accuracy"] > 0.95
    assert f"test split, {len(rows)} completions each given its prompt (0 cut to 16 tokens" in result["protocol"]
    # A shorter encoder cuts prompts, never completions, and says so.
    short = measured(tuned, tmp_path / "short", pairs, seq_len=4)
    assert short["metrics"]["text_tokens"] == count and f"({len(rows)} cut to 4 tokens" in short["protocol"]


def test_completions_longer_than_the_model_are_refused(tuned, tmp_path):
    rows = [f"b {i}," + "y" * 40 for i in range(40)]
    (tmp_path / "long.csv").write_text("\n".join(["prompt,completion", *rows]))
    columns = {"prompt": "prompt", "completion": "completion"}
    data = DataConfig(source="csv", path=str(tmp_path / "long.csv"), columns=columns)
    with pytest.raises(RequestError, match="longest completion and its end have 41 tokens, its longest sequence 32"):
        measured(tuned, tmp_path, data)


@pytest.mark.parametrize("beams", [1, 3])
def test_what_was_learned_is_generated(tuned, beams, capsys):
    prompts = ["aeb", "gadc", "cceba"]
    flags = [flag for p in prompts for flag in ("--prompt", f"{p} 7")]
    assert app.run(["generate", str(tuned), *flags, "--max-new", "14", "--beams", str(beams), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["results"]
    assert [r["text"] for r in found] == [ANSWERS["d" if "d" in p else "b"] for p in prompts]
    assert all(r["ended"] == "end" and ("score" in r) == (beams > 1) for r in found)


def test_a_model_from_scratch_learns_pairs_of_texts_with_their_own_lengths(pairs, tmp_path):
    """No column `text` is needed; the tokenizer is trained on both columns, and each side has its length."""
    from llmctl.data.pretraining.lm_corpus import Text
    from llmctl.evaluate.tasks.registry import TASKS
    from llmctl.pipeline.stages import pretrain

    config = pretrain.Config(
        data=pairs.model_copy(update={"target_len": 6}),
        objective="completions",
        tokenizer=TokenizerConfig(kind="bytes"),
        model=ModelConfig(preset="t5-tiny", **SIZES, max_seq_len=32),
        train=TrainConfig(steps=2, batch_size=8, seq_len=24, tensorboard=False),
    )
    (tmp_path / "work").mkdir()
    pretrain.run(config, None, Context(tmp_path / "out", tmp_path / "work", "key"))
    made = artifact.load(tmp_path / "out")
    tokens = loading.load(made.tokenizer_dir)
    rows = TASKS["completions"].stage_rows(made.model, Text(config.data), "train", tokens, tmp_path, RowSettings(24))
    batch = rows.batch(np.arange(2))
    assert batch["encoder_tokens"].shape == (2, 24) and batch["tokens"].shape == (2, 6)
    assert "padding" not in made.manifest.metrics and made.manifest.metrics["steps"] == 2


@pytest.fixture(scope="module")
def better(tmp_path_factory):
    file = tmp_path_factory.mktemp("better") / "pairs.jsonl"
    rows = [{"prompt": f"{i}", "chosen": "abc", "rejected": "cba"} for i in range(60)]
    file.write_text("\n".join(map(json.dumps, rows)))
    return DataConfig(source="jsonl", path=str(file), validation=0.2, test=0.2)


@pytest.mark.parametrize("merge", [True, False])
def test_preferences_are_learned_with_adapters_alone(better, tmp_path, merge):
    words = loading.train((), TokenizerConfig(kind="bytes"))
    words.save(tmp_path / "words")
    sizes = {k: v for k, v in SIZES.items() if k != "encoder_layers"}
    model = ModelConfig(**sizes, vocab_size=words.vocab_size, max_seq_len=32)
    params = jax.jit(lambda key: functional.init(model, key))(jax.random.key(0))
    about = {"stage": "pretrain", "key": "k", "config": {"train": {"seq_len": 16}}}
    artifact.save(tmp_path / "base", params, model, tokenizer_dir=tmp_path / "words", **about)
    train = TrainConfig(steps=30, batch_size=8, seq_len=16, log_every=30, tensorboard=False)
    optim = OptimConfig(learning_rate=2e-2)
    ctx = Context(tmp_path / "tuned", tmp_path / "work", "key", {})
    ctx.work.mkdir()
    config = finetune.Config(data=better, task="preference", method="lora", merge=merge, train=train, optim=optim)
    beside = config.model_copy(update={"lora": finetune.LoraConfig(modules_to_save=["norm"])})
    with pytest.raises(RequestError, match=r"nothing else may be trained, here decoder/norm/scale"):
        finetune.run(beside, tmp_path / "base", ctx)
    assert not ctx.out.exists()
    finetune.run(config, tmp_path / "base", ctx)
    manifest = artifact.read_manifest(ctx.out)
    # Merged parameters are no longer apart from the reference, so validation is that of before.
    assert manifest.metrics["validation_accuracy"] == 1 and manifest.metrics["validation_loss"] < np.log(2)
    found = measured(ctx.out, tmp_path / "eval", better)["metrics"]
    assert found["accuracy"] == 1 and found["accuracy_per_token"] == 1 and found["margin"] > 1
