"""Merge the adapters of a model into their base, or write an adapter together with its base as one artifact."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import jax

from llmctl.artifacts import artifact
from llmctl.config.errors import RequestError
from llmctl.convert import parity
from llmctl.model import weights

STAGE = "export"
"""Name of the stage that `write` records in the manifest, the metadata file of an artifact."""


def merged(found: artifact.Artifact) -> dict[str, Any]:
    """Return the parameters with all adapters merged into their matrices. The model then computes the same function.

    If an adapter only replaces arrays of its base, such as the head or biases, the parameters are returned unchanged.

    Raises:
        RequestError: If the artifact has no adapter. If an adapter cannot be merged. If merging would undo the base's
            quantization or pruning.
    """
    cfg, pairs = found.model, {path: weights.as_node(w) for path, w in weights.adapted(found.params).items()}
    if any(w.is_integer for w in pairs.values()):
        raise RequestError(
            f"{found.path}: its base has integers, and merging would undo the quantization; leave out --merge, or "
            "export --to hf, which writes floats"
        )
    if found.manifest.pruned and not all(w.keeps_zeros for w in pairs.values()):
        raise RequestError(
            f"{found.path}: its base is pruned to {found.manifest.sparsity:.0%} zeros, which merging would fill; leave "
            "out --merge"
        )
    if pairs:
        return jax.jit(weights.merge_adapters)(found.params)
    parts = {"bottleneck adapters": cfg.adapter_size, "a trained prompt": cfg.prompt_tokens}
    parts |= {"a trained prefix": cfg.prefix_tokens}
    if kind := next((name for name, size in parts.items() if size), ""):
        raise RequestError(f"{found.path}: has {kind}, which no matrix of its base can express; leave out --merge")
    if not found.manifest.base:
        raise RequestError(f"{found.path}: has no adapter to merge; leave out --merge")
    return found.params


def write(found: artifact.Artifact, out: Path, merge: bool, name: str) -> float:
    """Write an adapter and its base as one artifact, and check its outputs.

    The written artifact is read back. Its outputs must equal those of `found`.

    Args:
        found: The artifact, usually an adapter.
        out: Folder to write to.
        merge: Whether to merge the adapters.
        name: Name of the written artifact.

    Returns:
        The largest difference between outputs of `found` and of the written artifact.

    Raises:
        RequestError: If the adapters cannot be merged (`merged`).
        WorkError: If the outputs differ.
    """
    params, about = (merged(found) if merge else found.params), found.manifest
    artifact.save(
        out,
        params,
        found.model,
        stage=STAGE,
        key=hashlib.sha256(f"{STAGE}:{merge}:{about.key}:{about.content or about.digest}".encode()).hexdigest(),
        config={**about.config, "source": str(found.path), "merge": merge},
        name=name,
        parent=about,
        labels=about.labels,
        metrics={} if merge else about.metrics,
        tokenizer_dir=found.tokenizer_dir if found.tokenizer_dir.is_dir() else None,
        allow_nonfinite=bool(about.nonfinite),
    )
    cfg, batch = found.model, parity.probe(found.model)
    back = artifact.load(out)
    with jax.default_matmul_precision("highest"):
        return parity.prove(
            str(found.path), parity.answers(cfg, back.params, batch), parity.answers(cfg, found.params, batch)
        )
