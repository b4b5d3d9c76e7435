"""Which weights are matrices, where they stand, and which of their arrays hold the zeros of pruning."""

import jax.numpy as jnp
import numpy as np
import pytest
import qwix

from llmctl.model import weights


@pytest.fixture(scope="module")
def tree():
    def layers(*shape):
        return jnp.ones((2, *shape))

    return {
        "embed": {"tokens": jnp.ones((8, 4)), "positions": jnp.ones((6, 4)), "norm": {"scale": jnp.ones(4)}},
        "decoder": {
            "blocks": {
                "attn": {"q": {"kernel": layers(4, 4), "bias": layers(4)}},
                "cross": {"o": {"kernel": layers(4, 4)}},
                "norm": {"scale": layers(4)},
            },
            "norm": {"scale": jnp.ones(4)},
            "relative_bias": {"table": jnp.ones((8, 2))},
        },
        "lm_head": {"kernel": jnp.ones((4, 8))},
        "head": {"out": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}},
    }


def test_every_matrix_with_its_place(tree):
    found = [(m.path, m.place, m.stack, m.module, m.name, m.inputs) for m in weights.matrices(tree)]
    assert found == [
        ("decoder/blocks/attn/q/kernel", "block", "decoder", "attn/q", "q", -2),
        ("decoder/blocks/cross/o/kernel", "block", "decoder", "cross/o", "o", -2),
        ("embed/tokens", "embedding", "", "embed", "embed", -1),
        ("head/out/kernel", "head", "", "head/out", "out", -2),
        ("lm_head/kernel", "head", "", "lm_head", "lm_head", -2),
    ]
    assert [m.path for m in weights.matrices(tree, "head")] == ["head/out/kernel", "lm_head/kernel"]


def test_one_layers_matrices_are_named_as_calibration_names_their_inputs(tree):
    layer = weights.layer_of(tree["decoder"]["blocks"], 1)
    assert [(m.path, m.module, m.weight.shape) for m in weights.layer_matrices(layer)] == [
        ("attn/q/kernel", "attn/q", (4, 4)),
        ("cross/o/kernel", "cross/o", (4, 4)),
    ]
    doubled = weights.map_layer(layer, lambda m: 2 * m.weight if m.module == "attn/q" else m.weight)
    assert doubled["attn"]["q"]["kernel"].max() == 2 and doubled["cross"]["o"]["kernel"].max() == 1
    assert doubled["attn"]["q"]["bias"].max() == 1


def test_every_leading_axis_is_taken_apart():
    w = jnp.arange(2 * 3 * 4 * 2.0).reshape(2, 3, 4, 2)  # layers, experts
    got = weights.per_layer(w, lambda one: one - one.mean())
    np.testing.assert_array_equal(got, w - w.mean((-2, -1), keepdims=True))
    q = weights.Quantized(qwix.quantize(w, "int8", channelwise_axes=[0, 1, 3]))
    shapes = []
    back = weights.per_layer(q, lambda one: shapes.append(one.shape) or one)
    assert shapes == [(4, 2)] * 6
    np.testing.assert_array_equal(weights.dense(back), weights.dense(q))


def test_zeros_are_held_in_floats_of_the_layers_matrices(tree):
    q, o = "decoder/blocks/attn/q/kernel", "decoder/blocks/cross/o/kernel"
    assert weights.zero_names(tree) == {q, o}
    pair = jnp.zeros((2, 4, 1)), jnp.zeros((2, 1, 4))
    ones = jnp.ones((2, 4, 4))
    integers = weights.Quantized(qwix.quantize(ones, "int8", channelwise_axes=[0, 2]))
    mixed = weights.updated(tree, {q: weights.LowRank(ones, *pair, scale=1.0), o: integers})
    assert weights.zero_names(mixed) == {f"{q}:base"}
    assert weights.zero_names(weights.updated(tree, {o: weights.LowRank(integers, *pair, scale=1.0)})) == {q}


def test_names():
    assert weights.parse("decoder/blocks/attn/q/kernel:base.qvalue") == (
        "decoder/blocks/attn/q/kernel", "decoder", "attn/q", "kernel", "base.qvalue",
    )  # fmt: skip
    assert weights.parse("embed/positions").embeds and not weights.parse("embed/positions").place
    assert weights.is_stacked("encoder/blocks/norm/scale") and not weights.is_stacked("encoder/norm/scale")
    assert weights.is_layer_matrix("encoder/blocks/mlp/up/kernel") and weights.is_kernel("mlp/up/kernel")
    assert not weights.is_layer_matrix("encoder/blocks/mlp/up/kernel:a") and not weights.is_layer_matrix(
        "lm_head/kernel"
    )
    assert weights.parse("head/out/bias").task_head and not weights.parse("lm_head/kernel").task_head
