"""Define the original Transformer: a post-norm encoder-decoder with sinusoidal positions (Vaswani et al., 2017,
arXiv:1706.03762).

Encoder input, decoder input and output projection share one embedding table.
"""

from __future__ import annotations

from llmctl.model.hf_config import Fields

FLAGS: Fields = {
    "architecture": "encoder_decoder", "norm": "layer", "norm_position": "post", "norm_eps": 1e-6,
    "activation": "relu", "gated": False, "positions": "sinusoidal", "qkv_bias": True, "out_bias": True,
    "mlp_bias": True, "tied": True, "embed_scale": 0.0, "max_seq_len": 512, "dropout": 0.1,
}  # fmt: skip

SIZES: dict[str, Fields] = {
    "transformer-tiny": {
        "d_model": 128, "layers": 2, "encoder_layers": 2, "heads": 4, "kv_heads": 4, "head_dim": 32, "d_ff": 512,
    },
    "transformer-base": {
        "d_model": 512, "layers": 6, "encoder_layers": 6, "heads": 8, "kv_heads": 8, "head_dim": 64, "d_ff": 2048,
        "vocab_size": 37_000,
    },
    "transformer-big": {
        "d_model": 1024, "layers": 6, "encoder_layers": 6, "heads": 16, "kv_heads": 16, "head_dim": 64, "d_ff": 4096,
        "vocab_size": 37_000, "dropout": 0.3,
    },
}  # fmt: skip
