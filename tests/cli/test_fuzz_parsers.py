"""Read randomly changed files with every parser: each is read, or refused in one line, within limits."""

import random
from collections import Counter

import fuzz_parsers
import pytest
import valid_inputs

MANY = pytest.param(range(200), marks=pytest.mark.slow, id="many")


@pytest.fixture(scope="module")
def parsers(tmp_path_factory):
    return fuzz_parsers.parsers(valid_inputs.write(tmp_path_factory.mktemp("valid")))


@pytest.mark.parametrize("seeds", [pytest.param(range(3), id="few"), MANY])
@pytest.mark.filterwarnings("ignore")
def test_changed_files_are_read_or_refused_in_one_line(parsers, seeds, tmp_path):
    outcomes = Counter()
    for name, parser in parsers.items():
        target = parser.target(tmp_path)
        assert fuzz_parsers.judge(lambda read=parser.read, at=target: read(at)) == "read", name
        for seed in seeds:
            parser.put(target, parser.change(random.Random(f"{name} {seed}"), parser.valid))
            try:
                outcomes[fuzz_parsers.judge(lambda read=parser.read, at=target: read(at))] += 1
            except AssertionError as e:
                raise AssertionError(f"{name}, seed {seed}: {e}") from e
    assert outcomes["read"] and outcomes["refused"]
