"""The programs of `prune` and `quantize`: the calibration walk's steps through a block, and one weight's turn.

Beside what a program takes, the walk holds the parameters, in which changed layers take the place of the unchanged
ones, and the residual stream of every batch.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llmctl.artifacts.artifact import Artifact
from llmctl.compress import prune, shrink, structured
from llmctl.compress import quantize as rounding
from llmctl.compress.calibrate import Collect, empty, moments, nothing, passes, putter
from llmctl.compress.calibration_data import READ
from llmctl.compress.pattern import Pattern
from llmctl.config.errors import RequestError
from llmctl.distributed import mesh as meshes
from llmctl.model import flops as cost
from llmctl.model import functional, weights
from llmctl.model.config import ModelConfig
from llmctl.pipeline.stages import prune as pruning
from llmctl.pipeline.stages import quantize as quantizing
from llmctl.plan import abstract_artifact, small_programs
from llmctl.plan import dummy_rows as made_up
from llmctl.plan.training_programs import Plan, Program, batch_of

Tree = Any


def of_prune(config: pruning.Config, base: Artifact, mesh: Mesh) -> Plan:
    """`prune`: the walk over the calibration data, if the method looks at any, and what it does to a matrix."""
    model, params = base.model, merged(base, mesh)
    if config.method != "structured":
        pattern = Pattern.parse(config.pattern, config.sparsity)
        prune.check(params, pattern)
        calibrated = prune.METHODS[config.method].calibrated
        found = _walk(config, base, model, params, moments, mesh, True) if calibrated else []
        found.append(_one_matrix(config, model, params, pattern, found[:1], mesh))
        return found, abstract_artifact.left(config, params, model, base=base, pruned=True)
    target = shrink.target(
        model, heads=config.heads, ffn=config.ffn, layers=config.layers, by=config.heads_by, multiple=config.multiple
    )
    small = functional.laid_out(target, functional.abstract(target), mesh)
    shrink.check_cuttable(model, params, target)
    found = []
    if (target.layers, target.encoder_layers) != (model.layers, model.encoder_layers):
        found += _walk(config, base, model, params, nothing, mesh, False)
    depths = {"layers": target.layers, "encoder_layers": target.encoder_layers}
    if (target.heads, target.kv_heads, target.d_ff) != (model.heads, model.kv_heads, model.d_ff):
        cut = model.model_copy(update=depths)
        shallow = _of_depth(cut, params, mesh)
        found += _walk(config, base, cut, shallow, structured.collector(cut, target), mesh, True)
    return found, abstract_artifact.left(config, small, target, base=base)


def merged(base: Artifact, mesh: Mesh) -> Tree:
    """The parent's parameters without low-rank pairs, as the stages begin."""
    if not weights.adapted(base.params):
        return base.params
    return functional.laid_out(base.model, jax.eval_shape(weights.merge_adapters, base.params), mesh)


def _of_depth(model: ModelConfig, params: Tree, mesh: Mesh) -> Tree:
    """The parameters with as many layers as `model` has."""
    out = dict(params)
    for stack in functional.stacks(model):
        depth = functional.depth(model, stack)
        blocks = jax.tree.map(lambda a, n=depth: a.update(shape=(n, *a.shape[1:])), params[stack]["blocks"])
        out[stack] = {**params[stack], "blocks": blocks}
    return functional.laid_out(model, out, mesh)


def _walk(
    config: pruning.Config,
    base: Artifact,
    model: ModelConfig,
    params: Tree,
    collect: Collect,
    mesh: Mesh,
    changes: bool,
) -> list[Program]:
    """What `llmctl.compress.calibrate.walk` runs for every layer and batch, of the stack that runs last."""
    seq_len = config.seq_len or base.manifest.seq_len
    if not seq_len:
        raise RequestError(f"{base.path}: does not say how long its training texts were; say it with seq_len")
    read = model if model.head == "lm" else model.model_copy(update={"head": "classify"})
    rows = made_up.of_examples(read, config.data, seq_len)
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    size = -(-min(config.batch_size, config.examples) // ways) * ways
    batch = {name: a for name, a in batch_of(rows, size, mesh).items() if name in READ}
    if model.encoder_layers and "encoder_tokens" not in batch:
        batch |= {f"encoder_{name}": a for name, a in batch.items()}
    dtype = jnp.dtype(config.dtype)
    stack = functional.stacks(model)[-1]
    whole = meshes.replicated(mesh)

    def over_rows(a: Any) -> Any:
        split = a.ndim > 0 and a.shape[0] == size
        return a.update(sharding=meshes.batch_sharding(mesh, a.ndim) if split else whole)

    with meshes.use(mesh):
        memory = (
            jax.eval_shape(partial(functional.encode, model, dtype=dtype), params, batch)
            if model.encoder_layers
            else None
        )
        start = partial(functional.embed, model, dtype=dtype)
        carry = jax.tree.map(over_rows, jax.eval_shape(start, params, batch, memory))
        layer = layer_of(params, stack)
        fresh = empty(model, stack, layer, carry, collect, dtype)
    stats = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole), fresh)
    look, advance = passes(model, stack, dtype)
    index = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    batches = -(-config.examples // size)
    depth = functional.depth(model, stack)
    held = [base.params] if params is not base.params else []
    waiting = [(carry, batch)] * (batches - 1)
    flops = (cost.row(model, seq_len) - cost.row(model.model_copy(update={"layers": 0}), seq_len)) / model.layers * size

    def program(title: str, fn: Any, takes: tuple[Any, ...]) -> Program:
        def trace() -> Any:
            with meshes.use(mesh):
                return fn.trace(*takes)

        layers, apart = ([layer], ()) if fn is look else ([layer, layer], stats)
        guess = small_programs.walk(model, mesh, size, seq_len, str(dtype), stats if fn is look else (), len(layers))
        return Program(
            title, model, mesh, trace, flops=flops * len(layers), tokens=size * seq_len, rows=size, seq_len=seq_len,
            dtype=str(dtype), steps=depth * batches, parameters=[params, held, layers],
            batch=[(carry, batch)] * batches, cache=stats, beside=[params, held, waiting, apart], guess=guess,
        )  # fmt: skip

    title = "statistics of a layer" if changes else "influence of a layer"
    found = [program(title, look, (layer, index, carry, batch, stats))]
    if changes:
        found.append(program("pass through a changed layer", advance, (layer, layer, index, carry, batch)))
        found.append(_putting(found[0], params, held, stack, layer, index))
    return found


def _putting(walk: Program, params: Tree, held: Tree, stack: str, layer: Tree, index: Any) -> Program:
    """The end of a layer's turn: changed, it is put where it was."""
    blocks = params[stack]["blocks"]
    rest = {**params, stack: {name: part for name, part in params[stack].items() if name != "blocks"}}
    return replace(
        walk, title="changed layer put back", trace=lambda: putter(blocks).trace(blocks, layer, index), flops=0.0,
        tokens=0, rows=0, seq_len=0, steps=functional.depth(walk.model, stack), parameters=[walk.parameters, layer],
        cache=(), beside=[rest, held, layer, walk.batch], guess=small_programs.putting(layer),
    )  # fmt: skip


def layer_of(params: Tree, stack: str) -> Tree:
    """One layer's arrays, abstract."""

    def one(a: Any) -> Any:
        spec = a.sharding.spec
        lies = a.sharding.update(spec=type(spec)(*spec[1:]))
        return jax.ShapeDtypeStruct(a.shape[1:], a.dtype, sharding=lies)

    return jax.tree.map(one, params[stack]["blocks"])


def _one_matrix(
    config: pruning.Config, model: ModelConfig, params: Tree, pattern: Pattern, walk: list[Program], mesh: Mesh
) -> Program:
    """Zeros in the largest matrix of a layer, beside what the walk holds or, without one, all that is pruned so far."""
    flat = weights.flatten(layer_of(params, functional.stacks(model)[-1]))
    path = max((p for p in flat if p.endswith("/kernel")), key=lambda p: math.prod(flat[p].shape))
    w, name = flat[path], path.removesuffix("/kernel")
    stats = walk[0].cache[name] if walk else None
    held = [one.parameters for one in walk] or [params, params]
    batch, cache = [one.batch for one in walk], [one.cache for one in walk]
    others = [{p: stat for p, stat in one.items() if p != name} for one in cache]
    return Program(
        f"zeros in {name}", model, mesh,
        lambda: prune.prune.trace(w, stats, method=config.method, pattern=pattern),
        flops=0.0, tokens=0, rows=0, seq_len=0, dtype="float32", steps=model.layers,
        parameters=[held, w], batch=batch, cache=cache, beside=[held, batch, others],
        guess=small_programs.zeros(w, config.method, pattern),
    )  # fmt: skip


def of_quantize(config: quantizing.Config, base: Artifact, mesh: Mesh) -> Plan:
    """`quantize`: the largest weight's turn, beside all weights and the integers made so far."""
    params = merged(base, mesh)
    flat = weights.flatten(params)
    chosen = dict(rounding.targets(flat, embeddings=config.embeddings, head=config.head))
    for path, inputs in chosen.items():
        rounding.check(path, flat[path], inputs, config.group)

    def rounded(path: str, w: Any) -> Any:
        scheme = rounding.SCHEMES[config.bits]
        array = jax.eval_shape(lambda a: scheme(a, chosen[path], config.group), w)
        return weights.Quantized(array, "" if chosen[path] == -1 else config.activations)

    small = {path: rounded(path, w) if path in chosen else w for path, w in flat.items()}
    left = functional.laid_out(base.model, weights.unflatten(small), mesh)
    last = max(chosen, key=lambda path: math.prod(flat[path].shape))
    w = flat[last]
    held = [base.params] if params is not base.params else []
    rest = {path: w for path, w in flat.items() if path != last}
    done = {path: q for path, q in weights.flatten(left).items() if path in chosen and path != last}
    program = Program(
        f"rounding of {last}", base.model, mesh,
        lambda: rounding.measured.trace(w, config.bits, chosen[last], config.group),
        flops=0.0, tokens=0, rows=0, seq_len=0, dtype="float32", steps=1,
        parameters=[params, held, done], beside=[rest, held, done],
        guess=small_programs.rounding(w, weights.flatten(left)[last]),
    )  # fmt: skip
    return [program], abstract_artifact.left(config, left, base.model, base=base)
