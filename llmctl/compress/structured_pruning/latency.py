"""Measure the time that models need for a prompt and for each new token, on one device.

The time does not depend on the values of the arrays, so the arrays are zeros. The models run in alternation, so that
other work of the machine slows all models equally. The result is the median over rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmctl.config.settings import MeshConfig
from llmctl.distributed import mesh as meshes
from llmctl.model import functional
from llmctl.model.config import ModelConfig
from llmctl.model.generate.decode import Decoder

NEW = 16
"""Number of new tokens over which the time per token is averaged."""
ROUNDS = 9
"""Number of timed rounds."""

Shapes = tuple[ModelConfig, Any]
"""Config and parameters of a model. The parameters may be abstract."""


def measure(models: Mapping[str, Shapes], seq_len: int, dtype: Any = jnp.float32) -> dict[str, dict[str, float]]:
    """Return the median times in seconds of each model: {name: {"prefill": time, "decode": time}}.

    - "prefill": the time for one text of `seq_len` tokens. If the model generates text, the first new token is
      included. If the model's maximum length is shorter, the text has the maximum length.
    - "decode": the time per further token. This entry is omitted if the model does not generate text.
    """
    with meshes.use(meshes.make(MeshConfig(), jax.local_devices()[:1])):
        runs = {name: _runner(cfg, _zeros(params), seq_len, dtype) for name, (cfg, params) in models.items()}
        for run in runs.values():
            run()  # compiles
        rounds = [{name: run() for name, run in runs.items()} for _ in range(ROUNDS)]
    return {
        name: {part: float(np.median([found[name][part] for found in rounds])) for part in rounds[0][name]}
        for name in runs
    }


def _zeros(params: Any) -> Any:
    device = jax.local_devices()[0]
    return jax.tree.map(lambda a: jax.device_put(jnp.zeros(a.shape, a.dtype), device), params)


def _runner(cfg: ModelConfig, params: Any, seq_len: int, dtype: Any) -> Callable[[], dict[str, float]]:
    """Return a function that runs a model once, and returns the times {"prefill", "decode"}."""
    if cfg.architecture == "encoder" or not cfg.head_kind.vocabulary:
        batch = functional.example_batch(cfg, 1, seq_len)
        batch = {k: jnp.zeros_like(v) if "tokens" in k else jnp.ones_like(v) for k, v in batch.items()}
        forward = jax.jit(partial(functional.hidden, cfg, dtype=dtype))

        def read() -> dict[str, float]:
            start = time.perf_counter()
            jax.block_until_ready(forward(params, batch))
            return {"prefill": time.perf_counter() - start}

        return read
    decoder = Decoder(cfg, params, dtype)
    prompt = [0] * max(1, min(seq_len, cfg.max_seq_len - NEW - 1))

    def write() -> dict[str, float]:
        tokens = decoder.generate([prompt], NEW + 1, chunk=NEW)
        times = [time.perf_counter()]
        for _ in range(2):
            jax.block_until_ready(next(tokens))
            times.append(time.perf_counter())
        return {"prefill": times[1] - times[0], "decode": (times[2] - times[1]) / NEW}

    return write
