"""Calibrated quantization of layers: errors in the report, fallbacks with a name, and pruned zeros."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmctl.compress.calibrate import walk
from llmctl.compress.quantize_method import Quantization
from llmctl.compress.quantize_report import records, weight_errors
from llmctl.compress.quantize_walk import NO_INPUTS, collect, quantize_layer
from llmctl.compress.statistics import Gram
from llmctl.model import weights
from llmctl.model.weights import NormalFloat, Quantized

INT4 = Quantization("int4", method="gptq", head=True)


def quantized(cfg, params, batches, method):
    def change(visit):
        layer, visit.notes["matrices"] = quantize_layer(visit.layer, visit.stats, method)
        return layer

    return walk(cfg, params, batches, collect, change, head=method.head)


@pytest.mark.parametrize("method", [INT4, Quantization("nf4", group=8, method="gptq", activations="")])
def test_every_matrix_of_the_layers_is_quantized(tiny, params, batches, method):
    original = {m.path: m.weight for m in weights.matrices(jax.tree.map(np.asarray, params), "block")}
    params, reports = quantized(tiny, params, batches, method)
    kind = Quantized if method.scheme == "int4" else NormalFloat
    got = {m.path: m for m in weights.matrices(params, "block")}
    assert got and all(isinstance(m.weight, kind) for m in got.values())
    layers = records(reports)
    assert len(layers) == tiny.layers + method.head
    for layer in layers[: tiny.layers]:
        for module, found in layer["matrices"].items():
            m = got[f"decoder/blocks/{module}/kernel"]
            before, after = (np.asarray(a)[layer["layer"]] for a in (original[m.path], weights.dense(m.weight)))
            assert found["weight_error"] == pytest.approx(
                np.linalg.norm(after - before) / np.linalg.norm(before), abs=1e-6
            )
            assert 0 < found["error"] < 0.3 and found["shape"] == list(before.shape)
        assert 0 < layer["error"] < 0.5
    assert weight_errors(layers).keys() >= original.keys()


def test_a_matrix_without_an_inverse_or_without_inputs_is_named():
    layer = {"attn": {"q": {"kernel": jnp.ones((4, 2))}, "k": {"kernel": jnp.ones((4, 2))}}}
    stats = {"attn/q": Gram(jnp.full((1, 4, 4), jnp.nan), jnp.float32(3))}
    _, notes = quantize_layer(layer, stats, INT4)
    assert notes["attn/q"]["fallback"] == "rounding to nearest: the Hessian has no inverse"
    assert notes["attn/k"]["fallback"] == NO_INPUTS


def test_activations_are_quantized_and_zeros_stay(tiny, params, batches):
    pruned = weights.updated(params, {m.path: m.weight.at[:, ::2].set(0.0) for m in weights.matrices(params, "block")})
    got, _ = quantized(tiny, pruned, batches, Quantization("int8", method="gptq", activations="int8"))
    for m in weights.matrices(got, "block"):
        assert m.weight.activations == "int8"
        assert np.all(np.asarray(m.node.values())[:, ::2] == 0)
