"""SparseGPT equals a plain reference in float64, and copes with Hessians that have no inverse."""

import jax.numpy as jnp
import numpy as np
import pytest

from llmctl.compress import error_feedback
from llmctl.compress.pruning import sparsegpt
from llmctl.compress.pruning.pattern import Pattern

BLOCK = 8


def reference(w, gram, pattern, damping=0.01, block=BLOCK):
    """The authors' loop over blocks and inputs [O, I], with the inverse Hessian of numpy."""
    w, hessian = w.T.astype(float), gram.astype(float).copy()
    hessian += damping * np.mean(np.diag(hessian)) * np.eye(len(hessian))
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    columns = w.shape[1]
    for first in range(0, columns, block):
        last = min(first + block, columns)
        w1, errors, inverse = w[:, first:last].copy(), np.zeros((len(w), last - first)), upper[first:last, first:last]
        pruned = np.zeros(w1.shape, bool)
        if not pattern.of:
            score = w1**2 / np.diag(inverse) ** 2
            a, b = pattern.block_inputs, pattern.block_outputs
            total = score.reshape(len(w) // b, b, -1, a).sum(axis=(1, 3))
            lowest = total <= np.sort(total.ravel())[int(total.size * pattern.sparsity) - 1]
            pruned = np.kron(lowest, np.ones((b, a), bool))
        for i in range(last - first):
            if pattern.of and i % pattern.of == 0:
                score = w1[:, i : i + pattern.of] ** 2 / np.diag(inverse)[i : i + pattern.of] ** 2
                worst = np.argsort(score, axis=1)[:, : pattern.of - pattern.keep]
                np.put_along_axis(pruned[:, i : i + pattern.of], worst, True, axis=1)
            kept = np.where(pruned[:, i], 0, w1[:, i])
            errors[:, i] = (w1[:, i] - kept) / inverse[i, i]
            w1[:, i:] -= np.outer(errors[:, i], inverse[i, i:])
            w1[:, i] = kept
        w[:, first:last] = w1
        w[:, last:] -= errors @ upper[first:last, last:]
    return w.T


def layer(seed=0, inputs=24, outputs=10, tokens=200, uneven=1.0):
    """Gram matrix of correlated inputs of uneven sizes, and a matrix."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(tokens, inputs)) @ (np.eye(inputs) + 0.3 * rng.normal(size=(inputs, inputs)))
    x *= np.exp(uneven * rng.normal(size=inputs))
    return (x.T @ x).astype(np.float32), rng.normal(size=(inputs, outputs)).astype(np.float32)


def error(gram, w, new):
    lost = np.asarray(new, float) - w
    return float(np.sum(lost * (gram.astype(float) @ lost)))


@pytest.mark.parametrize("text", ["unstructured", "2:4", "1:4", "4x1", "2x5", "8x1"])
def test_weights_equal_a_reference(text):
    gram, w = layer()
    pattern = Pattern.parse(text, 0.5)
    count = pattern.count(*w.shape, "matrix")
    got, attempts = sparsegpt.prune(w, gram, count, pattern=pattern, block=BLOCK)
    expected = reference(w, gram, pattern)
    np.testing.assert_array_equal(np.asarray(got) == 0, expected == 0)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert attempts == 0


def test_the_last_block_may_be_smaller_and_the_count_is_exact():
    gram, w = layer(inputs=21)
    for count in (0, 1, 77, 209, 210):
        got, _ = sparsegpt.prune(w, gram, count, pattern=Pattern(0.5), block=BLOCK)
        assert np.sum(np.asarray(got) == 0) == count
    np.testing.assert_array_equal(sparsegpt.prune(w, gram, 0, pattern=Pattern(0.5), block=BLOCK)[0], w)


def test_blocks_of_zeros_stay_and_count_and_blocks_may_be_larger():
    gram, w = layer()
    w[:12, :4] = 0
    pattern = Pattern.parse("12x2", 0.4)  # 2 x 5 blocks, of which 2 are zero; more inputs than `block`
    got, _ = sparsegpt.prune(w, gram, 4, pattern=pattern, block=BLOCK)
    zero = (np.asarray(got) == 0).reshape(2, 12, 5, 2).all(axis=(1, 3))
    assert zero.sum() == 4 and zero[0, :2].all() and (np.asarray(got) == 0).sum() == 4 * 24


def test_zeros_stay_zeros_and_count():
    """A pruned matrix whose zeros are uneven over the blocks; also more zeros than are asked for."""
    gram, w = layer()
    w[:5] = 0
    w[:, 0] = 0
    there = int(np.sum(w == 0))
    for count in (there - 10, there, there + 70):
        got, _ = sparsegpt.prune(w, gram, count, pattern=Pattern(0.5), block=BLOCK)
        assert np.all(np.asarray(got)[w == 0] == 0)
        assert np.sum(np.asarray(got) == 0) == max(count, there)
    got, _ = sparsegpt.prune(w, gram, 0, pattern=Pattern.parse("2:4", 0.5), block=BLOCK)
    assert np.all(np.asarray(got)[w == 0] == 0)
    assert np.sum(np.asarray(got)[8:, 1:] == 0) == 8 * 9


def test_less_error_than_masks_alone():
    gram, w = layer(inputs=32, outputs=16, uneven=0.3)
    norms = np.sqrt(np.diag(gram))[:, None]
    score = np.abs(w) * norms
    wanda = np.where(score > np.sort(score, axis=0)[15], w, 0)
    got, _ = sparsegpt.prune(w, gram, w.size // 2, pattern=Pattern(0.5), block=BLOCK)
    assert error(gram, w, got) < 0.7 * error(gram, w, wanda)


def test_dead_inputs_lose_their_weights_first_and_change_no_others():
    """The result of the live inputs is that of a matrix without the dead ones."""
    gram, w = layer()
    dead = np.arange(24) % 4 == 1
    gram[dead] = gram[:, dead] = 0
    pattern = Pattern.parse("2:4", 0.5)
    got, attempts = sparsegpt.prune(w, gram, 0, pattern=pattern, block=BLOCK)
    got = np.asarray(got)
    assert attempts == 0 and np.all(got[dead] == 0) and np.isfinite(got).all()
    small = gram[np.ix_(~dead, ~dead)]
    alone, _ = sparsegpt.prune(w[~dead], small, 0, pattern=Pattern.parse("2:3", 0.5), block=6)
    np.testing.assert_allclose(got[~dead], alone, atol=1e-5)


def test_a_singular_hessian_and_one_outlier():
    """Fewer tokens than inputs, and an input that is 10^6 times the others: finite weights, less error than masks."""
    gram, w = layer(tokens=5)
    got, attempts = sparsegpt.prune(w, gram, w.size // 2, pattern=Pattern(0.5), block=BLOCK)
    assert attempts == 0 and np.isfinite(got).all()
    gram, w = layer()
    gram[3] *= 1e6
    gram[:, 3] *= 1e6
    got, attempts = sparsegpt.prune(w, gram, w.size // 2, pattern=Pattern(0.5), block=BLOCK)
    assert attempts == 0 and np.isfinite(got).all() and np.all(np.asarray(got)[3] != 0)


def test_hessians_that_are_not_positive_definite_fall_back():
    """Rounding made an eigenvalue negative: more damping helps. Without a usable Hessian the score is Wanda's."""
    gram, w = layer(uneven=0.0)
    values, vectors = np.linalg.eigh(gram)
    values[0] = -0.05 * np.mean(np.diag(gram))
    broken = ((vectors * values) @ vectors.T).astype(np.float32)
    got, attempts = sparsegpt.prune(w, broken, w.size // 2, pattern=Pattern(0.5), block=BLOCK)
    assert attempts == 1 and np.isfinite(got).all()
    gram[2, 5] = gram[5, 2] = np.nan
    got, attempts = sparsegpt.prune(w, gram, w.size // 2, pattern=Pattern(0.5), block=24)
    score = np.abs(w) * np.sqrt(np.diag(gram))[:, None]
    assert attempts == error_feedback.ATTEMPTS
    np.testing.assert_array_equal(got, np.where(score > np.median(score), w, 0))


def test_inputs_that_are_nan_are_not_taken_for_dead_inputs():
    """An input that overflowed for one token makes a row and a column NaN; the other inputs keep their norms."""
    gram, w = layer(uneven=0.0)
    gram[3] = gram[:, 3] = np.nan
    got, attempts = sparsegpt.prune(w, gram, w.size // 2, pattern=Pattern(0.5), block=24)
    score = np.abs(w) * np.where(np.arange(24) == 3, 1, np.sqrt(np.diag(gram)))[:, None]
    assert attempts == error_feedback.ATTEMPTS and "no inverse" in sparsegpt.fallback(int(attempts), 0.01)
    np.testing.assert_array_equal(got, np.where(score > np.median(score), w, 0))


def test_blocks_of_more_than_2_to_the_24_weights_get_exact_quotas():
    """float32 rounds 2^24 + 3 up. Only the first of the two blocks has weights that are not zero yet."""
    size = 2**24 + 3
    zero_IO = jnp.zeros((2, size), bool).at[1].set(True)
    quotas = sparsegpt._quotas(zero_IO, jnp.ones(2, bool), 2, 2 * size)
    assert quotas.tolist() == [size, size]


def test_the_factor_is_that_of_the_inverse():
    gram, _ = layer()
    upper, _, _ = error_feedback.factor(jnp.asarray(gram), 0.01)
    inverse = np.linalg.inv(gram + 0.01 * np.mean(np.diag(gram)) * np.eye(24))
    np.testing.assert_allclose(np.asarray(upper).T @ upper, inverse, atol=1e-5 * np.abs(inverse).max())
