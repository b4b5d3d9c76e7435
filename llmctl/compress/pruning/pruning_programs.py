"""Describe the compiled functions that set single weights to zero, so that `llmctl plan` can estimate their cost."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llmctl.compress import error_feedback
from llmctl.compress.calibration.output_error import output_error
from llmctl.compress.calibration.statistics import moments
from llmctl.compress.programs import Walk, layer_of, sharding_of
from llmctl.compress.pruning import allocation, prune, repair, sparsegpt
from llmctl.compress.pruning.sparse_method import SparseMethod
from llmctl.distributed import mesh as meshes
from llmctl.model import flops as cost
from llmctl.model import functional, weights
from llmctl.model.array_bytes import bytes_of
from llmctl.model.config import ModelConfig
from llmctl.model.program import Cost, Gather, Pass, Program, Tree


def pruning(model: ModelConfig, params: Tree, method: SparseMethod, mesh: Mesh, walk: Walk | None) -> list[Program]:
    """Return the compiled functions that set single weights to zero, as programs with abstract arguments.

    One program prunes the largest matrix, and represents the pruning of all matrices. If the method reads data, the
    programs that run the data through the layers come first.

    Args:
      model: config of the model.
      params: abstract parameters of the model.
      method: the pruning method.
      mesh: the devices.
      walk: the calibration walk; None for a method that reads no data.
    """
    found = walk.programs(model, params, prune.collector(method), changes=True) if walk else []
    layer = layer_of(params, functional.stacks(model)[-1])
    largest = max(weights.layer_matrices(layer), key=lambda m: math.prod(m.weight.shape))
    w, name = largest.weight, largest.module
    stats = found[0].cache[name] if found and (method.moments or method.hessian) else None
    sums = walk.sums(params, method) if walk and method.gradients else {}
    own = {moment: jax.ShapeDtypeStruct(w.shape, jnp.float32, sharding=sharding_of(w)) for moment in method.gradients}
    held = [one.parameters for one in found[:1]] or [params, params]  # without a walk, pruned matrices are separate
    batch, cache = [one.batch for one in found[:1]], [one.cache for one in found[:1]]
    found = [replace(one, cache=[one.cache, sums], beside=[one.beside, sums]) for one in found] if sums else found
    found += [walk.gradients(model, params, method)] if walk and method.gradients else []
    found += _allocation(model, params, method, walk) if walk and method.allocation.calibrated else []
    others = [one.without(name) for one in cache]
    pattern = method.pattern
    common = Program(
        f"zeros in {name}", model, mesh, lambda: prune.prune.trace(w, stats, own, method=method.name, pattern=pattern),
        steps=model.layers, parameters=[held, w], batch=batch, cache=[cache, sums, own],
        beside=[held, batch, others, sums], work=_mask_cost(w, method),
    )  # fmt: skip
    if method.allocation.name == "global":
        found.append(replace(
            common, title=f"scores in {name}", steps=2 * model.layers, work=_score_cost(w, method),
            trace=lambda: prune.block_scores.trace(w, own, None, method=method.name, pattern=pattern),
        ))  # fmt: skip
    if stats is None or not method.hessian:
        return [*found, common]
    # Every device computes these in full.
    full = jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=meshes.replicated(mesh))
    gram_II = stats.products.update(shape=stats.products.shape[1:])
    if method.score is None:
        common = replace(
            common, trace=lambda: sparsegpt.prune.trace(full, gram_II, 0, method.damping, pattern=pattern),
            parameters=[held, full], work=_sparsegpt_cost(w),
        )  # fmt: skip
    found.append(common)
    entries, square = math.prod(w.shape), w.shape[0] ** 2
    found.append(replace(
        common, title=f"output error of {name}", trace=lambda: output_error.trace(gram_II, full, full),
        steps=model.layers * (1 + method.repair), parameters=[held, full, full],
        work=Cost(4.0 * entries, 4.0 * (2 * square + 3 * entries), {"float32": 4.0 * w.shape[0] * entries}),
    ))  # fmt: skip
    if method.repair:
        found.append(replace(
            common, title=f"repair of {name}", trace=lambda: repair.repair.trace(full, full, gram_II),
            parameters=[held, full, full], work=_repair_cost(w),
        ))  # fmt: skip
    return found


def _allocation(model: ModelConfig, params: Tree, method: SparseMethod, walk: Walk) -> list[Program]:
    """Return the programs that choose the sparsity of each layer.

    The first programs collect statistics of the unpruned layers' inputs. For OWL, one more program counts the outliers
    of a layer. For the allocation by sensitivity, two more programs run the model: without changes, and with one pruned
    layer.
    """
    found = walk.programs(model, params, moments, changes=False)
    batch, mesh, stack = dict(walk.batch), walk.mesh, functional.stacks(model)[-1]
    size, seq_len = batch["tokens"].shape
    layer, index = layer_of(params, stack), jax.ShapeDtypeStruct((), jnp.int32, sharding=meshes.replicated(mesh))
    held = [] if params is walk.parent else [walk.parent]
    depth = sum(functional.depth(model, stack) for stack in functional.stacks(model))
    stats = dict(found[0].cache)  # the sums of each matrix are saved, and read as arrays of their own
    if method.allocation.name == "owl":
        entries = sum(math.prod(_shard(m.weight)) for m in weights.layer_matrices(layer))
        matrices = {m.path: m.weight for m in weights.layer_matrices(layer)}
        found.append(Program(
            "outliers of a layer", model, mesh,
            lambda: allocation.outlier_ratio.trace(weights.unflatten(matrices), stats, 1.0), steps=depth,
            parameters=[params, held, matrices], batch=[batch] * walk.batches, cache=[stats] * depth,
            beside=[params, held, [batch] * walk.batches, [stats] * (depth - 1)],
            work=Cost(4.0 * entries, 16.0 * entries),
        ))  # fmt: skip
        return found
    run: dict[str, Any] = {
        "flops": cost.row(model, seq_len) * size, "tokens": size * seq_len, "rows": size, "seq_len": seq_len,
        "dtype": walk.dtype, "batch": [batch] * walk.batches, "cache": [stats] * depth,
        "beside": [held, [batch] * (walk.batches - 1), [stats] * depth], "work": Pass(attention="xla", predicted=0.0),
    }  # fmt: skip

    def programs() -> tuple[Any, Any, Any]:
        states_of, error_of = allocation.scan_programs(model, jnp.dtype(walk.dtype))
        states = jax.eval_shape(states_of, params, batch)
        return states_of, error_of, states.update(sharding=meshes.batch_sharding(mesh, states.ndim))

    def unchanged() -> Any:
        with meshes.use(mesh):
            return programs()[0].trace(params, batch)

    def changed() -> Any:
        with meshes.use(mesh):
            _, error_of, states = programs()
            return error_of[stack].trace(params, layer, index, batch, states)

    found.append(Program("final hidden states", model, mesh, unchanged, steps=1, parameters=[params, held], **run))
    found.append(Program(
        "scan of a pruned layer", model, mesh, changed, steps=3 * depth, parameters=[params, held, layer], **run
    ))  # fmt: skip
    return found


def _shard(w: Tree) -> tuple[int, ...]:
    """Return the shape of one device's shard of a weight; for a quantized weight, of its array of integers."""
    leaf = jax.tree.leaves(w)[0]
    return leaf.sharding.shard_shape(leaf.shape)


def _sparsegpt_cost(w: Tree) -> Cost:
    """Return the cost of SparseGPT for one matrix.

    Only the products that propagate each block's errors to later inputs are counted as FLOPs. The triangular solve and
    the Cholesky decomposition are not counted. Memory holds four arrays of the Hessian's size and six arrays of the
    matrix's size.
    """
    inputs, outputs = w.shape
    blocks = -(-inputs // error_feedback.BLOCK)
    entries, square = inputs * outputs, inputs * inputs
    moved = 4.0 * (12 * square + entries * (4 * blocks + 4 * min(error_feedback.BLOCK, inputs)))
    return Cost(4.0 * (4 * square + 6 * entries), moved, {"float32": 2.0 * square * outputs})


def _repair_cost(w: Tree) -> Cost:
    """Return the cost of `repair` for one matrix.

    Only the FLOPs of products with the Gram matrix are counted. Each step of the conjugate-gradient method needs one
    product, and the first residual needs one more. The final errors and their rounding errors need four products.
    """
    inputs, outputs = w.shape
    entries, square, products = inputs * outputs, inputs * inputs, repair.STEPS + 5
    moved = 4.0 * products * (square + 8 * entries)
    return Cost(4.0 * (5 * entries + square), moved, {"float32": 2.0 * square * outputs * products})


def _score_cost(w: Tree, method: SparseMethod) -> Cost:
    """Return the cost, per device, of the program that computes the pruning scores of one matrix in float32.

    In a block pattern, the program also sums the scores of each block.
    """
    leaf, pattern = jax.tree.leaves(w)[0], method.pattern
    entries = math.prod(leaf.sharding.shard_shape(leaf.shape))
    sums = entries / (pattern.block_inputs * pattern.block_outputs) if pattern.blocks else 0.0
    return Cost(4.0 * (entries + sums), 4.0 * (2 * entries + sums))


def _mask_cost(w: Tree, method: SparseMethod) -> Cost:
    """Return the cost, per device, of the program that computes the mask of one matrix from its scores.

    The program sorts the scores twice (`masks.mask`), together with their indices. Each sort is counted as reading and
    writing every element once. If scores compete within the complete matrix, every device gathers and sorts all scores.
    In a block pattern, one score per block is sorted. The memory traffic of summing the blocks and of expanding the
    mask is then added.
    """
    leaf, pattern = jax.tree.leaves(w)[0], method.pattern
    everywhere = method.per == "matrix" and not pattern.of
    own, weights_each = math.prod(_shard(w)), pattern.block_inputs * pattern.block_outputs
    whole = leaf.size / weights_each
    entries, payload = (whole, 4.0 * whole) if everywhere else (own / weights_each, 0.0)
    sent = payload * (1 - own / leaf.size)
    gathers = (Gather(",".join(meshes.axes_of(leaf.sharding.spec)), sent, payload),) if sent else ()
    expanded = 12.0 * own if pattern.blocks else 0.0
    held = 12.0 if pattern.blocks else 16.0  # the scores themselves are not kept
    return Cost(held * entries + bytes_of(w), 14 * 4.0 * entries + expanded, gathers=gathers)
