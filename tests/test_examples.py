"""Examples in docstrings give the output that they show."""

import doctest
import importlib
from pathlib import Path

import numpy as np
import pytest

import llmctl
from llmctl.artifacts import artifact
from llmctl.model import functional, weights
from llmctl.model.config import ModelConfig

PACKAGE = Path(llmctl.__file__).parent
OWN = {f"llmctl.artifacts.{name}" for name in ("artifact", "manifest_file", "integrity", "saving")}
"""Modules whose examples read a saved artifact, in a test of their own."""
MODULES = sorted(
    {
        ".".join(("llmctl", *p.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
        for p in PACKAGE.rglob("*.py")
        if ">>> " in p.read_text(encoding="utf-8")
    }
    - OWN
)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name):
    found = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert found.attempted and not found.failed


def test_artifact_examples_run(tmp_path):
    """The examples of these modules read a saved artifact, which is `folder`."""
    config = ModelConfig(vocab_size=16, d_model=8, layers=1, heads=2, kv_heads=2, head_dim=4, d_ff=16)
    flat = weights.flatten(functional.abstract(config))
    params = weights.unflatten({name: np.zeros(a.shape, a.dtype) for name, a in flat.items()})
    artifact.save(tmp_path / "base", params, config, stage="pretrain", key="k", config={})
    for name in OWN:
        found = doctest.testmod(importlib.import_module(name), extraglobs={"folder": tmp_path / "base"})
        assert found.attempted and not found.failed, name
