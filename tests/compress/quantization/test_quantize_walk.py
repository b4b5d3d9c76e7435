"""Calibrated quantization of layers: errors in the report, fallbacks with a name, and pruned zeros."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmctl.compress.calibration.calibrate import Visit, walk
from llmctl.compress.calibration.statistics import Gram, Joined
from llmctl.compress.quantization import folding
from llmctl.compress.quantization.quantize_method import Quantization
from llmctl.compress.quantization.quantize_report import records, unscaled, weight_errors
from llmctl.compress.quantization.quantize_walk import NO_INPUTS, collector, quantize_layer
from llmctl.model import weights
from llmctl.model.weights import NormalFloat, Quantized

INT4 = Quantization("int4", method="gptq", head=True)


def quantized(cfg, params, batches, method):
    def change(visit):
        layer, visit.notes["matrices"] = quantize_layer(cfg, visit, method)
        return layer

    return walk(cfg, params, batches, collector(method), change, head=method.head)


@pytest.mark.parametrize("method", [
    INT4, Quantization("nf4", group=8, method="gptq", double_quantize=True),
    Quantization("int4", group=8, method="awq", head=True), Quantization("int8", activations="int8", smooth=True),
], ids=str)  # fmt: skip
def test_every_matrix_of_the_layers_is_quantized(tiny, params, batches, method):
    original = {m.path: m.weight for m in weights.matrices(jax.tree.map(np.asarray, params), "block")}
    params, reports = quantized(tiny, params, batches, method)
    kind = NormalFloat if method.scheme == "nf4" else Quantized
    got = {m.path: m for m in weights.matrices(params, "block")}
    assert got and all(isinstance(m.weight, kind) for m in got.values())
    layers = records(reports)
    assert len(layers) == tiny.layers + method.head
    for layer in layers[: tiny.layers]:
        for module, found in layer["matrices"].items():
            m = got[f"decoder/blocks/{module}/kernel"]
            before, after = (np.asarray(a)[layer["layer"]] for a in (original[m.path], weights.dense(m.weight)))
            if not (method.scales_inputs or method.smooth):
                expected = np.linalg.norm(after - before) / np.linalg.norm(before)
                assert found["weight_error"] == pytest.approx(expected, abs=1e-6)
            assert ("error" in found) == method.hessian and found.get("error", 0) < 0.3
            assert found["shape"] == list(before.shape) and 0 < found["weight_error"] < 0.3
            assert ("exponent" in found) == method.scales_inputs and "unscaled" not in found
        assert 0 < layer["error"] < 0.5
    assert unscaled(layers) == (
        ["head: no scales for lm_head, because no norm or matrix before them can take the scales"]
        if method.scales_inputs and "lm_head" in layers[-1]["matrices"]
        else []
    )
    assert weight_errors(layers).keys() >= original.keys()


def test_smoothing_beats_plain_w8a8_with_outlier_channels(tiny, fresh, batches):
    """A channel of each norm is 100 times as large, and the matrices after it divide by 100."""
    flat = weights.flatten(fresh)
    for at in folding.folds(tiny, "decoder"):
        if at.producer.endswith("norm"):
            scale = flat[path := f"decoder/blocks/{at.producer}/scale"]
            flat[path] = scale.at[:, 3].mul(100.0)
            for reader in at.readers:
                path = weights.kernel_of(f"decoder/blocks/{reader}")
                flat[path] = flat[path].at[:, 3].divide(100.0)
    errors = []
    for smooth in (False, True):
        params = jax.tree.map(jnp.copy, weights.unflatten(flat))
        method = Quantization("int8", activations="int8", smooth=smooth)
        errors.append([r.error for r in quantized(tiny, params, batches, method)[1]])
    assert all(smoothed < 0.5 * plain for plain, smoothed in zip(*errors, strict=True))


def test_a_matrix_without_an_inverse_or_without_inputs_is_named(tiny):
    layer = {"attn": {"q": {"kernel": jnp.ones((4, 2))}, "k": {"kernel": jnp.ones((4, 2))}}}
    stats = {"attn/q": Joined({"gram": Gram(jnp.full((1, 4, 4), jnp.nan), jnp.float32(3))})}
    _, notes = quantize_layer(tiny, Visit("decoder", 0, layer, stats), INT4)
    assert notes["attn/q"]["fallback"] == "rounding to nearest: the Hessian has no inverse"
    assert notes["attn/k"]["fallback"] == NO_INPUTS


def test_activations_are_quantized_and_zeros_stay(tiny, params, batches):
    pruned = weights.updated(params, {m.path: m.weight.at[:, ::2].set(0.0) for m in weights.matrices(params, "block")})
    got, _ = quantized(tiny, pruned, batches, Quantization("int8", method="gptq", activations="int8"))
    for m in weights.matrices(got, "block"):
        assert m.weight.activations == "int8"
        assert np.all(np.asarray(m.node.values())[:, ::2] == 0)
