"""Define Llama: a pre-norm decoder with RMSNorm, rotary positions, grouped-query attention and SwiGLU (Touvron et al.,
2023, arXiv:2302.13971 and arXiv:2307.09288).

SmolLM2 uses the Llama architecture. Mistral, Qwen and Gemma are derived from Llama: their modules define the
differences.
"""

from __future__ import annotations

from typing import Any

from llmctl.model import hf_config, hf_names
from llmctl.model.hf_config import Fields, Keys
from llmctl.model.hf_names import Bridge, Head

FLAGS: Fields = {
    "architecture": "decoder", "norm": "rms", "activation": "silu", "gated": True, "positions": "rope",
    "head_bias": False,
}  # fmt: skip

LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip

SIZES: dict[str, Fields] = {
    "llama-tiny": {"d_model": 128, "layers": 4, "heads": 4, "kv_heads": 2, "head_dim": 32, "d_ff": 384},
    "llama-mini": {
        "d_model": 384, "layers": 6, "heads": 6, "kv_heads": 6, "head_dim": 64, "d_ff": 1024, "vocab_size": 8192,
    },
    "smollm2-135m": {
        "d_model": 576, "layers": 30, "heads": 9, "kv_heads": 3, "head_dim": 64, "d_ff": 1536,
        "vocab_size": 49_152, "max_seq_len": 8192, "rope_theta": 100_000.0,
    },
    "smollm2-360m": {
        "d_model": 960, "layers": 32, "heads": 15, "kv_heads": 5, "head_dim": 64, "d_ff": 2560,
        "vocab_size": 49_152, "max_seq_len": 8192, "rope_theta": 100_000.0,
    },
    "llama2-7b": {
        "d_model": 4096, "layers": 32, "heads": 32, "kv_heads": 32, "head_dim": 128, "d_ff": 11_008,
        "vocab_size": 32_000, "max_seq_len": 4096, "tied": False,
    },
    "llama2-70b": {
        "d_model": 8192, "layers": 80, "heads": 64, "kv_heads": 8, "head_dim": 128, "d_ff": 28_672,
        "vocab_size": 32_000, "max_seq_len": 4096, "tied": False,
    },
    "llama3-8b": {
        "d_model": 4096, "layers": 32, "heads": 32, "kv_heads": 8, "head_dim": 128, "d_ff": 14_336,
        "vocab_size": 128_256, "max_seq_len": 8192, "rope_theta": 500_000.0, "tied": False,
    },
    "llama3-70b": {
        "d_model": 8192, "layers": 80, "heads": 64, "kv_heads": 8, "head_dim": 128, "d_ff": 28_672,
        "vocab_size": 128_256, "max_seq_len": 8192, "rope_theta": 500_000.0, "tied": False,
    },
    "llama3.1-8b": {
        "d_model": 4096, "layers": 32, "heads": 32, "kv_heads": 8, "head_dim": 128, "d_ff": 14_336,
        "vocab_size": 128_256, "max_seq_len": 131_072, "rope_theta": 500_000.0, "tied": False,
        "rope_scaling": LLAMA3_ROPE,
    },
    "llama3.2-1b": {
        "d_model": 2048, "layers": 16, "heads": 32, "kv_heads": 8, "head_dim": 64, "d_ff": 8192,
        "vocab_size": 128_256, "max_seq_len": 131_072, "rope_theta": 500_000.0,
        "rope_scaling": LLAMA3_ROPE | {"factor": 32.0},
    },
    "llama3.2-3b": {
        "d_model": 3072, "layers": 28, "heads": 24, "kv_heads": 8, "head_dim": 128, "d_ff": 8192,
        "vocab_size": 128_256, "max_seq_len": 131_072, "rope_theta": 500_000.0,
        "rope_scaling": LLAMA3_ROPE | {"factor": 32.0},
    },
}  # fmt: skip

MATRICES = {
    "attn/q": "self_attn.q_proj", "attn/k": "self_attn.k_proj", "attn/v": "self_attn.v_proj",
    "attn/o": "self_attn.o_proj", "mlp/gate": "mlp.gate_proj", "mlp/up": "mlp.up_proj", "mlp/down": "mlp.down_proj",
}  # fmt: skip

NORMS = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}


def body(norms: dict[str, str]) -> dict[str, str]:
    """Return the map {parameter name: Hugging Face tensor name} for Llama and families derived from it.

    Args:
        norms: Map of the norms in one layer, {parameter name: Hugging Face name}.
    """
    layer = hf_names.linear(MATRICES) | hf_names.norm(norms)
    return {
        "embed/tokens": "embed_tokens.weight",
        **hf_names.blocks("decoder/blocks", "layers.{}", layer),
        "decoder/norm/scale": "norm.weight",
    }


def heads(name: str, model: str = "", qa_prefix: str = "") -> dict[str, Head]:
    """Return the checkpoint classes and tensor names of the task heads of Llama, or of a family derived from it.

    Args:
        name: Prefix of the class names in `transformers`, such as "Llama".
        model: Class name of the base model; `name` + "Model" if empty.
        qa_prefix: Prefix of the network's tensor names in the question-answering class; empty if `transformers` has no
            such class.
    """
    outputs = hf_names.linear({"head/out": "qa_outputs"})
    spans = {"span": Head(f"{name}ForQuestionAnswering", outputs, {"head_bias": True}, qa_prefix)} if qa_prefix else {}
    score = {"head/out/kernel": "score.weight", "head/out/bias": "score.bias"}
    return {
        "lm": Head(f"{name}ForCausalLM", {"lm_head/kernel": "lm_head.weight"}),
        "classify": Head(f"{name}ForSequenceClassification", score, {"head_bias": False, "pooling": "last"}),
        "regress": Head(f"{name}ForSequenceClassification", score, {"head_bias": False, "pooling": "last"}),
        "tokens": Head(f"{name}ForTokenClassification", score, {"head_bias": True}),
        "embed": Head(model or f"{name}Model"),
        **spans,
    }


BUFFERS = (r"(model\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"(model\.)?rotary_emb\.inv_freq")


def sizes_from_keys(keys: Keys) -> Fields:
    """Convert a config.json of a family derived from Llama to the size fields of ModelConfig."""
    d_model, heads = keys.take("hidden_size"), keys.take("num_attention_heads")
    return {
        "vocab_size": keys.take("vocab_size"),
        "d_model": d_model,
        "layers": keys.take("num_hidden_layers"),
        "heads": heads,
        "kv_heads": keys.take("num_key_value_heads", heads),
        "head_dim": keys.take("head_dim", d_model // heads),
        "d_ff": keys.take("intermediate_size"),
        "max_seq_len": keys.take("max_position_embeddings", 2048),
        "norm_eps": keys.take("rms_norm_eps", 1e-6),
    }


def sizes_to_keys(cfg: Any) -> Fields:
    """Convert the size fields of a ModelConfig to keys of config.json; inverse of `sizes_from_keys`."""
    return {
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.d_model,
        "num_hidden_layers": cfg.layers,
        "num_attention_heads": cfg.heads,
        "num_key_value_heads": cfg.kv_heads,
        "head_dim": cfg.head_dim,
        "intermediate_size": cfg.d_ff,
        "max_position_embeddings": cfg.max_seq_len,
        "rms_norm_eps": cfg.norm_eps,
        "attention_dropout": 0.0,
    }


def check_like_llama(cfg: Any, name: str, **differs: Any) -> None:
    """Check that a model config can be exported as Llama or as a family derived from it.

    Args:
        cfg: The ModelConfig to export.
        name: Name of the family in the error message.
        **differs: Fields in which this family differs from Llama, with the required value; None allows any value.

    Raises:
        RequestError: If a field has another value than the required one.
    """
    plain: Fields = {k: v for k, v in FLAGS.items() if k != "head_bias"}
    plain |= dict.fromkeys(
        ("norm_plus_one", "qkv_bias", "out_bias", "mlp_bias", "qk_norm", "embed_norm", "head_transform"), False
    )
    plain |= dict.fromkeys(
        ("attn_scale", "attn_softcap", "final_softcap", "window", "rope_local_theta", "token_types"), 0
    )
    plain |= {"norm_position": "pre", "embed_scale": 1.0, "logit_scale": 1.0}
    hf_config.refuse(cfg, name, **{k: v for k, v in (plain | differs).items() if v is not None})


def from_config(keys: Keys) -> Fields:
    """Convert a Llama config.json to fields of ModelConfig."""
    keys.check("rope_interleaved", False)
    keys.drop("is_llama_config")
    bias = keys.take("attention_bias", False)
    return {
        **sizes_from_keys(keys),
        **hf_config.rope_from_keys(keys),
        "activation": keys.activation("hidden_act", "silu"),
        "qkv_bias": bias,
        "out_bias": bias,
        "mlp_bias": keys.take("mlp_bias", False),
        "tied": keys.take("tie_word_embeddings", False),
    }


def to_config(cfg: Any) -> Fields:
    """Convert a ModelConfig to a Llama config.json; inverse of `from_config`."""
    check_like_llama(cfg, "Llama", qkv_bias=None, out_bias=cfg.qkv_bias, mlp_bias=None)
    hf_config.check_width(cfg, "Llama")
    return {
        **sizes_to_keys(cfg),
        **hf_config.rope_to_keys(cfg),
        "hidden_act": "silu",
        "attention_bias": cfg.qkv_bias,
        "mlp_bias": cfg.mlp_bias,
        "tie_word_embeddings": cfg.tied,
    }


def names_of(cfg: Any) -> Fields:
    """Return the map {parameter name: Hugging Face tensor name}, which is the same for every config."""
    return body(NORMS)


BRIDGE = Bridge("llama", "model.", names_of, heads("Llama", qa_prefix="transformer."), from_config, to_config, BUFFERS)
