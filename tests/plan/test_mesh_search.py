"""The search over meshes: against what must hold of any answer."""

import math
from typing import get_args

import pytest

from llmctl.config.settings import OptimConfig, TrainConfig
from llmctl.model.config import ModelConfig
from llmctl.plan import analytic_setup, mesh_search, topologies

MODEL = ModelConfig(preset="llama3.2-1b")
V5E = topologies.find("v5e:4x4")


def setup(rows=32, seq_len=2048):
    train = TrainConfig(batch_size=rows, seq_len=seq_len, dtype="bfloat16", remat="full")
    return analytic_setup.of_training(MODEL, train, OptimConfig(), {"fsdp": 16})


@pytest.fixture(scope="module")
def found():
    return mesh_search.candidates(setup(), V5E)


def test_every_candidate_is_a_step_that_runs(found):
    assert len(found) > 20 and len({str(c.setup) for c in found}) == len(found)
    for c in found:
        one = c.setup
        assert math.prod(one.mesh.values()) == 16
        assert one.rows % (one.size("data", "fsdp") * one.accumulate) == 0
        assert MODEL.kv_heads % one.size("tensor") == 0 and MODEL.d_model % one.size("fsdp", "context") == 0
        assert c.memory <= mesh_search.MARGIN * V5E.chip.hbm_bytes


def test_every_recomputation_is_tried_but_the_one_that_needs_the_host(found):
    tried = {c.setup.remat for c in found}
    assert tried == set(get_args(TrainConfig.model_fields["remat"].annotation)) - {"offload"}


def test_a_model_too_large_for_a_chip_leaves_nothing():
    large = ModelConfig(preset="llama3-70b")
    train = TrainConfig(batch_size=1, seq_len=2048, dtype="bfloat16", remat="full")
    one = analytic_setup.of_training(large, train, OptimConfig(), {})
    assert not mesh_search.candidates(one, topologies.find("v5e:1x1"))


def test_the_front_holds_what_nothing_beats(found):
    kept = mesh_search.front(found)
    assert kept and kept[0].seconds == min(c.seconds for c in found)
    for c in kept:
        assert not any(o.seconds <= c.seconds and o.memory < c.memory for o in found)
    assert all(any(k.seconds <= c.seconds and k.memory <= c.memory for k in kept) for c in found)


def test_few_are_compiled_and_what_does_not_fit_makes_room_for_the_next():
    asked = []

    def compile_one(one):
        asked.append(one)
        return None if len(asked) == 1 else (1e9 * len(asked), 1.0 / len(asked))

    kept = mesh_search.search(setup(), V5E, compile_one, best=3)
    assert len(asked) == 4 and all(c.compiled for c in kept)
    assert [c.memory for c in kept] == [4e9, 3e9, 2e9]  # each slower one is emptier
    assert len({str(a) for a in asked}) == 4


def test_the_smallest_slice_that_fits():
    """By the model alone: 1.2 billion parameters with AdamW are 15 GB, which one v5e has not left for them."""

    def compile_one(one):
        return mesh_search.modelled(one, V5E).memory, 1.0

    topology, c = mesh_search.fit(setup(), topologies.smallest_first("v5e"), compile_one)
    assert topology.name == "v5e:2x2" and c.memory <= topology.chip.hbm_bytes
    assert mesh_search.fit(setup(), [topologies.find("v5e:1x1")], compile_one) is None


def test_a_slice_is_given_up_only_when_the_emptiest_does_not_fit():
    """The compiler may find the fast ones too large."""
    ordered = mesh_search.candidates(setup(), V5E)
    least = min(ordered, key=lambda c: c.memory)

    def compile_one(one):
        return (1e9, 1.0) if mesh_search.modelled(one, V5E).memory <= least.memory else None

    assert ordered[0].memory > least.memory and ordered[1].memory > least.memory
    found = mesh_search.fit(setup(), [V5E], compile_one)
    assert found and found[1].setup == least.setup


def test_slices_are_joined_along_data():
    found = mesh_search.candidates(setup(), topologies.find("2*v5e:2x4"))
    assert found and not any(c.setup.size("data") % 2 for c in found)
