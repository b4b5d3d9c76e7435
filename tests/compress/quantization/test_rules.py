"""Formats by patterns: which pattern decides, which are refused, and what every method does with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmctl.compress.calibration.calibrate import walk
from llmctl.compress.quantization import rules
from llmctl.compress.quantization.quantize import quantize
from llmctl.compress.quantization.quantize_method import Quantization
from llmctl.compress.quantization.quantize_walk import collector, quantize_layer
from llmctl.config.errors import RequestError
from llmctl.model import weights

MIXED = (("attn/*", "int8"), ("attn/v", "none"), ("gate", "int3"))
"""Formats of the tests' decoder: the other matrices, `mlp/up` and `mlp/down`, get the format of the setting."""


def formats(params):
    return {m.module: m.node.format_name if m.node.is_integer else "none" for m in weights.matrices(params, "block")}


EXPECTED = {
    "attn/q": "int8", "attn/k": "int8", "attn/o": "int8", "attn/v": "none", "mlp/gate": "int3", "mlp/up": "int4",
    "mlp/down": "int4",
}  # fmt: skip


def test_rounding_gives_each_matrix_its_format_and_the_values_of_that_format(params):
    got, errors = quantize(params, scheme="int4", group=8, rules=MIXED)
    assert formats(got) == EXPECTED and len(errors) == 6
    flat = weights.flatten(got)
    for scheme, path in (("int8", "attn/q"), ("int3", "mlp/gate"), ("int4", "mlp/down")):
        alone = weights.flatten(quantize(params, scheme=scheme, group=8)[0])
        path = f"decoder/blocks/{path}/kernel"
        for a, b in zip(jax.tree.leaves(flat[path]), jax.tree.leaves(alone[path]), strict=True):
            np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(
        flat["decoder/blocks/attn/v/kernel"], weights.flatten(params)["decoder/blocks/attn/v/kernel"]
    )


@pytest.mark.parametrize("settings", [
    {"method": "gptq"}, {"method": "awq"}, {"smooth": True, "activations": "int8"},
], ids=str)  # fmt: skip
def test_methods_that_read_data_follow_the_rules(tiny, params, batches, settings):
    mixed = MIXED[:2] if settings.get("smooth") else MIXED
    method = Quantization("int4", group=8, rules=mixed, **settings)

    def change(visit):
        layer, visit.notes["matrices"] = quantize_layer(tiny, visit, method)
        return layer

    got, reports = walk(tiny, params, batches, collector(method), change)
    assert formats(got) == EXPECTED | ({"mlp/gate": "int4"} if settings.get("smooth") else {})
    assert all("attn/v" not in r.notes["matrices"] and 0 < r.error < 0.3 for r in reports)


def test_scales_of_awq_read_the_formats_of_their_matrices(tiny, params, batches):
    """Of the matrices after one norm only q is quantized, so its error alone chooses the scales."""
    notes = []
    for others in ((("attn/k", "none"), ("attn/v", "none")), ()):
        method = Quantization("int2", method="awq", rules=(*others, ("mlp/*", "none"), ("o", "none")))
        copy = jax.tree.map(jnp.copy, params)
        found = walk(tiny, copy, batches, collector(method), lambda v, m=method: record(tiny, v, m))[1]
        notes.append(found[0].notes["matrices"])
    assert set(notes[0]) == {"attn/q"} and set(notes[1]) == {"attn/q", "attn/k", "attn/v"}
    assert notes[0]["attn/q"]["error"] <= notes[1]["attn/q"]["error"]


def record(cfg, visit, method):
    layer, visit.notes["matrices"] = quantize_layer(cfg, visit, method)
    return layer


@pytest.mark.parametrize(("pattern", "message"), [
    ("layers/0/*", "selects a layer, but the layers of a stack are stored in one array per module .* attn/k, attn/o"),
    ("mlp/upp", "'mlp/upp' matches no matrix, did you mean 'mlp/up'"),
    ("embed/tokens", "'embed/tokens' matches only embed/tokens; set embeddings = true"),
    ("*", "rules leave no matrix"),
])  # fmt: skip
def test_refusals(params, pattern, message):
    with pytest.raises(RequestError, match=message):
        quantize(params, scheme="int4", rules=((pattern, "none"),))


def test_the_longest_pattern_decides_and_a_tie_is_refused():
    table = (("*", "int2"), ("mlp/*", "int3"), ("mlp/up", "int8"), ("mlp/do*", "nf4"), ("*p/down", "mxfp4"))
    assert rules.format_of("decoder/blocks/mlp/up", table, "int4") == "int8"
    assert rules.format_of("decoder/blocks/mlp/gate", table, "int4") == "int3"
    assert rules.format_of("encoder/blocks/attn/q", table, "int4") == "int2"
    with pytest.raises(RequestError, match=r"'\*p/down' \(mxfp4\) and 'mlp/do\*' \(nf4\) are equally long"):
        rules.format_of("decoder/blocks/mlp/down", table, "int4")
