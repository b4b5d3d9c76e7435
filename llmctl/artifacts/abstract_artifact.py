"""Predict the artifact that a stage (such as pretrain or prune) would save: its manifest, and the shapes of its arrays.

An abstract array is a `jax.ShapeDtypeStruct`: a shape, a dtype and a sharding, without values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from llmctl.artifacts import adapters, artifact, sparse_storage
from llmctl.artifacts.artifact import Artifact, Manifest
from llmctl.config.base import keyed
from llmctl.model import functional, weights
from llmctl.model.array_bytes import bytes_of
from llmctl.model.config import ModelConfig

Params = dict[str, Any]


def abstract_result(
    config: Any,
    params: Params,
    model: ModelConfig,
    *,
    base: Artifact | None = None,
    labels: list[str] | None = None,
    task: str | None = None,
    generation: dict[str, Any] | None = None,
    pruned: bool | None = None,
    stored: Callable[[str], bool] | None = None,
    sparsity: float | None = None,
) -> Artifact:
    """Return the artifact that a stage would save, with shapes and dtypes in place of arrays, and without digests.

    Args:
        config: Config of the stage.
        params: Parameters as `jax.ShapeDtypeStruct`s with shardings.
        model: Config of the saved model.
        base: Parent artifact; None if the stage starts without a parent.
        labels: Class names; None uses the names in `base`.
        task: Name of the task; None uses the task of `base`.
        generation: Settings for generating answers; None uses the settings in `base`.
        pruned: Whether the weights are pruned, so that later stages keep their zeros; None uses the value of `base`.
        stored: Function that takes the name of an array, and returns whether the saved folder contains the array. With
            this function, the artifact is an adapter of `base`. None saves all arrays.
        sparsity: Fraction of zeros in the pruned matrices, if the stage stores these matrices in a sparse format. If
            None, each array that `base` stores in a sparse format keeps its fraction of zeros.
    """
    before = base.manifest if base else None
    parameters = weights.count(params)
    pruned = (before is not None and before.pruned) if pruned is None else pruned
    named = {name: a for name, a in weights.arrays(params).items() if not stored or stored(name)}
    storage = _storage(params, base, sparsity) if pruned and not stored else {}
    encoded = sum(sparse_storage.size(record, named[name].shape, named[name].dtype) for name, record in storage.items())
    manifest = Manifest(
        format=artifact.FORMAT,
        name=config.title,
        stage=config.kind,
        key="",
        family=model.family,
        model=model,
        labels=(before.labels if before else []) if labels is None else labels,
        task=(before.task if before else "") if task is None else task,
        generation=artifact.generation_settings(before) if generation is None else generation,
        parameters=parameters,
        bytes=bytes_of([a for name, a in named.items() if name not in storage], whole=True) + encoded,
        sparsity=0.0,
        pruned=pruned,
        base=adapters.base_record(before, named, "") if stored and before else None,
        storage=storage,
        bits=8 * bytes_of(params, whole=True) / parameters,
        digest="",
        weights={path: weights.describe(w) for path, w in weights.flatten(params).items()},
        **artifact.text_settings(keyed(config), before),
    )
    return Artifact(Path(config.title), manifest, params)


def _storage(params: Params, base: Artifact | None, sparsity: float | None) -> dict[str, sparse_storage.Record]:
    """Estimate the manifest's record of each array in a sparse format, and return {array name: record}."""
    arrays = weights.arrays(params)
    if base and sparsity is None and base.manifest.stores_sparse and base.manifest.base:
        # An adapter, whose base has the fractions of the single arrays. A planned one has no fraction.
        sparsity = base.manifest.sparsity or None
    before = weights.arrays(base.params) if base else {}
    inherited = {
        weights.parse(name).path: sparse_storage.nonzero(record, before[name].shape)
        for name, record in (base.manifest.storage if base else {}).items()
    }
    records = {}
    for name in sorted(weights.value_names(params)):
        kept = inherited.get(weights.parse(name).path) if sparsity is None else 1 - sparsity
        if kept is not None:
            records[name] = {"format": sparse_storage.BITMASK, "values": round(kept * math.prod(arrays[name].shape))}
    return records


def masters(params: Params, trains: Callable[[str], bool] = lambda _: True) -> Params:
    """Return abstract parameters in the dtypes that training saves: trained floating-point arrays become float32.

    Args:
        params: Parameters as `jax.ShapeDtypeStruct`s.
        trains: Function that returns whether the array with a given name is trained. By default, all arrays are
            trained.
    """
    arrays = {
        name: a.update(dtype=jnp.dtype("float32")) if trains(name) and jnp.issubdtype(a.dtype, jnp.floating) else a
        for name, a in weights.arrays(params).items()
    }
    return weights.rebuild(params, arrays)


def with_shardings(found: Artifact, mesh: Mesh) -> Artifact:
    """Add the shardings on `mesh` to the arrays of an abstract artifact, and return the artifact."""
    return Artifact(found.path, found.manifest, functional.laid_out(found.model, found.params, mesh))
