"""Define T5: an encoder-decoder with relative position biases and RMSNorm, without other biases (Raffel et al., 2019,
arXiv:1910.10683).

Version 1.0 has ReLU and a tied output projection, whose input is scaled by d_model ** -0.5. Version 1.1 has gated GELU
and an untied output projection (Shazeer, 2020, arXiv:2002.05202).
"""

from __future__ import annotations

from typing import Any

from llmctl.model import hf_config, hf_names
from llmctl.model.hf_config import Fields, Keys
from llmctl.model.hf_names import Bridge, Head

FLAGS: Fields = {
    "architecture": "encoder_decoder", "norm": "rms", "norm_eps": 1e-6, "activation": "relu", "gated": False,
    "positions": "relative", "attn_scale": 1.0, "logit_scale": 0.0, "max_seq_len": 512, "vocab_size": 32_128,
}  # fmt: skip

V1_1: Fields = {"activation": "gelu_tanh", "gated": True, "logit_scale": 1.0, "tied": False}


def _size(d_model: int, layers: int, heads: int, head_dim: int, d_ff: int, **more: Any) -> Fields:
    sizes = {"d_model": d_model, "layers": layers, "encoder_layers": layers, "heads": heads, "kv_heads": heads}
    return {**sizes, "head_dim": head_dim, "d_ff": d_ff, **more}


SIZES: dict[str, Fields] = {
    "t5-tiny": _size(128, 2, 4, 32, 512),
    "t5-small": _size(512, 6, 8, 64, 2048),
    "t5-base": _size(768, 12, 12, 64, 3072),
    "t5-large": _size(1024, 24, 16, 64, 4096),
    "t5-v1.1-tiny": _size(128, 2, 4, 32, 320, **V1_1),
    "t5-v1.1-small": _size(512, 8, 6, 64, 1024, **V1_1),
    "t5-v1.1-base": _size(768, 12, 12, 64, 2048, **V1_1),
}


def from_config(keys: Keys) -> Fields:
    """Convert a T5 config.json to fields of ModelConfig."""
    alone = keys.all.get("architectures") in ([ENCODER], [TAGGER])
    keys.check("is_encoder_decoder", *((True, False) if alone else (True,)))  # encoder-only files have either value
    keys.check("is_decoder", False)
    kind = keys.take("feed_forward_proj", "relu")
    gate, _, activation = kind.rpartition("-")
    if gate not in ("", "gated"):
        keys.problems.append(f"feed_forward_proj = {kind!r} is not supported")
    keys.drop("dense_act_fn", "is_gated_act")  # redundant: feed_forward_proj implies both
    keys.given["activation"] = "gelu_new" if kind == "gated-gelu" else activation
    tied = keys.take("tie_word_embeddings", True)
    layers, heads = keys.take("num_layers"), keys.take("num_heads")
    below = keys.take("num_decoder_layers", layers)
    return {
        "vocab_size": keys.take("vocab_size"),
        "d_model": keys.take("d_model"),
        **({"layers": layers, "encoder_layers": 0} if alone else {"layers": below, "encoder_layers": layers}),
        "heads": heads,
        "kv_heads": heads,
        "head_dim": keys.take("d_kv"),
        "d_ff": keys.take("d_ff"),
        "max_seq_len": keys.take("n_positions", 512),
        "relative_buckets": keys.take("relative_attention_num_buckets", 32),
        "relative_max_distance": keys.take("relative_attention_max_distance", 128),
        "norm_eps": keys.take("layer_norm_epsilon", 1e-6),
        "activation": keys.activation("activation", "relu"),
        "gated": gate == "gated",
        # Only tied output projections are scaled. transformers 5 has a key for this scale. It ties the output
        # projection unless the file has two tables.
        "logit_scale": 0.0 if keys.take("scale_decoder_outputs", tied) else 1.0,
        "tied": tied,
        "dropout": keys.take("dropout_rate", 0.1),
    }


def to_config(cfg: Any) -> Fields:
    """Convert a ModelConfig to a T5 config.json; inverse of `from_config`."""
    alone = cfg.architecture == "encoder"
    hf_config.refuse(
        cfg, "T5", **{k: FLAGS[k] for k in ("norm", "positions", "attn_scale")}, norm_position="pre",
        norm_plus_one=False, kv_heads=cfg.heads, qkv_bias=False, out_bias=False, mlp_bias=False, qk_norm=False,
        attn_softcap=0.0, final_softcap=0.0, window=0, embed_scale=1.0, embed_norm=False, token_types=0,
        head_transform=False, logit_scale=cfg.logit_scale if cfg.logit_scale in (0.0, 1.0) else 0.0,
    )  # fmt: skip
    activation = {"gelu_tanh": "gelu_new"}.get(cfg.activation, cfg.activation)
    gated = "gated-gelu" if activation == "gelu_new" else f"gated-{activation}"
    return {
        "vocab_size": cfg.vocab_size,
        "d_model": cfg.d_model,
        "num_layers": cfg.layers if alone else cfg.encoder_layers,
        "num_decoder_layers": cfg.layers,
        "num_heads": cfg.heads,
        "d_kv": cfg.head_dim,
        "d_ff": cfg.d_ff,
        "n_positions": cfg.max_seq_len,
        "relative_attention_num_buckets": cfg.relative_buckets,
        "relative_attention_max_distance": cfg.relative_max_distance,
        "layer_norm_epsilon": cfg.norm_eps,
        "feed_forward_proj": gated if cfg.gated else activation,
        "dropout_rate": cfg.dropout,
        # Encoder-only models have no output projection to tie, so both keys keep their imported values.
        "tie_word_embeddings": cfg.tied if alone else cfg.logit_scale == 0.0,
        **({"scale_decoder_outputs": cfg.logit_scale == 0.0} if alone else {}),
        "is_encoder_decoder": not alone,
        "decoder_start_token_id": 0,
    }


def _attention(ours: str, theirs: str) -> dict[str, str]:
    return hf_names.linear({f"{ours}/{x}": f"{theirs}.{x}" for x in "qkvo"})


def names_of(cfg: Any) -> Fields:
    """Return the map {parameter name: Hugging Face tensor name}.

    The names of the feed-forward layer depend on whether this layer is gated.
    """
    wi = {"gate": "wi_0", "up": "wi_1", "down": "wo"} if cfg.gated else {"up": "wi", "down": "wo"}

    def stack(name: str, mlp: int) -> dict[str, str]:
        layer = {
            **_attention("attn", "layer.0.SelfAttention"),
            **hf_names.norm({"attn_norm": "layer.0.layer_norm"}),
            **hf_names.linear({f"mlp/{k}": f"layer.{mlp}.DenseReluDense.{v}" for k, v in wi.items()}),
            **hf_names.norm({"mlp_norm": f"layer.{mlp}.layer_norm"}),
        }
        if name == "decoder":
            layer |= _attention("cross", "layer.1.EncDecAttention") | hf_names.norm(
                {"cross_norm": "layer.1.layer_norm"}
            )
        return {
            **hf_names.blocks(f"{name}/blocks", f"{name}.block.{{}}", layer),
            **hf_names.norm({f"{name}/norm": f"{name}.final_layer_norm"}),
            f"{name}/relative_bias/table": f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        }

    return {"embed/tokens": "shared.weight", **stack("encoder", 1), **stack("decoder", 2)}


ENCODER, TAGGER = "T5EncoderModel", "T5ForTokenClassification"
"""Names of the classes in `transformers` for T5 encoders without a decoder."""
BOTH: Fields = {"architecture": "encoder_decoder"}
ALONE: Fields = {"architecture": "encoder", "pooler": False}

BRIDGE = Bridge(
    "t5",
    "",
    names_of,
    {
        "lm": Head("T5ForConditionalGeneration", {"lm_head/kernel": "lm_head.weight"}, BOTH),
        "tokens": Head(TAGGER, hf_names.linear({"head/out": "classifier"}), ALONE, prefix="transformer."),
        "embed": Head(ENCODER, {}, ALONE),
    },
    from_config,
    to_config,
    renamed={"T5WithLMHeadModel": "T5ForConditionalGeneration"},
    buffers=(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",),
    copies={
        f"{prefix}{stack}.embed_tokens.weight": f"{prefix}shared.weight"
        for prefix in ("", "transformer.")
        for stack in ("encoder", "decoder")
    },
)
"""Mapping between T5 and the Hugging Face format. Task heads read only the encoder output.

The T5ForSequenceClassification and T5ForQuestionAnswering classes of `transformers` also run the decoder over the text.
These classes are different networks, so llmctl does not convert checkpoints from or to these classes.
"""
