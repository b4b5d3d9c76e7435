"""Write an artifact to a GGUF file.

Tensors have llama.cpp's names. Weights are rounded to the type of the file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from llmctl.artifacts.artifact import Artifact
from llmctl.config.errors import RequestError
from llmctl.convert import architectures, gguf_blocks, gguf_vocabulary, hf_export, name_map
from llmctl.convert.architectures import GGUF, TO_GGUF
from llmctl.convert.gguf import heads_of, interleaved, library, llama3_factors, stems
from llmctl.convert.lazy_tensors import listed
from llmctl.evaluate.tasks import registry
from llmctl.model import weights
from llmctl.model.config import ModelConfig
from llmctl.model.families.llama import LLAMA3_ROPE

KINDS = {
    "f32": "F32", "f16": "F16", "q8_0": "Q8_0", "q6_k": "Q6_K", "q5_0": "Q5_0", "q5_1": "Q5_1", "q4_0": "Q4_0",
    "q4_1": "Q4_1",
}  # fmt: skip
FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q6_k": 18}


def kind_of(name: str, shape: tuple[int, ...], kind: str) -> str:
    """Return the GGUF type in which a tensor is stored in a file of the type `kind`.

    Vectors are float32. Matrices whose number of inputs is not a multiple of 32 are float16 in quantized files. In a
    q6_k file, matrices whose number of inputs is not a multiple of 256 are q8_0. Embedding tables and output
    projections of a file with 4 or 5 bits have 8 bits.

    Args:
        name: Name of the tensor in transformers.
        shape: Shape of the tensor.
        kind: Type of the file, a key of `KINDS`.
    """
    if len(shape) < 2 or kind == "f32":
        return "f32"
    if shape[-1] % gguf_blocks.BLOCK and kind.startswith("q"):
        return "f16"
    if kind == "q6_k":
        return "q8_0" if shape[-1] % gguf_blocks.SUPER else kind
    return "q8_0" if kind.startswith(("q4", "q5")) and ("embed_tokens" in name or "lm_head" in name) else kind


def write(found: Artifact, file: Path, kind: str) -> str:
    """Write an artifact's model and vocabulary to a GGUF file.

    Returns:
        A description of the differences between this model in llama.cpp and in llmctl; "" if there are none.

    Raises:
        RequestError: If the type `kind` is unknown, or if GGUF cannot express the family or one of its settings.
    """
    gguf = library()
    cfg = found.model
    bridge, _ = architectures.of(cfg)
    if kind not in KINDS:
        raise RequestError(f"--type {kind}: not a known kind; known: {', '.join(KINDS)}")
    if bridge.model_type not in TO_GGUF or not cfg.head_kind.vocabulary:
        raise RequestError(f"GGUF export knows language models of {', '.join(sorted(TO_GGUF))}, not {cfg.family!r}")
    architecture = TO_GGUF[bridge.model_type]
    _refuse(cfg, architecture)
    config = hf_export.config_of(cfg, registry.of(found.manifest), [], {}, "float32")
    theirs, flat = hf_export.tensors_of(cfg, found.params), weights.flatten(found.params)
    layouts = name_map.tensor_layouts(cfg, *architectures.of(cfg), bare=cfg.head_kind.bare)
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_name(found.manifest.name)
    writer.add_file_type(FILE_TYPES[kind])
    _write_metadata(writer, cfg, kind)
    differs = gguf_vocabulary.write(writer, found.tokenizer_dir, cfg.vocab_size)
    back = {v: k for k, v in stems(GGUF[architecture]).items()}
    if cfg.rope_scaling.get("rope_type") == "llama3":
        factors = llama3_factors(cfg.rope_scaling, cfg.rope_theta, cfg.head_dim)
        writer.add_tensor("rope_freqs.weight", factors)
    for name, t in sorted(theirs.items()):
        chosen, slots = kind_of(name, t.shape, kind), layouts[name].slots
        w = t.read()
        if len(slots) == 1 and len(t.shape) == 2:
            slot = slots[0]
            w = flat[slot.path] if slot.layer < 0 else weights.layer_of(flat[slot.path], slot.layer)
            data, _ = _encoded(w, chosen, -1 if slot.transposed else -2)
        else:
            plus = float(architecture.startswith("gemma") and name.endswith("norm.weight"))
            data = gguf.quants.quantize(np.asarray(w, np.float32) + np.float32(plus), _type(chosen))
        if architecture == "llama" and (heads := heads_of(config, name)):
            data = interleaved(data, heads)  # rows are encoded independently
        writer.add_tensor(_to_gguf(name, back), np.ascontiguousarray(data), raw_dtype=_type(chosen))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if cfg.family == "mistral" and cfg.window:
        ignored = f"llama.cpp runs this architecture without its window: exact up to {cfg.window:,} tokens of context"
        differs = "; ".join(filter(None, (differs, ignored)))
    return differs


def _refuse(cfg: ModelConfig, architecture: str) -> None:
    every = {"gemma2": 2, "gemma3": 6}.get(architecture)
    # llama.cpp runs Mistral without its sliding window; `write` reports this.
    odd = every is None or bool(cfg.window_layers) or cfg.window_every != every
    if cfg.window and odd and cfg.family != "mistral":
        raise RequestError("GGUF has no place for this pattern of windows; nothing was written")
    if architecture.startswith("gemma") and abs((cfg.attn_scale or cfg.head_dim**-0.5) - cfg.head_dim**-0.5) > 1e-6:
        raise RequestError(f"GGUF has no place for attn_scale = {cfg.attn_scale}; nothing was written")
    if architecture != "llama" and (cfg.out_bias or cfg.mlp_bias or (cfg.qkv_bias and architecture != "qwen2")):
        raise RequestError(
            f"llama.cpp reads no such biases in models of {cfg.family}; export --to hf; nothing was written"
        )
    if cfg.rope_local_theta not in (0.0, 10_000.0):
        raise RequestError(f"GGUF has no place for rope_local_theta = {cfg.rope_local_theta}; nothing was written")
    llama3 = cfg.rope_scaling.get("rope_type") == "llama3"
    if llama3 and {k: v for k, v in cfg.rope_scaling.items() if k != "factor"} != {
        k: v for k, v in LLAMA3_ROPE.items() if k != "factor"
    }:
        raise RequestError("GGUF export knows llama3's rotary scaling with its published constants only")


def _write_metadata(writer: Any, cfg: ModelConfig, kind: str) -> None:
    gguf = library()
    writer.add_vocab_size(cfg.vocab_size)
    writer.add_context_length(cfg.max_seq_len)
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
    if cfg.window or cfg.family.startswith("gemma"):
        writer.add_sliding_window(cfg.window)
    if cfg.family.startswith("gemma"):
        if cfg.attn_softcap:
            writer.add_attn_logit_softcapping(cfg.attn_softcap)
        if cfg.final_softcap:
            writer.add_final_logit_softcapping(cfg.final_softcap)


def _to_gguf(name: str, table: Mapping[str, str]) -> str:
    found = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.+)\.(weight|bias)", name)
    if not found or found[2] not in table:
        raise RequestError(f"GGUF has no place for {listed([name])}")
    prefix = f"blk.{found[1]}." if found[1] else ""
    return f"{prefix}{table[found[2]]}.{found[3]}"


def _type(kind: str) -> Any:
    return getattr(library().GGMLQuantizationType, KINDS[kind])


def _encoded(w: Any, kind: str, rows: int) -> tuple[np.ndarray, bool]:
    """Return the rows of one matrix in the GGUF type `kind`, and whether the matrix keeps its integers.

    Args:
        w: The weight: a matrix [I, O], or an embedding table [V, D].
        kind: Key of `KINDS`.
        rows: Axis of the rows: -1 for a matrix, -2 for a table.
    """
    stored = gguf_blocks.integers_of(w, rows) if kind.startswith("q") else None
    if stored is not None and (data := gguf_blocks.kept(kind, stored)) is not None:
        return data, True
    dense = np.asarray(weights.dense(w), np.float32)
    dense = np.ascontiguousarray(dense.T if rows == -1 else dense)
    return gguf_blocks.rounded_q6_k(dense) if kind == "q6_k" else library().quants.quantize(dense, _type(kind)), False


def as_stored(found: Artifact, kind: str) -> tuple[dict[str, Any], str]:
    """Return an artifact's parameters as a GGUF file of the type `kind` stores them, and a line about rounding errors.

    The parameters are encoded, and then decoded by the package gguf to float32 arrays. For each GGUF type, the line has
    the number of matrices and their relative error (Frobenius). If `kind` is not a quantized type, the line is empty.
    """
    flat, lost = dict[str, Any](), dict[tuple[str, bool], list[float]]()
    for path, w in weights.flatten(found.params).items():
        dense = np.asarray(weights.dense(w), np.float32)
        if place := weights.parse(path).place:
            rows = -2 if place == "embedding" else -1
            name = {"embed/tokens": "embed_tokens", "lm_head/kernel": "lm_head"}.get(path, path)
            shape = dense.shape if rows == -2 else (dense.shape[-1], dense.shape[-2])
            chosen, layers = kind_of(name, shape, kind), []
            for i, before in enumerate(dense if dense.ndim == 3 else dense[None]):
                data, kept = _encoded(weights.layer_of(w, i) if dense.ndim == 3 else w, chosen, rows)
                after = library().quants.dequantize(data, _type(chosen)).reshape(shape)
                layers.append(after if rows == -2 else after.T)
                square = [1.0, float(np.sum(np.square(layers[-1] - before))), float(np.sum(np.square(before)))]
                lost[chosen, kept] = [a + b for a, b in zip(lost.get((chosen, kept), [0.0] * 3), square, strict=True)]
            dense = np.stack(layers).reshape(dense.shape)
        flat[path] = jnp.asarray(dense)
    if not kind.startswith("q"):
        return weights.unflatten(flat), ""
    told = [
        f"{int(count)} to {name}{', with unchanged integers' * kept} "
        f"(relative error {(error / (whole or 1)) ** 0.5:.2g})"
        for (name, kept), (count, error, whole) in sorted(lost.items())
    ]
    return weights.unflatten(flat), f"matrices are rounded: {'; '.join(told)}"
