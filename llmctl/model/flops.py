"""Compute a model's parameter count, FLOPs and cache size from its config, without arrays.

Only the FLOPs of matrix products are counted, two per multiply-add. Norms, activations, softmax and recomputation are
not counted (Chowdhery et al., 2022, arXiv:2204.02311, appendix B). In attention, only pairs of tokens that the mask
allows are counted.
"""

from __future__ import annotations

from llmctl.model.config import ModelConfig


def parameters(cfg: ModelConfig) -> dict[str, int]:
    """Return the number of parameters per part of the model, and in total.

    The keys are "embed", "encoder", "decoder", "head" and "total".

    Example:
        >>> parameters(ModelConfig(preset="llama-tiny", vocab_size=1000))["embed"]
        128000
    """
    D = cfg.d_model
    embed = (cfg.vocab_size + cfg.token_types + cfg.prompt_tokens) * D
    embed += (cfg.max_seq_len + cfg.prefix_tokens + cfg.position_offset) * D if cfg.positions == "learned" else 0
    embed += _norm(cfg, D) if cfg.embed_norm else 0
    encoder = (cfg.encoder_layers or cfg.layers) if cfg.architecture != "decoder" else 0
    decoder = cfg.layers if cfg.architecture != "encoder" else 0
    out = {
        "embed": embed,
        "encoder": _stack(cfg.of_stack("encoder"), encoder),
        "decoder": _stack(cfg, decoder, cross=cfg.encoder_layers > 0),
        "head": _head(cfg),
    }
    return out | {"total": sum(out.values())}


def row(cfg: ModelConfig, length: int, source: int = 0, predicted: int | None = None) -> float:
    """Return the FLOPs of a forward pass over one sequence; a backward pass takes twice as many.

    Args:
        cfg: Config of the model.
        length: Number of tokens in the sequence; for an encoder-decoder, number of decoder tokens.
        source: Number of encoder tokens of an encoder-decoder.
        predicted: Number of tokens to which a language model applies its output projection; None means all.
    """
    matrices = 0.0
    if cfg.head_kind.vocabulary:
        matrices = cfg.d_model * cfg.vocab_size + (cfg.d_model**2 if cfg.head_transform else 0)
    elif cfg.head_kind.per_token:
        matrices = cfg.d_model * cfg.head_width
    total = 2.0 * matrices * (length if predicted is None else predicted)
    causal = cfg.architecture != "encoder"
    local = sum(cfg.local_layers(cfg.layers))
    pairs = length * (
        local * _mean_keys(length, cfg.window, causal) + (cfg.layers - local) * _mean_keys(length, 0, causal)
    )
    pairs += length * cfg.layers * cfg.prefix_tokens
    total += 2.0 * length * cfg.layers * _matrices(cfg)
    if cfg.encoder_layers:
        pairs += cfg.layers * length * source + cfg.encoder_layers * source * _mean_keys(source, 0, causal=False)
        total += 2.0 * source * cfg.encoder_layers * _matrices(cfg)
        # Cross-attention: queries and outputs of decoder tokens, keys and values of encoder tokens.
        width = 2 * cfg.d_model * cfg.head_dim
        total += 2.0 * cfg.layers * width * (length * cfg.heads + source * cfg.kv_heads)
        total += 2.0 * cfg.layers * length * _adapters(cfg, "cross") * 2 * cfg.d_model * cfg.adapter_size
    return total + 4.0 * cfg.heads * cfg.head_dim * pairs


def flops(cfg: ModelConfig, length: int) -> float:
    """Return the FLOPs per token of a forward pass over sequences of `length` tokens.

    A backward pass takes twice as many. In an encoder-decoder, encoder and decoder each read `length` tokens. The FLOPs
    of both are divided by the number of decoder tokens.
    """
    return row(cfg, length, length) / length


def of_rows(cfg: ModelConfig, shapes: dict[str, tuple[int, ...]]) -> float:
    """Return the FLOPs per token of a forward pass over sequences whose arrays have the given shapes.

    In an encoder-decoder, the FLOPs are divided by the number of encoder tokens and decoder tokens together.

    Args:
        cfg: Config of the model.
        shapes: Shape of each array of one sequence, without a batch axis, such as {"tokens": (512,)}.
    """
    length = shapes["tokens"][-1]
    source = shapes.get("encoder_tokens", (0,))[-1]
    return row(cfg, length, source, shapes.get("places", (length,))[-1]) / (length + source)


def kv_cache(cfg: ModelConfig, itemsize: int = 2, kv_cache: str = "") -> int:
    """Return the size of the key-value cache per token, over all layers, in bytes.

    Args:
        cfg: Config of the model.
        itemsize: Number of bytes per element, or per scale if elements are quantized.
        kv_cache: Format of quantized keys and values (int8, fp8_e4m3, int4), with one scale per head; empty means not
            quantized.
    """
    bits = {"": 8 * itemsize, "int8": 8, "fp8_e4m3": 8, "int4": 4}[kv_cache]
    head = cfg.head_dim * bits // 8 + (itemsize if kv_cache else 0)
    return 2 * cfg.layers * cfg.kv_heads * head


def cache_row(cfg: ModelConfig, tokens: int, itemsize: int = 2, form: str = "") -> int:
    """Return the size of the key-value cache of one text, over all layers, in bytes.

    A quantized cache also has one center per layer and head, a float32 vector (`llmctl.model.compressed_cache`).

    Args:
        cfg: Config of the model.
        tokens: Number of tokens for which the cache has room.
        itemsize: Number of bytes per element, or per scale if elements are quantized.
        form: Format of quantized keys and values; empty means not quantized.
    """
    centers = 4 * cfg.layers * cfg.kv_heads * cfg.head_dim if form else 0
    return tokens * kv_cache(cfg, itemsize, form) + centers


def _norm(cfg: ModelConfig, width: int) -> int:
    return width * (2 if cfg.norm == "layer" else 1)


def cache_rotation(cfg: ModelConfig) -> float:
    """Return the FLOPs per decoded token of the rotations that a quantized cache of keys and values needs.

    In every layer, the queries, keys, values and outputs are rotated within their heads. In cross-attention, only the
    queries and outputs are rotated.
    """
    vectors = 2 * (cfg.heads + cfg.kv_heads) + (2 * cfg.heads if cfg.encoder_layers else 0)
    block = cfg.head_dim & -cfg.head_dim  # size of a Hadamard block
    return 2.0 * cfg.layers * vectors * cfg.head_dim * block


def _matrices(cfg: ModelConfig, *, cross: bool = False) -> int:
    """Return the number of elements in the matrices of one layer, including the matrices of bottleneck adapters."""
    attention = cfg.d_model * cfg.head_dim * 2 * (cfg.heads + cfg.kv_heads)
    adapters = _adapters(cfg, *_sublayers(cross)) * 2 * cfg.d_model * cfg.adapter_size
    return attention * (2 if cross else 1) + cfg.d_model * cfg.d_ff * (3 if cfg.gated else 2) + adapters


def _sublayers(cross: bool) -> tuple[str, ...]:
    """Return the names of the sublayers in a layer with or without cross-attention."""
    return ("attn", "cross", "mlp") if cross else ("attn", "mlp")


def _adapters(cfg: ModelConfig, *parts: str) -> int:
    """Return the number of sublayers in `parts` that have a bottleneck adapter."""
    return sum(cfg.has_adapter(part) for part in parts)


def _stack(cfg: ModelConfig, layers: int, *, cross: bool = False) -> int:
    if not layers:
        return 0
    D, K = cfg.d_model, cfg.head_dim
    attention = (cfg.heads + 2 * cfg.kv_heads) * K if cfg.qkv_bias else 0
    attention += (D if cfg.out_bias else 0) + (2 * _norm(cfg, K) if cfg.qk_norm else 0)
    prefix = 2 * cfg.prefix_tokens * cfg.kv_heads * K
    mlp = D + cfg.d_ff * (2 if cfg.gated else 1) if cfg.mlp_bias else 0
    sublayers = len(_sublayers(cross))
    mlp += _adapters(cfg, *_sublayers(cross)) * (D + cfg.adapter_size)
    norms = sublayers * _norm(cfg, D) * (2 if cfg.norm_position == "sandwich" else 1)
    layer = _matrices(cfg, cross=cross) + (sublayers - 1) * attention + prefix + mlp + norms
    beside = cfg.relative_buckets * cfg.heads if cfg.positions == "relative" else 0
    return layers * layer + beside + (0 if cfg.norm_position == "post" else _norm(cfg, D))


def _head(cfg: ModelConfig) -> int:
    D, total = cfg.d_model, 0
    if cfg.head_kind.vocabulary:
        total += 0 if cfg.tied else D * cfg.vocab_size
        total += D * D + D + _norm(cfg, D) + cfg.vocab_size if cfg.head_transform else 0
    if cfg.pools:
        total += D * D + D
    return total + D * cfg.head_width + (cfg.head_width if cfg.head_bias else 0)


def _mean_keys(length: int, window: int, causal: bool) -> float:
    """Return the mean number of keys to which a query attends.

    A query attends to keys that are fewer than `window` tokens away, or to all keys if `window` is 0. If attention is
    causal, later keys are excluded. Without queries, the mean is 0.
    """
    if not length:
        return 0.0
    reach = min(window or length, length)
    if causal:
        return (reach * (reach + 1) / 2 + (length - reach) * reach) / length
    return (length * (2 * reach - 1) - reach * (reach - 1)) / length
