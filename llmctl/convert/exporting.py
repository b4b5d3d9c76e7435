"""`export`: write an artifact in another format, then read it back and compare its outputs with the artifact's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from llmctl.artifacts import artifact, atomic
from llmctl.config.errors import RequestError
from llmctl.convert import (
    compressed_tensors,
    gguf,
    gguf_export,
    lazy_tensors,
    name_map,
    parity,
    peft,
    safetensors,
    tokenizers,
)
from llmctl.convert import hf_folder as folders
from llmctl.convert.importing import bar, placer
from llmctl.evaluate.tasks import registry
from llmctl.model import weights
from llmctl.model.config import ModelConfig

FORMATS = ("hf", "compressed-tensors", "peft", "gguf")

SENTENCE = {"mean": "pooling_mode_mean_tokens", "first": "pooling_mode_cls_token", "last": "pooling_mode_lasttoken"}


def run(
    source: Path,
    out: Path,
    *,
    to: str = "hf",
    dtype: str = "",
    kind: str = "f16",
    shard_bytes: int = folders.SHARD_BYTES,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Write the artifact `source` to `out` and verify that the written model gives the same outputs.

    Args:
        source: Folder of an artifact.
        out: A new folder, or a new file for GGUF. It appears only after everything was written and verified.
        to: "hf" (dense weights), "compressed-tensors" (integers of a quantized artifact), "peft" (a low-rank adapter)
            or "gguf".
        dtype: Dtype of the written weights. If empty, weights keep theirs, and quantized weights take that of their
            scales.
        kind: Kind of GGUF file: f32, f16, q8_0, q4_0 or q4_1.
        shard_bytes: Largest size of a weight file in bytes.
        say: Called with one line of text for each message to the user.

    Returns:
        {"artifact", "digest", "format", "out", "files", "bytes", "parity"}; parity is the largest difference between
        the outputs of the artifact and those of the weights read back.

    Raises:
        RequestError: If the artifact has no counterpart in that format, or `out` exists.
        WorkError: If the written model gives other outputs; it is removed.
    """
    if to not in FORMATS:
        raise RequestError(f"--to {to}: not a known format; known: {', '.join(FORMATS)}")
    if dtype and to in ("peft", "gguf"):
        raise RequestError(f"--dtype has no meaning for --to {to}{'; --type says it' if to == 'gguf' else ''}")
    if kind != "f16" and to != "gguf":
        raise RequestError(f"--type {kind} is for --to gguf; --dtype says the type of the weights")
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise RequestError(f"{out}: exists already; name a new {'file' if to == 'gguf' else 'folder'}")
    found = artifact.load(source)
    with atomic.writing(out) as draft:
        if to == "gguf":
            delta = _gguf(found, draft / "model.gguf", kind, say)
        elif to == "peft":
            delta = peft.export(found, draft)
        else:
            delta = _folder(found, draft, to, dtype, shard_bytes, say)
        files = sorted(p for p in draft.rglob("*") if p.is_file())
        names, size = [str(p.relative_to(draft)) for p in files], sum(p.stat().st_size for p in files)
    return {
        "artifact": str(source),
        "digest": found.manifest.digest,
        "format": to,
        "out": str(out),
        "files": names,
        "bytes": size,
        "parity": delta,
    }


def _folder(
    found: artifact.Artifact, draft: Path, to: str, dtype: str, shard_bytes: int, say: Callable[[str], None]
) -> float:
    cfg, params = found.model, found.params
    kind = lazy_tensors.dtype(dtype) if dtype else None
    ends = cfg.architecture != "decoder" or not cfg.head_kind.vocabulary
    tokens = tokenizers.hand_on(found.tokenizer_dir, draft, ends) if found.tokenizer_dir.is_dir() else {}
    if not tokens:
        say(f"{found.path}: has no tokenizer; the folder has none")
    theirs = folders.tensors_of(cfg, params, kind)
    main = str((kind or next(t.dtype for n, t in theirs.items() if n.endswith("weight"))).name)
    config = folders.config_of(cfg, registry.of(found.manifest), found.manifest.labels, tokens, main)
    if to == "compressed-tensors":
        theirs, settings = compressed_tensors.pack(cfg, params, theirs)
        config |= {"quantization_config": settings}
    with bar("writing", safetensors.total(theirs.values())) as wrote:
        folders.save(draft, config, theirs, shard_bytes, wrote)
    if cfg.head_kind.bare:
        sentence_transformer(cfg, draft)
    again = folders.look(draft)
    if again.model != cfg.model_copy(update={"preset": ""}):
        odd = [k for k in type(cfg).model_fields if getattr(again.model, k) != getattr(cfg, k) and k not in FREE]
        if odd:
            raise RequestError(f"{found.path}: {', '.join(odd)} cannot be written in this format; nothing was written")
    with bar("proving", again.nbytes) as wrote:
        back = folders.load(again, placer(again.model), None, wrote)
    batch = parity.probe(cfg)
    ours = weights.unflatten(_cast(params, kind, packed=to == "compressed-tensors"))
    return parity.prove(str(found.path), parity.answers(again.model, back, batch), parity.answers(cfg, ours, batch))


FREE = {
    "preset",
    "dropout",
    "max_seq_len",
    "pooling",
    "labels",
    "window_every",
    "window_layers",
    "head_bias",
    "attn_scale",
}
"""Fields that a format may express differently for the same function; the comparison of outputs covers them."""


def _cast(params: dict[str, Any], dtype: Any, packed: bool) -> dict[str, Any]:
    """Cast the weights to the dtype in which they are written, so that rounding to it does not count as a difference.

    If matrices are `packed` integers, they stay quantized. Activations are not rounded, because the program that runs
    the exported weights does that.
    """

    def cast(path: str, w: Any) -> Any:
        integers = weights.as_node(w).integers()
        if integers and (dtype is None or (packed and weights.is_kernel(path))):
            return integers.with_activations("")
        return w if dtype is None else jnp.asarray(weights.dense(w), dtype)

    return {path: cast(path, w) for path, w in weights.flatten(params).items()}


def _gguf(found: artifact.Artifact, file: Path, kind: str, say: Callable[[str], None]) -> float:
    if differs := gguf_export.write(found, file, kind):
        say(f"{found.path}: {differs}")
    again = gguf.look(file)
    back = name_map.read(again.model, again.wanted, again.tensors, placer(again.model))
    batch = parity.probe(found.model, min(16, found.model.window or 16))
    return parity.prove(
        str(found.path), parity.answers(again.model, back, batch), gguf_export.expected(found, kind, batch)
    )


def sentence_transformer(cfg: ModelConfig, folder: Path) -> None:
    """Write the config files from which sentence-transformers reads the pooling and the normalization."""
    import json

    modes = {flag: cfg.pooling == pooling for pooling, flag in SENTENCE.items()}
    (folder / "1_Pooling").mkdir()
    content = {"word_embedding_dimension": cfg.d_model, **modes}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(content, indent=2) + "\n")
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds.items())
    ]
    (folder / "modules.json").write_text(json.dumps(modules, indent=2) + "\n")
