"""Which device stands where in the mesh: neighbours on the fast network, slices along the data axis alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.experimental import mesh_utils

from llmctl.config.errors import RequestError


def arrange(devices: Sequence[Any], axes: Sequence[str], sizes: Sequence[int], slices: int) -> np.ndarray:
    """Devices [*sizes]: the outer part of the data axis runs over slices, everything else stays inside one.

    Args:
      devices: as many as the product of `sizes`.
      axes: their names, "data" among them.
      sizes: devices an axis.
      slices: how many there are; 0 is as many as the devices say, 1 takes all for one.

    Raises:
      RequestError: the data axis or the devices do not divide into the slices.
    """
    groups = _groups(devices, slices)
    data = list(axes).index("data")
    if sizes[data] % len(groups):
        raise RequestError(
            f"mesh: data {sizes[data]} does not divide over {len(groups)} slices, and only that axis reaches from one "
            "to the next; make it a multiple, or set mesh.dcn = 1 to take all devices for one slice"
        )
    inner = [size // len(groups) if i == data else size for i, size in enumerate(sizes)]
    return np.concatenate([_inside(group, inner) for group in groups], axis=data)


def _inside(devices: Sequence[Any], sizes: Sequence[int]) -> np.ndarray:
    """One slice: on TPUs the axes follow the wires of the torus, where they can."""
    if devices[0].platform == "tpu" and len(devices) > 1:
        return mesh_utils.create_device_mesh(sizes, list(devices), allow_split_physical_axes=True)
    found = np.empty(len(devices), object)
    found[:] = devices
    return found.reshape(sizes)


def _groups(devices: Sequence[Any], slices: int) -> list[list[Any]]:
    """The devices of each slice. Where the hardware knows of none, whole processes in order are taken for one."""
    told = sorted({getattr(d, "slice_index", 0) for d in devices})
    if len(told) > 1 and slices != 1:
        if slices and slices != len(told):
            raise RequestError(f"mesh.dcn: the devices are in {len(told)} slices, not {slices}; 0 takes what they say")
        return [[d for d in devices if d.slice_index == s] for s in told]
    if slices <= 1:
        return [list(devices)]
    if devices[0].platform == "tpu":
        raise RequestError(f"mesh.dcn: these TPUs are one slice, not {slices}; leave it at 0")
    processes = len({d.process_index for d in devices})
    if len(devices) % slices or (processes > 1 and processes % slices):
        raise RequestError(f"mesh.dcn: {len(devices)} devices of {processes} processes do not make {slices} slices")
    ordered = sorted(devices, key=lambda d: (d.process_index, d.id))
    share = len(devices) // slices
    return [ordered[i * share : (i + 1) * share] for i in range(slices)]
