"""What a model of some config weighs, and what it takes to run, by arithmetic alone: no array, no JAX.

Letters: V vocabulary, D model width, L layers, H query heads, G key/value heads, K head width, F neurons.
"""

from __future__ import annotations

from typing import Any

from llmctl.model import ModelConfig, cost

BITS = {"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4}


def parameters(cfg: ModelConfig) -> dict[str, int]:
    """Parameters by part: embeddings, matrices (of the layers), other (norms, biases), head; and their total."""
    D, K = cfg.d_model, cfg.head_dim
    norm = 2 * D if cfg.norm == "layer" else D
    tables = cfg.vocab_size * D
    if cfg.positions == "learned":
        tables += (cfg.max_seq_len + cfg.position_offset) * D
    tables += cfg.token_types * D
    other = norm if cfg.embed_norm else 0
    matrices = 0
    for layers, cross in _stacks(cfg):
        attentions = 2 if cross else 1
        matrices += layers * cost.layer_weights(cfg, cross=cross)
        biases = (cfg.heads + 2 * cfg.kv_heads) * K if cfg.qkv_bias else 0
        biases += D if cfg.out_bias else 0
        biases += 2 * (2 * K if cfg.norm == "layer" else K) if cfg.qk_norm else 0
        biases *= attentions
        biases += ((2 if cfg.gated else 1) * cfg.d_ff + D) if cfg.mlp_bias else 0
        norms = (attentions + 1) * (2 if cfg.norm_position == "sandwich" else 1)
        other += layers * (biases + norms * norm)
        other += norm if cfg.norm_position != "post" else 0
        other += cfg.relative_buckets * cfg.heads if cfg.positions == "relative" else 0
    found = {"embeddings": tables, "matrices": matrices, "other": other, "head": _head(cfg, norm)}
    return {**found, "total": sum(found.values())}


def _stacks(cfg: ModelConfig) -> list[tuple[int, bool]]:
    """(layers, attends to a memory) of every stack."""
    main = (cfg.layers, cfg.encoder_layers > 0)
    return [(cfg.encoder_layers, False), main] if cfg.encoder_layers else [main]


def _head(cfg: ModelConfig, norm: int) -> int:
    D, total = cfg.d_model, 0
    if cfg.head == "lm":
        total += 0 if cfg.tied else D * cfg.vocab_size
        total += D * D + D + norm + cfg.vocab_size if cfg.head_transform else 0
    if cfg.head != "lm" or cfg.next_sentence:
        pooled = cfg.pooler and cfg.head not in ("tokens", "span")
        total += D * D + D if pooled else 0
        width = {"regress": 1, "span": 2, "lm": 2, "embed": 0}.get(cfg.head, cfg.labels)
        total += D * width + (width if cfg.head_bias else 0)
    return total


def kv_cache(cfg: ModelConfig, bits: int = 16) -> int:
    """Bytes of keys and values that a generated token adds, over all layers; 0 where nothing is generated."""
    return 0 if cfg.architecture == "encoder" else 2 * cfg.layers * cfg.kv_heads * cfg.head_dim * bits // 8


def report(cfg: ModelConfig, seq_len: int = 0) -> dict[str, Any]:
    """Everything above, and the operations of `llmctl.model.cost`, as one JSON object.

    Args:
      cfg: the model.
      seq_len: length of the sequences; 0 takes the model's longest, but 2,048 at most.
    """
    length = seq_len or min(cfg.max_seq_len, 2048)
    counts, cache = parameters(cfg), kv_cache(cfg)
    return {
        "family": cfg.family,
        "architecture": cfg.architecture,
        "parameters": counts["total"],
        "parameters_by_part": {k: v for k, v in counts.items() if k != "total"},
        "bytes": {name: counts["total"] * bits // 8 for name, bits in BITS.items()},
        "seq_len": length,
        "flops_per_token": cost.forward_flops(cfg, length),
        "training_flops_per_token": cost.training_flops(cfg, length),
        "kv_cache_bytes_per_token": cache,
        "kv_cache_bytes": cache * cfg.max_seq_len,
        "max_seq_len": cfg.max_seq_len,
    }
