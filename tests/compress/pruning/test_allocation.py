"""Allocations by hand; the zeros of all layers add up exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmctl.compress.calibration.calibrate import walk
from llmctl.compress.calibration.statistics import Moments
from llmctl.compress.pruning import allocation, prune_report
from llmctl.compress.pruning.pattern import Pattern
from llmctl.compress.pruning.prune import collector, prune, prune_layer, sparsity
from llmctl.compress.pruning.sparse_method import Allocation, SparseMethod
from llmctl.model import functional
from llmctl.model.config import ModelConfig
from llmctl.model.weights import matrices, updated


def test_owl_equals_the_authors_formula():
    """Ratios scaled to 2 * lambda, moved to the mean of the kept share; equal layers are pruned equally."""
    outliers = np.array([0.04, 0.01, 0.02, 0.03])
    scaled = (outliers - outliers.min()) / np.ptp(outliers) * 2 * 0.08
    kept = scaled - scaled.mean() + (1 - 0.6)
    got = allocation.owl(outliers, np.full(4, 100), 0.6, 0.08)
    np.testing.assert_allclose(got, 1 - kept)
    assert np.ptp(got) == pytest.approx(0.16)
    np.testing.assert_array_equal(allocation.owl(np.ones(3), np.ones(3), 0.6, 0.08), [0.6] * 3)
    uneven = allocation.owl(outliers, np.array([100, 300, 50, 50]), 0.6, 0.08)
    assert np.average(uneven, weights=[100, 300, 50, 50]) == pytest.approx(0.6)


def test_outliers_are_counted_over_all_matrices_of_a_layer():
    blocks = {
        "attn": {"q": {"kernel": jnp.ones((2, 4, 2)).at[1, 0, 0].set(30.0)}},
        "mlp": {"up": {"kernel": jnp.ones((2, 4, 3))}},
    }
    stats = {path: Moments(jnp.array([1.0, 1.0, 1.0, 4.0]), jnp.array(1.0)) for path in ("attn/q", "mlp/up")}
    layers = [("decoder", 0), ("decoder", 1)]
    got = allocation.outlier_ratios({"decoder": {"blocks": blocks}}, layers, dict.fromkeys(layers, stats), 1.5)
    # Scores of layer 0: 15 ones and 5 twos, mean 1.25, so 1.875 is exceeded by the twos. Layer 1: mean 2.7; one above.
    np.testing.assert_allclose(got, [5 / 20, 1 / 20])


def test_the_scan_fills_the_cheapest_halves():
    """Costs: layer 0: 1 and 5, layer 1: 2 and 3, layer 2: concave, so 4 and 4. Half of all halves are filled."""
    errors = np.array([[0.0, 1.0, 6.0], [1.0, 3.0, 6.0], [0.0, 6.0, 8.0]])
    got = allocation.by_sensitivity(errors, np.ones(3), 0.5, 0.1)
    np.testing.assert_allclose(got, [0.5, 0.6, 0.4])
    larger = allocation.by_sensitivity(errors, np.array([1, 1, 2]), 0.5, 0.1)  # two zeros for the same cost in layer 2
    np.testing.assert_allclose(larger, [0.5, 0.5, 0.5])
    assert np.average(larger, weights=[1, 1, 2]) == pytest.approx(0.5)


@pytest.mark.parametrize("errors", [[0.0, 0.0, 0.0], [0.0, 1.0, 2.0], [0.0, 3.0, 4.0], [0.0, 1.0, 4.0]])
def test_layers_with_equal_errors_get_equal_sparsities(errors):
    """Costs that are zero, linear, concave and convex; the sizes are equal."""
    got = allocation.by_sensitivity(np.array([errors] * 4), np.full(4, 7), 0.5, 0.1)
    np.testing.assert_allclose(got, [0.5] * 4)
    one = np.array([[0.0, 0.1, 0.2], errors, errors]) + np.array([[0.0], [1.0], [1.0]])
    assert np.ptp(allocation.by_sensitivity(one, np.ones(3), 0.5, 0.1)[1:]) < 1e-12


def test_counts_add_up_and_hold_the_zeros_that_are_there(tiny, fresh):
    """Of one matrix nine tenths are zeros already."""
    sparse = {m.path: m.weight for m in matrices(fresh, "block")}
    path = "decoder/blocks/mlp/up/kernel"
    sparse[path] = sparse[path].at[1].multiply(jax.random.uniform(jax.random.key(0), sparse[path].shape[1:]) > 0.9)
    params = updated(fresh, sparse)
    layers = [("decoder", i) for i in range(3)]
    got = allocation.counts(params, layers, np.array([0.25, 0.4, 0.55]), 0.4)
    total = sum(w.size for w in sparse.values())
    assert sum(n for own in got.values() for n in own.values()) == round(0.4 * total)
    assert got["decoder", 1]["mlp/up"] == int(np.sum(np.asarray(sparse[path][1]) == 0))
    size = sparse[path][0].size
    assert got["decoder", 0]["mlp/up"] < 0.25 * size < 0.4 * size < got["decoder", 2]["mlp/up"]


@pytest.mark.parametrize("name", ["owl", "sensitivity"])
def test_a_model_is_measured_and_not_changed(tiny, params, batches, name):
    before = jax.tree.map(np.array, params)
    method = SparseMethod("magnitude", Pattern(0.5), allocation=Allocation(name, spread=0.1, outlier=3.0))
    got = allocation.allocate(tiny, params, batches, method)
    jax.tree.map(np.testing.assert_array_equal, params, before)
    sizes = {m.module: m.weight[0].size for m in matrices(params, "block")}
    shares = [sum(own.values()) / sum(sizes.values()) for own in got.values()]
    assert sum(sum(own.values()) for own in got.values()) == round(0.5 * 3 * sum(sizes.values()))
    assert min(shares) < 0.5 < max(shares) and np.ptp(shares) < 0.2 + 1e-3


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_a_count_is_met_exactly(method):
    w = jax.random.normal(jax.random.key(0), (16, 7))
    stats = Moments(jnp.ones(16), jnp.array(1.0))
    for count in (0, 5, 50, 111):
        got = prune(w, stats, count=count, method=method, pattern=Pattern(0.5))
        assert int(jnp.sum(got == 0)) == count


def test_a_count_is_met_exactly_if_outputs_have_uneven_numbers_of_zeros():
    """After magnitude pruning, outputs of large weights have few zeros; no zero comes back."""
    w = jax.random.normal(jax.random.key(0), (64, 31)) * jnp.exp(jax.random.normal(jax.random.key(1), (31,)))
    once = prune(w, method="magnitude", pattern=Pattern(0.5))
    stats = Moments(jnp.ones(64), jnp.array(1.0))
    for count, expected in ((992, 992), (1126, 1126), (1900, 1900), (500, 992)):
        method, layer = SparseMethod("wanda", Pattern(0.5)), {"mlp": {"up": {"kernel": once}}}
        layer, notes = prune_layer(layer, {"mlp/up": stats}, method=method, counts={"mlp/up": count})
        got = layer["mlp"]["up"]["kernel"]
        assert int(jnp.sum(got == 0)) == notes["mlp/up"]["zeros"] == expected
        assert not np.any(np.asarray(got)[np.asarray(once) == 0])


def test_sparsegpt_with_repair_and_owl_of_an_encoder_decoder(tiny, make_rows):
    """Both stacks get their own numbers of zeros, and cross-attention reads the encoder's inputs."""
    change = {"architecture": "encoder_decoder", "encoder_layers": 2, "layers": 1, "positions": "relative"}
    cfg = ModelConfig.model_validate({**tiny.model_dump(), **change})
    params = jax.jit(lambda key: functional.init(cfg, key))(jax.random.key(1))
    batches = [make_rows(cfg, 0)]
    method = SparseMethod("sparsegpt", Pattern(0.5), repair=True, allocation=Allocation("owl", 0.1, 2.0))
    counts = allocation.allocate(cfg, params, batches, method)

    def prune_one(visit):
        own = counts[visit.stack, visit.index]
        layer, visit.notes["matrices"] = prune_layer(visit.layer, visit.stats, method=method, counts=own)
        return layer

    pruned, reports = walk(cfg, params, batches, collector(method), prune_one)
    layers = prune_report.records(reports)
    assert [(r["stack"], r["layer"]) for r in layers] == [("encoder", 0), ("encoder", 1), ("decoder", 0)]
    assert {(r["stack"], r["layer"]): {p: m["zeros"] for p, m in r["matrices"].items()} for r in layers} == counts
    assert sparsity(pruned) == pytest.approx(0.5, abs=1e-4) and "cross/k" in layers[2]["matrices"]
    assert all(m["error"] <= m["error_before_repair"] for r in layers for m in r["matrices"].values())
