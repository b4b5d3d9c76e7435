"""Read GGUF files of llama.cpp: convert metadata to a config.json, and tensor names to transformers' names.

A GGUF file differs from a Hugging Face folder in four points:
- Tensors have other names.
- The "llama" architecture permutes the rows of queries and keys for interleaved rotary positions.
- The norm weights of Gemma already include the added 1.
- The rotary scaling of llama3 is a tensor of factors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from llmctl.config.errors import RequestError
from llmctl.convert import gguf_vocabulary
from llmctl.convert import hf_folder as folders
from llmctl.convert.architectures import GGUF
from llmctl.convert.lazy_tensors import Tensor
from llmctl.model.families.llama import LLAMA3_ROPE

FLOATS = ("F64", "F32", "F16", "BF16")
"""GGUF tensor types that are floating-point, and not quantized."""
CLASSES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gemma2": "Gemma2",
    "gemma3_text": "Gemma3",
}

PLAIN = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
GEMMA = PLAIN | {
    "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip


def stems(model_type: str) -> dict[str, str]:
    """Return the names of an architecture's tensors, {name in llama.cpp: name in transformers}.

    The names have neither the layer's prefix nor the suffixes `weight` and `bias`.
    """
    return GEMMA if model_type.startswith("gemma") else PLAIN


def library() -> Any:
    """Import and return the gguf package.

    Raises:
        RequestError: If the package is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise RequestError("GGUF files need the gguf package: pip install 'llmctl[hf]'") from None
    return gguf


def inspect(file: Path, drop: tuple[str, ...] = ()) -> folders.Found:
    """Describe the model in a GGUF file. Quantized tensors are dequantized when they are read.

    Args:
        file: The file.
        drop: Regular expressions for the names of tensors to omit, in llama.cpp or in transformers.

    Raises:
        RequestError: If the file is missing or damaged, or if an architecture or tensor is unknown.
    """
    metadata, stored = _open(file)
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in GGUF:
        raise RequestError(f"{file}: architecture {architecture!r} is not known; known: {', '.join(sorted(GGUF))}")
    model_type = GGUF[architecture]
    if architecture == "llama" and metadata.get("llama.attention.sliding_window"):
        model_type = "mistral"
    factors = stored.pop("rope_freqs.weight", None)
    try:
        config = _config(file, model_type, architecture, metadata, factors)
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as e:
        raise RequestError(f"{file}: its metadata cannot be understood ({e})") from None
    back = {}
    for name, tensor in stored.items():
        if any(re.fullmatch(p, name) for p in drop):
            continue
        ours = _rename(name, stems(model_type))
        if ours is None:
            raise RequestError(f"{file}: tensor {name} is not understood")
        back[ours] = _from_gguf(model_type, config, ours, tensor)
    config["tie_word_embeddings"] = "lm_head.weight" not in back
    if model_type == "llama":
        config |= _biases(back)
    return folders.understand(file, config, back, drop=drop)


def _biases(back: dict[str, Tensor]) -> dict[str, bool]:
    """Return the config keys for the biases of a Llama model, such as {"attention_bias": True}.

    llama.cpp uses the biases that are in the file. In transformers, either all or none of queries, keys, values and
    output have biases. The same holds for the matrices of the feed-forward layer. If a file has only some of these
    biases, the missing biases are added to `back` as zeros. `back` has the tensors by their names in transformers.
    """
    ends = {
        "attention_bias": ("q_proj", "k_proj", "v_proj", "o_proj"),
        "mlp_bias": ("gate_proj", "up_proj", "down_proj"),
    }
    found = {}
    for key, projections in ends.items():
        found[key] = any(n.endswith(tuple(f"{p}.bias" for p in projections)) for n in back)
        matrices = [n for n in back if n.endswith(tuple(f"{p}.weight" for p in projections))] if found[key] else []
        for name in matrices:
            shape = back[name].shape[:1]
            zeros = Tensor(shape, np.dtype(np.float32), partial(np.zeros, shape, np.float32))
            back.setdefault(name.removesuffix("weight") + "bias", zeros)
    return found


def _open(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    gguf = library()
    if not file.is_file():
        raise RequestError(f"{file}: no such file")
    try:
        reader = _bounded(gguf.GGUFReader)(file)
        large = ("tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.ggml.scores", "tokenizer.ggml.token_type")
        metadata = {k: len(f.data) if k in large else f.contents() for k, f in reader.fields.items()}
        stored = {t.name: _tensor(file, t) for t in reader.tensors}
    except RequestError:
        raise
    except Exception as e:  # the reader raises many exception types for a damaged file
        raise RequestError(f"{file}: not a readable GGUF file ({e}); fetch it again") from None
    return metadata, stored


def _bounded(reader: Any) -> Any:
    """Return a subclass of the GGUF reader that raises an error at the end of the file.

    If a damaged header states sizes that are too large, the original class reads beyond the end.
    """

    class Bounded(reader):
        def _get(self, offset: int, dtype: Any, count: int = 1, *rest: Any, **more: Any) -> np.ndarray:
            if offset + np.dtype(dtype).itemsize * int(count) > len(self.data):
                raise ValueError("it is shorter than its header says")
            return super()._get(offset, dtype, count, *rest, **more)

    return Bounded


def _tensor(file: Path, t: Any) -> Tensor:
    from gguf.quants import dequantize

    shape = tuple(int(n) for n in reversed(t.shape))

    def read() -> np.ndarray:
        try:
            return dequantize(t.data, t.tensor_type).astype(np.float32, copy=False).reshape(shape)
        except NotImplementedError:
            raise RequestError(f"{file}: {t.name} is of type {t.tensor_type.name}, which is not supported") from None

    return Tensor(shape, np.dtype(np.float32), read, rounded=t.tensor_type.name not in FLOATS)


def _rename(name: str, table: Mapping[str, str]) -> str | None:
    found = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if not found or found[2] not in table:
        return None
    prefix = f"model.layers.{found[1]}." if found[1] else ""
    return f"{prefix}{table[found[2]]}.{found[3]}"


def _config(file: Path, model_type: str, architecture: str, metadata: dict[str, Any], factors: Tensor | None) -> Any:
    """Convert GGUF metadata to a config.json of transformers."""

    def take(key: str, default: Any = None) -> Any:
        value = metadata.get(f"{architecture}.{key}", default)
        if value is None:
            raise RequestError(f"{file}: its metadata lacks {architecture}.{key}")
        return value

    heads, width = take("attention.head_count"), take("embedding_length")
    kv_heads = take("attention.head_count_kv", heads)
    if isinstance(heads, list) or isinstance(kv_heads, list):
        raise RequestError(f"{file}: layers with different numbers of heads are not supported")
    counts = {key: take(key) for key in ("attention.head_count", "embedding_length", "block_count")}
    counts |= {key: take(key) for key in ("feed_forward_length", "context_length")} | {"head_count_kv": kv_heads}
    if odd := [key for key, count in counts.items() if not isinstance(count, int) or count < 1]:
        raise RequestError(f"{file}: its metadata has {odd[0]} = {counts[odd[0]]!r}, which must be at least 1")
    head_dim = take("attention.key_length", width // heads)
    if take("rope.dimension_count", head_dim) != head_dim or take("attention.value_length", head_dim) != head_dim:
        raise RequestError(f"{file}: heads that rotate in part, or whose keys and values differ, are not supported")
    config = {
        "model_type": model_type,
        "architectures": [f"{CLASSES[model_type]}ForCausalLM"],
        "vocab_size": metadata.get(f"{architecture}.vocab_size", metadata.get("tokenizer.ggml.tokens", 0)),
        "hidden_size": width,
        "num_hidden_layers": take("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": take("feed_forward_length"),
        "max_position_embeddings": take("context_length"),
        "rms_norm_eps": _short(take("attention.layer_norm_rms_epsilon")),
        "rope_theta": _short(take("rope.freq_base", 1e6 if model_type == "gemma3_text" else 10_000.0)),
    }
    if model_type.startswith("gemma"):
        config["sliding_window"] = take("attention.sliding_window", 4096)
        config["attn_logit_softcapping"] = metadata.get(f"{architecture}.attn_logit_softcapping")
        config["final_logit_softcapping"] = metadata.get(f"{architecture}.final_logit_softcapping")
        # llama.cpp identifies the two sizes with another attention scale by their number of layers.
        largest = {("gemma2", 46): width // heads, ("gemma3_text", 62): width // heads}
        config["query_pre_attn_scalar"] = largest.get((model_type, take("block_count")), head_dim)
    elif model_type == "mistral":
        config["sliding_window"] = take("attention.sliding_window")
    elif model_type == "qwen3":
        config["attention_bias"] = False
    scaling = _scaling(file, architecture, metadata, factors, config)
    return config | ({"rope_scaling": scaling} if scaling else {})


def _short(x: Any) -> float:
    """Return the number with the fewest decimal digits that rounds to the same float32 as `x`: 1e-5, not
    9.999999747378752e-06.

    Raises:
        ValueError: If `x` is no number.
    """
    if isinstance(x, bool) or not isinstance(x, (int, float)):
        raise ValueError(f"{x!r} is no number")
    return float(np.format_float_scientific(np.float32(x), trim="-"))


def _scaling(
    file: Path, architecture: str, metadata: dict[str, Any], factors: Tensor | None, config: dict[str, Any]
) -> dict[str, Any]:
    if factors is not None:
        found = factors.read().ravel()
        scaling = LLAMA3_ROPE | {"factor": float(found.max())}
        if not np.allclose(found, llama3_factors(scaling, config["rope_theta"], config["head_dim"]), rtol=1e-3):
            raise RequestError(f"{file}: its rotary factors (rope_freqs) are not those of llama3 scaling")
        return scaling
    kind = metadata.get(f"{architecture}.rope.scaling.type", "none")
    if kind == "none":
        return {}
    factor = metadata.get(f"{architecture}.rope.scaling.factor")
    original = metadata.get(f"{architecture}.rope.scaling.original_context_length")
    scaling = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = original
    return scaling


def llama3_factors(scaling: Mapping[str, Any], theta: float, head_dim: int) -> np.ndarray:
    """Return the number by which llama3 scaling divides each rotary frequency, float32 [K/2], for the head width K."""
    frequency = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
    keep = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / (keep + (1 - keep) / scaling["factor"])).astype(np.float32)


def heads_of(config: Mapping[str, Any], name: str) -> int:
    """Return the number of heads of a query or key projection, by its transformers name; 0 for other tensors."""
    if re.search(r"self_attn\.q_proj\.", name):
        return config["num_attention_heads"]
    return config["num_key_value_heads"] if re.search(r"self_attn\.k_proj\.", name) else 0


def _from_gguf(model_type: str, config: Mapping[str, Any], name: str, t: Tensor) -> Tensor:
    heads = heads_of(config, name) if model_type in ("llama", "mistral") else 0
    if heads:
        return replace(t, read=lambda: halves(t.read(), heads))
    if model_type.startswith("gemma") and name.endswith("norm.weight"):
        return replace(t, read=lambda: t.read() - 1)
    return t


def interleaved(w: np.ndarray, heads: int) -> np.ndarray:
    """Convert the rows of a query or key projection [H*K, …] from transformers' order to llama.cpp's.

    For rotary positions, transformers pairs row i of a head with row i + K / 2. llama.cpp pairs adjacent rows.
    """
    return w.reshape(heads, 2, -1, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def halves(w: np.ndarray, heads: int) -> np.ndarray:
    """Convert the rows of a query or key projection [H*K, …] from llama.cpp's order to transformers'.

    This is the inverse of `interleaved`.
    """
    return w.reshape(heads, -1, 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def tokenizer(file: Path, work: Path) -> Path:
    """Convert the vocabulary of a GGUF file to a tokenizer in the folder `work`, and return that folder.

    Raises:
        RequestError: If the vocabulary is damaged, or of an unknown kind.
    """
    library()
    try:
        return gguf_vocabulary.read(file, work)
    except RequestError:
        raise
    except Exception as e:  # protobuf and tokenizers raise many exception types for a damaged vocabulary
        reason = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
        raise RequestError(
            f"{file}: its vocabulary cannot be understood ({reason}); --tokenizer names another one"
        ) from None
