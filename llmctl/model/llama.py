"""Llama: pre-norm decoder with RMSNorm, rotary positions, grouped-query attention and SwiGLU (arXiv:2302.13971, 2307.09288)."""

FLAGS = {"architecture": "decoder", "norm": "rms", "activation": "silu", "gated": True, "positions": "rope"}

SIZES = {
    "tiny": {"d_model": 128, "layers": 4, "heads": 4, "kv_heads": 2, "head_dim": 32, "d_ff": 384},
    "mini": {"d_model": 384, "layers": 6, "heads": 6, "kv_heads": 6, "head_dim": 64, "d_ff": 1024, "vocab_size": 8192},
    "1b": {
        "d_model": 2048, "layers": 16, "heads": 32, "kv_heads": 8, "head_dim": 64, "d_ff": 8192,
        "vocab_size": 128_256, "max_seq_len": 131_072, "rope_theta": 500_000.0,
        "rope_scaling": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 8192},
    },
    "2-7b": {
        "d_model": 4096, "layers": 32, "heads": 32, "kv_heads": 32, "head_dim": 128, "d_ff": 11_008,
        "vocab_size": 32_000, "max_seq_len": 4096, "tied": False,
    },
    "3-8b": {
        "d_model": 4096, "layers": 32, "heads": 32, "kv_heads": 8, "head_dim": 128, "d_ff": 14_336,
        "vocab_size": 128_256, "max_seq_len": 8192, "rope_theta": 500_000.0, "tied": False,
    },
}  # fmt: skip
