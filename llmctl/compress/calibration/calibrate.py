"""Run calibration data through a model, layer by layer, to measure and change each layer (calibration walk).

The walk computes the embeddings of all batches, and then visits the layers in order, in three steps per layer:

1. The batches pass through the unchanged layer. Statistics of the inputs of every matrix are collected.
2. The compression method, if there is one, changes the layer.
3. The batches pass through the changed layer. The outputs are the inputs of the next layer. The layer's error is the
   difference between the outputs of steps 1 and 3.

The inputs of later layers therefore include the errors of earlier changes. Memory holds the parameters, one layer's
statistics, and the residual stream of every batch, before and after the layer. All layers of a stack (the encoder or
the decoder) run the same compiled functions.

A method is a function that takes a `Visit` (one layer with its statistics) and returns the layer's parameters. A
changed weight overwrites the unchanged weight in place if both have the same type. If the type changes, such as from
dense to quantized, the changed weights are stacked in new arrays. The unchanged weights are then freed when all layers
of the stack are finished.

Example:
    def change(visit: Visit) -> Layer:
        layer, visit.notes["matrices"] = prune_layer(visit.layer, visit.stats, method=method)
        return layer

    params, reports = walk(cfg, params, batches, moments, change, saved=Saved(ctx.work / "layers"))

Shapes: B batch, T sequence, D model width, N tokens of a batch, I inputs of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from llmctl.compress.calibration.gradients import Gradients, of_layer
from llmctl.compress.calibration.layer_files import Saved
from llmctl.compress.calibration.layer_passes import empty, empty_of_head, head_passes, passes, placed
from llmctl.compress.calibration.layer_stack import LayerStack, shard_like
from llmctl.compress.calibration.statistics import Collect, Stats
from llmctl.compress.calibration.walk_state import WalkState
from llmctl.config.errors import RequestError
from llmctl.distributed import host_memory
from llmctl.model import functional, layerwise
from llmctl.model.config import ModelConfig

Batch = dict[str, Any]
Layer = dict[str, Any]
HEAD = "head"
"""Value of `Visit.stack` for the output head, which belongs neither to the encoder nor to the decoder."""


@dataclass(frozen=True)
class Visit:
    """Describe one layer during a calibration walk: its parameters, statistics and gradients.

    The compression method gets a Visit as its argument.
    """

    stack: str
    """Stack of the layer: "encoder" or "decoder". For the output head, `HEAD`."""
    index: int
    """Index of the layer in its stack, from 0."""
    layer: Layer
    """Parameters of the layer. For the output head, the subtrees "lm_head" and "head"."""
    stats: Stats
    """Statistics of the inputs of each matrix, by the path of the matrix in the layer ("attn/q"). The argument
    `collect` of `walk` selects the statistics.
    """
    gradients: Gradients = field(default_factory=dict)
    """Gradients of the loss, summed over batches, by the path of the matrix in the layer. Empty for the output head,
    and if `walk` got no gradients.
    """
    notes: dict[str, Any] = field(default_factory=dict)
    """JSON data that the method may add about the layer. The data is copied to the layer's report and saved with the
    report."""
    inputs: Sequence[layerwise.Carry] = ()
    """Inputs of the layer, per batch. Empty for the output head."""
    outputs: Sequence[jax.Array] = ()
    """Outputs [B, T, D] of the unchanged layer, per batch. Empty for the output head."""
    batches: Sequence[Batch] = ()
    """The batches. Empty for the output head."""


Change = Callable[[Visit], Layer]
"""Compression method: a function that gets a `Visit`, and returns the changed parameters of the visited layer. A
changed weight must have the same type (dense, quantized, …) in all layers of a stack.
"""


@dataclass(frozen=True)
class LayerReport:
    """Store the measurements of one layer. Padding is not measured."""

    stack: str
    layer: int
    influence: float
    """Block influence: 1 - cosine similarity of the unchanged layer's input and output (arXiv:2403.03853). 0 for the
    output head."""
    error: float
    """Relative output error: ||changed output - unchanged output|| / ||unchanged output - input|| on the same inputs.
    The error is 1 if the layer is removed. For the output head the denominator is ||unchanged output||.
    """
    stats: Stats
    """Statistics of the inputs of each matrix. Empty if `walk` was called without `keep`, or if the layer was read from
    disk.
    """
    notes: dict[str, Any] = field(default_factory=dict)
    """JSON data that the method recorded for the layer."""

    @property
    def numbers(self) -> dict[str, Any]:
        """Return all fields except `stats`, by name, for JSON."""
        measured = {"influence": self.influence, "error": self.error}
        return {"stack": self.stack, "layer": self.layer, **measured, "notes": self.notes}


def walk(
    cfg: ModelConfig,
    params: dict[str, Any],
    batches: Sequence[Batch],
    collect: Collect,
    change: Change | None = None,
    *,
    gradients: Gradients | None = None,
    head: bool = False,
    keep: bool = False,
    progress: Callable[[LayerReport], None] | None = None,
    saved: Saved | None = None,
    state: WalkState | None = None,
    dtype: Any = jnp.float32,
) -> tuple[dict[str, Any], list[LayerReport]]:
    """Run batches through a model layer by layer, and measure or change each layer.

    The layers are visited in the order of the forward pass.

    Args:
      cfg: config of the model.
      params: parameters of the model. If `change` is given, the parameters of the layers are donated.
      batches: inputs of the model: tokens, segments, positions [B, T]. An encoder-decoder also has the same arrays with
          the prefix `encoder_`. Statistics and errors do not include padding (segment 0).
      collect: function that selects the statistic to collect for each matrix (see `Collect`).
      change: compression method, a function that returns the changed layer. If None, the walk only measures.
      gradients: gradients of the unchanged model, summed over batches (`gradients.accumulate`).
      head: whether to visit the output head too, after all layers.
      keep: whether to keep each layer's statistics in its report.
      progress: function that is called with each report.
      saved: folder in which changed layers are saved. If the folder already has a layer, the layer is read, and not
          changed again. The same compiled functions run saved layers and changed layers, so an interrupted walk gives
          bit-identical results.
      state: progress of a walk that only measures. Layers that an interrupted walk measured are not measured again.
      dtype: dtype of the computation.

    Returns:
      The parameters and one report per layer. The parameters are changed only if `change` is given.

    Raises:
      RequestError: If the batches contain only padding.
    """
    if not any(bool((batch["segments"] > 0).any()) for batch in batches):
        raise RequestError("calibration has no tokens: the data yields no example")
    reports: list[LayerReport] = []

    def note(report: LayerReport) -> None:
        reports.append(report)
        host_memory.trim()  # the heap otherwise grows by about twice the layer's size, because free blocks do not fit
        if progress is not None:
            progress(report)

    job = _Walk(cfg, batches, collect, change, gradients or {}, keep, note, saved, state, dtype)
    memories: list[Any] = [None] * len(batches)
    x_BTDs: list[jax.Array] = []
    for stack in functional.stacks(cfg):
        beside = stack == "encoder" and cfg.encoder_layers > 0
        start = jax.jit(partial(layerwise.embed_encoder if beside else layerwise.embed, cfg, dtype=dtype))
        extra = [() if beside else (memory,) for memory in memories]
        carries = [start(params, batch, *more) for batch, more in zip(batches, extra, strict=True)]
        params = job.stack(params, stack, carries, memories)
        if beside or head:
            end = jax.jit(partial(layerwise.finish, cfg, dtype=dtype), static_argnames=("stack",))
            memories = x_BTDs = [end(params=params, stack=stack, carry=carry) for carry in carries]
            if beside and state is not None:
                memories = state.memories(memories)
    return job.head(params, x_BTDs) if head else params, reports


@dataclass(frozen=True)
class _Walk:
    """Hold the arguments of `walk`, and process one stack (encoder or decoder) or the output head at a time."""

    cfg: ModelConfig
    batches: Sequence[Batch]
    collect: Collect
    change: Change | None
    gradients: Gradients
    keep: bool
    note: Callable[[LayerReport], None]
    saved: Saved | None
    state: WalkState | None
    dtype: Any

    def stack(
        self, params: dict[str, Any], stack: str, carries: list[layerwise.Carry], memories: Sequence[Any] = ()
    ) -> dict[str, Any]:
        """Visit all layers of one stack, and return the parameters with the changed layers.

        The list `carries` has one entry per batch: the inputs of the first layer. This method replaces these inputs by
        the outputs of the last layer. `memories` are the final states of the encoder, if the layers read them.
        """
        first = 0 if self.state is None else self.state.resume(stack, carries)
        observe, advance = passes(self.cfg, stack, self.dtype)
        layers = LayerStack(params[stack]["blocks"])
        for i in range(functional.depth(self.cfg, stack)):
            layer, index = layers[i], jnp.int32(i)
            if self.state is not None and i < first:
                stats = placed(empty(self.cfg, stack, layer, carries[0], self.collect, self.dtype))
                stats, share = self.state.layer(stack, i, stats)
                self.state.add(stack, i, stats, share)
                self.note(LayerReport(stack, i, share, 0.0, stats if self.keep else {}))
                continue
            done = self._saved(stack, i, layer)
            if done is None:
                stats = placed(empty(self.cfg, stack, layer, carries[0], self.collect, self.dtype))
                influence, outputs = jnp.zeros(2), []
                for n, batch in enumerate(self.batches):
                    out, stats, more = observe(layer, index, carries[n], batch, stats)
                    influence += more
                    if self.change is None:
                        carries[n] = out
                    else:
                        outputs.append(out.x_BTD)
                    del out
                gradients = of_layer(self.gradients, stack, i)
                visit = Visit(stack, i, layer, stats, gradients, inputs=carries, outputs=outputs, batches=self.batches)
                new, share = self._changed(visit), float(influence[0] / influence[1])
                report = LayerReport(stack, i, share, 0.0, stats if self.keep else {}, visit.notes)
                if self.state is not None:
                    self.state.add(stack, i, stats, share, carries, memories)
                del stats, visit  # Gram matrices are larger than the layer; they are freed before the next ones
            else:
                (new, report), outputs = done, []
            if self.change is not None:
                strayed = jnp.zeros(2)
                for n, batch in enumerate(self.batches):
                    before = outputs[n] if outputs else carries[n].x_BTD
                    carries[n], more = advance(new, index, carries[n], before, batch)
                    strayed += more
                    if outputs:
                        outputs[n] = None
                if done is None:
                    report = replace(report, error=_share(strayed))
                layers.put(i, new)
                if self.saved is not None and done is None:
                    self.saved.write(report.stack, report.layer, new, report.numbers)
            self.note(report)
        return {**params, stack: {**params[stack], "blocks": layers.finish()}} if self.change else params

    def head(self, params: dict[str, Any], x_BTDs: list[jax.Array]) -> dict[str, Any]:
        """Visit the output head, and return the parameters with the changed head.

        `x_BTDs` are the final hidden states of the batches.
        """
        observe, compare = head_passes(self.cfg, self.dtype)
        layer = {name: params[name] for name in ("lm_head", "head") if name in params}
        done = self._saved(HEAD, 0, layer)
        if done is None:
            stats = placed(empty_of_head(self.cfg, params, x_BTDs[0], self.batches[0], self.collect, self.dtype))
            for x_BTD, batch in zip(x_BTDs, self.batches, strict=True):
                stats = observe(params, x_BTD, batch, stats)
            visit = Visit(HEAD, 0, layer, stats)
            new = self._changed(visit)
            report = LayerReport(HEAD, 0, 0.0, 0.0, stats if self.keep else {}, visit.notes)
            del stats, visit
        else:
            new, report = done
        if self.change is not None:
            strayed, changed = jnp.zeros(2), {**params, **new}
            for x_BTD, batch in zip(x_BTDs, self.batches, strict=True):
                strayed += compare(params, changed, x_BTD, batch)
            report, params = replace(report, error=_share(strayed)), changed
            if self.saved is not None and done is None:
                self.saved.write(report.stack, report.layer, new, report.numbers)
        self.note(report)
        return params

    def _saved(self, stack: str, index: int, layer: Layer) -> tuple[Layer, LayerReport] | None:
        found = self.saved.read(stack, index, layer) if self.saved is not None and self.change is not None else None
        return found and (found[0], LayerReport(**found[1], stats={}))

    def _changed(self, visit: Visit) -> Layer:
        """Return the layer as changed by the method, sharded like the unchanged layer."""
        return visit.layer if self.change is None else shard_like(self.change(visit), visit.layer)


def _share(strayed: jax.Array) -> float:
    return float(jnp.sqrt(strayed[0] / jnp.maximum(strayed[1], 1e-30)))
