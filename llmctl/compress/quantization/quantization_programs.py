"""Describe the compiled functions that quantize weights, so that `llmctl plan` can estimate their cost."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llmctl.compress import error_feedback
from llmctl.compress.calibration.calibration_loss import loss_program
from llmctl.compress.programs import Walk, layer_of
from llmctl.compress.quantization import folding, format_allocation, format_scan, gptq, grids, input_scales, rotation
from llmctl.compress.quantization import quantize as rounding
from llmctl.compress.quantization.quantize_method import Quantization
from llmctl.compress.quantization.quantize_walk import collector, full_path, tuner
from llmctl.compress.quantization.settings import QuantizeConfig
from llmctl.distributed import mesh as meshes
from llmctl.model import flops as cost
from llmctl.model import functional, weights
from llmctl.model.array_bytes import bytes_of
from llmctl.model.config import ModelConfig
from llmctl.model.program import Cost, Pass, Program, Tree


def quantization(
    model: ModelConfig, params: Tree, mesh: Mesh, held: Tree, method: Quantization, walk: Walk | None
) -> tuple[list[Program], Tree]:
    """Return the compiled functions that quantize weights, as programs, and the abstract quantized parameters.

    One program quantizes the largest weight, and represents all weights. If the method reads data, the programs that
    run the data through the layers come first.

    Args:
      model: config of the model.
      params: abstract parameters of the model.
      mesh: the devices.
      held: arrays that are in memory in addition to `params`.
      method: how the model is quantized.
      walk: the calibration walk; None for a method that reads no data.
    """
    flat = weights.flatten(params)
    chosen = rounding.chosen(flat, method)

    def rounded(path: str, w: Any) -> Any:
        node, _ = jax.eval_shape(lambda a: rounding.measured(a, chosen[path], method.clips), w)
        fixed: Any = None
        if method.static_activations:
            fixed = jax.ShapeDtypeStruct((*w.shape[:-2], 1, 1), jnp.float32)
        return rounding.with_activations(node, chosen[path].inputs, method.activations, fixed)

    small = {path: rounded(path, w) if path in chosen else w for path, w in flat.items()}
    left = functional.laid_out(model, weights.unflatten(small), mesh)
    if walk is not None:
        found = walk.programs(model, params, collector(method), changes=True, after=left)
        found += _layer_programs(found[0], model, params, mesh, method)
        if "embed/tokens" in chosen:
            found.append(_rounding(model, params, left, mesh, held, method, ["embed/tokens"], chosen))
        return found, left
    return [_rounding(model, params, left, mesh, held, method, [*chosen], chosen)], left


def format_search(
    config: QuantizeConfig, model: ModelConfig, params: Tree, mesh: Mesh, held: list[Tree], walk: Walk
) -> tuple[Program, Quantization]:
    """Return the program that measures the losses of a format search, and a `Quantization` for planning.

    Without measurements, the formats that a run would choose are unknown. For `average_bits`, the returned quantization
    has formats that meet the budget. For `max_perplexity_increase`, the returned quantization has the formats with the
    most bits.

    Args:
      config: settings of the stage, with a budget.
      model: config of the model.
      params: abstract parameters of the model.
      mesh: the devices.
      held: arrays that are in memory in addition to `params`.
      walk: calibration batches with labels or targets.

    Raises:
      RequestError: If no mixture of formats meets the budget.
    """
    method, batch = config.quantization, dict(walk.batch)
    targets = format_scan.targets(params, method, config.formats_to_choose)
    front, flat = format_scan.guessed_front(params, targets), weights.flatten(params)
    count = sum(math.prod(flat[path].shape) for path in targets)
    format_scan.check_bits(config.average_bits, front, count)
    mixture = front[-1]
    if config.average_bits:
        mixture = format_allocation.best_within(front, config.average_bits * count) or mixture
    size, seq_len = batch["tokens"].shape
    rounded = {path: flat[path] for path in targets}

    def trace() -> Any:
        with meshes.use(mesh):
            return loss_program(walk.task, model, jnp.dtype(walk.dtype)).trace(params, batch)

    found = Program(
        "loss with rounded matrices", model, mesh, trace, flops=cost.row(model, seq_len) * size, tokens=size * seq_len,
        rows=size, seq_len=seq_len, dtype=walk.dtype, parameters=[params, held, rounded],
        steps=format_scan.loss_steps(params, targets, config.average_bits) * walk.batches,
        batch=[batch] * walk.batches, beside=[held, rounded, [batch] * (walk.batches - 1)],
    )  # fmt: skip
    return found, format_scan.with_formats(method, targets, mixture)


def rotated(model: ModelConfig, params: Tree, mesh: Mesh, held: list[Tree]) -> tuple[Program, Tree, list[Tree]]:
    """Return three results: a program that rotates the largest matrix, the rotated parameters, and other arrays in
    memory.

    The parameters and the other arrays are abstract.

    Args:
      model: config of the model.
      params: abstract parameters of the model.
      mesh: the devices.
      held: arrays that are in memory in addition to `params`.
    """
    small = jax.eval_shape(lambda p: rotation.rotated(model, p, 0), params)
    left = functional.laid_out(rotation.untied(model), small, mesh)
    m = max(weights.matrices(params, "block"), key=lambda m: math.prod(m.weight.shape))
    axis = -1 if m.weight.shape[-1] == model.d_model else -2
    size = m.weight.shape[axis]
    turn = jax.ShapeDtypeStruct((size, size), jnp.float32, sharding=meshes.replicated(mesh))
    found = Program(
        f"rotation of {m.path}", model, mesh, lambda: rotation.turn.trace(m.weight, turn, axis), steps=1,
        parameters=[params, held, left, turn], beside=[params, held, left],
        work=Cost(12.0 * math.prod(m.weight.shape), 2.0 * bytes_of(m.weight),
                  {"float32": 2.0 * size * math.prod(m.weight.shape)}),
    )  # fmt: skip
    return found, left, [*held, params]


def _rounding(
    model: ModelConfig, params: Tree, left: Tree, mesh: Mesh, held: Tree, method: Quantization,
    paths: list[str], chosen: dict[str, rounding.Target],
) -> Program:  # fmt: skip
    """Return the program that rounds a weight without data, for the largest weight among `paths`."""
    flat, integers = weights.flatten(params), weights.flatten(left)
    last = max(paths, key=lambda path: math.prod(flat[path].shape))
    w = flat[last]
    rest = {path: w for path, w in flat.items() if path != last}
    done = {path: q for path, q in integers.items() if path in chosen and path != last}
    return Program(
        f"rounding of {last}", model, mesh,
        lambda: rounding.measured.trace(w, chosen[last], method.clips), steps=1,
        parameters=[params, held, done], beside=[rest, held, done],
        # Read for the scales, the integers and the error; the integers are written and read.
        work=Cost(float(bytes_of(integers[last])), 3.0 * bytes_of(w) + 2 * bytes_of(integers[last])),
    )  # fmt: skip


def _layer_programs(walk: Program, model: ModelConfig, params: Tree, mesh: Mesh, method: Quantization) -> list[Program]:
    """Return the programs that scale the inputs of a layer's largest matrices and quantize the largest matrix.

    Every device computes the complete matrices.
    """
    stack = functional.stacks(model)[-1]
    matrices = {m.module: m.weight for m in weights.layer_matrices(layer_of(params, stack))}
    formats = {module: form for module in matrices if (form := method.format_of(full_path(stack, module)))}
    if not formats:  # rules leave the layers of this stack as they are
        return []
    name = max(formats, key=lambda module: math.prod(matrices[module].shape))
    whole = {m: jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=meshes.replicated(mesh)) for m, w in matrices.items()}

    def statistic(module: str, part: str) -> Any:
        return walk.cache[module].parts[part]

    def gram_of(module: str) -> Any:
        products = statistic(module, "gram").products
        return products.update(shape=products.shape[1:])

    def program(title: str, trace: Any, modules: tuple[str, ...], work: Cost) -> Program:
        full = [whole[module] for module in modules]
        return Program(
            title, model, mesh, trace, steps=model.layers, parameters=[walk.parameters, full], batch=walk.batch,
            cache=walk.cache, beside=[walk.parameters, walk.batch, walk.cache.without(modules[0])], work=work,
        )  # fmt: skip

    found: list[Program] = []
    places = folding.folds(model, stack) if method.scales_inputs or method.smooth else []
    places = [at for at in places if formats.keys() & set(at.readers)]
    if places:
        at = max(places, key=lambda at: sum(math.prod(whole[module].shape) for module in at.readers))
        readers = tuple(module for module in at.readers if module in formats)
        kernels = tuple(whole[module] for module in readers)
        levels = tuple(grids.levels_of(formats[module]) for module in readers)
        first = readers[0]
        if method.smooth:
            peaks, fn = statistic(first, "peaks").peaks, input_scales.smooth
            trace: Any = lambda: fn.trace(kernels, peaks, method.alpha, at=at)  # noqa: E731
            cost = Cost(16.0 * len(peaks), float(bytes_of(kernels)))
        else:
            trace = lambda: input_scales.awq.trace(  # noqa: E731
                kernels, gram_of(first), at=at, levels=levels
            )
            cost = _search_cost(kernels)
        found.append(program(f"scales of the inputs of {first}", trace, readers, cost))
    if method.tunes:
        return [*found, _tuning(walk, model, layer_of(params, stack), stack, method, mesh)]
    w, (grid, group), gram_II = whole[name], grids.levels_of(formats[name]), None
    if method.hessian:
        gram_II = gram_of(name)
    if method.solves:
        found.append(program(f"GPTQ of {name}", lambda: gptq.quantize.trace(
            w, gram_II, method.damping, grid=grid, group=group, clip=method.clips,
            act_order=method.act_order, static_groups=method.static_groups,
        ), (name,), _solve_cost(w)))  # fmt: skip
    else:
        found.append(program(f"rounding of {name}", lambda: grids.rounded.trace(
            w, gram_II, grid=grid, group=group, clip=method.clips
        ), (name,), _clip_cost(w, group, method)))  # fmt: skip
    return found


def _tuning(walk: Program, model: ModelConfig, layer: Tree, stack: str, method: Quantization, mesh: Mesh) -> Program:
    """Return the program of one gradient step of AutoRound. The step runs a layer forward and backward."""
    tune, index = tuner(model, layer, stack, method, walk.dtype), jax.ShapeDtypeStruct((), jnp.int32)
    pairs, rate = walk.batch[0], jax.ShapeDtypeStruct((), jnp.float32)
    carry, batch = pairs[0]
    state = jax.eval_shape(tune.start, layer)

    def trace() -> Any:
        with meshes.use(mesh):
            return tune.step.trace(state, layer, index, carry, batch, carry.x_BTD, rate)

    return replace(
        walk, title="gradient step of a layer's rounding", trace=trace, flops=3 * walk.flops, remat="none",
        steps=functional.depth(model, stack) * method.tuning_steps, cache=[state, state],
        parameters=[walk.parameters, layer], beside=[walk.beside, state],
        work=Pass(layers=3, attention="xla"),
    )  # fmt: skip


def _search_cost(kernels: tuple[Tree, ...]) -> Cost:
    """Return the cost of AWQ's search for the best exponent.

    For each exponent, the Gram matrix is multiplied by the rounding errors of each matrix. Memory holds four arrays of
    the size of the largest matrix.
    """
    tries, inputs = input_scales.STEPS + 1, kernels[0].shape[0]
    entries = sum(math.prod(w.shape) for w in kernels)
    largest = max(math.prod(w.shape) for w in kernels)
    moved = 4.0 * tries * (8 * entries + len(kernels) * inputs * inputs)
    return Cost(4.0 * 4 * largest, moved, {"float32": 2.0 * tries * inputs * entries})


def _clip_cost(w: Tree, group: int, method: Quantization) -> Cost:
    """Return the cost of rounding one matrix, including the search for clipped scales.

    For each scale that the search tries, the Gram matrix of every group is multiplied by the group's rounding errors.
    """
    inputs, outputs = w.shape
    entries, size = inputs * outputs, group or inputs
    tries = len(grids.CLIPS) if method.clips else 0
    products = 2.0 * tries * size * entries if method.hessian else 0.0
    moved = 4.0 * (4 + 6 * tries) * entries
    return Cost(4.0 * (3 * entries + (inputs * size if method.hessian and method.clips else 0)), moved,
                {"float32": products} if products else {})  # fmt: skip


def _solve_cost(w: Tree) -> Cost:
    """Return the cost of GPTQ for one matrix.

    Only the products that propagate each block's errors to later inputs are counted as FLOPs. The triangular solve and
    the Cholesky decomposition are not counted. Memory holds five arrays of the Hessian's size and six arrays of the
    matrix's size.
    """
    inputs, outputs = w.shape
    blocks, size = -(-inputs // error_feedback.BLOCK), min(error_feedback.BLOCK, inputs)
    entries, square = inputs * outputs, inputs * inputs
    moved = 4.0 * (13 * square + entries * (4 * blocks + 4 * size))
    return Cost(4.0 * (5 * square + 6 * entries), moved, {"float32": 2.0 * square * outputs})
