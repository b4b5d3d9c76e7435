"""Learn the scales of fake quantization together with the weights (LSQ; Esser et al., 2020, arXiv:1902.08153).

    job = learned_scales.attached(config.fake_quantize, job)

The job gets one more trained array per matrix: the logarithms of its scales. A step of Adam has the size of the
learning rate for every array. For scales of about 0.01, such a step would be too large, and could make the scales
negative. A step of the logarithm multiplies the scale by a factor near 1 (as in Jain et al., 2019, arXiv:1903.08066).

The initial scale is 2 mean|w| / sqrt(highest integer), as in LSQ. The mean is over the nonzero weights. The result of
the job has the matrices as `LearnedScale`, which the stage `quantize` converts to integers with equal values.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from llmctl.compress.quantization.quantize import Target, chosen
from llmctl.model import weights
from llmctl.model.weights import LearnedScale
from llmctl.model.weights.learned_scale import limits, rounded, sums_of_groups
from llmctl.train.fake_quantize_settings import FakeQuantizeConfig
from llmctl.train.job import Job, Params

SMALLEST = 1e-8
"""Lowest initial scale. Groups that contain only zeros have this scale."""


def attached(asked: FakeQuantizeConfig, job: Job) -> Job:
    """Return the job with rounded matrices and trained scales. The arrays of the job may be abstract."""
    targets = chosen(weights.flatten(job.params), asked.quantization)
    names = {path: f"log_scale.{weights.module_path(path).replace('/', '.')}" for path in targets}
    bounds = {path: limits(_bits(target)) for path, target in targets.items()}
    loss, result = job.loss, job.result

    def split(extra: Params) -> tuple[dict[str, jax.Array], Params]:
        """Return (scales by path of the weight, other arrays)."""
        scales = {path: jnp.exp(extra[name]) for path, name in names.items()}
        own = {*names.values()}
        return scales, {name: a for name, a in extra.items() if name not in own}

    def of_rounded(params: Params, *args: Any, extra: Params, **more: Any) -> Any:
        scales, rest = split(extra)
        flat = weights.flatten(params)
        flat |= {
            path: rounded(flat[path], scale.astype(flat[path].dtype), bounds[path]) for path, scale in scales.items()
        }
        return loss(weights.unflatten(flat), *args, **({"extra": rest} if rest else {}), **more)

    def with_scales(params: Params, extra: Params) -> Params:
        scales, rest = split(extra)
        flat = weights.flatten(result(params, rest))
        for path, scale in scales.items():
            w = flat[path]
            flat[path] = LearnedScale(w, scale.astype(w.dtype), targets[path].format.scheme)
        return weights.unflatten(flat)

    extra = {**job.extra, **{names[path]: a for path, a in initial(job.params, targets).items()}}
    return dataclasses.replace(job, loss=of_rounded, result=with_scales, extra=extra)


def as_saved(asked: FakeQuantizeConfig, params: Params) -> Params:
    """Return abstract parameters as the artifact of the training stores them: weight nodes replace the rounded
    matrices.

    If the training learns no scales, return the parameters unchanged.
    """
    if not asked.learns:
        return params
    flat = weights.flatten(params)
    targets = chosen(flat, asked.quantization)
    for path, scale in initial(params, targets).items():
        w = flat[path]
        flat[path] = LearnedScale(w, scale.update(dtype=w.dtype), targets[path].format.scheme)
    return weights.unflatten(flat)


def initial(params: Params, targets: dict[str, Target]) -> dict[str, Any]:
    """Return the initial logarithms of scales, float32, replicated over the mesh, by path of the weight.

    If the parameters are abstract, the result is abstract too.
    """
    flat = weights.flatten(params)
    chosen = {path: flat[path] for path in targets}

    def fresh(chosen: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {path: _initial(w, targets[path]) for path, w in chosen.items()}

    leaf = next(iter(chosen.values()))
    replicated = NamedSharding(leaf.sharding.mesh, PartitionSpec())
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.tree.map(lambda a: a.update(sharding=replicated), jax.eval_shape(fresh, chosen))
    return jax.jit(fresh, out_shardings=replicated)(chosen)


def _initial(w: jax.Array, target: Target) -> jax.Array:
    axis = target.inputs % w.ndim
    groups = w.shape[axis] // target.format.group if target.format.group else 1
    shape = (*w.shape[:axis], groups, *w.shape[axis + 1 :])
    size = jnp.abs(w.astype(jnp.float32))
    total, count = sums_of_groups(size, shape), sums_of_groups((size > 0).astype(jnp.float32), shape)
    _, high = limits(_bits(target))
    return jnp.log(jnp.maximum(2 * total / jnp.maximum(count, 1) / high**0.5, SMALLEST))


def _bits(target: Target) -> int:
    return int(target.format.scheme.removeprefix("int"))
