"""Fixtures: a tiny Llama with a byte-level BPE tokenizer as arrays, artifact and Hugging Face folder, all read-only."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from llmctl.artifacts import artifact
from llmctl.cli import app
from llmctl.convert import exporting
from llmctl.data.tokenizers.tokenizer_json import JsonTokenizer
from llmctl.model import functional, weights
from llmctl.model.config import ModelConfig

TEXT = ["The cat sat on the mat and looked at the moon.", "Numbers like 12 and 345 are cut into digits, it's so!"]


@pytest.fixture(scope="session")
def words():
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=290, special_tokens=special, initial_alphabet=alphabet)
    )
    return JsonTokenizer(made.to_str().encode())


@pytest.fixture(scope="session")
def config(words):
    return ModelConfig(
        family="llama", vocab_size=words.vocab_size, d_model=64, layers=3, heads=4, kv_heads=2, head_dim=16, d_ff=96,
        max_seq_len=64, tied=False, head_bias=False,
    )  # fmt: skip


@pytest.fixture(scope="session")
def wild():
    """wild(config): parameters that all matter, norms and biases away from neutral too."""

    def made(config):
        rng = np.random.default_rng(0)
        flat = {
            k: jnp.asarray(rng.normal(0.0, 0.15, s.shape) + k.endswith("norm/scale"), jnp.float32)
            for k, s in weights.flatten(functional.abstract(config)).items()
        }
        return weights.unflatten(flat)

    return made


@pytest.fixture(scope="session")
def params(config, wild):
    return wild(config)


@pytest.fixture(scope="session")
def save(words, tmp_path_factory):
    """save(config, params) -> a new artifact's folder."""

    def saved(config, params, **more):
        folder = tmp_path_factory.mktemp("artifact") / "model"
        words.save(folder.parent / "words")
        common = {"stage": "pretrain", "key": "k", "config": {}, "tokenizer_dir": folder.parent / "words"}
        artifact.save(folder, params, config, **common, **more)
        return folder

    return saved


@pytest.fixture(scope="session")
def saved(config, params, save):
    return save(config, params)


@pytest.fixture(scope="session")
def exported(saved, tmp_path_factory):
    """The artifact as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("exported") / "hf"
    exporting.run(saved, folder)
    return folder


@pytest.fixture
def call(capsys):
    """Runs a command in this process: exit code, what `--json` printed, stderr."""

    def called(*argv):
        code = app.run([*map(str, argv), "--json"])
        out, err = capsys.readouterr()
        return code, json.loads(out) if out else None, err

    return called


@pytest.fixture(scope="session")
def batch(config):
    rng = np.random.default_rng(1)
    tokens = jnp.asarray(rng.integers(0, config.vocab_size, (2, 12)), jnp.int32)
    return {"tokens": tokens, "segments": jnp.ones_like(tokens), "positions": jnp.tile(jnp.arange(12), (2, 1))}


@pytest.fixture(scope="session")
def logits():
    @jax.jit(static_argnums=0)
    def compiled(config, params, batch):
        cfg = ModelConfig.model_validate_json(config)
        return functional.lm_logits(cfg, params, functional.hidden(cfg, params, batch))

    return lambda cfg, params, batch: np.asarray(compiled(cfg.model_dump_json(), params, batch))
