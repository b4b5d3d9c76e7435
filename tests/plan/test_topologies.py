"""Names of topologies, and what they stand for."""

import pytest

from llmctl.config.errors import RequestError
from llmctl.distributed import hardware
from llmctl.plan import topologies


@pytest.mark.parametrize(
    "name, number, platform, devices",
    [
        ("v5e:16x16", 256, "tpu", 256), ("v5p:4x4x4", 64, "tpu", 64), ("2*v5e:16x16", 512, "tpu", 512),
        ("v4:2x2x1", 4, "tpu", 4), ("tpu7x:2x2x1", 4, "tpu", 8), ("h100:8", 8, "cuda", 8), ("h200:32", 32, "cuda", 32),
        ("cpu:8", 8, "cpu", 8), (" V6E:1x1 ", 1, "tpu", 1),
    ],
)  # fmt: skip
def test_a_name(name, number, platform, devices):
    found = topologies.find(name)
    assert (found.chips, found.platform, found.devices) == (number, platform, devices)
    assert topologies.find(found.name) == found


def test_every_known_name_is_found():
    for name in topologies.known():
        assert topologies.find(name.replace("N", "8")).chip.name == name.split(":")[0]


@pytest.mark.parametrize(
    "name", ["v5e:4x5", "v5:4x4", "v5e", "h100:12", "0*v5e:4x4", "cpu:0", "2*h100:8", "v5p:4x4", ""]
)
def test_an_unknown_name_lists_the_known_ones(name):
    with pytest.raises(RequestError) as caught:
        topologies.find(name)
    assert "\n" not in str(caught.value)
    assert name == "h100:12" or "v5e:{1x1,2x2" in str(caught.value)


@pytest.mark.parametrize("name", ["cpu:4097", "h100:999999992", "200*v5e:16x16"])
def test_more_devices_than_a_process_can_stand_for(name):
    with pytest.raises(RequestError, match="devices; at most"):
        topologies.find(name)


def test_a_near_miss_is_named():
    with pytest.raises(RequestError, match="did you mean 'v5e:16x16'"):
        topologies.find("v5e:16x61")


def test_what_the_compiler_is_asked_for():
    assert topologies.find("2*v5e:16x16").arguments == {
        "platform": "tpu", "topology_name": "v5e:16x16", "chips_per_host_bounds": (2, 2, 1),
        "wrap": (True, True, False), "num_slices": 2,
    }  # fmt: skip
    assert topologies.find("v5p:4x4x4").wrap == (True, True, True)
    assert topologies.find("v5p:2x4x4").wrap == (False, False, False)
    assert topologies.find("v4:2x2x1").arguments["chip_config_name"] == "megacore"


def test_the_number_of_chips_picks_a_slice():
    assert topologies.with_chips("v5e", 32).name == "v5e:4x8"
    assert topologies.with_chips("h100", 24).name == "h100:24"
    with pytest.raises(RequestError, match="whole nodes of 8"):
        topologies.with_chips("h100", 12)
    with pytest.raises(RequestError, match="there are 1, 4, 8, 16"):
        topologies.with_chips("v5e", 12)
    with pytest.raises(RequestError, match="did you mean 'v5p'"):
        topologies.with_chips("v5q", 12)


def test_a_type_without_a_figure_takes_that_of_bfloat16():
    v5e = hardware.chip("v5e")
    assert v5e.peak("int8") == 393e12 and v5e.peak("float32") == 197e12
    assert hardware.chip("h100").peak("float32") == 494.5e12
    assert hardware.CPU.peak("float32") == 0.0
