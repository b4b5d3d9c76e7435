"""Define GPT-2: a pre-norm decoder with LayerNorm, learned positions, GELU and biases (Radford et al., 2019)."""

from __future__ import annotations

from typing import Any

from llmctl.model import hf_config, hf_names
from llmctl.model.hf_config import Fields, Keys
from llmctl.model.hf_names import Bridge, Head

FLAGS: Fields = {
    "architecture": "decoder", "norm": "layer", "activation": "gelu_tanh", "gated": False, "positions": "learned",
    "qkv_bias": True, "out_bias": True, "mlp_bias": True, "max_seq_len": 1024, "head_bias": False,
}  # fmt: skip

SIZES: dict[str, Fields] = {
    "gpt2-tiny": {"d_model": 128, "layers": 4, "heads": 4, "kv_heads": 4, "head_dim": 32, "d_ff": 512},
    "gpt2": {
        "d_model": 768, "layers": 12, "heads": 12, "kv_heads": 12, "head_dim": 64, "d_ff": 3072, "vocab_size": 50_257,
    },
    "gpt2-medium": {
        "d_model": 1024, "layers": 24, "heads": 16, "kv_heads": 16, "head_dim": 64, "d_ff": 4096, "vocab_size": 50_257,
    },
    "gpt2-large": {
        "d_model": 1280, "layers": 36, "heads": 20, "kv_heads": 20, "head_dim": 64, "d_ff": 5120, "vocab_size": 50_257,
    },
    "gpt2-xl": {
        "d_model": 1600, "layers": 48, "heads": 25, "kv_heads": 25, "head_dim": 64, "d_ff": 6400, "vocab_size": 50_257,
    },
}  # fmt: skip

MATRICES = {
    "attn/q": "attn.c_attn#0", "attn/k": "attn.c_attn#1", "attn/v": "attn.c_attn#2", "attn/o": "attn.c_proj",
    "mlp/up": "mlp.c_fc", "mlp/down": "mlp.c_proj",
}  # fmt: skip


def from_config(keys: Keys) -> Fields:
    """Convert a GPT-2 config.json to fields of ModelConfig."""
    keys.check("scale_attn_weights", True)
    keys.check("scale_attn_by_inverse_layer_idx", False)
    keys.check("add_cross_attention", False)
    d_model, heads = keys.take("n_embd"), keys.take("n_head")
    length = keys.take("n_positions", keys.take("n_ctx", 1024))
    keys.drop("n_ctx")
    return {
        "vocab_size": keys.take("vocab_size"),
        "d_model": d_model,
        "layers": keys.take("n_layer"),
        "heads": heads,
        "kv_heads": heads,
        "head_dim": d_model // heads,
        "d_ff": keys.take("n_inner", 4 * d_model),
        "max_seq_len": length,
        "norm_eps": keys.take("layer_norm_epsilon", 1e-5),
        "activation": keys.activation("activation_function", "gelu_new"),
        "dropout": keys.take("resid_pdrop", 0.1),
        "tied": keys.take("tie_word_embeddings", True),
    }


def to_config(cfg: Any) -> Fields:
    """Convert a ModelConfig to a GPT-2 config.json; inverse of `from_config`."""
    activation = {"gelu_tanh": "gelu_new"}.get(cfg.activation, cfg.activation)
    needed = {k: v for k, v in FLAGS.items() if k not in ("max_seq_len", "activation", "head_bias")}
    hf_config.refuse(
        cfg, "GPT-2", **needed, norm_position="pre", kv_heads=cfg.heads, head_dim=cfg.d_model / cfg.heads,
        position_offset=0, qk_norm=False, attn_scale=0.0, attn_softcap=0.0, final_softcap=0.0, window=0,
        embed_scale=1.0, logit_scale=1.0, embed_norm=False, token_types=0, head_transform=False,
    )  # fmt: skip
    return {
        "vocab_size": cfg.vocab_size,
        "n_embd": cfg.d_model,
        "n_layer": cfg.layers,
        "n_head": cfg.heads,
        "n_inner": cfg.d_ff,
        "n_positions": cfg.max_seq_len,
        "layer_norm_epsilon": cfg.norm_eps,
        "activation_function": activation,
        "resid_pdrop": cfg.dropout,
        "embd_pdrop": cfg.dropout,
        "attn_pdrop": 0.0,
        "tie_word_embeddings": cfg.tied,
    }


def names_of(cfg: Any) -> Fields:
    """Return the map {parameter name: Hugging Face tensor name}, which is the same for every config."""
    layer = hf_names.linear(MATRICES) | hf_names.norm({"attn_norm": "ln_1", "mlp_norm": "ln_2"})
    return {
        "embed/tokens": "wte.weight",
        "embed/positions": "wpe.weight",
        **hf_names.blocks("decoder/blocks", "h.{}", layer),
        **hf_names.norm({"decoder/norm": "ln_f"}),
    }


SCORE = {"head/out/kernel": "score.weight", "head/out/bias": "score.bias"}

BRIDGE = Bridge(
    "gpt2",
    "transformer.",
    names_of,
    {
        "lm": Head("GPT2LMHeadModel", {"lm_head/kernel": "lm_head.weight"}),
        "classify": Head("GPT2ForSequenceClassification", SCORE, {"head_bias": False, "pooling": "last"}),
        "regress": Head("GPT2ForSequenceClassification", SCORE, {"head_bias": False, "pooling": "last"}),
        "tokens": Head("GPT2ForTokenClassification", hf_names.linear({"head/out": "classifier"}), {"head_bias": True}),
        "span": Head("GPT2ForQuestionAnswering", hf_names.linear({"head/out": "qa_outputs"}), {"head_bias": True}),
        "embed": Head("GPT2Model"),
    },
    from_config,
    to_config,
    buffers=(r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias",),
    in_out=r"\.c_(attn|proj|fc)\.weight$",
)
