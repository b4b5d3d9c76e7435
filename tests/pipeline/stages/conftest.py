"""A run folder with a tiny language model and a classifier made from it, on made-up reviews; tests only read it."""

import csv

import jax
import numpy as np
import pytest

from llmctl.artifacts import artifact
from llmctl.data import splits
from llmctl.data.config import DataConfig, TokenizerConfig
from llmctl.data.tokenizers import loading
from llmctl.model import functional
from llmctl.model.config import ModelConfig

WORDS = ("fine", "dull", "grand", "poor", "bright", "grey", "warm", "cold", "quick", "slow")
SIZES = {"d_model": 16, "layers": 3, "heads": 4, "kv_heads": 2, "head_dim": 8, "d_ff": 24, "max_seq_len": 64}


@pytest.fixture(scope="session")
def reviews(tmp_path_factory):
    file = tmp_path_factory.mktemp("reviews") / "reviews.csv"
    rng = np.random.default_rng(0)
    with file.open("w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["text", "label"])
        for i in range(200):
            writer.writerow([f"{i} " + " ".join(rng.choice(WORDS, 12)), "pos" if i % 3 else "neg"])
    return DataConfig(source="csv", path=str(file), validation=0.1, test=0.2)


@pytest.fixture(scope="session")
def artifacts(reviews, tmp_path_factory):
    """The folder; `lm`, `classifier` (made from it) and `encoder` (a BERT with the same words) lie in it."""
    run = tmp_path_factory.mktemp("artifacts")
    words = loading.train(splits.examples(reviews, "train").texts(), TokenizerConfig(vocab_size=300))
    words.save(run / "words")
    common = {"key": "k", "tokenizer_dir": run / "words", "config": {"train": {"seq_len": 32}, "truncate": "head_tail"}}
    lm = ModelConfig(vocab_size=words.vocab_size, **SIZES)
    params = jax.jit(lambda key: functional.init(lm, key))(jax.random.key(0))
    base = artifact.save(run / "lm", params, lm, stage="pretrain", **common)
    model = lm.model_copy(update={"head": "classify", "labels": 2})
    params |= {"head": jax.jit(lambda key: functional.init(model, key))(jax.random.key(1))["head"]}
    artifact.save(run / "classifier", params, model, stage="finetune", labels=["neg", "pos"], parent=base, **common)
    bert = ModelConfig.model_validate({"family": "bert", "vocab_size": words.vocab_size, **SIZES, "kv_heads": 4})
    params = jax.jit(lambda key: functional.init(bert, key))(jax.random.key(0))
    artifact.save(run / "encoder", params, bert, stage="pretrain", **common)
    return run
