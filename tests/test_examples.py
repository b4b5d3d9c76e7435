"""Examples in docstrings give the output that they show."""

import doctest
import importlib

import numpy as np
import pytest

from llmctl.artifacts import artifact
from llmctl.model import functional, weights
from llmctl.model.config import ModelConfig

MODULES = [
    "llmctl.artifacts.workspace",
    "llmctl.convert.hf_folder",
    "llmctl.convert.importing",
    "llmctl.convert.name_map",
    "llmctl.data.pretraining.objective_rows",
    "llmctl.data.sources.base",
    "llmctl.data.sources.readers",
    "llmctl.data.tokenizers.base",
    "llmctl.distributed.mesh",
    "llmctl.evaluate.metrics.classification",
    "llmctl.evaluate.perplexity",
    "llmctl.model.config",
    "llmctl.model.families",
    "llmctl.model.flops",
    "llmctl.model.functional",
    "llmctl.model.generate.decode",
    "llmctl.model.generate.sampling",
    "llmctl.model.hf_config",
    "llmctl.model.weights",
    "llmctl.model.weights.base",
    "llmctl.model.weights.matrices",
    "llmctl.model.weights.names",
    "llmctl.plan.hlo.counts",
    "llmctl.plan.topologies",
]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name):
    found = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert found.attempted and not found.failed


def test_artifact_examples_run(tmp_path):
    """The examples of the artifact module read a saved artifact, which is `folder`."""
    config = ModelConfig(vocab_size=16, d_model=8, layers=1, heads=2, kv_heads=2, head_dim=4, d_ff=16)
    flat = weights.flatten(functional.abstract(config))
    params = weights.unflatten({name: np.zeros(a.shape, a.dtype) for name, a in flat.items()})
    artifact.save(tmp_path / "base", params, config, stage="pretrain", key="k", config={})
    found = doctest.testmod(artifact, extraglobs={"folder": tmp_path / "base"})
    assert found.attempted and not found.failed
