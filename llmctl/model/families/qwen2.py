"""Define Qwen2: Llama with biases on queries, keys and values (Yang et al., 2024, arXiv:2407.10671)."""

from __future__ import annotations

from typing import Any

from llmctl.model import hf_config
from llmctl.model.families import llama
from llmctl.model.hf_config import Fields, Keys
from llmctl.model.hf_names import Bridge

FLAGS = {**llama.FLAGS, "qkv_bias": True, "norm_eps": 1e-6, "rope_theta": 1_000_000.0}

SIZES: dict[str, Fields] = {
    "qwen2.5-0.5b": {
        "d_model": 896, "layers": 24, "heads": 14, "kv_heads": 2, "head_dim": 64, "d_ff": 4864,
        "vocab_size": 151_936, "max_seq_len": 32_768,
    },
    "qwen2.5-7b": {
        "d_model": 3584, "layers": 28, "heads": 28, "kv_heads": 4, "head_dim": 128, "d_ff": 18_944,
        "vocab_size": 152_064, "max_seq_len": 131_072, "tied": False,
    },
}  # fmt: skip


def shared_from_keys(keys: Keys) -> Fields:
    """Convert the keys of config.json that Qwen2 and Qwen3 have in common to fields of ModelConfig."""
    keys.check("use_mrope", False)
    sizes = llama.sizes_from_keys(keys)
    keys.set_default("sliding_window", 4096)
    keys.set_default("max_window_layers", 28)
    window, first = keys.take("sliding_window", 0), keys.take("max_window_layers", 0)
    window = window if keys.take("use_sliding_window", False) else 0
    if window and "layer_types" not in keys.given:
        keys.given["layer_types"] = [
            "full_attention" if i < first else "sliding_attention" for i in range(sizes["layers"])
        ]
    return {
        **sizes,
        **hf_config.rope_from_keys(keys),
        **hf_config.windows_from_keys(keys, sizes["layers"], window),
        "activation": keys.activation("hidden_act", "silu"),
        "tied": keys.take("tie_word_embeddings", False),
    }


def shared_to_keys(cfg: Any) -> Fields:
    """Convert a ModelConfig to the keys of config.json that Qwen2 and Qwen3 have in common; inverse of
    `shared_from_keys`."""
    first = next((i for i, local in enumerate(cfg.local_layers(cfg.layers)) if local), cfg.layers)
    return {
        **llama.sizes_to_keys(cfg),
        **hf_config.rope_to_keys(cfg),
        "hidden_act": "silu",
        "use_sliding_window": cfg.window > 0,
        "sliding_window": cfg.window or None,
        "max_window_layers": first,
        "layer_types": hf_config.windows_to_keys(cfg),
        "tie_word_embeddings": cfg.tied,
    }


def from_config(keys: Keys) -> Fields:
    """Convert a Qwen2 config.json to fields of ModelConfig."""
    return shared_from_keys(keys)


def to_config(cfg: Any) -> Fields:
    """Convert a ModelConfig to a Qwen2 config.json; inverse of `from_config`."""
    llama.check_like_llama(cfg, "Qwen2", qkv_bias=True, window=None)
    fields = shared_to_keys(cfg)
    if cfg.head_dim * cfg.heads == cfg.d_model:  # published configs omit the key, and transformers then computes it
        fields.pop("head_dim")
    return fields


def names_of(cfg: Any) -> Fields:
    """Return the map {parameter name: Hugging Face tensor name}, which is the same for every config."""
    return llama.body(llama.NORMS)


HEADS = llama.heads("Qwen2", qa_prefix="transformer.")
BRIDGE = Bridge("qwen2", "model.", names_of, HEADS, from_config, to_config, llama.BUFFERS)
