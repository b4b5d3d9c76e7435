"""Bad inputs of every kind are refused: exit code 2, one line, within limits, and nothing outside is touched."""

import bad_inputs
import pytest
import valid_inputs
from bad_inputs import runner

CASES = bad_inputs.cases()
FEW = 24
"""Number of cases in `make test`, in equal distances."""


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    runner.preload()
    return valid_inputs.write(tmp_path_factory.mktemp("valid"))


@pytest.mark.parametrize("case", CASES[:: len(CASES) // FEW], ids=lambda case: case.name)
def test_a_bad_input_of_each_kind(case, valid, tmp_path):
    if "tfds" in case.uses:
        pytest.skip("its library takes seconds to import")
    runner.run(case, valid, tmp_path / "case")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of TFDS itself
def test_all_bad_inputs(valid, tmp_path):
    valid_inputs.tfds(valid.folder)
    assert len(CASES) >= 400
    for case in CASES:
        runner.run(case, valid, tmp_path / "case")
