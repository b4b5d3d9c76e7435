"""Test slices in the mesh: only the data axis spans several slices."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest

from llmctl.config.errors import RequestError
from llmctl.config.settings import MeshConfig
from llmctl.distributed import mesh
from llmctl.distributed.device_order import arrange

AXES = ("data", "fsdp", "tensor")


DESCRIBED = """
import json
from jax.experimental.topologies import get_topology_desc
from llmctl.config.settings import MeshConfig
from llmctl.distributed import mesh
devices = get_topology_desc(**{arguments}).devices
found = mesh.make(MeshConfig(data=2, fsdp=4, tensor=4), devices).devices.reshape(2, 4, 4)
print(json.dumps([[[[d.slice_index, *d.coords] for d in row] for row in block] for block in found]))
"""


@dataclass(frozen=True)
class Device:
    id: int
    process_index: int = 0
    slice_index: int = 0
    platform: str = "gpu"


def ids(found):
    return np.vectorize(lambda d: d.id)(found).tolist()


def test_slices_are_the_outer_part_of_the_data_axis():
    devices = [Device(i, i // 2, i % 2) for i in range(8)]  # slices 0 and 1 alternate
    assert ids(arrange(devices, AXES, (4, 2, 1), 0)) == [[[0], [2]], [[4], [6]], [[1], [3]], [[5], [7]]]
    assert ids(arrange(devices, AXES, (4, 2, 1), 1)) == [[[0], [1]], [[2], [3]], [[4], [5]], [[6], [7]]]


def test_processes_stand_for_slices_where_the_devices_say_nothing():
    devices = [Device(i, (7 - i) // 2) for i in range(8)]
    assert ids(arrange(devices, AXES, (2, 1, 4), 2)) == [[[6, 7, 4, 5]], [[2, 3, 0, 1]]]


def test_fake_devices_make_slices_in_order():
    made = [mesh.make(MeshConfig(data=2, tensor=4, dcn=dcn)).devices for dcn in (0, 2)]
    assert ids(made[0]) == ids(made[1])


@pytest.mark.parametrize(
    "devices, sizes, slices, message",
    [
        ([Device(i, 0, i // 4) for i in range(8)], (1, 8, 1), 0, "data 1 does not divide over 2 slices"),
        ([Device(i, 0, i // 4) for i in range(8)], (4, 2, 1), 4, "in 2 slices, not 4"),
        ([Device(i, i // 3) for i in range(9)], (9, 1, 1), 9, "9 devices of 3 processes"),
        ([Device(i, platform="tpu") for i in range(8)], (8, 1, 1), 2, "one slice"),
    ],
    ids=["data", "number", "processes", "tpu"],
)
def test_slices_that_do_not_fit(devices, sizes, slices, message):
    with pytest.raises(RequestError, match=message):
        arrange(devices, AXES, sizes, slices)


def test_a_tpu_mesh_follows_the_wires_and_keeps_slices_apart():
    pytest.importorskip("libtpu")
    from llmctl.plan import topologies

    # By default libtpu queries the network for its topology. A separate process isolates this one from that state.
    code = DESCRIBED.format(arguments=topologies.find("2*v5e:4x4").arguments)
    env = {**os.environ, "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    found = json.loads(subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True).stdout)
    for number, block in enumerate(found):
        slices, coords = np.array(block)[..., 0], np.array(block)[..., 1:3]
        assert (slices == number).all()
        steps = np.abs(np.diff(coords, axis=1)).sum(-1)
        assert (steps == 1).all()  # neighbors on the tensor axis are one hop apart
