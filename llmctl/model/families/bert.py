"""Define BERT: a post-norm encoder with token types, for masked language modelling and next-sentence prediction (Devlin
et al., 2018, arXiv:1810.04805).
"""

from __future__ import annotations

from typing import Any

from llmctl.model import hf_config, hf_names
from llmctl.model.hf_config import Fields, Keys
from llmctl.model.hf_names import Bridge, Head

FLAGS: Fields = {
    "architecture": "encoder", "norm": "layer", "norm_position": "post", "norm_eps": 1e-12, "activation": "gelu",
    "gated": False, "positions": "learned", "qkv_bias": True, "out_bias": True, "mlp_bias": True,
    "max_seq_len": 512, "embed_norm": True, "token_types": 2, "head_transform": True, "pooler": True,
    "next_sentence": True, "pooling": "first", "vocab_size": 30_522,
}  # fmt: skip

SIZES: dict[str, Fields] = {
    "bert-tiny": {"d_model": 128, "layers": 2, "heads": 2, "kv_heads": 2, "head_dim": 64, "d_ff": 512},
    "bert-mini": {"d_model": 256, "layers": 4, "heads": 4, "kv_heads": 4, "head_dim": 64, "d_ff": 1024},
    "bert-small": {"d_model": 512, "layers": 4, "heads": 8, "kv_heads": 8, "head_dim": 64, "d_ff": 2048},
    "bert-medium": {"d_model": 512, "layers": 8, "heads": 8, "kv_heads": 8, "head_dim": 64, "d_ff": 2048},
    "bert-base": {"d_model": 768, "layers": 12, "heads": 12, "kv_heads": 12, "head_dim": 64, "d_ff": 3072},
    "bert-large": {"d_model": 1024, "layers": 24, "heads": 16, "kv_heads": 16, "head_dim": 64, "d_ff": 4096},
}

MATRICES = {
    "attn/q": "attention.self.query", "attn/k": "attention.self.key", "attn/v": "attention.self.value",
    "attn/o": "attention.output.dense", "mlp/up": "intermediate.dense", "mlp/down": "output.dense",
}  # fmt: skip

NORMS = {"attn_norm": "attention.output.LayerNorm", "mlp_norm": "output.LayerNorm"}


def from_config(keys: Keys) -> Fields:
    """Convert a BERT config.json to fields of ModelConfig."""
    keys.check("position_embedding_type", "absolute")
    keys.check("is_decoder", False)
    keys.check("add_cross_attention", False)
    d_model, heads = keys.take("hidden_size"), keys.take("num_attention_heads")
    return {
        "vocab_size": keys.take("vocab_size"),
        "d_model": d_model,
        "layers": keys.take("num_hidden_layers"),
        "heads": heads,
        "kv_heads": heads,
        "head_dim": d_model // heads,
        "d_ff": keys.take("intermediate_size"),
        "max_seq_len": keys.take("max_position_embeddings"),
        "token_types": keys.take("type_vocab_size", 2),
        "norm_eps": keys.take("layer_norm_eps", 1e-12),
        "activation": keys.activation("hidden_act", "gelu"),
        "dropout": keys.take("hidden_dropout_prob", 0.1),
        "tied": keys.take("tie_word_embeddings", True),
    }


def to_config(cfg: Any) -> Fields:
    """Convert a ModelConfig to a BERT config.json; inverse of `from_config`."""
    if cfg.head == "lm" and cfg.head_activation not in ("", cfg.activation):
        hf_config.refuse(cfg, "BERT", head_activation="")
    return shared_to_keys(cfg)


def shared_to_keys(cfg: Any) -> Fields:
    """Convert a ModelConfig to the keys of config.json that BERT and RoBERTa have in common."""
    free = ("max_seq_len", "norm_eps", "activation", "token_types", "vocab_size", "head_transform", "pooler")
    needed = {k: v for k, v in FLAGS.items() if k not in (*free, "next_sentence", "pooling")}
    hf_config.refuse(
        cfg, "BERT", **needed, kv_heads=cfg.heads, head_dim=cfg.d_model / cfg.heads, qk_norm=False, attn_scale=0.0,
        attn_softcap=0.0, final_softcap=0.0, window=0, embed_scale=1.0, logit_scale=1.0,
        head_transform=cfg.head_kind.vocabulary,
    )  # fmt: skip
    return {
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.d_model,
        "num_hidden_layers": cfg.layers,
        "num_attention_heads": cfg.heads,
        "intermediate_size": cfg.d_ff,
        "max_position_embeddings": cfg.max_seq_len + cfg.position_offset,
        "type_vocab_size": cfg.token_types,
        "layer_norm_eps": cfg.norm_eps,
        "hidden_act": {"gelu_tanh": "gelu_new"}.get(cfg.activation, cfg.activation),
        "hidden_dropout_prob": cfg.dropout,
        "attention_probs_dropout_prob": 0.0,
        "tie_word_embeddings": cfg.tied,
    }


def names_of(cfg: Any) -> Fields:
    """Return the map {parameter name: Hugging Face tensor name}, which is the same for every config."""
    return {
        "embed/tokens": "embeddings.word_embeddings.weight",
        "embed/positions": "embeddings.position_embeddings.weight",
        "embed/types": "embeddings.token_type_embeddings.weight",
        **hf_names.norm({"embed/norm": "embeddings.LayerNorm"}),
        **hf_names.blocks("encoder/blocks", "encoder.layer.{}", hf_names.linear(MATRICES) | hf_names.norm(NORMS)),
    }


MASKED = {
    **hf_names.linear({"lm_head/transform": "cls.predictions.transform.dense"}),
    **hf_names.norm({"lm_head/norm": "cls.predictions.transform.LayerNorm"}),
    "lm_head/bias": "cls.predictions.bias",
    "lm_head/kernel": "cls.predictions.decoder.weight",
}
POOLER = hf_names.linear({"head/pooler": "bert.pooler.dense"})
OUT = hf_names.linear({"head/out": "classifier"})
NO_LM: Fields = {"head_transform": False, "next_sentence": False}

BRIDGE = Bridge(
    "bert",
    "bert.",
    names_of,
    {
        "lm": Head("BertForMaskedLM", MASKED, {"pooler": False, "next_sentence": False}),
        "lm+next_sentence": Head(
            "BertForPreTraining", MASKED | POOLER | hf_names.linear({"head/out": "cls.seq_relationship"})
        ),
        "classify": Head("BertForSequenceClassification", POOLER | OUT, {"pooler": True, "pooling": "first", **NO_LM}),
        "regress": Head("BertForSequenceClassification", POOLER | OUT, {"pooler": True, "pooling": "first", **NO_LM}),
        "tokens": Head("BertForTokenClassification", OUT, {"pooler": False, **NO_LM}),
        "span": Head(
            "BertForQuestionAnswering", hf_names.linear({"head/out": "qa_outputs"}), {"pooler": False, **NO_LM}
        ),
        "embed": Head("BertModel", hf_names.linear({"head/pooler": "pooler.dense"}), {"pooler": True, **NO_LM}),
    },
    from_config,
    to_config,
    renamed={"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"},
    buffers=(r"(bert\.)?embeddings\.position_ids",),
    copies={"cls.predictions.decoder.bias": "cls.predictions.bias"},
)
