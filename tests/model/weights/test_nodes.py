"""A kind of weight that only this file knows goes through everything that the others do, by public functions alone."""

import sys
from dataclasses import replace
from functools import partial
from importlib.metadata import EntryPoint
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix

from llmctl.artifacts import artifact, fingerprint
from llmctl.compress.pruning.prune import sparsity
from llmctl.compress.quantization import quantize
from llmctl.compress.structured_pruning import shrink
from llmctl.config import registry
from llmctl.config.errors import RequestError
from llmctl.config.settings import MeshConfig
from llmctl.distributed import mesh as meshes
from llmctl.model import functional, weights
from llmctl.model.config import ModelConfig
from llmctl.model.weights.quantized import Quantized
from llmctl.pipeline.stages import quantize as quantize_stage
from llmctl.train.adapters import lora
from llmctl.train.adapters.settings import LoraConfig

TINY = ModelConfig.model_validate(
    {"family": "llama", "vocab_size": 32, "d_model": 16, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 4,
     "d_ff": 24}
)  # fmt: skip
PATH = "decoder/blocks/mlp/up/kernel"


@weights.node_type
class Ternary(weights.Node):
    """-1, 0 and 1 in two bits each, four inputs to a byte, times one scale per layer; no part has the logical shape."""

    kind: ClassVar[str] = "ternary"

    packed: jax.Array  # uint8 [..., I / 4, O]
    scale: jax.Array  # float32 [..., 1, 1]
    outputs: int = weights.setting(default=0)

    shape = property(lambda self: (*self.packed.shape[:-2], 4 * self.packed.shape[-2], self.packed.shape[-1]))
    dtype = property(lambda self: self.scale.dtype)
    is_integer = property(lambda self: True)

    def dense(self, dtype: Any = jnp.float32) -> jax.Array:
        codes = jnp.stack([(self.packed >> (2 * i)) & 3 for i in range(4)], axis=-2)  # [..., I / 4, 4, O]
        return ((codes.reshape(self.shape).astype(jnp.float32) - 1) * self.scale).astype(dtype)


def ternary(w: jax.Array) -> Ternary:
    """Round to the nearest of -s, 0 and s, where s is the mean size of a layer's entries."""
    scale = jnp.mean(jnp.abs(w), axis=(-2, -1), keepdims=True)
    codes = (jnp.clip(jnp.round(w / scale), -1, 1) + 1).astype(jnp.uint8)
    *lead, inputs, outputs = w.shape
    codes = codes.reshape(*lead, inputs // 4, 4, outputs)
    packed = sum((codes[..., i, :] << (2 * i) for i in range(4)), jnp.zeros((), jnp.uint8))
    return Ternary(packed, scale, outputs=outputs)


@pytest.fixture
def installed(monkeypatch):
    point = EntryPoint("weight.ternary", f"{__name__}:Ternary", registry.GROUP)
    monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])
    monkeypatch.setattr(registry, "entry_points", lambda: {"weight.ternary": point})


@pytest.fixture(scope="module")
def plain():
    return jax.jit(lambda key: functional.init(TINY, key))(jax.random.key(0))


@pytest.fixture(scope="module")
def params(plain):
    return weights.updated(plain, {m.path: ternary(m.weight) for m in weights.matrices(plain, "block")})


@pytest.fixture(scope="module")
def batch():
    tokens = np.arange(16, dtype=np.int32).reshape(2, 8)
    positions = np.tile(np.arange(8, dtype=np.int32), (2, 1))
    return {"tokens": tokens, "segments": np.ones_like(tokens), "positions": positions}


hidden = jax.jit(partial(functional.hidden, TINY))


def test_by_hand():
    w = jnp.array([[[0.9, -0.1], [-1.1, 0.1], [0.1, 2.9], [0.1, -2.9]]])  # the mean size is 8.2 / 8
    node = ternary(w)
    assert node.packed.tolist() == [[[0b01_01_00_10, 0b00_10_01_01]]] and node.shape == (1, 4, 2) == w.shape
    np.testing.assert_allclose(node.dense(), [[[1.025, 0], [-1.025, 0], [0, 1.025], [0, -1.025]]], rtol=1e-6)


def test_forward_is_that_of_the_dense_weights(params, batch):
    dense = jax.tree.map(lambda w: weights.dense(w), params, is_leaf=weights.is_weight)
    np.testing.assert_allclose(hidden(params, batch), hidden(dense, batch), rtol=1e-5, atol=1e-5)


def test_saved_described_and_loaded(params, batch, installed, tmp_path):
    made = artifact.save(tmp_path / "a", params, TINY, stage="test", key="k", config={})
    assert made.weights[PATH] == {
        "parts": {"packed": ["uint8", [2, 4, 24]], "scale": ["float32", [2, 1, 1]]}, "node": "ternary", "outputs": 24,
    }  # fmt: skip
    assert made.parameters == weights.count(params) == weights.count(functional.abstract(TINY)) and made.bits < 16
    assert not made.pruned and 0.2 < made.sparsity < 0.5  # zeros of rounding, not of pruning
    back = artifact.load(tmp_path / "a")
    assert isinstance(weights.flatten(back.params)[PATH], Ternary)
    np.testing.assert_array_equal(hidden(back.params, batch), hidden(params, batch))


def test_a_manifest_that_names_an_unknown_node_is_refused(params, tmp_path):
    artifact.save(tmp_path / "a", params, TINY, stage="test", key="k", config={})
    with pytest.raises(RequestError, match="unknown weight 'ternary'"):
        artifact.load(tmp_path / "a")


def test_sharded_over_eight_devices(params, batch, installed):
    mesh = meshes.make(MeshConfig(data=2, fsdp=2, tensor=2))
    placed = jax.device_put(params, functional.shardings(TINY, params, mesh))
    up = weights.flatten(placed)[PATH]
    # [L, I / 4, O]: outputs over tensor; what lacks the inputs' full length is replicated along them.
    assert up.packed.sharding.shard_shape(up.packed.shape) == (2, 4, 12)
    assert up.scale.sharding.is_fully_replicated
    with meshes.use(mesh):
        many = jax.jit(lambda p, b: functional.hidden(TINY, p, b))(placed, batch)
    np.testing.assert_allclose(many, hidden(params, batch), rtol=1e-4, atol=1e-5)


def test_an_adapter_around_it_is_trained_kept_and_merged(params, batch, installed, tmp_path):
    one = meshes.make(MeshConfig())
    tuned = lora.attach(TINY, params, LoraConfig(rank=2, alpha=4.0, targets=["up"]), jax.random.key(1), one)
    names = weights.adapter_names(tuned)
    assert names == {f"{PATH}:a", f"{PATH}:b"} and f"{PATH}:base.packed" in weights.arrays(tuned)
    np.testing.assert_array_equal(hidden(tuned, batch), hidden(params, batch))  # b starts at zero
    named = {name: a + 0.1 if name in names else a for name, a in weights.arrays(tuned).items()}
    tuned = weights.rebuild(tuned, named)
    made = artifact.save(tmp_path / "a", tuned, TINY, stage="test", key="k", config={})
    assert made.weights[PATH]["base"] == {"node": "ternary", "outputs": 24}
    back = artifact.load(tmp_path / "a").params
    merged = weights.merge_adapters(back)
    assert weights.is_plain(weights.flatten(merged)[PATH]) and not weights.adapted(merged)
    np.testing.assert_allclose(hidden(merged, batch), hidden(tuned, batch), rtol=1e-4, atol=1e-5)


def test_what_it_cannot_do_is_refused_by_name(params):
    node = weights.flatten(params)[PATH]
    with pytest.raises(RequestError, match="a ternary weight cannot be pruned"):
        node.masked(jnp.ones(node.shape, bool))
    with pytest.raises(RequestError, match="a ternary weight cannot quantize its activations to int8"):
        node.with_activations("int8")
    with pytest.raises(RequestError, match=f"{PATH} is quantized in groups of 4 along"):
        shrink.take(PATH, node, np.zeros((2, 8), np.int64), -2)
    assert shrink.take(PATH, node, np.zeros((2, 8), np.int64), -1).shape == (2, 16, 8)
    assert node.integers() is None and weights.zero_names(params) == frozenset() and sparsity(params) > 0.2


@weights.node_type
class Bare(Ternary):
    """Ternary in the methods that a node must have, and no others."""

    kind: ClassVar[str] = "bare"
    is_integer = property(lambda self: False)


def test_a_node_that_does_not_say_that_it_is_integer(plain):
    """Its zeros are those of rounding, no line asks to quantize it, and it is not quantized twice."""
    stored = ternary(jnp.asarray(weights.flatten(plain)[PATH]))
    node = Bare(stored.packed, stored.scale, outputs=stored.outputs)
    found = fingerprint.manifest_fields({PATH: node})
    assert found["sparsity"] > 0.2 and not found["pruned"]
    pair = weights.LowRank(node, jnp.ones((2, 16, 1)), jnp.ones((2, 1, 24)), 1.0)
    assert not fingerprint.manifest_fields({PATH: pair})["pruned"]
    head = {"head": {"out": {"kernel": node}}, "embed": {"tokens": jnp.ones((8, 4), jnp.bfloat16)}}
    (line,) = quantize_stage.left_out(quantize_stage.Config(), head, 64)
    assert line == "the embeddings (50.0% of the weights) stay bfloat16; embeddings = true quantizes them too"
    for w in (node, jax.eval_shape(lambda: node)):  # plan asks about abstract weights
        with pytest.raises(RequestError, match=rf"{PATH} is compressed already \(bare\)"):
            quantize.check(PATH, w, -2, "int8", 0)


def test_activations_are_dropped_from_a_base_too():
    plain = weights.Quantized(qwix.quantize(jnp.arange(8.0).reshape(4, 2), "int8", channelwise_axes=[1]))
    base = plain.with_activations("int8")
    pair = weights.LowRank(base, jnp.ones((4, 1)), jnp.ones((1, 2)), 1.0)
    assert base.without_activations() == plain and pair.without_activations().base == plain
    assert weights.as_node(plain.array.scale).without_activations() is plain.array.scale


def test_a_shape_that_the_config_has_not_is_refused(params, batch):
    wrong = weights.updated(params, {PATH: ternary(jnp.ones((2, 16, 28)))})
    with pytest.raises(Exception, match=r"\(16, 28\)"):
        functional.hidden(TINY, wrong, batch)


@weights.node_type
class Scaled(weights.Adapter):
    """Outputs times a trained factor each (IA3, arXiv:2205.05638)."""

    kind: ClassVar[str] = "scaled"
    adapter_parts: ClassVar[tuple[str, ...]] = ("factor",)

    factor: jax.Array  # [..., 1, O]

    def dense(self, dtype: Any = jnp.float32) -> jax.Array:
        return (weights.dense(self.base) * self.factor).astype(dtype)


def test_a_new_adapter_says_its_parts_and_dense_and_no_more():
    base = jnp.arange(8.0).reshape(1, 4, 2)
    w = Scaled(base, jnp.array([[[2.0, 3.0]]]))
    tree = {"decoder": {"blocks": {"mlp": {"up": {"kernel": w}}}}}
    assert weights.describe(w) == {
        "parts": {"base": ["float32", [1, 4, 2]], "factor": ["float32", [1, 1, 2]]}, "node": "scaled", "base": {},
    }  # fmt: skip
    assert weights.count(tree) == 8 + 2 and weights.adapter_names(tree) == {f"{PATH}:factor"}
    assert weights.zero_names(tree) == {f"{PATH}:base"}
    np.testing.assert_array_equal(weights.flatten(weights.merge_adapters(tree))[PATH], base * jnp.array([2.0, 3.0]))
    one = weights.layer_of(w, 0)
    np.testing.assert_array_equal(weights.matmul(jnp.eye(4), one, jnp.float32), weights.dense(one))
    with pytest.raises(RequestError, match="merge it into its base before pruning"):
        weights.as_node(w).masked(jnp.ones((1, 4, 2), bool))


def test_products_by_group_equal_the_dense_product():
    """Few tokens are multiplied group by group; more tokens by the dequantized weight."""
    x = jax.random.normal(jax.random.key(0), (70, 256))
    stored = qwix.quantize(
        jax.random.normal(jax.random.key(1), (256, 48)), "int4", channelwise_axes=[1], tiled_axes={0: 64}
    )
    weight, dense = Quantized(stored), qwix.dequantize(stored)
    for tokens in (1, 9, 70):
        np.testing.assert_allclose(weights.matmul(x[:tokens], weight, jnp.float32), x[:tokens] @ dense, atol=1e-4)


def test_arrays_that_do_not_fit_the_weight_are_named():
    """Scales in groups, zero points, scales of inputs, packed codes, and the base of an adapter."""
    good = weights.Quantized(qwix.quantize(jnp.ones((2, 8, 4)), "int8", channelwise_axes=[0, 2], tiled_axes={1: 4}))
    scaled = lambda *shape: replace(good, array=replace(good.array, scale=jnp.ones(shape)))  # noqa: E731
    assert [w.misfit() for w in (good, scaled(2, 8, 4), scaled(2, 1, 1))] == ["", "", ""]
    assert [scaled(*shape).misfit() for shape in ((2, 3, 4), (2, 4), (1, 1, 4))] == ["scale"] * 3
    assert replace(good, input_scale=jnp.ones((2, 2, 1))).misfit() == "input_scale"
    zero = replace(good, array=replace(good.array, zero_point=jnp.zeros((2, 1, 4), jnp.int8)))
    assert zero.misfit() == "zero"
    packed = weights.Packed(jnp.zeros((2, 4), jnp.uint8), jnp.ones((1, 4)), jnp.ones((1, 1)), "int2", 8)
    assert packed.misfit() == "" and replace(packed, size=9).misfit() == "codes"
    pair = weights.LowRank(scaled(2, 3, 4), jnp.ones((2, 8, 1)), jnp.ones((2, 1, 4)), scale=1.0)
    assert pair.misfit() == "base.scale"
