"""Describe the compiled functions of structured pruning, so that `llmctl plan` can estimate their cost."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llmctl.compress.calibration import calibration_loss
from llmctl.compress.calibration.statistics import nothing
from llmctl.compress.programs import Walk, layer_of, sharding_of
from llmctl.compress.structured_pruning import (
    budget_scan,
    channel_choice,
    channel_cut,
    compensation,
    gates,
    shrink,
    structured,
)
from llmctl.compress.structured_pruning.latency import NEW, Timing, generates
from llmctl.compress.structured_pruning.search_space import Space
from llmctl.compress.structured_pruning.structured_method import StructuredMethod
from llmctl.distributed import mesh as meshes
from llmctl.model import flops as cost
from llmctl.model import functional, weights, wiring
from llmctl.model.config import ModelConfig
from llmctl.model.generate.programs import Request, generation
from llmctl.model.program import Cost, Program, Tree


def structured_pruning(
    model: ModelConfig,
    params: Tree,
    target: ModelConfig,
    method: StructuredMethod,
    mesh: Mesh,
    walk: Walk,
    *,
    known: bool = False,
) -> list[Program]:
    """Return the programs that remove layers, channels, heads and neurons, so that the model has the config `target`.

    Programs are omitted for sizes that do not change. `known` is true if a search measured the importance.
    """
    found: list[Program] = []
    gradients = method.gradients and not known
    if structured.fewer_layers(model, target):
        found += [] if known else walk.programs(model, params, nothing, changes=False)
        model = model.model_copy(update={"layers": target.layers, "encoder_layers": target.encoder_layers})
        params = _of_depth(model, params, mesh)
    if model.d_model != target.d_model:
        found += [] if known else _channels(model, params, method, walk)
        if method.repair:
            changed = walk.programs(model, params, channel_choice.grams(model), changes=True)
            rows = {"attn/q": (model.d_model, target.d_model), "mlp/up": (model.d_model, target.d_model)}
            found += [*changed, _compensation(model, params, rows, changed[0], mesh)]
        model, params = _of_width(model, params, target.d_model, mesh)
    if structured.narrower(model, target):
        first = len(found)
        found += walk.programs(model, params, structured.collector(model, target, method), changes=True)
        found += [_gates(model, params, structured.gates(model, target), walk)] if gradients else []
        found += [_compensation(model, params, _rows(model, target), found[first], mesh)] if method.repair else []
    return found


def search(model: ModelConfig, params: Tree, space: Space, method: StructuredMethod, walk: Walk) -> list[Program]:
    """Return the programs of a budget search. The programs measure the importance of all heads, neurons and channels,
    and the loss of the candidates.

    The program for the loss has the unpruned sizes, which are the most expensive.
    """
    collect = budget_scan.collector(model, method)
    found = walk.programs(model, params, collect, changes=False)
    if method.gradients:
        units = {**budget_scan.unit_counts(model), **channel_choice.gate_paths(model, params)}
        found.append(_gates(model, params, units, walk))
    else:
        found += _channels(model, params, method, walk)
    return [*found, _loss(model, params, budget_scan.loss_steps(space), walk)]


def timed(model: ModelConfig, params: Tree, timing: Timing, mesh: Mesh, dtype: str) -> list[Program]:
    """Return the program whose latency a budget limits, for the unpruned model.

    A run measures this program, and the same program with few layers of other sizes.
    """
    if generates(model):
        request = Request(timing.rows, timing.context, NEW + 1)
        prefill, decode = generation(model, params, request, mesh, dtype=dtype)
        return [replace(decode if timing.phase == "decode" else prefill, steps=0)]
    batch = functional.example_batch(model, timing.rows, timing.context)
    batch = {k: a.update(sharding=meshes.replicated(mesh)) for k, a in jax.eval_shape(lambda: batch).items()}

    def trace() -> Any:
        with meshes.use(mesh):
            return jax.jit(partial(functional.hidden, model, dtype=jnp.dtype(dtype))).trace(params, batch)

    body = model.model_copy(update={"vocab_size": 0})
    flops = timing.rows * cost.row(body, timing.context)
    return [Program(
        "prefill", model, mesh, trace, flops=flops, tokens=timing.rows * timing.context, rows=timing.rows,
        seq_len=timing.context, dtype=dtype, parameters=params, batch=batch,
    )]  # fmt: skip


def _channels(model: ModelConfig, params: Tree, method: StructuredMethod, walk: Walk) -> list[Program]:
    """Return the programs that measure the importance of the hidden channels."""
    if method.gradients:
        return [_gates(model, params, channel_choice.gate_paths(model, params), walk)]
    if method.importance in ("contribution", "activation"):
        return walk.programs(model, params, channel_choice.collector(model, method), changes=False)
    return []


def _loss(model: ModelConfig, params: Tree, count: int, walk: Walk) -> Program:
    """Return the program that `llmctl.compress.structured_pruning.budget_scan.Scan.loss` runs per batch."""
    batch = dict(walk.batch)
    held = [] if params is walk.parent else [walk.parent]
    size, seq_len = batch["tokens"].shape
    flat = weights.flatten(params)
    read = {shrink.kernel_of(f"{s}/blocks/{p}") for s in wiring.stacks(model) for p in _readers(model, s)}
    masked = {path: flat[path] for path in sorted(read)}

    def trace() -> Any:
        with meshes.use(walk.mesh):
            return calibration_loss.loss_program(walk.task, model, jnp.dtype(walk.dtype)).trace(params, batch)

    return Program(
        "loss of smaller sizes", model, walk.mesh, trace, flops=cost.row(model, seq_len) * size, tokens=size * seq_len,
        rows=size, seq_len=seq_len, dtype=walk.dtype, steps=count * walk.batches, parameters=[params, held, masked],
        batch=[batch] * walk.batches, beside=[held, masked, [batch] * (walk.batches - 1)],
    )  # fmt: skip


def _readers(model: ModelConfig, stack: str) -> list[str]:
    """Return the paths of the matrices that read the outputs of heads or neurons."""
    return [path for units in wiring.units(model, stack) for path in units.readers]


def _of_depth(model: ModelConfig, params: Tree, mesh: Mesh) -> Tree:
    """Return abstract parameters in which each stack has as many layers as in the config `model`."""
    out = dict(params)
    for stack in functional.stacks(model):
        depth = functional.depth(model, stack)
        blocks = jax.tree.map(lambda a, n=depth: a.update(shape=(n, *a.shape[1:])), params[stack]["blocks"])
        out[stack] = {**params[stack], "blocks": blocks}
    return functional.laid_out(model, out, mesh)


def _of_width(model: ModelConfig, params: Tree, width: int, mesh: Mesh) -> tuple[ModelConfig, Tree]:
    """Return the config and the abstract parameters of the model with the hidden width `width`."""
    target = model.model_copy(update={"d_model": width})
    small = jax.eval_shape(lambda p: channel_cut.cut_channels(model, p, np.arange(width))[1], params)
    return target, functional.laid_out(target, small, mesh)


def _rows(model: ModelConfig, target: ModelConfig) -> dict[str, tuple[int, int]]:
    """Return {path of a matrix whose inputs are pruned: (number of inputs before, number of inputs after)}."""
    stack = functional.stacks(model)[-1]
    after = {u.name: u.count * u.width for u in wiring.units(target, stack)}
    read = structured.readers(model, target, stack)
    return {path: (u.count * u.width, after[u.name]) for path, u in read.items()}


def _gates(model: ModelConfig, params: Tree, units: dict[str, int], walk: Walk) -> Program:
    """Return the program that `llmctl.compress.structured_pruning.gates.accumulate` runs per batch."""
    batch, flat = dict(walk.batch), weights.flatten(params)
    held = [] if params is walk.parent else [walk.parent]
    size, seq_len = batch["tokens"].shape
    whole = meshes.replicated(walk.mesh)
    read = jax.eval_shape(lambda p: gates.read(p, units), params)
    inner = {p: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding_of(flat[p])) for p, a in read.items()}
    sums = {p: jax.ShapeDtypeStruct(s, jnp.float32, sharding=whole) for p, s in gates.shapes(params, units).items()}
    copies = {p: a for p, a in inner.items() if not weights.is_plain(flat[p]) or flat[p].dtype != jnp.float32}

    def trace() -> Any:
        with meshes.use(walk.mesh):
            return gates.adder(walk.task, model, units, jnp.dtype(walk.dtype)).trace(inner, params, sums, batch)

    return Program(
        "derivatives of the loss", model, walk.mesh, trace, flops=3 * cost.row(model, seq_len) * size,
        tokens=size * seq_len, rows=size, seq_len=seq_len, dtype=walk.dtype, remat="full", steps=walk.batches,
        parameters=[params, held, copies], batch=[batch] * walk.batches, cache=sums,
        beside=[held, {p: flat[p] for p in copies}, [batch] * (walk.batches - 1)],
    )  # fmt: skip


def _compensation(
    model: ModelConfig, params: Tree, rows: dict[str, tuple[int, int]], walk: Program, mesh: Mesh
) -> Program:
    """Return the program of repair, for the matrix with the most inputs.

    Repair compensates a matrix for removed inputs. This program represents the programs of all matrices. The FLOPs of
    the Cholesky decomposition and of the triangular solves are not counted. `rows` has the numbers of inputs of each
    matrix before and after pruning.
    """
    stack, whole = functional.stacks(model)[-1], meshes.replicated(mesh)
    layer = layer_of(params, stack)
    name = max(rows, key=lambda path: rows[path])
    (inputs, kept), matrices = rows[name], {m.module: m.weight for m in weights.layer_matrices(layer)}
    outputs = matrices[name].shape[1]

    def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

    w, gram, index = array(inputs, outputs), array(inputs, inputs), array(kept, dtype=jnp.int32)
    takes = (w, index, array(inputs - kept, dtype=jnp.int32), gram, array(inputs), array(), array())
    moved = 4.0 * (4 * inputs * inputs + 6 * inputs * outputs)
    flops = 2.0 * inputs * (kept + 1) * outputs
    # The covariance is freed before the products of the kept rows exist.
    temporaries = 4.0 * max(inputs * inputs, 2 * kept * kept + 4 * kept * outputs)
    return Program(
        f"compensation of {name}", model, mesh, lambda: compensation.solve.trace(*takes, centered=True),
        steps=functional.depth(model, stack), parameters=[walk.parameters, w], batch=[walk.batch], cache=[walk.cache],
        beside=[walk.parameters, walk.batch, walk.cache], work=Cost(temporaries, moved, {"float32": flops}),
    )  # fmt: skip
