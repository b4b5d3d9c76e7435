"""Static scales of activations: the products, the choice of the scale, and the scales that the walk measures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix

from llmctl.compress.calibration.calibrate import Visit, walk
from llmctl.compress.quantization import static_inputs
from llmctl.compress.quantization.quantize_method import Quantization
from llmctl.compress.quantization.quantize_walk import NO_INPUTS, NO_SCALE, collector, quantize_layer
from llmctl.model import functional, layerwise, weights
from llmctl.model.config import ModelConfig
from llmctl.model.weights import Product, Quantized


def rounded(x, scale, kind):
    """The inputs after rounding, in plain numpy."""
    if kind == "int8":
        return np.clip(np.round(x / scale), -127, 127) * scale
    return np.clip(x / scale, -448, 448).astype(jnp.float8_e4m3fn).astype(np.float32) * scale


@pytest.mark.parametrize(("kind", "stored", "group"), [
    ("int8", "int8", 0), ("int8", "int4", 8), ("fp8_e4m3", "float8_e4m3fn", 0),
])  # fmt: skip
def test_products_are_those_of_numpy(kind, stored, group):
    """The last token's inputs are larger than those that were measured, so they are clipped."""
    rng = np.random.default_rng(0)
    w, x = rng.normal(size=(32, 16)).astype(np.float32), rng.normal(size=(5, 32)).astype(np.float32)
    scale = np.float32(static_inputs.largest(np.abs(x).max(0), kind))
    x[4] *= 3
    integers = qwix.quantize(jnp.asarray(w), stored, channelwise_axes=[1], tiled_axes={0: group} if group else None)
    node = Quantized(integers).with_activations(kind, jnp.full((1, 1), scale))
    got = node.matmul(jnp.asarray(x), jnp.float32, Product())
    np.testing.assert_allclose(got, rounded(x, scale, kind) @ np.asarray(node.dense()), atol=1e-4)
    again = weights.assemble(weights.describe(node), weights.parts(node))
    assert again.input_scale is node.input_scale and node.without_activations().input_scale is None


@pytest.mark.parametrize("kind", ["int8", "fp8_e4m3"])
@pytest.mark.parametrize("divided", [False, True])
def test_the_search_finds_the_best_scale(kind, divided):
    """Heavy tails, of which the search clips the largest, and an input with large values; compared by true errors."""
    rng = np.random.default_rng(1)
    x = rng.standard_t(3, size=(3000, 16)).astype(np.float32)
    x[:, 3] *= 20
    divisor = rng.uniform(0.2, 5, 16).astype(np.float32) if divided else None
    found = static_inputs.Magnitudes.start(16)
    for part in np.split(x, 3):
        found = found.fold(jnp.asarray(part), jnp.ones(len(part), bool))
    inputs = x if divisor is None else x / divisor
    peak = np.abs(inputs).max(0)
    got, top = (
        static_inputs.least_squares(peak, np.asarray(found.counts), divisor, kind), static_inputs.largest(peak, kind),
    )  # fmt: skip
    errors = {f: np.square(rounded(inputs, top * f, kind) - inputs).mean() for f in static_inputs.FACTORS}
    lost = np.square(rounded(inputs, got, kind) - inputs).mean()
    assert lost <= 1.001 * min(errors.values()) and (kind == "fp8_e4m3" or lost < 0.99 * errors[1.0])


FAMILIES = {
    "llama": {"kv_heads": 2}, "bert": {}, "t5": {"encoder_layers": 1, "family": "t5"},
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_the_walk_measures_the_inputs_of_each_matrix(family, make_rows):
    """In the first layer, whose inputs do not depend on integers. Padding is not measured."""
    sizes = {"vocab_size": 32, "d_model": 16, "layers": 1, "heads": 4, "kv_heads": 4, "head_dim": 4, "d_ff": 24}
    cfg = ModelConfig.model_validate({"family": family, **sizes, **FAMILIES[family]})
    params = jax.jit(lambda key: functional.init(cfg, key))(jax.random.key(0))
    batches = [make_rows(cfg, seed) for seed in range(2)]
    stack = functional.stacks(cfg)[0]
    embed = layerwise.embed_encoder if cfg.encoder_layers else layerwise.embed
    layer, peaks = jax.tree.map(lambda a: a[0], params[stack]["blocks"]), {}
    for batch in batches:
        _, taps = layerwise.block(cfg, stack, layer, embed(cfg, params, batch), 0, taps=True)
        real = batch["segments"].reshape(-1) > 0
        for module, x in taps.items():
            peaks.setdefault(module, []).append(np.abs(np.asarray(x))[real].max())
    method = Quantization("int8", activations="int8", static_activations="max")

    def change(visit):
        layer, visit.notes["matrices"] = quantize_layer(cfg, visit, method)
        return layer

    got, reports = walk(cfg, params, batches, collector(method), change)
    for m in weights.matrices({stack: got[stack]}, "block"):
        scale = np.asarray(m.weight.input_scale)
        assert scale.shape == (1, 1, 1) and scale[0, 0, 0] == pytest.approx(max(peaks[m.module]) / 127)
    found = {r.stack: r.notes["matrices"] for r in reports}
    assert found.keys() == set(functional.stacks(cfg))
    for matrices in found.values():
        assert matrices["attn/q"]["input_scale"] == matrices["attn/k"]["input_scale"] > 0


def test_every_fallback_of_a_matrix_is_named():
    """Without calibration inputs, gptq rounds to nearest, and each token has a scale."""
    cfg = ModelConfig(preset="llama-tiny", vocab_size=32, d_model=16, layers=1, heads=2, head_dim=8, d_ff=24)
    layer = jax.tree.map(lambda a: jnp.ones(a.shape[1:]), functional.abstract(cfg)["decoder"]["blocks"])
    method = Quantization("int8", method="gptq", activations="int8", static_activations="max")
    new, notes = quantize_layer(cfg, Visit("decoder", 0, layer, {}), method)
    assert notes["attn/q"]["fallback"] == f"{NO_INPUTS}; {NO_SCALE}"
    assert new["attn"]["q"]["kernel"].input_scale is None
