"""Write an artifact (a model folder of llmctl) in another format, and check that the written model gives equal outputs.

The written files are read back for this check.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmctl.artifacts import artifact, atomic
from llmctl.config.errors import RequestError
from llmctl.convert import (
    adapter_export,
    architectures,
    compressed_tensors,
    gguf,
    gguf_export,
    hf_export,
    lazy_tensors,
    merging,
    name_map,
    parity,
    proof_texts,
    safetensors,
    sentence_transformer,
    sparse_tensors,
    text_proof,
    tokenizer_export,
    tokenizers,
)
from llmctl.convert import hf_folder as folders
from llmctl.convert.importing import bar, placer
from llmctl.evaluate.tasks import registry
from llmctl.model import weights
from llmctl.model.config import ModelConfig

FORMATS = ("hf", "compressed-tensors", "peft", "gguf", "artifact")


def run(
    source: Path,
    out: Path,
    *,
    to: str = "hf",
    dtype: str = "",
    kind: str = "f16",
    shard_bytes: int = hf_export.SHARD_BYTES,
    bases: Sequence[Path] = (),
    merge: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Write the artifact `source` to `out`, and verify that the written model gives the same outputs.

    Args:
        source: Folder of an artifact.
        out: A new folder, or a new file for GGUF. The output appears only after everything is written and verified.
        to: Name of the format:

            - "hf": dense weights
            - "compressed-tensors": integers of a quantized artifact, or sparse weights of a pruned artifact
            - "peft": an adapter
            - "gguf": a GGUF file
            - "artifact": an adapter with its base, for llmctl
        dtype: Dtype of the written weights. If empty, weights keep their dtype; quantized weights get the dtype of
            their scales.
        kind: Kind of GGUF file: a key of `llmctl.convert.gguf_export.KINDS`, such as f16 or q8_0.
        shard_bytes: Maximum size of a weight file in bytes.
        bases: Folders of base artifacts, for adapters whose base is not in a folder next to the adapter.
        merge: Whether to merge adapters into the matrices of an artifact. All formats except "peft" and "artifact"
            always merge adapters.
        say: Function that is called with one line of text per message to the user.

    Returns:
        A dict with "artifact", "digest", "format", "out", "files", "bytes", "parity", "transformers" and "proof".
        "parity" is the largest difference between outputs of the artifact and of the written model, both in llmctl.
        "transformers" is the largest difference if the written model runs in transformers; None if transformers did not
        read the model. "proof" describes the comparison.

    Raises:
        RequestError: If the artifact has no counterpart in the format `to`, or if `out` exists.
        WorkError: If the written model gives other outputs. The written model is then removed.
    """
    if to not in FORMATS:
        raise RequestError(f"--to {to}: not a known format; known: {', '.join(FORMATS)}")
    if merge and to in ("peft", "compressed-tensors"):
        raise RequestError(f"--merge has no meaning for --to {to}; it belongs to --to artifact")
    if dtype and to in ("peft", "gguf", "artifact"):
        raise RequestError(f"--dtype has no meaning for --to {to}{'; --type says it' if to == 'gguf' else ''}")
    if kind != "f16" and to != "gguf":
        raise RequestError(f"--type {kind} is for --to gguf; --dtype says the type of the weights")
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise RequestError(f"{out}: exists already; name a new {'file' if to == 'gguf' else 'folder'}")
    atomic.check(out)
    found = artifact.load(source, bases=bases)
    if to not in ("peft", "artifact"):
        found = dataclasses.replace(found, params=weights.merge_bias_adapters(found.params))
    if to not in ("peft", "artifact") and found.manifest.pruned and weights.adapted(found.params):
        say(
            f"{found.path}: its low-rank pairs are merged, which fills the {found.manifest.sparsity:.1%} zeros of its "
            "pruned base; --to peft keeps the pairs apart"
        )
    with atomic.writing(out) as draft:
        if to == "gguf":
            delta, theirs, proof = _gguf(found, draft / "model.gguf", kind, say), None, text_proof.OUR_READER
        elif to == "peft":
            delta, theirs, proof = adapter_export.write(found, draft, say)
        elif to == "artifact":
            delta, theirs, proof = merging.write(found, draft, merge, out.name), None, text_proof.OUR_READER
        else:
            delta, theirs, proof = _folder(found, draft, to, dtype, shard_bytes, say)
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
        "transformers": theirs,
        "proof": proof,
    }


def _folder(
    found: artifact.Artifact, draft: Path, to: str, dtype: str, shard_bytes: int, say: Callable[[str], None]
) -> tuple[float, float | None, str]:
    cfg, params = found.model, found.params
    architectures.of(cfg)  # a model without a counterpart is refused before its tokenizer is written
    kind = lazy_tensors.dtype(dtype) if dtype else None
    written = tokenizer_export.export_tokenizer(found.tokenizer_dir, draft, cfg, found.manifest.seq_len)
    for line in written.differences if written else ("has no tokenizer; the folder has none",):
        say(f"{found.path}: {line}")
    if written and written.rows:
        cfg, params = tokenizer_export.with_rows(cfg, params, written.rows)
    if tokenizers.reads_texts(cfg) and found.manifest.truncate == "head_tail":
        say(f"{found.path}: long texts lose their middle in llmctl, and their end in other programs")
    tokens, unread = written.ids if written else {}, ""
    theirs = hf_export.tensors_of(cfg, params, kind)
    main = str((kind or next(t.dtype for n, t in theirs.items() if n.endswith("weight"))).name)
    about = found.manifest
    config = hf_export.config_of(cfg, registry.of(about), about.labels, tokens, main, about.fitted)
    if to == "compressed-tensors":
        theirs, settings = compressed_tensors.pack(cfg, params, theirs, about.pruned)
        config |= {"quantization_config": settings}
        if settings.get("format") == compressed_tensors.NVFP4:
            unread = "compressed-tensors rounds nvfp4 weights to bfloat16 when transformers reads them"
        if sparse := settings.get("sparsity_config"):
            unread = f"compressed-tensors reads {sparse['format']} up to version {sparse_tensors.LAST}"
            say(f"{found.path}: {unread}; export --to hf writes dense weights for all versions")
        if compressed_tensors.has_zero_points(settings):
            unread = "transformers does not load packed zero points of compressed-tensors, as of version 0.20.1"
            say(f"{found.path}: {unread}; export --to hf writes dense weights for it")
    with bar("writing", safetensors.total(theirs.values())) as wrote:
        hf_export.save(draft, config, theirs, shard_bytes, wrote)
    if cfg.head_kind.bare:
        sentence_transformer.save(cfg, draft)
    again = folders.inspect(draft)
    if again.model != cfg.model_copy(update={"preset": ""}):
        odd = [k for k in type(cfg).model_fields if getattr(again.model, k) != getattr(cfg, k) and k not in FREE]
        if odd:
            raise RequestError(f"{found.path}: {', '.join(odd)} cannot be written in this format; nothing was written")
    with bar("proving", again.nbytes) as wrote:
        back = folders.load(again, placer(again.model), None, wrote)
    ours = weights.unflatten(_cast(params, kind, packed=to == "compressed-tensors"))
    return _prove(found, draft, cfg, ours, again.model, back, to, say, unread)


def _prove(
    found: artifact.Artifact,
    draft: Path,
    cfg: ModelConfig,
    ours: dict[str, Any],
    model: ModelConfig,
    back: dict[str, Any],
    to: str,
    say: Callable[[str], None],
    unread: str,
) -> tuple[float, float | None, str]:
    """Compare the outputs of the artifact with the outputs of the written model, on the same texts.

    Args:
        found: The artifact.
        draft: Folder of the written files.
        cfg: Config of the written model.
        ours: Parameters of the artifact, in the dtype that was written.
        model: Config that was read back.
        back: Parameters that were read back.
        to: Name of the format, such as "hf".
        say: Function that is called with one line of text per message to the user.
        unread: Reason why transformers cannot read exactly the written numbers; empty if it can.

    Returns:
        (difference in llmctl, difference in transformers, description of the comparison). A difference is the largest
        absolute difference between outputs of the artifact and of the written model. The second difference is None if
        transformers cannot read the files.
    """
    what = str(found.path)
    package = to.replace("-", "_") if to != "hf" else ""
    missing = unread or text_proof.available(4 * found.manifest.parameters, package)
    samples, begin = text_proof.read_rows(found, cfg, draft, not missing, say)
    with jax.default_matmul_precision("highest"):
        batch = proof_texts.batch_of(cfg, samples)
        expected = np.asarray(parity.answers(cfg, ours, batch))
        delta = parity.prove(what, parity.answers(model, back, batch), expected)
    if missing:
        return delta, None, f"{begin}{text_proof.OUR_READER} ({missing})"
    theirs = parity.prove(what, text_proof.answers_there(cfg, draft, samples), expected[-len(samples.rows) :])
    return delta, theirs, f"{begin}transformers reads what was written"


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
    "head_activation",
}
"""Config fields that may differ between the artifact and the written model, because a format can express the same
function differently. The comparison of outputs verifies that the function is the same."""


def _cast(params: dict[str, Any], dtype: Any, packed: bool) -> dict[str, Any]:
    """Round weights to the dtype of the written file, so that the comparison of outputs does not measure this rounding.

    Args:
        params: Parameters of the artifact.
        dtype: Dtype of the written weights; if None, every weight keeps its dtype.
        packed: Whether the format is compressed-tensors, in which quantized matrices stay quantized.

    Returns:
        {path: weight}. In products with these weights, activations are not quantized.
    """

    def cast(path: str, w: Any) -> Any:
        node = weights.as_node(w)
        stays = dtype is None or (packed and weights.is_kernel(path) and bool(compressed_tensors.scheme_of(w)))
        return node.without_activations() if stays else jnp.asarray(node.dense(), dtype)

    return {path: cast(path, w) for path, w in weights.flatten(params).items()}


def _gguf(found: artifact.Artifact, file: Path, kind: str, say: Callable[[str], None]) -> float:
    if differs := gguf_export.write(found, file, kind):
        say(f"{found.path}: {differs}")
    stored, rounding = gguf_export.as_stored(found, kind)
    if rounding:
        say(f"{found.path}: {rounding}")
    again = gguf.inspect(file)
    back = name_map.read(again.model, again.wanted, again.tensors, placer(again.model))
    batch = parity.probe(found.model)
    expected = parity.answers(found.model, stored, batch)
    return parity.prove(str(found.path), parity.answers(again.model, back, batch), expected)
