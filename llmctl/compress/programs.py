"""Describe the compiled functions of pruning and quantization, so that `llmctl plan` can estimate their cost.

A program is a function that JAX compiles, with abstract arguments. Compression runs calibration batches through the
model layer by layer (calibration walk), and changes one weight at a time. Each of these steps is a program. During the
walk, memory holds the arguments of the program, all parameters and the residual stream of every batch. Changed layers
replace the unchanged layers in the parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llmctl.artifacts.artifact import Artifact
from llmctl.compress.calibration import calibration_data, gradients
from llmctl.compress.calibration.layer_passes import empty, passes
from llmctl.compress.calibration.layer_stack import putter
from llmctl.compress.calibration.settings import CalibrationConfig
from llmctl.compress.calibration.statistics import Collect, LayerStats
from llmctl.compress.pruning.sparse_method import SparseMethod
from llmctl.distributed import mesh as meshes
from llmctl.evaluate.tasks.base import Task
from llmctl.evaluate.tasks.registry import of
from llmctl.model import flops as cost
from llmctl.model import functional, layerwise, weights
from llmctl.model.array_bytes import bytes_of
from llmctl.model.config import ModelConfig
from llmctl.model.program import Cost, Pass, Program, Tree


@dataclass(frozen=True)
class Walk:
    """Describe a calibration walk by abstract arrays, and return the compiled programs of the walk."""

    batch: Mapping[str, Any]
    """Batch of abstract arrays [B, T], by name."""
    batches: int
    """Number of batches."""
    dtype: str
    task: Task
    """Task that the model was trained for. Its loss defines the gradients."""
    mesh: Mesh
    parent: Tree
    """Abstract parameters of the model before compression. These parameters stay in memory even if the walk reads other
    parameters, for example with merged adapters.
    """

    @classmethod
    def of(cls, config: CalibrationConfig, base: Artifact, mesh: Mesh, labels: bool = False) -> Walk:
        """Describe, by abstract arrays, the calibration walk of a command that compresses the artifact `base`.

        Args:
          config: calibration settings.
          base: the artifact, with abstract arrays.
          mesh: the devices.
          labels: whether batches contain labels or targets.
        """
        batch, batches = calibration_data.abstract(config, base, mesh, labels=labels)
        return cls(batch, batches, config.dtype, of(base.manifest), mesh, base.params)

    def programs(
        self, model: ModelConfig, params: Tree, collect: Collect, changes: bool, after: Tree | None = None
    ) -> list[Program]:
        """Return the programs that `llmctl.compress.calibration.calibrate.walk` runs per layer and batch.

        The programs run the decoder's layers, or the encoder's layers if the model has no decoder.

        Args:
          model: config of the model.
          params: abstract parameters of the model.
          collect: function that selects the statistics (see `walk`).
          changes: whether the walk changes layers.
          after: abstract parameters after the walk, if weights change their type, such as from dense to quantized.
        """
        mesh, batch, dtype = self.mesh, dict(self.batch), jnp.dtype(self.dtype)
        held = [] if params is self.parent else [self.parent]
        size, seq_len = batch["tokens"].shape
        stack = functional.stacks(model)[-1]
        whole = meshes.replicated(mesh)

        def over_rows(a: Any) -> Any:
            split = a.ndim > 0 and a.shape[0] == size
            return a.update(sharding=meshes.batch_sharding(mesh, a.ndim) if split else whole)

        with meshes.use(mesh):
            memory = (
                jax.eval_shape(partial(layerwise.encode, model, dtype=dtype), params, batch)
                if model.encoder_layers
                else None
            )
            start = partial(layerwise.embed, model, dtype=dtype)
            carry = jax.tree.map(over_rows, jax.eval_shape(start, params, batch, memory))
            layer = layer_of(params, stack)
            new = layer if after is None else layer_of(after, stack)
            made = {} if after is None else _of_other_type(params, after, stack)
            fresh = empty(model, stack, layer, carry, collect, dtype)
        stats = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole), fresh)
        look, advance = passes(model, stack, dtype)
        index = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
        depth = functional.depth(model, stack)
        waiting = [(carry, batch)] * (self.batches - 1)
        outputs = [carry.x_BTD] * self.batches if changes else []  # of the unchanged layer
        no_layers = model.model_copy(update={"layers": 0})
        flops = (cost.row(model, seq_len) - cost.row(no_layers, seq_len)) / model.layers * size

        def program(title: str, fn: Any, takes: tuple[Any, ...]) -> Program:
            def trace() -> Any:
                with meshes.use(mesh):
                    return fn.trace(*takes)

            layers, held_stats = ([], stats) if fn is look else ([layer], LayerStats({}, ()))
            kept = outputs[1:]  # an output of this batch is a result or an argument of the program
            return Program(
                title, model, mesh, trace, flops=flops, tokens=size * seq_len, rows=size, seq_len=seq_len,
                dtype=str(dtype), steps=depth * self.batches, parameters=[params, held, made, layers, takes[0]],
                batch=[[(carry, batch)] * self.batches, kept if fn is look else outputs], cache=held_stats,
                beside=[params, held, made, layers, waiting, kept],
                work=Pass(layers=1, attention="xla", statistics=held_stats.of_inputs),
            )  # fmt: skip

        title = "statistics of a layer" if changes else "influence of a layer"
        found = [program(title, look, (layer, index, carry, batch, stats))]
        if changes:
            found.append(program("pass through a changed layer", advance, (new, index, carry, carry.x_BTD, batch)))
            found.append(_layer_write(found[0], params, held, stack, new, index, made))
        return found

    def sums(self, params: Tree, method: SparseMethod) -> Tree:
        """Return the gradient sums that the score of a pruning method reads, as abstract arrays.

        The result is a dictionary: path of a matrix -> name of the sum -> array.
        """
        inner = {m.path: m.weight for m in weights.matrices(params, "block")}
        names = method.gradients
        return {
            path: {name: jax.ShapeDtypeStruct(w.shape, jnp.float32, sharding=sharding_of(w)) for name in names}
            for path, w in inner.items()
        }

    def gradients(self, model: ModelConfig, params: Tree, method: SparseMethod) -> Program:
        """Return the program that `llmctl.compress.calibration.gradients.accumulate` runs per batch."""
        batch, sums, names = dict(self.batch), self.sums(params, method), method.gradients
        held = [] if params is self.parent else [self.parent]
        size, seq_len = batch["tokens"].shape
        matrices = {m.path: m.weight for m in weights.matrices(params, "block")}
        inner = {p: jax.ShapeDtypeStruct(w.shape, jnp.float32, sharding=sharding_of(w)) for p, w in matrices.items()}
        copied = {p: w for p, w in matrices.items() if not weights.is_plain(w) or w.dtype != jnp.float32}
        copies = {p: inner[p] for p in copied}

        def trace() -> Any:
            with meshes.use(self.mesh):
                return gradients.adder(self.task, model, names, jnp.dtype(self.dtype)).trace(inner, params, sums, batch)

        return Program(
            "gradients of the loss", model, self.mesh, trace, flops=4 * cost.row(model, seq_len) * size,
            tokens=size * seq_len, rows=size, seq_len=seq_len, dtype=self.dtype, remat="full", steps=self.batches,
            parameters=[params, held, copies], batch=[batch] * self.batches, cache=sums,
            beside=[held, copied, [batch] * (self.batches - 1)],
        )  # fmt: skip


def sharding_of(w: Tree) -> Any:
    """Return the sharding of a weight. If a weight is stored as several arrays, return the sharding of the first."""
    return jax.tree.leaves(w)[0].sharding


def merged(model: ModelConfig, params: Tree, mesh: Mesh) -> Tree:
    """Return the abstract parameters with low-rank adapters merged, as `llmctl.compress.lowrank.merged` does."""
    if not weights.adapted(params):
        return params
    return functional.laid_out(model, jax.eval_shape(weights.merge_adapters, params), mesh)


def _of_other_type(params: Tree, after: Tree, stack: str) -> Tree:
    """Return the stacked weights of `after` whose storage differs from `params`, by path in the layer. An example is
    a weight that is a plain array in `params` and a quantized weight node in `after`."""
    old, new = (weights.flatten(tree[stack]["blocks"]) for tree in (params, after))
    return {path: w for path, w in new.items() if jax.tree.structure(w) != jax.tree.structure(old[path])}


def _layer_write(walk: Program, params: Tree, held: Tree, stack: str, layer: Tree, index: Any, made: Tree) -> Program:
    """Return the program that writes one changed layer into the stacked parameters, in place.

    `made` has new stacked arrays for the weights that change their type, such as from dense to quantized. The program
    writes these weights into `made`.
    """
    blocks = params[stack]["blocks"]
    rest = {**params, stack: {name: part for name, part in params[stack].items() if name != "blocks"}}
    new, beside = layer, [rest, held, layer, walk.batch]
    if made:
        blocks, flat = made, weights.flatten(layer)
        new = {path: flat[path] for path in made}
        beside = [params, held, layer, walk.batch]
    return replace(
        walk, title="changed layer put back", trace=lambda: putter(blocks).trace(blocks, new, index), flops=0.0,
        tokens=0, rows=0, seq_len=0, steps=functional.depth(walk.model, stack), parameters=[walk.parameters, layer],
        cache=(), beside=beside, work=Cost(0.0, 2.0 * bytes_of(new)),
    )  # fmt: skip


def layer_of(params: Tree, stack: str) -> Tree:
    """Return the abstract arrays of one layer of the encoder or the decoder."""

    def one(a: Any) -> Any:
        spec = a.sharding.spec
        sharding = a.sharding.update(spec=type(spec)(*spec[1:]))
        return jax.ShapeDtypeStruct(a.shape[1:], a.dtype, sharding=sharding)

    return jax.tree.map(one, params[stack]["blocks"])
