"""Define Gemma 2: a decoder with norms around each sublayer, soft caps, and alternating local and global attention
(Gemma Team, 2024, arXiv:2408.00118).
"""

from __future__ import annotations

from typing import Any

from llmctl.config.errors import RequestError
from llmctl.model import hf_config
from llmctl.model.families import llama
from llmctl.model.hf_config import Fields, Keys
from llmctl.model.hf_names import Bridge

FLAGS = {
    **llama.FLAGS, "norm_position": "sandwich", "norm_plus_one": True, "norm_eps": 1e-6, "activation": "gelu_tanh",
    "embed_scale": 0.0, "attn_softcap": 50.0, "final_softcap": 30.0, "window": 4096, "window_every": 2,
    "attn_scale": 256**-0.5,
}  # fmt: skip

SIZES: dict[str, Fields] = {
    "gemma2-2b": {
        "d_model": 2304, "layers": 26, "heads": 8, "kv_heads": 4, "head_dim": 256, "d_ff": 9216,
        "vocab_size": 256_000, "max_seq_len": 8192,
    },
    "gemma2-9b": {
        "d_model": 3584, "layers": 42, "heads": 16, "kv_heads": 8, "head_dim": 256, "d_ff": 14_336,
        "vocab_size": 256_000, "max_seq_len": 8192,
    },
}  # fmt: skip

NORMS = {
    "attn_norm": "input_layernorm",
    "attn_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}


def shared_from_keys(keys: Keys, every: int) -> Fields:
    """Convert the keys of config.json that Gemma 2 and 3 have in common to fields of ModelConfig.

    Args:
        keys: The config.json to read.
        every: Period of the attention pattern in layers. The last layer of each period is global; the others are local.
    """
    keys.check("use_bidirectional_attention", False)
    keys.drop("hidden_act")  # early configs have this key, but the model ignores it
    sizes = llama.sizes_from_keys(keys)
    bias = keys.take("attention_bias", False)
    return {
        **sizes,
        **hf_config.windows_from_keys(keys, sizes["layers"], keys.take("sliding_window", 4096), every),
        "activation": keys.activation("hidden_activation", "gelu_pytorch_tanh"),
        "qkv_bias": bias,
        "out_bias": bias,
        "attn_scale": keys.take("query_pre_attn_scalar", 256) ** -0.5,
        "attn_softcap": keys.take("attn_logit_softcapping", 0.0),
        "final_softcap": keys.take("final_logit_softcapping", 0.0),
        "tied": keys.take("tie_word_embeddings", True),
    }


def shared_to_keys(cfg: Any) -> Fields:
    """Convert a ModelConfig to the keys of config.json that Gemma 2 and 3 have in common; inverse of
    `shared_from_keys`."""
    scalar = (cfg.attn_scale or cfg.head_dim**-0.5) ** -2
    if abs(scalar - round(scalar)) > 1e-6 * scalar:
        raise RequestError(f"Gemma models have no attn_scale = {cfg.attn_scale}: its square is not one over an integer")
    return {
        **llama.sizes_to_keys(cfg),
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": cfg.qkv_bias,
        "query_pre_attn_scalar": round(scalar),
        "attn_logit_softcapping": cfg.attn_softcap or None,
        "final_logit_softcapping": cfg.final_softcap or None,
        "sliding_window": cfg.window or cfg.max_seq_len,
        "layer_types": hf_config.windows_to_keys(cfg),
        "tie_word_embeddings": cfg.tied,
    }


def check_like_gemma(cfg: Any, name: str, **differs: Any) -> None:
    """Check that a model config can be exported as Gemma 2 or Gemma 3.

    Args:
        cfg: The ModelConfig to export.
        name: Name of the family in the error message.
        **differs: Fields in which this family differs from Gemma 2, with the required value; None allows any value.

    Raises:
        RequestError: If a field has another value than the required one.
    """
    free = dict.fromkeys(("attn_scale", "attn_softcap", "final_softcap", "window", "qkv_bias"))
    flags = {k: FLAGS[k] for k in ("norm_position", "norm_plus_one", "activation", "embed_scale")}
    llama.check_like_llama(cfg, name, **(flags | free | {"out_bias": cfg.qkv_bias} | differs))


def from_config(keys: Keys) -> Fields:
    """Convert a Gemma 2 config.json to fields of ModelConfig."""
    keys.set_default("attn_logit_softcapping", 50.0)
    keys.set_default("final_logit_softcapping", 30.0)
    return {**hf_config.rope_from_keys(keys), **shared_from_keys(keys, 2)}


def to_config(cfg: Any) -> Fields:
    """Convert a ModelConfig to a Gemma 2 config.json; inverse of `from_config`."""
    check_like_gemma(cfg, "Gemma 2")
    hf_config.check_width(cfg, "Gemma 2")
    return {**hf_config.rope_to_keys(cfg), **shared_to_keys(cfg)}


def names_of(cfg: Any) -> Fields:
    """Return the map {parameter name: Hugging Face tensor name}, which is the same for every config."""
    return llama.body(NORMS)


BRIDGE = Bridge("gemma2", "model.", names_of, llama.heads("Gemma2"), from_config, to_config, llama.BUFFERS)
