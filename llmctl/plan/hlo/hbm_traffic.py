"""Compute the bytes that one instruction of compiled HLO reads from and writes to HBM.

Arrays whose layout names on-chip memory cost nothing. If an operation only slices an array or updates a slice in place,
only the slice counts.
"""

from __future__ import annotations

from llmctl.plan.hlo.parser import Array, Computation, Instruction, Module

FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
    "while", "conditional", "call", "optimization-barrier", "domain", "opt-barrier", "add-dependency",
}  # fmt: skip
FREE_CALLS = {"AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "Sharding"}
SLICES = {"dynamic-slice", "slice", "gather"}
_SAME = {"bitcast", "reshape", "get-tuple-element", "copy", "convert"}


def of(module: Module, computation: Computation, i: Instruction) -> float:
    """Return the bytes that one execution of the instruction `i` reads and writes in HBM."""
    if i.opcode in FREE or i.opcode.endswith("-done") or i.target in FREE_CALLS:
        return 0.0
    if i.opcode in ("copy-start", "slice-start", "async-start") or i.opcode.endswith("-start"):
        return _start_bytes(computation, i)
    if i.opcode in ("send", "recv"):  # the sent array is also among the results
        return _hbm(i.arrays[:1])
    if i.opcode in SLICES:
        source = computation.operand(i, 0).arrays[0]
        return _hbm(i.arrays) + _bytes_if_hbm(source, i.arrays)
    if i.opcode == "dynamic-update-slice":
        update = computation.operand(i, 1).arrays[0]
        return update.hbm + _bytes_if_hbm(i.arrays[0], [update])
    if i.opcode == "scatter":
        updates = computation.inputs(i)[len(i.arrays) :]
        return _hbm(updates) + 2 * _bytes_if_hbm(i.arrays[0], updates[1:])
    if i.opcode == "fusion":
        return _fusion(module, computation, i)
    return _hbm(i.arrays) + _hbm(computation.inputs(i))


def _hbm(arrays: list[Array]) -> float:
    return sum(a.hbm for a in arrays)


def _bytes_if_hbm(container: Array, moved: list[Array]) -> float:
    """Return the bytes of the arrays `moved` if the array `container`, which contains them, is in HBM. Otherwise,
    return 0."""
    return sum(a.bytes for a in moved) if container.space == 0 else 0.0


def _start_bytes(computation: Computation, i: Instruction) -> float:
    """Return the HBM bytes that an asynchronous operation reads and writes.

    The bytes are counted at the start instruction. The result of the start instruction contains the operands, the
    outputs and flags, in this order.
    """
    inputs = computation.inputs(i)
    outputs = i.arrays[len(inputs) :] or i.arrays
    if i.opcode == "slice-start":
        return _bytes_if_hbm(inputs[0], outputs[:1]) + _hbm(outputs[:1])
    if i.opcode == "copy-start":  # backends disagree on the order of result and operand
        spaces = [a for a in i.arrays if a.dims == inputs[0].dims][:2]
        return _hbm(spaces)
    return _hbm(inputs) + _hbm([a for a in outputs if a.size > 1])


def _fusion(module: Module, computation: Computation, i: Instruction) -> float:
    inner = module.computations[i.called["calls"][0]]
    read = 0.0
    for name, parameter in zip(i.operands, inner.parameters, strict=False):
        given = computation.by_name[name].arrays
        read += min(_hbm(given), _parameter_bytes(module, inner, parameter)) if _hbm(given) else 0.0
    return read + _result_bytes(inner, i)


def _parameter_bytes(module: Module, inner: Computation, parameter: Instruction) -> float:
    """Return the number of bytes that a fusion reads from one of its parameters.

    `parameter` may also be an instruction that only copies, converts or reshapes a parameter.
    """
    if parameter is inner.root:  # all of the parameter is written to the result
        return sum(a.bytes for a in parameter.arrays)
    total = 0.0
    for user in inner.users[parameter.name]:
        if user.opcode in _SAME:
            read = _parameter_bytes(module, inner, user)
            total += read * (_width(parameter, user) if user.opcode == "convert" else 1)
        elif user.opcode in SLICES and user.operands[0] == parameter.name:
            total += sum(a.bytes for a in user.arrays)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == parameter.name:
            continue  # in-place update
        elif user.opcode == "fusion":
            nested = module.computations[user.called["calls"][0]]
            places = [n for n, o in enumerate(user.operands) if o == parameter.name]
            for given in (nested.parameters[n] for n in places):
                if _passes(nested, given):
                    total += _parameter_bytes(module, inner, user) * _width(parameter, user)
                else:
                    total += _parameter_bytes(module, nested, given)
        else:
            return sum(a.bytes for a in parameter.arrays)
    return total


def _width(before: Instruction, after: Instruction) -> float:
    """Return the ratio of bytes per element of two arrays with equal elements, such as 2 for float32 and bfloat16."""
    return before.arrays[0].bytes / after.arrays[0].bytes if after.arrays[0].bytes else 1.0


def _passes(inner: Computation, parameter: Instruction) -> bool:
    """Return whether the fusion only copies, converts or reshapes one of its parameters."""
    found = inner.root
    while found.opcode in _SAME and found.operands:
        found = inner.operand(found, 0)
    return found is parameter


def _result_bytes(inner: Computation, i: Instruction) -> float:
    """Return the number of bytes of results that a fusion writes.

    If the fusion updates an array in place, only the update counts.
    """
    parts = [inner.by_name[o] for o in inner.root.operands] if inner.root.opcode == "tuple" else [inner.root]
    if len(parts) != len(i.arrays):
        return _hbm(i.arrays)
    total = 0.0
    for part, out in zip(parts, i.arrays, strict=True):
        while part.opcode in _SAME and part.operands:
            part = inner.operand(part, 0)
        update = inner.operand(part, 1).arrays if part.opcode == "dynamic-update-slice" else [out]
        total += _bytes_if_hbm(out, update)
    return total
