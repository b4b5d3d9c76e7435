"""What manifests record of weights: today's form, and that of artifacts written before nodes had names."""

import jax.numpy as jnp
import numpy as np
import pytest
import qwix

from llmctl.model import weights

W = jnp.arange(24, dtype=jnp.float32).reshape(6, 4) - 11
A, B = jnp.ones((6, 2)), jnp.full((2, 4), 0.5)
INT8 = weights.Quantized(qwix.quantize(W, "int8", channelwise_axes=[1]), "int8")
INTEGERS = {"qvalue": ["int8", [6, 4]], "scale": ["float32", [1, 4]]}
UNDER = {f"base.{k}": v for k, v in INTEGERS.items()}
PAIR = {"a": ["float32", [6, 2]], "b": ["float32", [2, 4]]}
QUANTIZED = {"node": "quantized", "activations": "int8"}

CASES = {
    "plain": (W, {"parts": {"": ["float32", [6, 4]]}}, {"parts": {"": ["float32", [6, 4]]}}),
    "quantized": (
        INT8,
        {"parts": INTEGERS, **QUANTIZED},
        {"parts": INTEGERS, "quantized": True, "activations": "int8"},
    ),
    "lora": (
        weights.LowRank(W, A, B, scale=0.5),
        {"parts": {"base": ["float32", [6, 4]], **PAIR}, "node": "low_rank", "scale": 0.5, "base": {}},
        {"parts": {"base": ["float32", [6, 4]], **PAIR}, "low_rank_scale": 0.5},
    ),
    "qlora": (
        weights.LowRank(INT8, A, B, scale=0.5),
        {"parts": {**UNDER, **PAIR}, "node": "low_rank", "scale": 0.5, "base": QUANTIZED},
        {"parts": {**UNDER, **PAIR}, "quantized": True, "activations": "int8", "low_rank_scale": 0.5},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_records_and_older_records_rebuild_the_weight(case):
    w, record, older = CASES[case]
    assert weights.describe(w) == record
    for said in (record, older):
        back = weights.assemble(said, weights.parts(w))
        assert type(back) is type(w) and weights.describe(back) == record
        np.testing.assert_array_equal(weights.dense(back), weights.dense(w))


def test_parts_are_named_arrays_and_rebuilt():
    tree = {"decoder": {"blocks": {"attn": {"q": {"kernel": CASES["qlora"][0], "bias": W[0]}}}}}
    named = weights.arrays(tree)
    path = "decoder/blocks/attn/q/kernel"
    assert [*named] == ["decoder/blocks/attn/q/bias", *(f"{path}:{p}" for p in ("base.qvalue", "base.scale", "a", "b"))]
    back = weights.rebuild(tree, named | {f"{path}:b": 2 * B})
    want = weights.dense(INT8) + 0.5 * A @ (2 * B)
    np.testing.assert_allclose(weights.dense(weights.flatten(back)[path]), want, rtol=1e-6)
    assert weights.count(tree) == 4 + 24 + 12 + 8
