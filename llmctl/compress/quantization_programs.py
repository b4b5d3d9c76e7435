"""Describe the compiled functions that quantize weights, so that `llmctl plan` can estimate their cost."""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.sharding import Mesh

from llmctl.compress import error_feedback, gptq
from llmctl.compress import quantize as rounding
from llmctl.compress.grids import GRIDS
from llmctl.compress.programs import Walk, layer_of
from llmctl.compress.quantize_method import Quantization
from llmctl.compress.quantize_walk import collect
from llmctl.distributed import mesh as meshes
from llmctl.model import functional, weights
from llmctl.model.array_bytes import bytes_of
from llmctl.model.config import ModelConfig
from llmctl.model.program import Cost, Program, Tree


def quantization(
    model: ModelConfig, params: Tree, mesh: Mesh, held: Tree, method: Quantization, walk: Walk | None
) -> tuple[list[Program], Tree]:
    """Return the compiled functions as programs, and the abstract parameters with all weights quantized.

    One program quantizes the largest weight, and stands for all weights. If the method reads data, the programs that
    run the data through the layers come first.

    Args:
      model: config of the model.
      params: abstract parameters of the model.
      mesh: the devices.
      held: further arrays that are in memory.
      method: how the model is quantized.
      walk: the calibration walk; None for a method that reads no data.
    """
    flat, group = weights.flatten(params), method.inputs
    chosen = rounding.chosen(flat, group, embeddings=method.embeddings, head=method.head)

    def rounded(path: str, w: Any) -> Any:
        inputs = chosen[path]
        node, _ = jax.eval_shape(lambda a: rounding.measured(a, method.scheme, inputs, group, method.clip), w)
        return rounding.with_activations(node, inputs, method.activations)

    small = {path: rounded(path, w) if path in chosen else w for path, w in flat.items()}
    left = functional.laid_out(model, weights.unflatten(small), mesh)
    if walk is not None:
        found = walk.programs(model, params, collect, changes=True, after=left)
        found.append(_solve(found[0], model, params, mesh, method))
        if method.embeddings:
            found.append(_rounding(model, params, left, mesh, held, method, ["embed/tokens"], chosen))
        return found, left
    return [_rounding(model, params, left, mesh, held, method, [*chosen], chosen)], left


def _rounding(
    model: ModelConfig, params: Tree, left: Tree, mesh: Mesh, held: Tree, method: Quantization,
    paths: list[str], chosen: dict[str, int],
) -> Program:  # fmt: skip
    """Return the program that rounds the largest of the weights `paths`."""
    flat, integers = weights.flatten(params), weights.flatten(left)
    last = max(paths, key=lambda path: math.prod(flat[path].shape))
    w = flat[last]
    rest = {path: w for path, w in flat.items() if path != last}
    done = {path: q for path, q in integers.items() if path in chosen and path != last}
    return Program(
        f"rounding of {last}", model, mesh,
        lambda: rounding.measured.trace(w, method.scheme, chosen[last], method.inputs, method.clip), steps=1,
        parameters=[params, held, done], beside=[rest, held, done],
        # Read for the scales, the integers and the error; the integers are written and read.
        work=Cost(float(bytes_of(integers[last])), 3.0 * bytes_of(w) + 2 * bytes_of(integers[last])),
    )  # fmt: skip


def _solve(walk: Program, model: ModelConfig, params: Tree, mesh: Mesh, method: Quantization) -> Program:
    """Return the program that quantizes the largest matrix of a layer by GPTQ. Every device computes it in full."""
    layer = layer_of(params, functional.stacks(model)[-1])
    largest = max(weights.layer_matrices(layer), key=lambda m: math.prod(m.weight.shape))
    w, name = largest.weight, largest.module
    full = jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=meshes.replicated(mesh))
    products = walk.cache[name].products
    gram_II = products.update(shape=products.shape[1:])
    others = {path: stat for path, stat in walk.cache.items() if path != name}

    def trace() -> Any:
        return gptq.quantize.trace(
            full, gram_II, method.damping, grid=GRIDS[method.scheme], group=method.inputs, clip=method.clip,
            act_order=method.act_order, static_groups=method.static_groups,
        )  # fmt: skip

    return Program(
        f"GPTQ of {name}", model, mesh, trace, steps=model.layers, parameters=[walk.parameters, full],
        batch=walk.batch, cache=walk.cache, beside=[walk.parameters, walk.batch, others], work=_solve_cost(w),
    )  # fmt: skip


def _solve_cost(w: Tree) -> Cost:
    """Return the cost of GPTQ for one matrix.

    Its FLOPs are those of the products that propagate each block's errors to all inputs. Those of the triangular solve
    and the Cholesky decomposition are not counted. Memory holds five arrays of the Hessian's size, one of them in
    another order, and six of the matrix's size.
    """
    inputs, outputs = w.shape
    blocks, size = -(-inputs // error_feedback.BLOCK), min(error_feedback.BLOCK, inputs)
    entries, square = inputs * outputs, inputs * inputs
    moved = 4.0 * (13 * square + entries * (4 * blocks + 4 * size))
    return Cost(4.0 * (5 * square + 6 * entries), moved, {"float32": 2.0 * square * outputs})
