"""Define Qwen3: Llama with RMSNorm on each query and key head (Yang et al., 2025, arXiv:2505.09388)."""

from __future__ import annotations

from typing import Any

from llmctl.model.families import llama, qwen2
from llmctl.model.hf_config import Fields, Keys
from llmctl.model.hf_names import Bridge

FLAGS = {**llama.FLAGS, "qk_norm": True, "norm_eps": 1e-6, "rope_theta": 1_000_000.0}

SIZES: dict[str, Fields] = {
    "qwen3-0.6b": {
        "d_model": 1024, "layers": 28, "heads": 16, "kv_heads": 8, "head_dim": 128, "d_ff": 3072,
        "vocab_size": 151_936, "max_seq_len": 40_960,
    },
    "qwen3-8b": {
        "d_model": 4096, "layers": 36, "heads": 32, "kv_heads": 8, "head_dim": 128, "d_ff": 12_288,
        "vocab_size": 151_936, "max_seq_len": 40_960, "tied": False,
    },
}  # fmt: skip

NORMS = {**llama.NORMS, "attn/q_norm": "self_attn.q_norm", "attn/k_norm": "self_attn.k_norm"}


def from_config(keys: Keys) -> Fields:
    """Convert a Qwen3 config.json to fields of ModelConfig."""
    bias = keys.take("attention_bias", False)
    return {**qwen2.shared_from_keys(keys), "qkv_bias": bias, "out_bias": bias}


def to_config(cfg: Any) -> Fields:
    """Convert a ModelConfig to a Qwen3 config.json; inverse of `from_config`."""
    llama.check_like_llama(cfg, "Qwen3", qk_norm=True, qkv_bias=None, out_bias=cfg.qkv_bias, window=None)
    return {**qwen2.shared_to_keys(cfg), "attention_bias": cfg.qkv_bias}


def names_of(cfg: Any) -> Fields:
    """Return the map {parameter name: Hugging Face tensor name}, which is the same for every config."""
    return llama.body(NORMS)


HEADS = llama.heads("Qwen3", qa_prefix="transformer.")
BRIDGE = Bridge("qwen3", "model.", names_of, HEADS, from_config, to_config, llama.BUFFERS)
