"""Structured pruning by identities: what adds nothing goes and the outputs stay; shapes are the config's."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmctl.compress.calibration.layer_files import Saved
from llmctl.compress.calibration.statistics import Gram, Moments
from llmctl.compress.quantization.quantize import quantize
from llmctl.compress.structured_pruning.importance import head_scores, neuron_scores
from llmctl.compress.structured_pruning.shrink import target
from llmctl.compress.structured_pruning.structured import (
    choose_heads,
    choose_layers,
    choose_neurons,
    prune_layers,
    prune_widths,
)
from llmctl.config.errors import RequestError
from llmctl.model import functional
from llmctl.model.config import ModelConfig
from llmctl.model.weights import flatten, unflatten


def zero(params: dict[str, Any], path: str, layer: int, rows: slice) -> dict[str, Any]:
    flat = flatten(params)
    flat[path] = flat[path].at[layer, rows].set(0)
    return unflatten(flat)


def assert_shapes(cfg: ModelConfig, params: dict[str, Any]) -> None:
    expected = {path: x.shape for path, x in flatten(functional.abstract(cfg)).items()}
    assert {path: x.shape for path, x in flatten(params).items()} == expected


def hidden(cfg: ModelConfig, params: dict[str, Any], batch: dict[str, Any]) -> jax.Array:
    return jax.jit(partial(functional.hidden, cfg))(params, batch)


def real(batch, x_BTD):
    return np.asarray(x_BTD)[np.asarray(batch["segments"]) > 0]


def test_head_scores_are_the_norm_of_the_contribution():
    x = jax.random.normal(jax.random.key(0), (10, 12))
    o = jax.random.normal(jax.random.key(1), (12, 5))
    got = head_scores(Gram.start(12, 3).fold(x, jnp.ones(10, bool)), o)
    want = [np.linalg.norm(x[:, 4 * h : 4 * h + 4] @ o[4 * h : 4 * h + 4]) for h in range(3)]
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_neuron_scores_are_the_norm_of_the_contribution():
    x = jax.random.normal(jax.random.key(0), (10, 6))
    down = jax.random.normal(jax.random.key(1), (6, 5))
    got = neuron_scores(Moments.start(6).fold(x, jnp.ones(10, bool)), down)
    np.testing.assert_allclose(got, [np.linalg.norm(np.outer(x[:, f], down[f])) for f in range(6)], rtol=1e-5)


def test_heads_go_by_groups_or_evenly_within_them():
    scores = np.array([1.0, 9.0, 4.0, 5.0, 2.0, 3.0])  # groups (0 1) (2 3) (4 5)
    heads, groups = choose_heads(scores, 3, 2, 4)
    assert heads.tolist() == [0, 1, 2, 3] and groups.tolist() == [0, 1]
    heads, groups = choose_heads(scores, 3, 3, 3)
    assert heads.tolist() == [1, 3, 5] and groups.tolist() == [0, 1, 2]
    assert choose_neurons(scores, 3).tolist() == [1, 2, 3]
    assert choose_neurons(np.zeros(4), 2).tolist() == [0, 1]


def test_layers_keep_the_pattern_of_local_and_global():
    influence = [0.9, 0.1, 0.5, 0.3]
    assert choose_layers(influence, 2, [False] * 4) == [0, 2]
    # local global local global: two layers must again be local, global; 0.9 + 0.3 beats every other such pair
    assert choose_layers(influence, 2, [True, False, True, False]) == [0, 3]
    assert choose_layers([0.0, 0.0, 0.0], 3, [False] * 3) == [0, 1, 2]


def test_what_adds_nothing_goes_and_the_output_stays(tiny, params, batches):
    """A group, neurons and a layer that contribute nothing, different ones a layer, are found and cut."""
    o, down = "decoder/blocks/attn/o/kernel", "decoder/blocks/mlp/down/kernel"
    silent = params
    for layer, (group, neurons) in enumerate(((0, slice(0, 8)), (1, slice(8, 16)), (1, slice(16, 24)))):
        silent = zero(silent, o, layer, slice(8 * group, 8 * group + 8))  # two heads of width 4 a group
        silent = zero(silent, down, layer, neurons)
    smaller = target(tiny, heads=0.5, ffn=16)
    assert (smaller.heads, smaller.kv_heads, smaller.d_ff) == (2, 1, 16)
    whole = [hidden(tiny, silent, batch) for batch in batches]
    cfg, got, reports = prune_widths(tiny, silent, batches, smaller)
    assert_shapes(cfg, got)
    assert max(r.error for r in reports) < 1e-6
    for batch, before in zip(batches, whole, strict=True):
        after = hidden(cfg, got, batch)
        np.testing.assert_allclose(real(batch, after), real(batch, before), atol=1e-5)


def test_an_interrupted_choice_of_widths_goes_on_at_its_layer(tiny, params, batches, tmp_path):
    """Finished layers bring their choices from disk; each layer chooses other heads and neurons."""
    smaller, saved = target(tiny, heads=0.5, ffn=16), Saved(tmp_path / "layers")

    def run(**how):
        return prune_widths(tiny, jax.tree.map(jnp.copy, params), batches, smaller, **how)

    def kill(report):
        raise KeyboardInterrupt

    _, whole, reports = run()
    assert len({str(r.notes) for r in reports}) == 3 and reports[0].notes.keys() == {
        "attn/heads", "attn/groups", "mlp/neurons", "importance"
    }  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        run(saved=saved, progress=kill)
    assert [file.name for file in (tmp_path / "layers").iterdir()] == ["decoder.00000.npz"]
    _, again, repeated = run(saved=saved)
    assert repeated == reports
    jax.tree.map(np.testing.assert_array_equal, again, whole)


def test_queries_go_evenly_within_groups(tiny, params, batches):
    silent = params
    for layer in range(3):
        for head in (0, 3):  # one of each group
            silent = zero(silent, "decoder/blocks/attn/o/kernel", layer, slice(4 * head, 4 * head + 4))
    before = hidden(tiny, silent, batches[0])
    cfg, got, _ = prune_widths(tiny, silent, batches, target(tiny, heads=0.5, by="queries"))
    assert (cfg.heads, cfg.kv_heads) == (2, 2)
    assert_shapes(cfg, got)
    after = hidden(cfg, got, batches[0])
    np.testing.assert_allclose(real(batches[0], after), real(batches[0], before), atol=1e-5)


def test_a_layer_that_does_nothing_goes(tiny, params, batches):
    silent = zero(params, "decoder/blocks/attn/o/kernel", 1, slice(None))
    silent = zero(silent, "decoder/blocks/mlp/down/kernel", 1, slice(None))
    cfg, got, kept, _ = prune_layers(tiny, silent, batches, target(tiny, layers=1 / 3))
    assert kept == {"decoder": [0, 2]} and cfg.layers == 2
    assert_shapes(cfg, got)
    before, after = hidden(tiny, silent, batches[0]), hidden(cfg, got, batches[0])
    np.testing.assert_allclose(real(batches[0], after), real(batches[0], before), atol=1e-6)


@pytest.mark.parametrize("cuts", [prune_layers, prune_widths])
def test_the_walk_computes_in_the_type_that_is_asked_for(cuts, tiny, params, batches):
    """8 bits of precision: near what 24 make, and not that."""
    smaller = target(tiny, **({"layers": 1 / 3} if cuts is prune_layers else {"ffn": 0.5}))
    influence = {}
    for dtype in ("float32", "bfloat16"):
        seen = influence[dtype] = []
        own = jax.tree.map(jnp.copy, params)
        cuts(tiny, own, batches, smaller, progress=lambda report, seen=seen: seen.append(report.influence), dtype=dtype)
    np.testing.assert_allclose(influence["bfloat16"], influence["float32"], rtol=0.05)
    assert np.abs(np.subtract(influence["bfloat16"], influence["float32"])).max() > 1e-5


def test_a_quantized_model_is_cut_exactly(tiny, params, batches):
    int8, _ = quantize(params, scheme="int8")
    grouped, _ = quantize(jax.tree.map(jnp.copy, params), scheme="int8", group=4)
    smaller = target(tiny, heads=2, ffn=0.5)
    cfg, got, _ = prune_widths(tiny, int8, batches, smaller)
    assert_shapes(cfg, got)
    assert flatten(got)["decoder/blocks/mlp/up/kernel"].array.qvalue.dtype == jnp.int8
    assert np.all(np.isfinite(hidden(cfg, got, batches[0])))
    with pytest.raises(RequestError, match=r"quantized in groups of 4 along what would be cut"):
        prune_widths(tiny, grouped, batches, smaller)


def test_encoder_decoder_with_biases_and_a_shared_position_bias(tiny, make_rows):
    """T5-like: self-attention keeps the same heads in every layer, for the position bias is one table a stack."""
    flags = {
        "architecture": "encoder_decoder", "encoder_layers": 2, "layers": 2, "positions": "relative", "kv_heads": 4,
        "gated": False, "qkv_bias": True, "out_bias": True, "mlp_bias": True, "norm": "layer",
    }  # fmt: skip
    big = ModelConfig.model_validate({**tiny.model_dump(), **flags})
    params = jax.jit(lambda key: functional.init(big, key))(jax.random.key(3))
    flat = flatten(params)
    for path in flat:
        if path.endswith("bias"):
            flat[path] = 0.1 * jax.random.normal(jax.random.key(len(path)), flat[path].shape)
    for layer in range(2):
        quiet = {"encoder/blocks/attn": (1, 2), "decoder/blocks/attn": (0, 3), "decoder/blocks/cross": (layer, 3)}
        for part, heads in quiet.items():
            o = f"{part}/o/kernel"
            for head in heads:
                flat[o] = flat[o].at[layer, 4 * head : 4 * head + 4].set(0)
    silent, batch = unflatten(flat), make_rows(big, 5)
    before = hidden(big, silent, batch)
    cfg, got, _ = prune_widths(big, silent, [batch], target(big, heads=0.5))
    assert_shapes(cfg, got)
    after = hidden(cfg, got, batch)
    np.testing.assert_allclose(real(batch, after), real(batch, before), atol=1e-5)


@pytest.mark.parametrize(("request_", "message"), [
    ({}, "nothing would be removed"), ({"heads": 0.1}, "nothing would be removed"), ({"heads": 3}, "multiple of 2"),
    ({"heads": 8}, "has 4"), ({"ffn": 16.5}, "multiple of 1"), ({"ffn": 20, "multiple": 16}, "not a multiple of 16"),
    ({"ffn": 25}, "has 24"),
    ({"ffn": 0.5, "multiple": 32}, "fewer than a multiple"), ({"layers": 5}, "has 3"),
    ({"heads": 0.1, "ffn": 0.5}, "removed by heads = 0.1 from"),
    ({"layers": 0.99}, "layers: a fraction of 0.99 removed leaves fewer than 1 of 3, the least that can stay"),
    ({"heads": 0.8}, "heads: .* fewer than 2 of 4"), ({"ffn": 0.99}, "ffn: .* fewer than 1 of 24"),
    ({"ffn": 0.9, "multiple": 8}, "ffn: .* fewer than 8 of 24"), ({"hidden": 0.99}, "hidden: .* fewer than 1 of"),
    ({"heads": 0.5, "layers": 0.1, "ffn": 0.01}, "removed by ffn = 0.01 and layers = 0.1 from"),
])  # fmt: skip
def test_requests_that_cannot_be(tiny, request_, message):
    with pytest.raises(RequestError, match=message):
        target(tiny, **request_)


def test_rounding_is_to_the_nearest(tiny):
    assert target(tiny, ffn=0.3).d_ff == 17
    assert target(tiny, ffn=0.3, multiple=8).d_ff == 16
    assert target(tiny, layers=0.8).layers == 1
    assert target(tiny, heads=0.7).kv_heads == 1
    assert target(tiny, heads=4, layers=3, ffn=0.5).d_ff == 12  # what is kept may be all
