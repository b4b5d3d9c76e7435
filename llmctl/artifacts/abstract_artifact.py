"""Predict the artifact that a stage (such as pretrain or prune) would save: its manifest, and the shapes of its arrays.

An abstract array is a `jax.ShapeDtypeStruct`: a shape, a dtype and a sharding, without values.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from llmctl.artifacts import artifact
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
    stored: Callable[[str], bool] = lambda _: True,
) -> Artifact:
    """Return the artifact that a stage would save, with shapes and dtypes in place of arrays, and without digests.

    Args:
        config: Config of the stage.
        params: Parameters as `jax.ShapeDtypeStruct`s with shardings.
        model: Config of the saved model.
        base: Parent artifact, if there is one.
        labels: Class names; None uses those of `base`.
        task: Name of the task; None uses that of `base`.
        generation: Settings of generated answers; None uses those of `base`.
        pruned: Whether the weights are pruned, so that later stages keep their zeros; None uses the value of `base`.
        stored: Function that returns whether the saved folder contains the array with a given name. An adapter's folder
            contains only some arrays.
    """
    before = base.manifest if base else None
    parameters = weights.count(params)
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
        bytes=bytes_of([a for name, a in weights.arrays(params).items() if stored(name)], whole=True),
        sparsity=0.0,
        pruned=(before is not None and before.pruned) if pruned is None else pruned,
        bits=8 * bytes_of(params, whole=True) / parameters,
        digest="",
        weights={path: weights.describe(w) for path, w in weights.flatten(params).items()},
        **artifact.text_settings(keyed(config), before),
    )
    return Artifact(Path(config.title), manifest, params)


def masters(params: Params, trains: Callable[[str], bool] = lambda _: True) -> Params:
    """Return the shapes of parameters with the dtypes that training saves: float32 for trained floating-point arrays.

    Args:
        params: Parameters as `jax.ShapeDtypeStruct`s.
        trains: Function that returns whether the array with a given name is trained. By default, all arrays are.
    """
    arrays = {
        name: a.update(dtype=jnp.dtype("float32")) if trains(name) and jnp.issubdtype(a.dtype, jnp.floating) else a
        for name, a in weights.arrays(params).items()
    }
    return weights.rebuild(params, arrays)


def with_shardings(found: Artifact, mesh: Mesh) -> Artifact:
    """Return an abstract artifact (shapes and dtypes in place of arrays) with the shardings that its arrays have on
    `mesh`."""
    return Artifact(found.path, found.manifest, functional.laid_out(found.model, found.params, mesh))
