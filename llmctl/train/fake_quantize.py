"""Train with rounded matrices, so that quantization harms the model less (quantization-aware training).

    job = fake_quantize.attached(config.fake_quantize, job)

In every step, the loss reads rounded matrices. The matrices are rounded by the scheme of the chosen format, with scales
computed from the current weights. The rounding has the gradient of the identity (straight-through estimator; Bengio et
al., 2013, arXiv:1308.3432). The optimizer updates the weights before rounding, and the artifact stores these weights.
The stage `quantize` rounds the weights with the same scheme, so the quantized artifact computes the function that was
trained. Validation measures the same function.

With `scales = "learned"`, the scales are trained too (`llmctl.train.learned_scales`).

Zeros stay zeros, because every format represents 0. In each step, the rounded matrices need as much memory as the
unrounded matrices.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax

from llmctl.artifacts.artifact import Artifact
from llmctl.compress.quantization.quantize import chosen
from llmctl.compress.quantization.schemes import SCHEMES, inputs_per_scale
from llmctl.compress.quantization.settings import QuantizeConfig
from llmctl.config.errors import RequestError
from llmctl.model import weights
from llmctl.train import learned_scales
from llmctl.train.fake_quantize_settings import FakeQuantizeConfig
from llmctl.train.job import Job, Params

CHANGING = (
    *("method", "clip", "smooth", "rotate", "symmetric", "double_quantize", "activations"),
    *("average_bits", "max_perplexity_increase"),
)
"""Settings of the stage `quantize` that training simulates only if they have their default values."""


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def straight_through(w: jax.Array, scheme: str, inputs: int, group: int) -> jax.Array:
    """Return a weight rounded by a quantization scheme, with the gradient of the identity.

    >>> from jax import numpy as jnp
    >>> w = jnp.array([[7.5], [-3.2], [0.49]])
    >>> straight_through(w, "int4", -2, 0)[:, 0].tolist()
    [7.0, -3.0, 0.0]
    >>> jax.grad(lambda w: jnp.sum(straight_through(w, "int4", -2, 0) ** 2))(w)[:, 0].tolist()
    [14.0, -6.0, 0.0]

    Args:
      w: matrix [..., I, O], or table [V, D].
      scheme: name in `SCHEMES`.
      inputs: axis of the inputs: -2 for a matrix, -1 for a table.
      group: number of inputs per scale; 0 for all inputs.
    """
    return SCHEMES[scheme](w, inputs, group).dense(w.dtype)


def _forward(w: jax.Array, scheme: str, inputs: int, group: int) -> tuple[jax.Array, None]:
    return straight_through(w, scheme, inputs, group), None


def _backward(scheme: str, inputs: int, group: int, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    return (gradient,)


straight_through.defvjp(_forward, _backward)


def rounded(asked: FakeQuantizeConfig, params: Params) -> Params:
    """Return the parameters that the loss reads: the chosen matrices rounded, and the other arrays unchanged."""
    if not asked.active or asked.learns:  # learned scales are part of the parameters that training returns
        return params
    flat = weights.flatten(params)
    for path, target in chosen(flat, asked.quantization).items():
        flat[path] = straight_through(flat[path], target.format.scheme, target.inputs, target.format.group)
    return weights.unflatten(flat)


def check(asked: FakeQuantizeConfig, params: Params) -> None:
    """Check that the matrices of a model can be rounded. The arrays may be abstract.

    Raises:
      RequestError: If the group size does not divide the number of inputs of a matrix. If a matrix is quantized or has
        an adapter. If a pattern of the rules matches no matrix.
    """
    if not asked.active:
        return
    try:
        chosen(weights.flatten(params), asked.quantization)
    except RequestError as e:
        raise RequestError(f"fake_quantize: {e}") from None


def attached(asked: FakeQuantizeConfig, job: Job) -> Job:
    """Return the job with rounded matrices in loss and validation. If the settings have no format, return the
    unchanged job."""
    if not asked.active:
        return job
    if asked.learns:
        return learned_scales.attached(asked, job)
    read, loss, validate = partial(rounded, asked), job.loss, job.validate
    compiled = jax.jit(read)

    def of_rounded(params: Params, *args: Any, **extra: Any) -> Any:
        return loss(read(params), *args, **extra)

    return dataclasses.replace(job, loss=of_rounded, validate=validate and (lambda params: validate(compiled(params))))


def log_lines(base: Artifact | None, config: QuantizeConfig) -> list[str]:
    """Return a list with one log line if `config` differs from the quantization that `base` was trained for.

    The line names the settings that differ. If `base` was trained without quantization-aware training, or if no setting
    differs, return [].
    """
    asked = base.manifest.config.get("fake_quantize") if base else None
    if not isinstance(asked, dict) or not asked.get("format"):
        return []
    trained = FakeQuantizeConfig.model_validate(asked)
    differ = [name for name in ("rules", "embeddings", "head") if getattr(config, name) != getattr(trained, name)]
    fields = type(config).model_fields
    differ += [name for name in CHANGING if getattr(config, name) != fields[name].default]
    was, now = (
        f"{name} with group {inputs_per_scale(name, group)}"
        for name, group in ((trained.format, trained.group), (config.scheme_name, config.group))
    )
    if was != now:
        return [f"the parent was trained for {was}, and not for {now}"]
    return [f"the parent was trained for {was} with other settings: {', '.join(differ)}"] if differ else []
