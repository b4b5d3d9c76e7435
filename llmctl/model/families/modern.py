"""Define a modern encoder: pre-norm RMSNorm, rotary positions, gated GELU, and global attention in every third layer.

The other layers have local attention (a sliding window). The design follows ModernBERT (Warner et al., 2024,
arXiv:2412.13663). Checkpoints of ModernBERT itself cannot be imported, because their first layer has no norm.
"""

from __future__ import annotations

from llmctl.model.hf_config import Fields

FLAGS: Fields = {
    "architecture": "encoder", "norm": "rms", "norm_position": "pre", "activation": "gelu", "gated": True,
    "positions": "rope", "rope_theta": 160_000.0, "rope_local_theta": 10_000.0, "window": 65, "window_every": 3,
    "embed_norm": True, "head_transform": True, "pooling": "mean", "max_seq_len": 8192,
}  # fmt: skip

SIZES: dict[str, Fields] = {
    "modern-tiny": {"d_model": 128, "layers": 3, "heads": 4, "kv_heads": 4, "head_dim": 32, "d_ff": 192},
    "modern-base": {
        "d_model": 768, "layers": 22, "heads": 12, "kv_heads": 12, "head_dim": 64, "d_ff": 1152, "vocab_size": 50_368,
    },
    "modern-large": {
        "d_model": 1024, "layers": 28, "heads": 16, "kv_heads": 16, "head_dim": 64, "d_ff": 2624, "vocab_size": 50_368,
    },
}  # fmt: skip
