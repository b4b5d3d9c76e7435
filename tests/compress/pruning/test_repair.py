"""Repaired weights are the least-squares solution on the kept inputs, and no output becomes worse."""

import jax.numpy as jnp
import numpy as np
import pytest

from llmctl.compress.pruning import sparsegpt
from llmctl.compress.pruning.pattern import Pattern
from llmctl.compress.pruning.repair import repair


@pytest.fixture(scope="module")
def layer():
    """Inputs [200, 24], their Gram matrix, a matrix [24, 10] and a mask that is uneven over the outputs."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 24)) @ (np.eye(24) + 0.3 * rng.normal(size=(24, 24))) * np.exp(0.5 * rng.normal(size=24))
    mask = rng.random((24, 10)) < np.linspace(0.2, 0.9, 10)
    return x, (x.T @ x).astype(np.float32), rng.normal(size=(24, 10)).astype(np.float32), mask


def errors(gram, w, new):
    lost = np.asarray(new, float) - w
    return np.sum(lost * (gram.astype(float) @ lost), axis=0)


def test_enough_steps_give_the_least_squares_solution(layer):
    x, gram, w, mask = layer
    got = np.asarray(repair(w, np.where(mask, w, 0), gram, steps=60))
    assert np.array_equal(got != 0, mask)
    for o in range(w.shape[1]):
        kept = mask[:, o]
        expected = np.linalg.lstsq(x[:, kept], x @ w[:, o].astype(float), rcond=None)[0]
        np.testing.assert_allclose(got[kept, o], expected, rtol=0, atol=2e-4 * np.abs(expected).max())


def test_no_output_becomes_worse_and_few_steps_suffice(layer):
    _, gram, w, mask = layer
    pruned = np.where(mask, w, 0)
    before, best = errors(gram, w, pruned), errors(gram, w, repair(w, pruned, gram, steps=60))
    after = errors(gram, w, repair(w, pruned, gram))
    assert np.all(after <= before) and after.sum() < 1.01 * best.sum() < 0.7 * before.sum()
    again = repair(w, np.where(mask, w, 0), gram * 0)  # no inputs: nothing to choose by
    np.testing.assert_array_equal(again, pruned)


def test_a_solution_of_sparsegpt_gains_too(layer):
    _, gram, w, _ = layer
    solved, _ = sparsegpt.prune(w, gram, 120, pattern=Pattern(0.5))
    got = repair(w, solved, gram)
    np.testing.assert_array_equal(np.asarray(got) == 0, np.asarray(solved) == 0)
    assert errors(gram, w, got).sum() < errors(gram, w, solved).sum()


@pytest.mark.parametrize("seed", [1, 2])
def test_nearly_collinear_inputs_make_no_output_worse(seed):
    """Three large inputs are nearly multiples of one another, so the terms of the squared error cancel in float32."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(300, 32))
    x[:, 0] *= 1e3
    x[:, 1] = x[:, 0] + 0.3 * rng.normal(size=300)
    x[:, 2] = -0.7 * x[:, 0] + 0.3 * rng.normal(size=300)
    gram, w = (x.T @ x).astype(np.float32), rng.normal(size=(32, 240)).astype(np.float32)
    solved, _ = sparsegpt.prune(w, gram, w.size // 2, pattern=Pattern(0.5))
    got = repair(w, solved, gram)
    before, after = (np.sum((x @ (np.asarray(v, float) - w)) ** 2, axis=0) for v in (solved, got))
    assert np.all(after <= before) and after.sum() < before.sum()


def test_dead_inputs_and_a_lost_output_stay(layer):
    _, gram, w, mask = layer
    gram = gram.copy()
    gram[4] = gram[:, 4] = 0
    pruned = np.where(mask, w, 0)
    pruned[:, 3] = 0
    got = np.asarray(repair(w, pruned, gram))
    assert np.isfinite(got).all()
    np.testing.assert_array_equal(got[4], pruned[4])
    np.testing.assert_array_equal(got[:, 3], 0)


def test_rounding_to_bfloat16_makes_no_output_worse(layer):
    _, gram, w, mask = layer
    w16 = jnp.asarray(w, jnp.bfloat16)
    pruned = jnp.where(mask, w16, 0)
    got = repair(w16, pruned, gram)
    exact = np.asarray(w16, np.float32)
    assert got.dtype == jnp.bfloat16
    assert np.all(errors(gram, exact, got) <= errors(gram, exact, pruned) * (1 + 1e-5))
