"""Examples in docstrings give the output that they show."""

import doctest
import importlib

import pytest

MODULES = [
    "llmctl.distributed.mesh",
    "llmctl.model.families",
    "llmctl.model.generate.decode",
    "llmctl.model.generate.sampling",
]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name):
    found = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert found.attempted and not found.failed
