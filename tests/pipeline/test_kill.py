"""Real processes that die or are told to stop, again and again; the same command ends where a quiet run ends.

With dropout, on one device and on a mesh of stages that share sequences: parameters are compared bit for bit.
"""

import random
import signal

import pytest
from processes import finished, interrupted, write

from llmctl.artifacts import artifact

pytestmark = pytest.mark.slow
LAYOUTS = {"alone": (1, "", 1200), "pipeline": (4, "pipeline = 2, context = 2, data = 1", 400)}
"""Devices, mesh and steps: enough that a signal comes before the end."""


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request, tmp_path_factory):
    """(folder of the recipe, devices, steps, digest of the parameters of a run that nothing happens to)."""
    devices, mesh, steps = LAYOUTS[request.param]
    place = write(tmp_path_factory.mktemp(request.param), steps, mesh)
    return place, devices, steps, digest(place, "quiet", devices)[0]


def digest(place, folder, devices):
    """(digest of the parameters at the end, what was said)."""
    said = finished(place, folder, 1, devices)
    return artifact.read_manifest(place / folder / "pretrain").digest, said


def test_two_clean_runs_make_the_same_bytes(layout):
    place, devices, _, quiet = layout
    assert digest(place, "again", devices)[0] == quiet


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_interrupted_three_times_it_is_uninterrupted_bit_for_bit(layout, number):
    place, devices, steps, quiet = layout
    chosen = sorted(random.Random(int(number)).sample(range(20, steps // 2), 3))
    for step in chosen:
        [(code, _, said)] = interrupted(place, number.name, step, number, 1, devices)
        if number == signal.SIGKILL:
            assert code == -number
        else:
            assert code == 3 and "the same command goes on from there" in said
    found, said = digest(place, number.name, devices)
    assert "going on from step" in said
    assert found == quiet, chosen
