"""GGUF files, as llama.cpp reads them: their metadata as a config.json, their tensors under the names of transformers.

What differs from a Hugging Face folder: names; rows of queries and keys of the "llama" architecture are permuted for
interleaved rotary positions; Gemma's norms are stored with the 1 added; llama3's rotary scaling is a tensor of factors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from llmctl import weights
from llmctl.bridge import folder as folders
from llmctl.bridge import gguf_vocabulary, parity
from llmctl.bridge import names as bridge_names
from llmctl.bridge.tensors import Tensor, listed
from llmctl.errors import RequestError
from llmctl.model import ModelConfig
from llmctl.model.llama import LLAMA3_ROPE

if TYPE_CHECKING:
    from llmctl.artifact import Artifact

TYPES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma2": "gemma2", "gemma3": "gemma3_text"}
"""Their architecture -> model_type."""
ARCHITECTURES = {v: k for k, v in TYPES.items()} | {"mistral": "llama"}
CLASSES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma2": "Gemma2", "gemma3_text": "Gemma3"}
KINDS = {"f32": "F32", "f16": "F16", "q8_0": "Q8_0", "q4_0": "Q4_0", "q4_1": "Q4_1"}
FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7}
BLOCK = 32
"""Inputs that share a scale in the quantized kinds."""

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


def names(model_type: str) -> dict[str, str]:
    """Their stem -> the name in transformers, of one architecture."""
    return GEMMA if model_type.startswith("gemma") else PLAIN


def library() -> Any:
    """The gguf package. Raises RequestError where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise RequestError("GGUF files need the gguf package: pip install 'llmctl[hf]'") from None
    return gguf


def look(file: Path) -> folders.Found:
    """What a GGUF file holds, its tensors dequantized when they are read.

    Raises:
      RequestError: no such file, damaged, an architecture or tensor that is not understood.
    """
    metadata, stored = _open(file)
    architecture = metadata.get("general.architecture")
    if architecture not in TYPES:
        raise RequestError(f"{file}: architecture {architecture!r} is not known; known: {', '.join(sorted(TYPES))}")
    model_type = TYPES[architecture]
    factors = stored.pop("rope_freqs.weight", None)
    config = _config(file, model_type, architecture, metadata, factors)
    back = {}
    for name, tensor in stored.items():
        ours = _rename(name, names(model_type))
        if ours is None:
            raise RequestError(f"{file}: tensor {name} is not understood")
        back[ours] = _from_gguf(model_type, config, ours, tensor)
    config["tie_word_embeddings"] = "lm_head.weight" not in back
    return folders.understand(file, config, back)


def _open(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    gguf = library()
    if not file.is_file():
        raise RequestError(f"{file}: no such file")
    try:
        reader = gguf.GGUFReader(file)
        large = ("tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.ggml.scores", "tokenizer.ggml.token_type")
        metadata = {k: len(f.data) if k in large else f.contents() for k, f in reader.fields.items()}
        stored = {t.name: _tensor(file, t) for t in reader.tensors}
    except RequestError:
        raise
    except Exception as e:  # the reader raises whatever numpy does for a damaged file
        raise RequestError(f"{file}: not a readable GGUF file ({e}); fetch it again") from None
    return metadata, stored


def _tensor(file: Path, t: Any) -> Tensor:
    from gguf.quants import dequantize

    shape = tuple(int(n) for n in reversed(t.shape))

    def read() -> np.ndarray:
        try:
            return dequantize(t.data, t.tensor_type).astype(np.float32, copy=False).reshape(shape)
        except NotImplementedError:
            raise RequestError(f"{file}: {t.name} is of type {t.tensor_type.name}, which is not supported") from None

    return Tensor(shape, np.dtype(np.float32), read)


def _rename(name: str, table: Mapping[str, str]) -> str | None:
    found = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if not found or found[2] not in table:
        return None
    prefix = f"model.layers.{found[1]}." if found[1] else ""
    return f"{prefix}{table[found[2]]}.{found[3]}"


def _config(file: Path, model_type: str, architecture: str, metadata: dict[str, Any], factors: Tensor | None) -> Any:
    """The metadata as a config.json of transformers."""

    def take(key: str, default: Any = None) -> Any:
        value = metadata.get(f"{architecture}.{key}", default)
        if value is None:
            raise RequestError(f"{file}: its metadata lacks {architecture}.{key}")
        return value

    heads, width = take("attention.head_count"), take("embedding_length")
    kv_heads = take("attention.head_count_kv", heads)
    if not isinstance(heads, int) or not isinstance(kv_heads, int):
        raise RequestError(f"{file}: layers with different numbers of heads are not supported")
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
        # llama.cpp knows the scale of the two sizes that differ from their head's width by the number of layers.
        largest = {("gemma2", 46): width // heads, ("gemma3_text", 62): width // heads}
        config["query_pre_attn_scalar"] = largest.get((model_type, take("block_count")), head_dim)
    elif model_type == "qwen3":
        config["attention_bias"] = False
    scaling = _scaling(file, architecture, metadata, factors, config)
    return config | ({"rope_scaling": scaling} if scaling else {})


def _short(x: float) -> float:
    """A float32 as people wrote it: 1e-5, not 9.999999747378752e-06."""
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
    """What every rotary frequency is divided by under llama3 scaling [K/2]."""
    frequency = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
    keep = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / (keep + (1 - keep) / scaling["factor"])).astype(np.float32)


def _heads_of(config: Mapping[str, Any], name: str) -> int:
    if re.search(r"self_attn\.q_proj\.", name):
        return config["num_attention_heads"]
    return config["num_key_value_heads"] if re.search(r"self_attn\.k_proj\.", name) else 0


def _from_gguf(model_type: str, config: Mapping[str, Any], name: str, t: Tensor) -> Tensor:
    heads = _heads_of(config, name) if model_type == "llama" else 0
    if heads:
        return Tensor(t.shape, t.dtype, lambda: halves(t.read(), heads))
    if model_type.startswith("gemma") and name.endswith("norm.weight"):
        return Tensor(t.shape, t.dtype, lambda: t.read() - 1)
    return t


def interleaved(w: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection [H*K, …] from halves to pairs, as llama.cpp rotates them."""
    return w.reshape(heads, 2, -1, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def halves(w: np.ndarray, heads: int) -> np.ndarray:
    """Inverse of `interleaved`."""
    return w.reshape(heads, -1, 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def tokenizer(file: Path, work: Path) -> Path:
    """The file's vocabulary as a tokenizer's file in `work`. Raises RequestError for a kind that is not understood."""
    library()
    return gguf_vocabulary.read(file, work)


# --- out -------------------------------------------------------------------------------------------------------------


def kind_of(name: str, shape: tuple[int, ...], kind: str) -> str:
    """How a tensor (by its name in transformers) is stored: vectors in float32, a table of a 4-bit file in 8 bits."""
    if len(shape) < 2 or kind == "f32":
        return "f32"
    if shape[-1] % BLOCK and kind.startswith("q"):
        return "f16"
    return "q8_0" if kind.startswith("q4") and ("embed_tokens" in name or "lm_head" in name) else kind


def write(found: Artifact, file: Path, kind: str) -> str:
    """Writes an artifact's model and vocabulary; returns what llama.cpp will do otherwise, or nothing.

    Raises:
      RequestError: an unknown kind, a family that GGUF has no architecture for, settings that it cannot say.
    """
    gguf = library()
    cfg = found.model
    bridge, _ = bridge_names.of(cfg)
    if kind not in KINDS:
        raise RequestError(f"--type {kind}: not a known kind; known: {', '.join(KINDS)}")
    if bridge.model_type not in ARCHITECTURES or cfg.head != "lm":
        raise RequestError(
            f"GGUF export knows language models of {', '.join(sorted(ARCHITECTURES))}, not {cfg.family!r}"
        )
    architecture = ARCHITECTURES[bridge.model_type]
    _refuse(cfg, architecture)
    config = folders.config_of(cfg, [], {}, "float32")
    theirs = folders.tensors_of(cfg, found.params)
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_name(found.manifest.name)
    writer.add_file_type(FILE_TYPES[kind])
    _write_metadata(writer, cfg, kind)
    differs = gguf_vocabulary.write(writer, found.tokenizer_dir, cfg.vocab_size)
    stems = {v: k for k, v in names(TYPES[architecture]).items()}
    if cfg.rope_scaling.get("rope_type") == "llama3":
        factors = llama3_factors(cfg.rope_scaling, cfg.rope_theta, cfg.head_dim)
        writer.add_tensor("rope_freqs.weight", factors)
    for name, t in sorted(theirs.items()):
        array = np.asarray(t.read(), np.float32)
        if architecture == "llama" and (heads := _heads_of(config, name)):
            array = interleaved(array, heads)
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            array = array + 1
        chosen = getattr(gguf.GGMLQuantizationType, KINDS[kind_of(name, t.shape, kind)])
        data = gguf.quants.quantize(np.ascontiguousarray(array), chosen)
        writer.add_tensor(_to_gguf(name, stems), data, raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return differs


def _refuse(cfg: ModelConfig, architecture: str) -> None:
    every = {"gemma2": 2, "gemma3": 6}.get(architecture)
    # llama.cpp runs Mistral without its window: exact up to that many tokens, so the context ends there.
    odd = every is None or bool(cfg.window_layers) or cfg.window_every != every
    if cfg.window and odd and cfg.family != "mistral":
        raise RequestError("GGUF has no place for this pattern of windows; nothing was written")
    if architecture.startswith("gemma") and abs((cfg.attn_scale or cfg.head_dim**-0.5) - cfg.head_dim**-0.5) > 1e-6:
        raise RequestError(f"GGUF has no place for attn_scale = {cfg.attn_scale}; nothing was written")
    if cfg.rope_local_theta not in (0.0, 10_000.0):
        raise RequestError(f"GGUF has no place for rope_local_theta = {cfg.rope_local_theta}; nothing was written")
    llama3 = cfg.rope_scaling.get("rope_type") == "llama3"
    if llama3 and {k: v for k, v in cfg.rope_scaling.items() if k != "factor"} != {
        k: v for k, v in LLAMA3_ROPE.items() if k != "factor"
    }:
        raise RequestError("GGUF export knows llama3's rotary scaling with its published constants only")


def _write_metadata(writer: Any, cfg: ModelConfig, kind: str) -> None:
    gguf = library()
    length = min(cfg.max_seq_len, cfg.window) if cfg.family == "mistral" and cfg.window else cfg.max_seq_len
    writer.add_vocab_size(cfg.vocab_size)
    writer.add_context_length(length)
    writer.add_embedding_length(cfg.d_model)
    writer.add_block_count(cfg.layers)
    writer.add_feed_forward_length(cfg.d_ff)
    writer.add_head_count(cfg.heads)
    writer.add_head_count_kv(cfg.kv_heads)
    writer.add_key_length(cfg.head_dim)
    writer.add_value_length(cfg.head_dim)
    writer.add_rope_dimension_count(cfg.head_dim)
    writer.add_rope_freq_base(cfg.rope_theta)
    writer.add_layer_norm_rms_eps(cfg.norm_eps)
    if kind.startswith("q"):
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    scaling = cfg.rope_scaling
    if scaling.get("rope_type") in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling["rope_type"]))
        writer.add_rope_scaling_factor(scaling["factor"])
        if "original_max_position_embeddings" in scaling:
            writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
    if cfg.family.startswith("gemma"):
        writer.add_sliding_window(cfg.window)
        if cfg.attn_softcap:
            writer.add_attn_logit_softcapping(cfg.attn_softcap)
        if cfg.final_softcap:
            writer.add_final_logit_softcapping(cfg.final_softcap)


def _to_gguf(name: str, stems: Mapping[str, str]) -> str:
    found = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.+)\.(weight|bias)", name)
    if not found or found[2] not in stems:
        raise RequestError(f"GGUF has no place for {listed([name])}")
    prefix = f"blk.{found[1]}." if found[1] else ""
    return f"{prefix}{stems[found[2]]}.{found[3]}"


def expected(found: Artifact, kind: str, batch: dict[str, jax.Array]) -> jax.Array:
    """The artifact's answers with its weights rounded as this kind rounds them: what the file must answer."""
    quants, cfg = library().quants, found.model
    flat = {}
    for path, w in weights.flatten(found.params).items():
        array = np.asarray(weights.dense(w), np.float32)
        if path.endswith("kernel") or path == "embed/tokens":
            rows = array if path == "embed/tokens" else array.swapaxes(-1, -2)  # [.., out, in]
            name = {"embed/tokens": "embed_tokens", "lm_head/kernel": "lm_head"}.get(path, path)
            chosen = getattr(library().GGMLQuantizationType, KINDS[kind_of(name, rows.shape, kind)])
            rows = quants.dequantize(quants.quantize(np.ascontiguousarray(rows), chosen), chosen).reshape(rows.shape)
            array = rows if path == "embed/tokens" else rows.swapaxes(-1, -2)
        flat[path] = jnp.asarray(array)
    return parity.answers(cfg, weights.unflatten(flat), batch)
