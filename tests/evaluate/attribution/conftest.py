"""Random models of all families in transformers and as artifacts, with a tokenizer of bytes."""

import functools
import warnings

import jax
import jax.numpy as jnp
import pytest
import torch
import transformers as hf

from llmctl.artifacts import artifact
from llmctl.convert import hf_folder
from llmctl.data.tokenizers.byte_tokenizer import ByteTokenizer

LABELS = ["no", "perhaps", "yes"]
WORDS = ByteTokenizer.new(0)
SIZES = {
    "vocab_size": WORDS.vocab_size, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 64, "pad_token_id": WORDS.pad_id,
    "attn_implementation": "eager",
}  # fmt: skip
T5 = {
    "vocab_size": WORDS.vocab_size, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 2,
    "num_heads": 2, "pad_token_id": WORDS.pad_id, "decoder_start_token_id": WORDS.pad_id,
    "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
}  # fmt: skip
MODELS = {
    "encoder": lambda: hf.BertForSequenceClassification(hf.BertConfig(**SIZES, num_labels=3)),
    "decoder": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, num_key_value_heads=1)),
    "encoder_decoder": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5, attn_implementation="eager")),
}


@pytest.fixture(scope="session")
def references():
    return reference


@functools.cache
def reference(name):
    """A model of transformers whose every parameter matters."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = MODELS[name]().eval()
    with torch.no_grad():
        for path, p in model.named_parameters():
            p.copy_((1.0 if "norm" in path.lower() and path.endswith("weight") else 0.0) + 0.3 * torch.randn(p.shape))
    return model


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """name -> artifact on all devices, made once."""
    folder = tmp_path_factory.mktemp("models")
    WORDS.save(folder / "words")

    @functools.cache
    def make(name):
        reference(name).save_pretrained(folder / f"hf-{name}")
        found = hf_folder.inspect(folder / f"hf-{name}")
        params = hf_folder.load(found, lambda _, w: jnp.asarray(w.read(())))
        return save(folder / name, params, found.model, folder / "words")

    return make


def save(out, params, model, words, labels=tuple(LABELS), task=""):
    names = list(labels) if model.head == "classify" else []
    common = {"stage": "finetune", "key": "k", "config": {}, "tokenizer_dir": words}
    artifact.save(out, params, model, task=task or model.head, labels=names, **common)
    return artifact.load(out)


def random_params(params, seed=1):
    keys = jax.random.split(jax.random.key(seed), len(jax.tree.leaves(params)))
    leaves, tree = jax.tree.flatten(params)
    return jax.tree.unflatten(
        tree, [a + 0.3 * jax.random.normal(k, a.shape) for k, a in zip(keys, leaves, strict=True)]
    )
