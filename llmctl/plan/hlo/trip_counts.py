"""Find the trip counts of while loops in compiled HLO.

In Llama training steps, XLA's CPU compiler records trip counts as known_trip_count (all 5 loops). The TPU compiler
records none (3 loops, libtpu 0.0.42). If a count is missing, this module computes it from three facts: the loop
condition, the start of the loop's counter, and the counter's increment.
"""

from __future__ import annotations

import math
import re

from llmctl.plan.hlo.parser import Computation, Instruction, Module

Affine = tuple[dict[int, int], int]
"""Affine function of a loop's state: {index in the loop's tuple: factor}, and the constant term."""

_SAME = {"copy", "bitcast", "convert", "copy-done", "reshape"}


def trips(module: Module, caller: Computation, loop: Instruction) -> int | None:
    """Return the trip count of the while instruction `loop`. If the count is unknown, return None."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
        return int(known[1])
    condition = module.computations[loop.called["condition"][0]]
    body = module.computations[loop.called["body"][0]]
    compared = _comparison(module, condition)
    if compared is None:
        return None
    left, right, direction = compared
    # Elements that the loop does not change equal the constants that they start with.
    left, right = (_with_constants(module, caller, loop, body, side) for side in (left, right))
    if left is None or right is None:
        return None
    difference = _add(left, right, -1)
    if len(difference[0]) != 1:
        return None
    (counter, factor), offset = *difference[0].items(), difference[1]
    start, step = _start(module, caller, loop, counter), _step(module, body, counter)
    if start is None or not step:
        return None
    value, step = factor * start + offset, factor * step  # the loop runs while `value` compares to 0
    if direction in ("GT", "GE"):
        value, step, direction = -value, -step, {"GT": "LT", "GE": "LE"}[direction]
    if direction == "NE":
        return -value // step if value % step == 0 and -value // step >= 0 else None
    if step <= 0:
        return None
    return max(0, math.ceil((-value + (direction == "LE")) / step))


def _comparison(module: Module, condition: Computation) -> tuple[Affine, Affine, str] | None:
    """Return (left side, right side, direction) of the comparison in a loop condition. If the comparison is
    unsupported, return None.

    The sides are affine functions, and the direction is LT, LE, GT, GE or NE.
    """
    root = condition.root
    if root.opcode == "fusion" or root.opcode == "call":
        inner = module.computations[next(iter(root.called.values()))[0]]
        compare = inner.root
        given = [_affine(module, condition, condition.by_name[o], []) for o in root.operands]
    else:
        inner, compare, given = condition, root, []
    if compare.opcode != "compare":
        return None
    left, right = (_affine(module, inner, inner.operand(compare, n), given) for n in (0, 1))
    direction = compare.attribute("direction")
    return (left, right, direction) if left and right and direction in ("LT", "LE", "GT", "GE", "NE") else None


def _affine(module: Module, computation: Computation, i: Instruction, given: list[Affine | None]) -> Affine | None:
    """Return the value of `i` as an affine function of the loop's state. If the value is not affine, return None.

    If `computation` is a fusion, `given` has the values of the fusion's parameters. If `computation` is the loop's body
    or condition, `given` is empty.
    """
    if i.opcode == "constant":
        return ({}, int(i.inside)) if re.fullmatch(r"-?\d+", i.inside.strip()) else None
    if i.opcode == "parameter" and given:
        return given[int(i.inside)]
    if i.opcode in _SAME and i.operands:
        return _affine(module, computation, computation.operand(i, 0), given)
    if i.opcode == "get-tuple-element":
        source, index = computation.operand(i, 0), i.numbers("index")[0]
        if source.opcode == "parameter" and not given:
            return {index: 1}, 0
        if source.opcode == "fusion":
            inner = module.computations[source.called["calls"][0]]
            if inner.root.opcode != "tuple":
                return None
            passed = [_affine(module, computation, computation.by_name[o], given) for o in source.operands]
            return _affine(module, inner, inner.operand(inner.root, index), passed)
        if source.opcode == "tuple":
            return _affine(module, computation, computation.operand(source, index), given)
        return None
    if i.opcode == "fusion":
        inner = module.computations[i.called["calls"][0]]
        passed = [_affine(module, computation, computation.by_name[o], given) for o in i.operands]
        return _affine(module, inner, inner.root, passed)
    if i.opcode in ("add", "subtract"):
        left, right = (_affine(module, computation, computation.operand(i, n), given) for n in (0, 1))
        return _add(left, right, 1 if i.opcode == "add" else -1) if left and right else None
    return None


def _add(left: Affine, right: Affine, sign: int) -> Affine:
    factors = {k: left[0].get(k, 0) + sign * right[0].get(k, 0) for k in left[0] | right[0]}
    return {k: f for k, f in factors.items() if f}, left[1] + sign * right[1]


def _with_constants(
    module: Module, caller: Computation, loop: Instruction, body: Computation, side: Affine
) -> Affine | None:
    """Return an affine function with the loop's constants inserted. If a constant is unknown, return None.

    The constants are the elements of the loop's state that the body does not change.
    """
    out: Affine = ({}, side[1])
    for index, factor in side[0].items():
        if _step(module, body, index) == 0:
            start = _start(module, caller, loop, index)
            if start is None:
                return None
            out = out[0], out[1] + factor * start
        else:
            out = {**out[0], index: factor}, out[1]
    return out


def _start(module: Module, caller: Computation, loop: Instruction, index: int) -> int | None:
    """Return the initial value of element `index` of the loop's tuple. If the value is not constant, return None."""
    source = caller.operand(loop, 0)
    while source.opcode in _SAME and source.operands:
        source = caller.operand(source, 0)
    if source.opcode != "tuple":
        return None
    found = _affine(module, caller, caller.operand(source, index), [])
    return found[1] if found and not found[0] else None


def _step(module: Module, body: Computation, index: int) -> int | None:
    """Return the increment of element `index` of the loop's tuple per iteration. If the increment is not constant,
    return None."""
    if body.root.opcode != "tuple":
        return None
    found = _affine(module, body, body.operand(body.root, index), [])
    return found[1] if found and found[0] == {index: 1} else None
