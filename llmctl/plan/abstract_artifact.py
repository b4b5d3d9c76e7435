"""What a planned stage would leave, for the stages after it: an artifact whose arrays are shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llmctl.artifacts import artifact
from llmctl.artifacts.artifact import Artifact, Manifest
from llmctl.config.base import keyed
from llmctl.model import functional, weights
from llmctl.model.config import ModelConfig
from llmctl.pipeline.stage import StageConfig
from llmctl.plan.sizes import bytes_of

Params = dict[str, Any]


def left(
    config: StageConfig,
    params: Params,
    model: ModelConfig,
    *,
    base: Artifact | None = None,
    labels: list[str] | None = None,
    pruned: bool | None = None,
) -> Artifact:
    """The artifact of `config`'s stage; what is not said is the parent's."""
    before = base.manifest if base else None
    settings = keyed(config)
    parameters = weights.count(params)
    manifest = Manifest(
        format=artifact.FORMAT,
        name=config.title,
        stage=config.kind,
        key="",
        family=model.family,
        model=model,
        labels=(before.labels if before else []) if labels is None else labels,
        parameters=parameters,
        bytes=bytes_of(params, whole=True),
        sparsity=0.0,
        pruned=(before is not None and before.pruned) if pruned is None else pruned,
        bits=8 * bytes_of(params, whole=True) / parameters,
        digest="",
        seq_len=settings.get("train", {}).get("seq_len") or (before.seq_len if before else 0),
        truncate=settings.get("truncate") or (before.truncate if before else ""),
        weights={path: weights.describe(w) for path, w in weights.flatten(params).items()},
    )
    return Artifact(Path(config.title), manifest, params)


def masters(params: Params) -> Params:
    """What training leaves: floats in float32."""

    def one(a: Any) -> Any:
        return a.update(dtype=jnp.dtype("float32")) if jnp.issubdtype(a.dtype, jnp.floating) else a

    return jax.tree.map(one, params)


def on(there: Artifact, mesh: Mesh) -> Artifact:
    """The artifact laid out over another mesh."""
    return Artifact(there.path, there.manifest, functional.laid_out(there.model, there.params, mesh))
