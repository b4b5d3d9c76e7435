"""Compute the sizes of a model from its config. `llmctl show --config` prints the sizes as one JSON object."""

from __future__ import annotations

from typing import Any, get_args

from llmctl.config.settings import KVCache
from llmctl.model import flops
from llmctl.model.config import ModelConfig

BITS = {"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4}


def report(cfg: ModelConfig, seq_len: int = 0) -> dict[str, Any]:
    """Return the parameter counts, bytes, FLOPs per token and cache size of a model, as JSON data.

    Args:
        cfg: Config of the model.
        seq_len: Sequence length in tokens; 0 means the model's maximum, limited to 2,048.
    """
    length = seq_len or min(cfg.max_seq_len, 2048)
    counts, forward = flops.parameters(cfg), flops.flops(cfg, length)
    cache = flops.kv_cache(cfg) if cfg.architecture != "encoder" else 0
    return {
        "family": cfg.family,
        "architecture": cfg.architecture,
        "parameters": counts["total"],
        "parameters_by_part": {k: v for k, v in counts.items() if k != "total"},
        "bytes": {name: counts["total"] * bits // 8 for name, bits in BITS.items()},
        "seq_len": length,
        "flops_per_token": forward,
        "training_flops_per_token": 3 * forward,
        "kv_cache_bytes_per_token": cache,
        "kv_cache_bytes": cache * cfg.max_seq_len,
        "quantized_kv_cache_bytes_per_token": {
            name: flops.kv_cache(cfg, kv_cache=name) for name in get_args(KVCache) if name and cache
        },
        "max_seq_len": cfg.max_seq_len,
    }
