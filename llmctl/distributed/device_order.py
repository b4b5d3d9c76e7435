"""Order the devices of a mesh: neighbors share the fast network, and only the data axis spans several slices.

A slice is a group of chips that one fast network connects. A slower network connects the slices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.experimental import mesh_utils

from llmctl.config.errors import RequestError


def arrange(devices: Sequence[Any], axes: Sequence[str], sizes: Sequence[int], slices: int) -> np.ndarray:
    """Arrange devices into an array of shape `sizes`, in which only the data axis spans several slices.

    Args:
        devices: Devices, as many as the product of `sizes`.
        axes: Names of the mesh axes, including "data".
        sizes: Number of devices per axis.
        slices: Number of slices. 0 uses the number that the devices report; 1 treats all devices as one slice.

    Returns:
        Object array [*sizes] of devices. Along the data axis, the devices of one slice are contiguous.

    Raises:
        RequestError: If the data axis or the devices cannot be divided by the number of slices.
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
    """Arrange the devices of one slice (chips joined by a fast network) into an array of shape `sizes`.

    On TPUs, the mesh axes follow the links of the torus if possible.
    """
    if devices[0].platform == "tpu" and len(devices) > 1:
        return mesh_utils.create_device_mesh(sizes, list(devices), allow_split_physical_axes=True)
    found = np.empty(len(devices), object)
    found[:] = devices
    return found.reshape(sizes)


def _groups(devices: Sequence[Any], slices: int) -> list[list[Any]]:
    """Return the devices of each slice (chips joined by a fast network).

    If the devices do not report slices, they are divided equally, in the order of their processes.

    Raises:
        RequestError: If the devices report a number of slices other than `slices`, or cannot be divided by `slices`.
    """
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
