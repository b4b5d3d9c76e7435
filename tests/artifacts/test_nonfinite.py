"""NaN and infinity: no array that holds them is saved unless it was asked for, and the array is named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmctl.artifacts import artifact
from llmctl.config.errors import WorkError
from llmctl.model import functional, weights
from llmctl.model.config import ModelConfig

MODEL = ModelConfig(preset="llama-tiny", layers=1, d_model=8, heads=2, kv_heads=1, head_dim=4, d_ff=12, vocab_size=16)


@pytest.fixture(scope="module")
def params():
    return functional.init(MODEL, jax.random.key(0))


def save(out, params, **settings):
    return artifact.save(out, params, MODEL, stage="test", key="", config={}, **settings)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_an_array_that_is_not_finite_is_refused_by_name(tmp_path, params, value, dtype):
    flat = {name: a.astype(dtype) for name, a in weights.flatten(params).items()}
    name = next(n for n in flat if n.endswith("up/kernel"))
    flat[name] = flat[name].at[0, 3, 2].set(value)
    with pytest.raises(WorkError, match=rf"{name} would hold NaN or infinity; --allow-nonfinite saves it"):
        save(tmp_path / "out", weights.unflatten(flat))
    assert not list(tmp_path.iterdir())


def test_the_manifest_names_what_was_allowed(tmp_path, params):
    flat = weights.flatten(params)
    assert save(tmp_path / "good", params).nonfinite == []
    name = next(iter(flat))
    flat[name] = flat[name].at[0].set(jnp.nan)
    assert save(tmp_path / "bad", weights.unflatten(flat), allow_nonfinite=True).nonfinite == [name]
    assert artifact.read_manifest(tmp_path / "bad").nonfinite == [name]
