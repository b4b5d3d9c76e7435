"""Estimate programs that are smaller than a pass through a model, such as the calibration of one layer.

The estimates are for chips whose compiler is not available. `tests/plan/test_small_programs.py` compares each
estimate with the program that XLA compiled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax

from llmctl.model.array_bytes import bytes_of
from llmctl.model.program import Cost, Pass, Program
from llmctl.plan import analytic_counts, analytic_memory
from llmctl.plan.analytic_setup import Setup
from llmctl.plan.hlo.counts import Collective, Counts

Estimate = tuple[float, Counts]
"""Two figures per device. The first is the bytes of results and temporaries, without arguments. The second is the
counts of operations, traffic and collectives."""


def described(cost: Cost) -> Estimate:
    """Convert the cost that a stage declares for one of its programs to an `Estimate`."""
    gathers = [Collective("all-gather", g.sent, g.axes, 1, 0, g.payload) for g in cost.gathers]
    types = dict(cost.flops_by_type)
    return cost.temporaries, Counts(sum(types.values()), cost.moved, gathers, types)


def least(program: Program) -> Estimate:
    """Return a lower bound of a program's memory and traffic, with the FLOPs that the program declares.

    The memory is the size of the results. The traffic is one read of the arguments and one write of the results.
    """
    flops = program.flops / program.mesh.size
    into = bytes_of([program.parameters, program.optimizer, program.batch, program.cache]) - bytes_of(program.beside)
    out = float(bytes_of(program.trace().out_info))
    return out, Counts(flops, into + out, flops_by_type={program.dtype: flops})


def layers(program: Program, work: Pass) -> Estimate:
    """Return the estimate of a program that runs one batch through a few layers, with plain attention.

    Calibration, for example, runs one layer, and updates statistics of the inputs of its matrices, such as Gram
    matrices. The inputs stay in memory until the statistics are updated. In an encoder-decoder, the layers are decoder
    layers.
    """
    model, dtype, statistics = program.model, program.dtype, work.statistics
    crossed = 2 if model.encoder_layers else 1  # cross-attention is as wide as self-attention
    stack = {"layers": work.layers, "encoder_layers": 0, "vocab_size": 0}
    stack |= {"heads": crossed * model.heads, "kv_heads": crossed * model.kv_heads}
    axes = {axis: int(n) for axis, n in program.mesh.shape.items()}
    setup = Setup(model.model_copy(update=stack), axes, program.rows, program.seq_len, dtype, fused=False)
    unit, found = setup.item_bytes * setup.tokens, analytic_counts.counts(setup)
    taps = unit * _kept(statistics, setup)
    products = 2 * setup.tokens * _products(statistics, setup)
    types = {**found.flops_by_type}
    types["float32"] = types.get("float32", 0.0) + products
    counts = replace(found, flops=found.flops + products, bytes=found.bytes + taps, flops_by_type=types)
    temporaries = analytic_memory.layer(setup, work.layers) + taps + unit * model.d_model
    return temporaries, counts


def _products(statistics: Mapping[str, Any], setup: Setup) -> float:
    """Return the number of elements of all Gram matrices that one device computes."""
    elements = 0.0
    for path, statistic in statistics.items():
        elements += sum(a.size for a in jax.tree.leaves(statistic) if a.ndim == 3) / _shards(path, setup)
    return elements


def _kept(statistics: Mapping[str, Any], setup: Setup) -> float:
    """Return the number of elements per token, on one device, of all inputs that have a statistic."""
    return sum(statistic.inputs / _shards(path, setup) for path, statistic in statistics.items())


def _shards(path: str, setup: Setup) -> int:
    """Return the number of devices over which the input of a matrix is sharded.

    Tensor parallelism shards the input of the last matrix of a block, `o` or `down`.
    """
    return setup.size("tensor") if path.endswith(("/o", "/down")) else 1
