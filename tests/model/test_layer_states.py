"""Hidden states of chosen layers, against the same network applied block by block."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmctl.config.errors import RequestError
from llmctl.config.settings import MeshConfig
from llmctl.distributed import mesh as meshes
from llmctl.model import functional, layerwise
from llmctl.model.config import ModelConfig

SIZES = {"d_model": 16, "layers": 4, "heads": 2, "kv_heads": 2, "head_dim": 8, "d_ff": 24, "vocab_size": 32}
PRESETS = {"llama-tiny": {}, "bert-tiny": {"max_seq_len": 16}, "t5-small": {"encoder_layers": 2}}


def model(preset, **changes):
    return ModelConfig(preset=preset, **(SIZES | PRESETS[preset] | changes))


def some_batch(cfg, B=2, T=6):
    batch = functional.example_batch(cfg, B, T)
    drawn = np.random.default_rng(0).integers(3, 32, (2, B, T)).astype(np.int32)
    found = {
        "tokens": drawn[0],
        "segments": np.ones((B, T), np.int32),
        "positions": np.arange(T) * np.ones_like(drawn[0]),
    }
    if cfg.encoder_layers:
        found |= {f"encoder_{name}": a for name, a in found.items()} | {"encoder_tokens": drawn[1]}
    return {name: jnp.asarray(found[name]) for name in batch}


def walk(cfg, params, batch):
    """The outputs of all layers of the last stack, one block after the other, and the final states."""
    stack = functional.stacks(cfg)[-1]
    memory = layerwise.encode(cfg, params, batch) if cfg.encoder_layers else None
    carry, found = layerwise.embed(cfg, params, batch, memory), []
    for i in range(cfg.layers):
        carry, _ = layerwise.block(cfg, stack, layerwise.layer_params(params, stack, i), carry, i)
        found.append(carry.x_BTD)
    return layerwise.finish(cfg, params, stack, carry), jnp.stack(found)


@pytest.mark.parametrize("preset", PRESETS)
def test_chosen_states_equal_the_walk_block_by_block(preset):
    cfg = model(preset)
    params, batch = jax.jit(lambda key: functional.init(cfg, key))(jax.random.key(0)), some_batch(cfg)
    want, layers = walk(cfg, params, batch)
    x, states = functional.hidden_states(cfg, params, batch, (3, -1, 1))
    np.testing.assert_allclose(states[::2], layers[jnp.array([3, 1])], atol=1e-5)
    memory = layerwise.encode(cfg, params, batch) if cfg.encoder_layers else None
    np.testing.assert_allclose(states[1], layerwise.embed(cfg, params, batch, memory).x_BTD, atol=1e-5)
    np.testing.assert_allclose(x, want, atol=1e-5)


@pytest.mark.parametrize("remat", ["none", "minimal", "full"])
def test_gradients_through_chosen_states_equal_those_of_the_walk(remat):
    cfg = model("llama-tiny")
    params, batch = jax.jit(lambda key: functional.init(cfg, key))(jax.random.key(0)), some_batch(cfg)
    weight = jnp.asarray(np.random.default_rng(1).normal(size=(2, 2, 6, 16)), jnp.float32)

    def chosen(params):
        x, states = functional.hidden_states(cfg, params, batch, (0, 2), remat=remat)
        return jnp.sum(states * weight) + jnp.sum(jnp.square(x))

    def walked(params):
        x, layers = walk(cfg, params, batch)
        return jnp.sum(layers[jnp.array([0, 2])] * weight) + jnp.sum(jnp.square(x))

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), jax.grad(chosen)(params), jax.grad(walked)(params)
    )


def test_a_layer_that_is_none_and_a_pipeline_are_refused():
    cfg = model("llama-tiny")
    params, batch = jax.jit(lambda key: functional.init(cfg, key))(jax.random.key(0)), some_batch(cfg)
    for layers in ((4,), (-2,), (1, 1)):
        with pytest.raises(RequestError, match="different layers of a stack of 4"):
            functional.hidden_states(cfg, params, batch, layers)
    with (
        meshes.use(meshes.make(MeshConfig(pipeline=2, data=2, tensor=2))),
        pytest.raises(RequestError, match=r"mesh\.pipeline = 1"),
    ):
        functional.hidden_states(cfg, params, batch, (0,))
