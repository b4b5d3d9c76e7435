"""Step times by hand."""

import pytest

from llmctl.plan import roofline, topologies
from llmctl.plan.hlo.counts import Collective, Counts

V5E = topologies.find("v5e:16x16")


def counts(flops=0.0, moved=0.0, *collectives):
    return Counts(flops, moved, list(collectives), {"bfloat16": flops})


def gather(amount, axis="fsdp", hidden=0.0):
    return Collective("all-gather", amount, axis, 1, float(hidden > 0), amount, hidden)


def test_whichever_is_slowest_binds():
    mesh = {"data": 1, "fsdp": 256}
    busy = roofline.of(counts(197e12, 819e9 / 2), V5E, mesh)
    assert busy.seconds == pytest.approx(1.0) and busy.binds == "compute"
    fed = roofline.of(counts(197e12, 819e9 * 2), V5E, mesh)
    assert fed.seconds == pytest.approx(2.0) and fed.binds == "hbm"


def test_collectives_hide_behind_compute_or_add_to_it():
    mesh = {"data": 1, "fsdp": 256}  # both dimensions, rings of 16: all four links
    exposed = roofline.of(counts(197e12, 0.0, gather(100e9)), V5E, mesh)
    assert exposed.seconds == pytest.approx(1.5) and exposed.exposed == pytest.approx(0.5)
    hidden = roofline.of(counts(197e12, 0.0, gather(100e9, hidden=100e9)), V5E, mesh)
    assert hidden.seconds == pytest.approx(1.0)
    longer = roofline.of(counts(197e12, 0.0, gather(600e9, hidden=600e9)), V5E, mesh)
    assert longer.seconds == pytest.approx(3.0) and longer.binds == "ici"


@pytest.mark.parametrize(
    "name, mesh, axis, links",
    [
        ("v5e:16x16", {"fsdp": 16, "tensor": 16}, "tensor", 2),  # one ring
        ("v5e:16x16", {"fsdp": 16, "tensor": 16}, "fsdp", 2),
        ("v5e:16x16", {"fsdp": 16, "tensor": 16}, "fsdp,tensor", 4),
        ("v5e:16x16", {"fsdp": 64, "tensor": 4}, "tensor", 1),  # a line within a ring
        ("v5e:16x16", {"fsdp": 64, "tensor": 4}, "fsdp", 3),  # the rest of it, and the other ring
        ("v5e:4x4", {"fsdp": 4, "tensor": 4}, "tensor", 1),  # no rings
        ("v5e:4x4", {"fsdp": 16}, "fsdp", 2),
        ("v5p:4x4x4", {"fsdp": 64}, "fsdp", 6),
        ("v5p:4x4x4", {"fsdp": 16, "tensor": 4}, "tensor", 2),
        ("tpu7x:4x4x4", {"fsdp": 64, "tensor": 2}, "fsdp", 6),
    ],
)
def test_links_of_an_axis(name, mesh, axis, links):
    topology = topologies.find(name)
    link = topology.chip.ici_bandwidth / (2 * topology.chip.dimensions)
    assert roofline.bandwidth(axis, topology, mesh) == pytest.approx(links * link)


def test_between_slices_the_network_counts():
    two, mesh = topologies.find("2*v5e:16x16"), {"data": 2, "fsdp": 256}
    found = roofline.of(counts(0.0, 0.0, gather(3.125e9, "data"), gather(200e9, "fsdp")), two, mesh)
    assert found.dcn == pytest.approx(1.0) and found.ici == pytest.approx(1.0) and found.seconds == pytest.approx(2.0)


@pytest.mark.parametrize(
    "kind, axis, mesh, here, away",
    [
        # 16 GB gathered by 16 GPUs of 2 nodes: 7/8 of it from 7 neighbours; half comes from the other node, an eighth
        # of that by every GPU's own port.
        ("all-gather", "fsdp", {"fsdp": 16}, 14e9, 1e9),
        ("all-reduce", "fsdp", {"fsdp": 16}, 14e9, 1e9),  # of 8 GB, there and back
        ("all-gather", "tensor", {"fsdp": 2, "tensor": 8}, 15e9, 0),
        ("all-gather", "fsdp", {"fsdp": 2, "tensor": 8}, 0, 15e9),
        ("all-gather", "data,tensor", {"data": 4, "fsdp": 2, "tensor": 2}, 15e9 * 8 / 7 * 3 / 4, 15e9 / 7),
        ("all-to-all", "fsdp", {"fsdp": 16}, 7e9, 8e9),
        ("collective-permute", "context", {"context": 16}, 0, 15e9),
        ("all-gather", "?", {"fsdp": 16}, 0, 15e9),
        ("all-reduce", "slices", {"data": 4, "fsdp": 4}, 0, 15e9),  # as the hosts of TPUs do it
    ],
)
def test_the_network_carries_what_a_node_does_not_have(kind, axis, mesh, here, away):
    c = Collective(kind, 15e9, axis, 1, 0, 16e9)
    assert roofline.sent(c, topologies.find("h100:16"), mesh) == pytest.approx((here, away))


def test_what_the_compiler_took_apart_is_not_taken_apart_again():
    """The rest of a sum over 8 devices of 2 slices is a sum over 4 of them, which keeps the axis's name."""
    two, mesh = topologies.find("2*v5e:2x2"), {"data": 8}
    parts = gather(200e9, "data"), Collective("all-reduce", 3.125e9, "slices", 1, 0, 3.125e9)
    found = roofline.of(counts(0.0, 0.0, *parts), two, mesh)
    assert found.dcn == pytest.approx(1.0) and found.ici == pytest.approx(2.0)  # two of four links


def test_utilization_and_chip_hours():
    found = roofline.of(counts(197e12), V5E, {"fsdp": 256})
    assert found.mfu(0.75 * 256 * 197e12, V5E, "bfloat16") == pytest.approx(0.75)
    assert found.chip_hours(1e6 * 3600, 1e6, V5E) == pytest.approx(256)


def test_int8_runs_at_its_own_peak():
    both = Counts(0, 0, [], {"int8": 393e12, "bfloat16": 197e12}, {}, 197e12)
    assert roofline.of(both, V5E, {"fsdp": 256}).compute == pytest.approx(3.0)


def test_a_cpu_has_no_roofline():
    assert roofline.of(counts(1.0), topologies.find("cpu:8"), {"data": 8}) is None
