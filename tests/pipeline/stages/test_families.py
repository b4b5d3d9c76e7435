"""Every family through every stage: LoRA, both ways of pruning, distillation, quantization, and measured at the end."""

import json

import jax
import pytest

from llmctl.artifacts import artifact
from llmctl.artifacts.workspace import Context
from llmctl.config.settings import OptimConfig, TrainConfig
from llmctl.data import splits
from llmctl.data.config import TokenizerConfig
from llmctl.data.tokenizers import loading
from llmctl.model import functional
from llmctl.model.config import ModelConfig, families, family
from llmctl.pipeline.stages import distill, finetune, prune, quantize
from llmctl.pipeline.stages import eval as evaluation

SIZES = {"d_model": 16, "layers": 2, "heads": 4, "kv_heads": 4, "head_dim": 8, "d_ff": 24, "max_seq_len": 64}
WINDOWS = {"window": 5, "window_every": 2}
MORE = {
    **{name: {"encoder_layers": 2} for name in ("t5", "original")},
    **dict.fromkeys(("gemma2", "gemma3", "modern"), WINDOWS),
    "mistral": {"window": 5},
    "qwen3": {"kv_heads": 2},
}
"""What a tiny model of a family needs to be of it."""
OFTEN = ("gemma3",)
"""Not only where slow tests run: other tests take llama, bert and t5 through them, and the original to its answers."""
TRAIN = TrainConfig(steps=2, batch_size=8, seq_len=24, eval_every=2, log_every=2, tensorboard=False)
OPTIM = OptimConfig(learning_rate=1e-3)


@pytest.mark.parametrize("name", [n if n in OFTEN else pytest.param(n, marks=pytest.mark.slow) for n in families()])
def test_every_stage(name, reviews, tmp_path):
    texts = splits.examples(reviews, "train").texts()
    words = loading.train(texts, TokenizerConfig(kind="bpe", vocab_size=330, sentinels=16))
    words.save(tmp_path / "words")
    model = ModelConfig(
        **{**family(name).FLAGS, **SIZES, **MORE.get(name, {}), "vocab_size": words.vocab_size}, family=name
    )
    params = jax.jit(lambda key: functional.init(model, key))(jax.random.key(0))
    about = {"stage": "pretrain", "key": "k", "config": {"train": {"seq_len": 24}}}
    artifact.save(tmp_path / "base", params, model, tokenizer_dir=tmp_path / "words", **about)
    assert model.family == name

    def go(stage, parent, **settings):
        ctx = Context(tmp_path / stage / "out", tmp_path / stage / "work", "key", settings.pop("siblings", {}))
        ctx.work.mkdir(parents=True)
        module = {"lora": finetune, "wanda": prune, "sparsegpt": prune, "structured": prune, "distill": distill}.get(
            stage, quantize
        )
        module.run(module.Config(**settings), parent, ctx)
        return ctx.out

    def measured(folder):
        ctx = Context(tmp_path / "eval" / folder.parent.name, tmp_path / "eval" / "work", "key", {})
        ctx.work.mkdir(parents=True, exist_ok=True)
        evaluation.run(evaluation.Config(data=reviews, seq_len=24, speed=False, plot=False), folder, ctx)
        return json.loads((ctx.out / "results.json").read_text())[0]

    settings = {"data": reviews, "train": TRAIN, "optim": OPTIM}
    tuned = go("lora", tmp_path / "base", method="lora", lora=finetune.LoraConfig(rank=2), **settings)
    result = measured(tuned)
    assert result["task"] == "classification" and result["metrics"]["examples"] > 10
    zeros = go("wanda", tmp_path / "base", method="wanda", data=reviews, examples=16)
    assert artifact.read_manifest(zeros).sparsity > 0.2
    solved = go(
        "sparsegpt", tmp_path / "base", method="sparsegpt", pattern="2:4", repair=True, data=reviews, examples=16
    )
    assert artifact.read_manifest(solved).metrics["block_sparsity"] == 0.5
    small = go("structured", tmp_path / "base", heads=0.5, ffn=0.25, data=reviews, examples=16)
    cut = artifact.read_manifest(small).model
    assert (cut.heads, cut.d_ff) == (2, 18)
    taught = go("distill", small, teacher="base", siblings={"base": tmp_path / "base"}, **settings)
    rounded = go("quantize", taught)
    assert artifact.read_manifest(rounded).bits < 32
    result = measured(rounded)
    expected = {"decoder": "perplexity", "encoder": "masked tokens", "encoder_decoder": "spans"}[model.architecture]
    assert result["task"] == expected and 1 < result["metrics"]["nll"] < 8
