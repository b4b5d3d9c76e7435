"""A tiny decoder that learned its texts by heart, and a random classifier."""

from functools import partial

import jax
import pytest
import tiny_memorizer

from llmctl.artifacts import artifact
from llmctl.data.tokenizers.byte_tokenizer import ByteTokenizer
from llmctl.model import functional
from llmctl.model.config import ModelConfig


@pytest.fixture(scope="session")
def memorizer(tmp_path_factory):
    """The folder of the decoder."""
    return tiny_memorizer.save(tmp_path_factory.mktemp("memorizer"))


@pytest.fixture(scope="session")
def judge(tmp_path_factory):
    """The folder of a random classifier with the classes fine and toxic."""
    folder, words = tmp_path_factory.mktemp("judge"), ByteTokenizer.new()
    words.save(folder / "words")
    about = {
        "head": "classify",
        "labels": 2,
        "next_sentence": False,
        "pooler": False,
        "head_transform": False,
        "pooling": "mean",
    }
    sizes = {"d_model": 16, "layers": 1, "heads": 2, "d_ff": 24, "max_seq_len": 64}
    model = ModelConfig(preset="bert-tiny", vocab_size=words.vocab_size, **sizes, **about)
    params = jax.jit(partial(functional.init, model))(jax.random.key(1))
    params["head"] = jax.tree.map(lambda a: a * 0.1, params["head"])  # probabilities that are not 0 and 1
    common = {"stage": "finetune", "key": "k", "config": {"train": {"seq_len": 48}, "truncate": "tail"}}
    artifact.save(
        folder / "model", params, model, task="classify", labels=["fine", "toxic"], tokenizer_dir=folder / "words",
        **common,
    )  # fmt: skip
    return folder / "model"
