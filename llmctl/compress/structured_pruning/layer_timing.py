"""Measure the latencies of the unpruned model and of a few smaller layers, for a latency budget.

A few layers are compiled together, with a vocabulary of a few tokens. Each measurement runs in alternation with a few
layers of the unpruned model. All latencies are in microseconds. They are saved, so that an interrupted run continues
with the same numbers.

Shapes: S stacks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np

from llmctl.compress.calibration.measurements import Measurements
from llmctl.compress.structured_pruning import channel_cut, latency, shrink, vocabulary
from llmctl.compress.structured_pruning.latency import Timing
from llmctl.compress.structured_pruning.measured_walk import measure_once
from llmctl.compress.structured_pruning.search_space import QUERIES, count
from llmctl.distributed import processes
from llmctl.model import functional, wiring
from llmctl.model.array_bytes import bytes_of
from llmctl.model.config import ModelConfig

Params = dict[str, Any]

LAYERS = 4
"""Number of layers that are compiled together."""
TOKENS = 8
"""Size of the vocabulary when layers are measured: small, so that the output head takes little time."""
CACHED = 16 << 20
"""Maximum size in bytes of parameters that stay in a cache of the processor while a model generates tokens."""


@dataclass(frozen=True)
class LayerTimer:
    """Measure the latency of models with few layers, in microseconds."""

    cfg: ModelConfig
    params: Params
    """Abstract parameters."""
    timing: Timing
    dtype: Any
    saved: Measurements

    @property
    def stacks(self) -> tuple[str, ...]:
        """Return the stacks that run in the measured phase. While tokens are generated, only the last stack runs."""
        stacks = functional.stacks(self.cfg)
        return tuple(stacks[-1:] if self.timing.phase == "decode" else stacks)

    def overhead(self, model: ModelConfig) -> tuple[float, np.ndarray]:
        """Return the latency of a model without layers, and the latency of one layer of each stack, [S]."""
        depths_SS = self._depths()
        equations = np.pad(np.vstack([np.ones(len(depths_SS)), depths_SS]), ((0, 0), (1, 0)), constant_values=1)
        found = np.linalg.solve(equations, [self._few(model, depths) for depths in equations[:, 1:]])
        return float(found[0]), found[1:]

    def layers(self, model: ModelConfig, overhead: float) -> np.ndarray:
        """Return the latency of one layer of each stack, [S]."""
        depths_SS = self._depths()
        return np.linalg.solve(depths_SS, [self._few(model, depths) - overhead for depths in depths_SS])

    def one_layer(self, model: ModelConfig, tokens: int) -> float:
        """Return the latency of a model with one layer per stack, and a vocabulary of the size `tokens`."""
        depths = np.ones(len(self.stacks))
        return self._once(model, depths, tokens, lambda: self._run(model, depths, tokens, 1, latency.NEW))

    def complete(self) -> float:
        """Return the latency of the unpruned model."""
        cfg = self.cfg
        depths = np.array([functional.depth(cfg, stack) for stack in self.stacks])
        return self._once(cfg, depths, cfg.vocab_size, lambda: self._compared(cfg, self.params, 1, latency.NEW))

    def _depths(self) -> np.ndarray:
        """Return the numbers of layers of the models to measure, [S, S]: one row per model, one column per stack.

        The model of row s has several layers of stack s, and one layer of every other stack.
        """
        several = min(2 * LAYERS, max(LAYERS, self.cfg.window_every if self.cfg.window else 0))
        return np.ones((len(self.stacks), len(self.stacks))) + (several - 1) * np.eye(len(self.stacks))

    def _few(self, model: ModelConfig, depths: np.ndarray) -> float:
        """Return the latency of a model with few layers and a small vocabulary."""
        tokens = min(TOKENS, self.cfg.vocab_size)
        return self._once(model, depths, tokens, lambda: self._run(model, depths, tokens, *self._repeats(depths)))

    def _repeats(self, depths: np.ndarray) -> tuple[int, int]:
        """Return the number of copies of a few layers, and the number of new tokens per call.

        All copies together have at least as many layers as the model. A model of at most `CACHED` bytes has one copy.
        Each call then generates several tokens. Otherwise, the start of the call would take most of the time.
        """
        if bytes_of(self.params) <= CACHED:
            return 1, latency.NEW
        every = [functional.depth(self.cfg, stack) for stack in self.stacks]
        return max(-(-n // int(few)) for n, few in zip(every, depths, strict=True)), 1

    def _once(self, model: ModelConfig, depths: np.ndarray, tokens: int, compute: Callable[[], float]) -> float:
        """Return a latency that an interrupted run saved, or measure and save it."""
        sizes = (*depths.astype(int), model.kv_heads, count(model, QUERIES), model.d_ff, model.d_model, tokens)
        return self._saved(".".join(map(str, sizes)), compute)

    def _saved(self, name: str, compute: Callable[[], float]) -> float:
        """Return a number that an interrupted run saved, or compute and save it. All processes get the same number."""
        name = f"latency.{self.timing.phase}.{name}"
        return measure_once(self.saved, name, lambda: max(processes.gather(compute())))

    def _run(self, model: ModelConfig, depths: np.ndarray, tokens: int, copies: int, new: int) -> float:
        return self._compared(*self._shaped(model, depths, tokens), copies, new)

    def _shaped(self, model: ModelConfig, depths: np.ndarray, tokens: int) -> tuple[ModelConfig, Params]:
        few = {stack: int(n) for stack, n in zip(self.stacks, depths, strict=True)}
        return shaped(self.cfg, self.params, model, few, tokens)

    def _compared(self, cfg: ModelConfig, params: Params, copies: int, new: int) -> float:
        """Return the latency of a model, measured in alternation with a few layers of the unpruned model.

        The latency is multiplied by (first measurement of these layers) / (present measurement of these layers).
        """
        reference, first = self._reference
        run = self._runner(cfg, params, copies, new)
        with latency.on_one_device():
            own, now = latency.minima([run, reference])
        return 1e6 * own * first / now

    @cached_property
    def _reference(self) -> tuple[latency.Run, float]:
        """Return a function that runs a few layers of the unpruned model, and its first measured time in seconds."""
        depths, tokens = self._depths()[-1], min(TOKENS, self.cfg.vocab_size)
        run = self._runner(*self._shaped(self.cfg, depths, tokens), *self._repeats(depths))
        with latency.on_one_device():
            return run, self._saved("reference", lambda: latency.minima([run])[0])

    def _runner(self, cfg: ModelConfig, params: Params, copies: int, new: int) -> latency.Run:
        with latency.on_one_device():
            made = [latency.zeros(params) for _ in range(copies)]
            return latency.runner(cfg, made, self.timing, self.dtype, new)


def shaped(
    cfg: ModelConfig, params: Params, target: ModelConfig, depths: Mapping[str, int], tokens: int
) -> tuple[ModelConfig, Params]:
    """Return the config and the abstract parameters of a model with other sizes.

    Args:
      cfg: config of the model.
      params: parameters of the model; they may be abstract. The arrays keep their types.
      target: config with the hidden width, the heads and the neurons.
      depths: number of layers by stack. A stack that is not named gets one layer.
      tokens: number of tokens in the vocabulary.
    """
    models: list[ModelConfig] = []
    sizes = {field: getattr(target, field) for field in ("heads", "kv_heads", "d_ff")}

    def small(p: Params) -> Params:
        model = cfg  # the vocabulary and the channels first, because their axes are found by tracing each config
        if tokens != cfg.vocab_size:
            model, p = vocabulary.cut(model, p, np.arange(tokens))
        if target.d_model != cfg.d_model:
            model, p = channel_cut.cut_channels(model, p, np.arange(target.d_model))
        every = {stack: functional.depth(cfg, stack) for stack in functional.stacks(cfg)}
        model, p = shrink.drop_layers(
            model, p, {stack: [i % n for i in range(depths.get(stack, 1))] for stack, n in every.items()}
        )
        narrow = model.model_copy(update=sizes)
        kept = {
            stack: {
                units.name: [np.arange(after.count)] * functional.depth(model, stack)
                for units, after in zip(wiring.units(model, stack), wiring.units(narrow, stack), strict=True)
                if units.count != after.count
            }
            for stack in functional.stacks(model)
        }
        model, p = shrink.cut(model, p, narrow, kept)
        models.append(model)
        return p

    made = jax.eval_shape(small, params)
    return models[0], made
