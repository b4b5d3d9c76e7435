"""Measure the time that models need for a prompt and for each new token, on one device.

The time does not depend on the values of the arrays, so the arrays are zeros. The result is the minimum over rounds,
because other work of the machine can only add time. Several models run in alternation.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from llmctl.config.errors import RequestError
from llmctl.config.settings import MeshConfig
from llmctl.distributed import mesh as meshes
from llmctl.model import functional
from llmctl.model.config import ModelConfig
from llmctl.model.generate.decode import Decoder
from llmctl.model.generate.padded_prompts import padded_ends
from llmctl.model.generate.sampling import Sampling, row_keys

NEW = 16
"""Number of new tokens over which the time per token is averaged."""
ROUNDS = 9
"""Number of timed rounds."""

Phase = Literal["prefill", "decode"]
Run = Callable[[], list[float]]
"""Function that runs a model, and returns the seconds of each call of its program."""
Shapes = tuple[ModelConfig, Any]
"""Config and parameters of a model. The parameters may be abstract."""


@dataclass(frozen=True)
class Timing:
    """Describe a latency measurement: a phase of text generation, the number of texts, and the number of tokens per
    text.

    - "prefill": the time for all texts together. If the model generates text, the first new token is included.
    - "decode": the time per further token of every text.
    """

    phase: Phase
    rows: int = 1
    context: int = 512

    def __str__(self) -> str:
        """Return the description for a log line."""
        return f"{self.phase}, {self.rows:,} x {self.context:,} tokens"


def generates(cfg: ModelConfig) -> bool:
    """Return whether the model generates text."""
    return cfg.architecture != "encoder" and cfg.head_kind.vocabulary


def timing(cfg: ModelConfig, phase: Phase, rows: int, context: int) -> Timing:
    """Return the `Timing` for a model. The context is reduced so that a few new tokens fit the maximum length.

    Raises:
      RequestError: If the model does not generate text, but `phase` is "decode".
    """
    if phase == "decode" and not generates(cfg):
        raise RequestError(
            f"budget.latency: a model with {cfg.architecture!r} stacks and head {cfg.head!r} does not generate text; "
            "set budget.latency_of = 'prefill'"
        )
    return Timing(phase, rows, max(1, min(context, cfg.max_seq_len - (NEW + 1 if generates(cfg) else 0))))


def phases(cfg: ModelConfig, context: int) -> list[Timing]:
    """Return a `Timing` of one text for each phase of the model: "prefill" and, if the model generates text,
    "decode"."""
    names: tuple[Phase, ...] = ("prefill", "decode") if generates(cfg) else ("prefill",)
    return [timing(cfg, name, 1, context) for name in names]


def measure(
    models: Mapping[str, Shapes], timings: Sequence[Timing], dtype: Any = jnp.float32
) -> dict[str, dict[str, float]]:
    """Return the times in seconds of each model: {name: {phase: time}}. The models run in alternation."""
    with on_one_device():
        runs = {
            (name, t.phase): runner(cfg, [zeros(params)], t, dtype, NEW)
            for name, (cfg, params) in models.items()
            for t in timings
        }
        found = minima(list(runs.values()))
    out: dict[str, dict[str, float]] = {name: {} for name in models}
    for (name, phase), seconds in zip(runs, found, strict=True):
        out[name][phase] = seconds
    return out


def minima(runs: Sequence[Run]) -> list[float]:
    """Return the time of each function in seconds per call. A first round compiles the programs.

    The time of a call is the minimum over `ROUNDS` rounds. The result is the mean over calls.
    """
    for run in runs:
        run()
    rounds = [[run() for run in runs] for _ in range(ROUNDS)]
    return [float(np.mean(np.min(times, axis=0))) for times in zip(*rounds, strict=True)]


@contextmanager
def on_one_device() -> Iterator[None]:
    """Set the current mesh to the first local device, for the code in a `with` block."""
    with meshes.use(meshes.make(MeshConfig(), jax.local_devices()[:1])):
        yield


def zeros(params: Any) -> Any:
    """Return zeros in the shapes and types of parameters, on the current mesh's device."""
    device = meshes.device()
    # `np.full` writes every page. The pages of `np.zeros` would all be one page of the system, which a cache holds.
    return jax.tree.map(lambda a: jax.device_put(np.full(a.shape, 0, a.dtype), device), params)


def runner(cfg: ModelConfig, copies: Sequence[Any], timing: Timing, dtype: Any = jnp.float32, tokens: int = 1) -> Run:
    """Return a function that runs a model, and returns the seconds of each copy, per prefill or per new token.

    Args:
      cfg: config of the model.
      copies: several copies of the parameters, which run one after the other. A single small copy could stay in a cache
          of the processor. It would then be faster than the same layers in a large model.
      timing: description of the measurement.
      dtype: dtype of the computation.
      tokens: number of new tokens that one call of the compiled function generates, if the phase is "decode".
    """
    if not generates(cfg):
        batch = functional.example_batch(cfg, timing.rows, timing.context)
        batch = {k: jnp.zeros_like(v) if "tokens" in k else jnp.ones_like(v) for k, v in batch.items()}
        forward = jax.jit(partial(functional.hidden, cfg, dtype=dtype))
        return lambda: _seconds([partial(forward, params, batch) for params in copies])
    decoder, weights = Decoder(cfg, {}, dtype), []
    for params in copies:
        decoder.set_params(params)
        weights.append(decoder.weights)
    inputs, slots = decoder.inputs([[0] * timing.context] * timing.rows, NEW + 1)
    decoder.check_cache(timing.rows * len(copies), slots)
    keys, ends, rules = row_keys(0, timing.rows), jnp.asarray(padded_ends(())), Sampling()
    first = partial(decoder.first, slots=slots, rules=rules)
    if timing.phase == "prefill":
        prefill = jax.jit(first)
        return lambda: _seconds([partial(prefill, one, inputs, keys, ends) for one in weights])

    @partial(jax.jit, donate_argnums=1)
    def step(served: Any, state: Any) -> Any:
        return jax.lax.fori_loop(0, tokens, lambda _, s: decoder.one(served, s, keys, ends, rules), state)

    shapes = jax.eval_shape(first, weights[0], inputs, keys, ends)
    states = [zeros(shapes) for _ in weights]

    def decode() -> list[float]:
        def one(i: int) -> Any:
            states[i] = step(weights[i], states[i])
            return states[i]

        return [seconds / tokens for seconds in _seconds([partial(one, i) for i in range(len(weights))])]

    return decode


def _seconds(calls: Sequence[Callable[[], Any]]) -> list[float]:
    """Return the time in seconds that each call needs until its result is ready."""
    times = [time.perf_counter()]
    for call in calls:
        jax.block_until_ready(call())
        times.append(time.perf_counter())
    return np.diff(times).tolist()
