"""LoRA's options and DoRA: ranks and scales by hand, rates, refusals, and integers that stay integers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix

from llmctl.config.errors import RequestError
from llmctl.config.settings import MeshConfig
from llmctl.distributed import mesh as meshes
from llmctl.model import functional, weights
from llmctl.model.config import ModelConfig
from llmctl.pipeline.stages import finetune
from llmctl.train.adapters import lora, targets
from llmctl.train.adapters.registry import METHODS
from llmctl.train.adapters.settings import LoraConfig

TINY = ModelConfig.model_validate(
    {"family": "llama", "vocab_size": 32, "d_model": 16, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 4,
     "d_ff": 24}
)  # fmt: skip


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda key: functional.init(TINY, key))(jax.random.key(0))


@pytest.fixture(scope="module")
def one():
    return meshes.make(MeshConfig())


def pairs(params, mesh, **settings):
    tuned = lora.attach(TINY, params, LoraConfig(**settings), jax.random.key(1), mesh)
    return {m.module: m.weight for m in weights.matrices(tuned, "block") if m.node.has_adapter}


def test_ranks_and_scales_of_single_matrices(params, one):
    found = pairs(
        params, one, rank=4, alpha=8.0, targets=["q", "v", "down"], rank_pattern={"q": 2, "mlp/down": 1},
        alpha_pattern={"down": 3.0},
    )  # fmt: skip
    assert {m: (w.a.shape[-1], w.scale) for m, w in found.items()} == {
        "attn/q": (2, 4.0), "attn/v": (4, 2.0), "mlp/down": (1, 3.0)
    }  # fmt: skip
    assert found["attn/q"].b.shape == (2, 2, 16)
    plain = pairs(params, one, rank=4, targets=["v"])["attn/v"]
    np.testing.assert_array_equal(found["attn/v"].a, plain.a)  # other targets and ranks change no random numbers


def test_rslora_divides_by_the_root_of_the_rank(params, one):
    (w,) = pairs(params, one, rank=4, alpha=8.0, targets=["o"], rslora=True).values()
    assert w.scale == 4.0


def test_names_that_no_matrix_has_are_refused(params, one):
    with pytest.raises(RequestError, match=r"lora.targets: the model has no matrix query in its blocks"):
        pairs(params, one, targets=["query"])
    with pytest.raises(RequestError, match=r"lora.rank_pattern: no matrix with an adapter is called up"):
        pairs(params, one, targets=["q"], rank_pattern={"up": 2})
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        LoraConfig(rank_pattern={"q": 0})


def test_lora_plus_is_a_rate_of_the_second_matrix():
    config = finetune.Config(method="lora", lora=LoraConfig(plus_ratio=16.0))
    path = "decoder/blocks/attn/q/kernel"
    names = (f"{path}:a", f"{path}:b", "head/out/kernel", "embed/tokens:a", "embed/tokens:b")
    assert [METHODS["lora"].rate(config, name) for name in names] == [1.0, 16.0, 1.0, 1.0, 1.0]


def test_bottleneck_adapters_get_pairs_only_by_name():
    wide = TINY.model_copy(update={"adapter_size": 4, "adapter_form": "parallel", "adapter_scale": 1.0})
    tree = functional.abstract(wide)
    assert {m.name for m in targets.selected(tree, [])} == {"q", "k", "v", "o", "gate", "up", "down"}
    assert [m.module for m in targets.selected(tree, ["reduce"])] == ["mlp_adapter/reduce"]


def test_new_settings_change_no_key_until_they_are_used():
    from llmctl.config.base import keyed

    assert set(keyed(LoraConfig())) == {"rank", "alpha", "targets"}
    assert "rslora" in keyed(LoraConfig(rslora=True))


def test_dora_by_hand():
    """Columns of V have norms 5 and 2, magnitudes 10 and 1; the update adds to the direction before the norm."""
    base = jnp.array([[3.0, 0.0], [0.0, 2.0]])
    start = weights.Dora.around(base, jnp.zeros((2, 1)), jnp.zeros((1, 2)), 2.0)
    np.testing.assert_allclose(start.magnitude, [[3, 2]])
    np.testing.assert_array_equal(start.dense(), base)
    w = weights.Dora(base, jnp.array([[0.0], [2.0]]), jnp.array([[1.0, 0.0]]), 2.0, jnp.array([[10.0, 1.0]]))
    np.testing.assert_allclose(w.dense(), [[6, 0], [8, 1]], rtol=1e-6)
    x = jnp.array([[1.0, -1.0]])
    np.testing.assert_allclose(weights.matmul(x, w, jnp.float32), [[-2, -1]], rtol=1e-6)
    # The norm is a constant of the gradient: d sum(y) / d b_0 = scale * (x @ a) * m_0 / ||V_0|| = 2 * -2 * 2.
    slope = jax.grad(lambda w: weights.matmul(x, w, jnp.float32).sum())(w)
    np.testing.assert_allclose(slope.b, [[-8, 2 * -2 * 0.5]], rtol=1e-6)
    np.testing.assert_allclose(slope.magnitude, [[(3 - 4) / 5, -1]], rtol=1e-6)


def test_dora_starts_as_its_base_and_leaves_integers(params, one):
    up = "decoder/blocks/mlp/up/kernel"
    stored = qwix.quantize(weights.flatten(params)[up], "int8", channelwise_axes=[0, 2])
    integers = weights.updated(params, {up: weights.Quantized(stored)})
    config = finetune.Config(method="dora", merge=False, lora=LoraConfig(rank=2, targets=["up", "q"]))
    tuned = METHODS["dora"].attach(config, TINY, integers, jax.random.key(1), one)
    w = weights.flatten(tuned)[up]
    np.testing.assert_array_equal(w.dense(), weights.dense(weights.flatten(integers)[up]))
    trains = METHODS["dora"].trains(config, TINY, tuned)
    arrays = weights.arrays(tuned)
    assert {n for n in arrays if trains(n)} == {
        f"decoder/blocks/{m}/kernel:{part}" for m in ("mlp/up", "attn/q") for part in ("a", "b", "magnitude")
    }
    assert arrays[f"{up}:base.qvalue"].dtype == jnp.int8 and not trains(f"{up}:base.qvalue")
    assert weights.count(tuned) - weights.count(params) == 2 * ((16 + 24 + 16 + 16) * 2 + 24 + 16)


def test_the_token_table_starts_with_zeros_where_it_is_looked_up(params, one):
    tuned = lora.attach(TINY, params, LoraConfig(rank=2, targets=["embed", "q"]), jax.random.key(1), one)
    w = tuned["embed"]["tokens"]
    assert (w.a.shape, w.b.shape) == ((32, 2), (2, 16)) and not np.asarray(w.a).any() and np.asarray(w.b).all()
    with pytest.raises(RequestError, match=r"lora.targets: embed: the token table has adapters of method 'lora' only"):
        METHODS["dora"].attach(
            finetune.Config(method="dora", lora={"targets": ["embed"]}), TINY, params, jax.random.key(1), one
        )


def test_modules_to_save_are_trained_in_full(params, one):
    config = finetune.Config(method="lora", lora={"rank": 2, "targets": ["q"], "modules_to_save": ["embed", "norm"]})
    tuned = METHODS["lora"].attach(config, TINY, params, jax.random.key(1), one)
    trains = METHODS["lora"].trains(config, TINY, tuned)
    q = "decoder/blocks/attn/q/kernel"
    assert {n for n in weights.arrays(tuned) if trains(n)} == {
        f"{q}:a", f"{q}:b", "decoder/norm/scale", "embed/tokens"
    }  # fmt: skip
    int8 = weights.Quantized(qwix.quantize(params["embed"]["tokens"], "int8", channelwise_axes=[0]))
    integers = weights.updated(tuned, {"embed/tokens": int8})
    for modules, tree, line in (
        (["emb"], tuned, "the model has no module emb"),
        (["attn/q"], tuned, f"{q} has an adapter; leave it out of lora.targets"),
        (["embed"], integers, "embed/tokens is quantized"),
    ):
        odd = finetune.Config(method="lora", lora={"modules_to_save": modules})
        with pytest.raises(RequestError, match=f"lora.modules_to_save: {line}"):
            METHODS["lora"].trains(odd, TINY, tree)
