"""Blocks of GGUF's quantized types: the gguf package decodes our integers, with no rounding but that of the scales."""

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import quants

from llmctl.compress.quantization import grids
from llmctl.compress.quantization.formats import Format
from llmctl.compress.quantization.quantize import quantize
from llmctl.convert import gguf_blocks
from llmctl.model import weights

RNG = np.random.default_rng(0)
W = RNG.normal(size=(512, 24)).astype(np.float32)


def decoded(data, kind):
    return quants.dequantize(data, getattr(gguf.GGMLQuantizationType, kind.upper()))


HELD = {  # the types that hold the integers of a format; with zero points and without
    ("int8", True): ("q8_0",), ("int8", False): (),
    ("int4", True): ("q8_0", "q6_k", "q5_0", "q5_1", "q4_0", "q4_1"),
    ("int4", False): ("q8_0", "q6_k", "q5_0", "q5_1", "q4_1"),
    ("int3", False): ("q8_0", "q6_k", "q5_0", "q5_1", "q4_0", "q4_1"),
    ("int2", True): ("q8_0", "q6_k", "q5_0", "q5_1", "q4_0", "q4_1"),
}  # fmt: skip


@pytest.mark.parametrize("group", [0, 32, 256])
@pytest.mark.parametrize(("scheme", "symmetric"), HELD)
def test_integers_are_decoded_by_the_package(scheme, symmetric, group):
    """With scales that float16 holds, the values are equal bit for bit; otherwise by the rounding of the scale."""
    grid, size = grids.levels_of(Format(scheme, group, symmetric))
    node = grids.quantized(jnp.asarray(W), grid, -2, size, False)
    found = gguf_blocks.integers_of(node, -1)
    assert found is not None
    dense = np.asarray(weights.dense(node)).T
    np.testing.assert_allclose(found.level_RI * np.repeat(found.scale_RG, 512 // found.scale_RG.shape[1], 1), dense)
    held = HELD[scheme, symmetric]
    for kind in gguf_blocks.LIMITS:
        data = gguf_blocks.kept(kind, found)
        assert (data is not None) == (kind in held and (kind != "q6_k" or group != 32))
        if data is None:
            continue
        # The zero point of q4_1 and q5_1 is a float16 too.
        worst = 2**-11 * (8 if not symmetric and kind.endswith("_1") else 1)
        assert np.linalg.norm(decoded(data, kind) - dense) <= worst * np.linalg.norm(dense)
        if kind == "q6_k":
            assert np.linalg.norm(decoded(data, kind) - dense) <= 3e-5 * np.linalg.norm(dense)
        whole = gguf_blocks.Integers(found.level_RI, np.full_like(found.scale_RG, 0.0078125))
        again = gguf_blocks.kept(kind, whole)
        np.testing.assert_array_equal(decoded(again, kind), found.level_RI * np.float32(0.0078125))


def test_scales_that_float16_cannot_hold_are_not_kept():
    level = np.ones((2, 32), np.int32)
    for scale in (1e-9, 1e6):
        assert gguf_blocks.kept("q8_0", gguf_blocks.Integers(level, np.full((2, 1), scale, np.float32))) is None


def test_q6_k_is_rounded_about_as_finely_as_its_6_bits_allow():
    """Normal weights: between the errors of 5 and of 8 bits. Rows of zeros stay zeros."""
    w = np.array(W.T)
    w[3] = 0
    got = decoded(gguf_blocks.rounded_q6_k(w), "q6_k")
    error = np.linalg.norm(got - w) / np.linalg.norm(w)
    others = [np.linalg.norm(decoded(quants.quantize(w, t), t.name) - w) / np.linalg.norm(w) for t in (
        gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q5_1,
    )]  # fmt: skip
    assert others[0] < error < 0.6 * others[1] and not got[3].any()
    assert np.abs(got - w).max(1)[0] <= np.abs(w[0]).max() / 31


def test_an_export_keeps_the_integers_and_names_the_rounding(save, config, params, call, tmp_path):
    integers, _ = quantize(params, scheme="int4", group=32, rules=(("mlp/up", "none"),))
    made = save(config, integers)
    code, said, err = call("export", made, "--to", "gguf", "--type", "q5_0", "--out", tmp_path / "g")
    assert code == 0, err
    assert said["parity"] < 1e-4
    told = " ".join(err.split())
    assert "matrices are rounded: 3 to q5_0 (relative error 0." in told
    assert "18 to q5_0, with unchanged integers (relative error 0.0002" in told
    reader = gguf.GGUFReader(tmp_path / "g" / "model.gguf")
    tensor = next(t for t in reader.tensors if t.name == "blk.1.attn_v.weight")
    node = weights.layer_of(integers["decoder"]["blocks"]["attn"]["v"]["kernel"], 1)
    found = gguf_blocks.integers_of(node, -1)
    assert found is not None
    np.testing.assert_array_equal(np.asarray(tensor.data), gguf_blocks.kept("q5_0", found))
