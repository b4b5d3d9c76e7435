"""Read the replica groups of collectives, and determine the mesh axes that the groups span.

Devices are numbered in mesh order: consecutive numbers differ in the last mesh axis.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from itertools import product

import numpy as np

from llmctl.plan.hlo.parser import Instruction


def group_of(i: Instruction, devices: int) -> list[int]:
    """Return the device numbers of one replica group of `i`, usually the group of device 0.

    All printed forms are supported: {{0,1},{2,3}}, [4,2]<=[2,4]T(1,0), mesh['a'=2,'b'=4] {'b'}, and source-target
    pairs.

    Args:
      i: a collective.
      devices: number of devices of the program. If `i` lists no groups, all devices form one group.
    """
    if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", i.attributes):
        return _connected([(int(a), int(b)) for a, b in re.findall(r"(\d+),(\d+)", pairs[1])])
    text = i.attributes.partition("replica_groups=")[2]
    if text.startswith("mesh["):
        return _of_mesh(text)
    if iota := re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        return [int(n) for n in _iota(iota[2], iota[3]).reshape(_ints(iota[1]))[0]]
    if first := re.match(r"\{\{([\d,]+)\}", text):
        return _ints(first[1])
    return list(range(devices))


def slices_of(i: Instruction) -> int:
    """Return the number of TPU slices in the collective of the send instruction `i`.

    The attribute {1,2}x{0:3} means two slices (1 and 2) with four devices each.
    """
    found = re.search(r'_xla_megascale_target="\{*([\d,:]+)\}', i.attributes)
    spans = (part.split(":") for part in found[1].split(",")) if found else ()
    return max(2, sum(int(span[-1]) - int(span[0]) + 1 for span in spans))


def _ints(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]


def _iota(dims: str, order: str | None) -> np.ndarray:
    """Return the numbers 0, 1, 2, … as an array of the shape `dims`, with its axes transposed to `order`."""
    ids = np.arange(math.prod(_ints(dims))).reshape(_ints(dims))
    return ids.transpose(_ints(order)) if order else ids


def _connected(pairs: list[tuple[int, int]]) -> list[int]:
    """Return the sorted device numbers of the group that contains the first pair's source.

    Each pair is (source, target) of a collective-permute. Devices belong to one group if pairs connect them, directly
    or through other devices.
    """
    joined = {pairs[0][0]} if pairs else {0}
    while more := {d for p in pairs if set(p) & joined for d in p} - joined:
        joined |= more
    return sorted(joined)


def _of_mesh(text: str) -> list[int]:
    """Parse replica groups that are printed as axes of a mesh, and return the first group's device numbers, sorted.

    The first group contains mesh index 0. An example of the form is mesh['a'=2,'b'=4] {'b'}: a group spans the axis b.
    XLA invents the names of the axes. If a group spans a part of an axis, XLA prints 'a':(P)S. S is the size of this
    part. P is the product of the sizes of the earlier parts of the axis.
    """
    names = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", text.partition("]")[0])}
    over = re.search(r"\{([^}]*)\}", text.partition("]")[2])
    parts = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", over[1]) if over else []
    shape = list(names.values())
    order = np.arange(math.prod(shape))
    if found := re.search(r"device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\)", text):
        order = _iota(found[1], found[2]).reshape(-1)
    elif listed := re.search(r"device_ids=\(([\d,]+)\)", text):
        order = np.array(_ints(listed[1]))
    choices: list[list[int]] = []
    for name, size in names.items():
        offsets = [0]
        for part, before, length in parts:
            if part == name:
                many = int(length) if length else size
                step = size // (int(before) * many) if before else 1
                offsets = [o + k * step for o in offsets for k in range(many)]
        choices.append(offsets)
    places = [int(np.ravel_multi_index(at, shape)) for at in product(*choices)]
    return sorted(int(order[p]) for p in places)


def axis_of(group: list[int], mesh: Mapping[str, int]) -> str:
    """Return the names of the mesh axes along which the devices of a group differ, joined by commas.

    Return "?" if the devices differ along no axis, or if a device is not in the mesh.
    """
    shape = tuple(mesh.values())
    if max(group, default=0) >= math.prod(shape):
        return "?"
    places = np.array(np.unravel_index(group, shape))
    return ",".join(name for name, along in zip(mesh, places, strict=True) if len(set(along.tolist())) > 1) or "?"
