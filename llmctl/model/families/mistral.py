"""Define Mistral: Llama with sliding-window attention (Jiang et al., 2023, arXiv:2310.06825)."""

from __future__ import annotations

from typing import Any

from llmctl.model import hf_config
from llmctl.model.families import llama
from llmctl.model.hf_config import Fields, Keys
from llmctl.model.hf_names import Bridge

FLAGS = {**llama.FLAGS, "tied": False}

SIZES: dict[str, Fields] = {
    "mistral-7b": {
        "d_model": 4096, "layers": 32, "heads": 32, "kv_heads": 8, "head_dim": 128, "d_ff": 14_336,
        "vocab_size": 32_000, "max_seq_len": 32_768, "window": 4096,
    },
    "mistral-7b-v0.3": {
        "d_model": 4096, "layers": 32, "heads": 32, "kv_heads": 8, "head_dim": 128, "d_ff": 14_336,
        "vocab_size": 32_768, "max_seq_len": 32_768, "rope_theta": 1_000_000.0,
    },
}  # fmt: skip


def from_config(keys: Keys) -> Fields:
    """Convert a Mistral config.json to fields of ModelConfig."""
    sizes = llama.sizes_from_keys(keys)
    keys.set_default("sliding_window", 4096)
    return {
        **sizes,
        **hf_config.rope_from_keys(keys),
        **hf_config.windows_from_keys(keys, sizes["layers"], keys.take("sliding_window", 0)),
        "activation": keys.activation("hidden_act", "silu"),
        "tied": keys.take("tie_word_embeddings", False),
    }


def to_config(cfg: Any) -> Fields:
    """Convert a ModelConfig to a Mistral config.json; inverse of `from_config`."""
    llama.check_like_llama(cfg, "Mistral", window=None, window_every=1, window_layers=())
    return {
        **llama.sizes_to_keys(cfg),
        **hf_config.rope_to_keys(cfg),
        "hidden_act": "silu",
        "sliding_window": cfg.window or None,
        "tie_word_embeddings": cfg.tied,
    }


def names_of(cfg: Any) -> Fields:
    """Return the map {parameter name: Hugging Face tensor name}, which is the same for every config."""
    return llama.body(llama.NORMS)


HEADS = llama.heads("Mistral", qa_prefix="model.")
BRIDGE = Bridge("mistral", "model.", names_of, HEADS, from_config, to_config, llama.BUFFERS)
