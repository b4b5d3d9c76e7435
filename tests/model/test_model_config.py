"""Invalid model configs are rejected at validation, before any computation."""

import pytest
from pydantic import ValidationError

from llmctl.config.errors import RequestError
from llmctl.config.validation import validate
from llmctl.model.config import ModelConfig

YARN = {"rope_type": "yarn", "factor": 4.0}


@pytest.mark.parametrize(("fields", "said"), [
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic' is not known; known: linear, llama3, yarn"),
    ({"rope_scaling": {"type": "linear"}}, "'linear' needs factor"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}}, "needs high_freq_factor"),
    ({"rope_scaling": {**YARN, "beta_quick": 32}}, "knows no beta_quick; it knows attention_factor, beta_fast"),
    ({"rope_scaling": {**YARN, "factor": "4"}}, "factor must be a number above 0"),
    ({"rope_scaling": {**YARN, "factor": 0}}, "factor must be a number above 0"),
    ({"rope_scaling": {**YARN, "factor": float("inf")}}, "factor must be a number above 0"),
    ({"preset": "llama-tiny", "family": "gemma2"}, "'llama-tiny' is of the family 'llama', not 'gemma2'"),
    ({"preset": "t5-tiny", "relative_max_distance": 16}, "must be more than 16"),
])  # fmt: skip
def test_what_cannot_be_is_refused(fields, said):
    with pytest.raises(ValidationError, match=said):
        ModelConfig(**fields)


def test_what_can_be_is_not():
    for scaling in ({}, {"rope_type": "default"}, {"type": "linear", "factor": 2}, {**YARN, "beta_fast": 16.0}):
        assert ModelConfig(rope_scaling=scaling).rope_scaling == scaling
    assert ModelConfig(preset="llama-tiny", family="llama") == ModelConfig(preset="llama-tiny")


def test_a_recipe_sets_the_local_layers_by_a_list():
    """Values that passed the preset's validator were no JSON any more, and a list was refused ("must be a list")."""
    assert validate(ModelConfig, {"window": 4, "window_layers": [0, 2]}, str).window_layers == (0, 2)
    with pytest.raises(RequestError, match=r"window_layers\.0: must be a whole number"):
        validate(ModelConfig, {"window": 4, "window_layers": [0.5]}, str)
