"""Programs smaller than a model, by arithmetic: a step of decoding, a layer's turn in calibration, a weight's turn.

For chips whose compiler is not at hand. `tests/plan/test_turns.py` holds each against the program that XLA compiled.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import jax

from llmctl.compress import prune
from llmctl.compress.pattern import Pattern
from llmctl.model.config import ModelConfig
from llmctl.plan import analytic_counts, analytic_memory
from llmctl.plan.analytic_memory import Setup
from llmctl.plan.hlo.counts import Collective, Counts
from llmctl.plan.sizes import bytes_of

Guess = tuple[float, Counts]
"""Bytes of one device beside a program's arguments, results included; its operations, traffic and collectives."""


def decoding(model: ModelConfig, rows: int, slots: int, flops: float, item: int, read: Any) -> Guess:
    """One token a row, on one device: `read` is what lies in memory and is read (weights, keys and values)."""
    a_row = 2 * 4 * (model.vocab_size + model.heads * slots) + item * (2 * model.d_model + 2 * model.d_ff)
    between = float(rows * a_row)
    dtype = next(name for name, size in analytic_memory.ITEM.items() if size == item)
    return between, Counts(flops, bytes_of(read) + 2 * between, flops_by_type={dtype: flops})


def walk(model: ModelConfig, mesh: Any, rows: int, seq_len: int, dtype: str, statistics: Any, layers: int) -> Guess:
    """A batch through so many layers of the stack that runs last, in plain attention.

    With `statistics` the inputs of all matrices are kept until they are folded in.
    """
    crossed = 2 if model.encoder_layers else 1  # attention over the encoder's tokens, as wide as that over its own
    stack = {"layers": layers, "encoder_layers": 0, "vocab_size": 0}
    stack |= {"heads": crossed * model.heads, "kv_heads": crossed * model.kv_heads}
    axes = {axis: int(n) for axis, n in mesh.shape.items()}
    setup = Setup(model.model_copy(update=stack), axes, rows, seq_len, dtype, fused=False)
    unit, found = setup.item * setup.tokens, analytic_counts.counts(setup)
    taps = unit * sum(_kept(statistics, setup).values())
    products = sum(2 * setup.tokens * a.size for a in jax.tree.leaves(statistics) if a.ndim == 3)  # second moments
    types = {**found.flops_by_type}
    types["float32"] = types.get("float32", 0.0) + products
    counts = replace(found, flops=found.flops + products, bytes=found.bytes + taps, flops_by_type=types)
    return analytic_memory.layer(setup, layers) + taps + unit * model.d_model + bytes_of(statistics), counts


def _kept(statistics: Any, setup: Setup) -> dict[tuple[str, bool], float]:
    """Numbers a token of one device, of every input that has a statistic; matrices that share one count once."""
    found = {}
    for path, statistic in dict(statistics).items():
        block, name = path.split("/")
        inner, first = name in ("o", "down"), jax.tree.leaves(statistic)[0]
        found[block, inner] = math.prod(first.shape[:2]) / (setup.size("tensor") if inner else 1)
    return found


def putting(layer: Any) -> Guess:
    """A layer written into its stack, in place."""
    return 0.0, Counts(0.0, 2.0 * bytes_of(layer))


def zeros(w: Any, method: str, pattern: Pattern) -> Guess:
    """A matrix's scores sorted twice, with their places: all on every device where they compete over the whole matrix.

    Both sorts are counted as one pass over what they read and write.
    """
    leaf = jax.tree.leaves(w)[0]
    everywhere = prune.METHODS[method].per == "matrix" and not pattern.of
    own = math.prod(leaf.sharding.shard_shape(leaf.shape))
    entries, payload = (leaf.size, 4.0 * leaf.size) if everywhere else (own, 0.0)
    axes = [axis for part in leaf.sharding.spec if part for axis in ([part] if isinstance(part, str) else part)]
    sent = payload * (1 - own / leaf.size)
    gathers = [Collective("all-gather", sent, ",".join(axes), 1, 0, payload)] if sent else []
    return 16.0 * entries + bytes_of(w), Counts(0.0, 14 * 4.0 * entries, gathers)


def rounding(w: Any, rounded: Any) -> Guess:
    """A weight read for its scales, its integers and what they lose."""
    return float(bytes_of(rounded)), Counts(0.0, 3.0 * bytes_of(w) + 2 * bytes_of(rounded))
