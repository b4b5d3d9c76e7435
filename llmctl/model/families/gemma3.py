"""Define Gemma 3 (text model): Gemma 2 with query and key norms in place of soft caps (Gemma Team, 2025,
arXiv:2503.19786).

Five local layers (sliding-window attention) precede each global layer. Local and global layers have separate rotary
bases.
"""

from __future__ import annotations

from typing import Any

from llmctl.model import hf_config
from llmctl.model.families import gemma2, llama
from llmctl.model.hf_config import Fields, Keys
from llmctl.model.hf_names import Bridge

FLAGS = {
    **gemma2.FLAGS, "attn_softcap": 0.0, "final_softcap": 0.0, "qk_norm": True, "window": 1024, "window_every": 6,
    "rope_theta": 1_000_000.0, "rope_local_theta": 10_000.0,
}  # fmt: skip

SIZES: dict[str, Fields] = {
    "gemma3-270m": {
        "d_model": 640, "layers": 18, "heads": 4, "kv_heads": 1, "head_dim": 256, "d_ff": 2048,
        "vocab_size": 262_144, "max_seq_len": 32_768, "window": 512,
    },
    "gemma3-1b": {
        "d_model": 1152, "layers": 26, "heads": 4, "kv_heads": 1, "head_dim": 256, "d_ff": 6912,
        "vocab_size": 262_144, "max_seq_len": 32_768, "window": 512,
    },
    "gemma3-4b": {
        "d_model": 2560, "layers": 34, "heads": 8, "kv_heads": 4, "head_dim": 256, "d_ff": 10_240,
        "vocab_size": 262_208, "max_seq_len": 131_072, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
}  # fmt: skip

NORMS = {**gemma2.NORMS, "attn/q_norm": "self_attn.q_norm", "attn/k_norm": "self_attn.k_norm"}


def from_config(keys: Keys) -> Fields:
    """Convert the config.json of a Gemma 3 text model to fields of ModelConfig."""
    every = keys.take("sliding_window_pattern", None) or keys.take("_sliding_window_pattern", 6)
    keys.drop("_sliding_window_pattern")
    keys.drop("attn_logit_softcapping")  # transformers accepts this key but never applies it in Gemma 3
    return {**hf_config.rope_from_keys(keys, 1_000_000.0, local=True), **gemma2.shared_from_keys(keys, every)}


def to_config(cfg: Any) -> Fields:
    """Convert a ModelConfig to a Gemma 3 config.json; inverse of `from_config`."""
    gemma2.check_like_gemma(cfg, "Gemma 3", qk_norm=True, rope_local_theta=None, attn_softcap=0.0)
    hf_config.check_width(cfg, "Gemma 3")
    return {**hf_config.rope_to_keys(cfg, local=True), **gemma2.shared_to_keys(cfg)}


def names_of(cfg: Any) -> Fields:
    """Return the map {parameter name: Hugging Face tensor name}, which is the same for every config."""
    return llama.body(NORMS)


# transformers has no class that labels tokens, and marks the classes of the text model that need a mark.
TEXT = {k: h for k, h in llama.heads("Gemma3Text", "Gemma3TextModel").items() if k != "tokens"}
HEADS = {**TEXT, "lm": llama.heads("Gemma3")["lm"]}
RENAMED = {"Gemma3ForSequenceClassification": "Gemma3TextForSequenceClassification"}
BRIDGE = Bridge(
    "gemma3_text", "model.", names_of, HEADS, from_config, to_config, llama.BUFFERS, renamed=RENAMED
)  # fmt: skip
