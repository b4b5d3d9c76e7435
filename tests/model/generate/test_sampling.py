"""Each rule on a distribution small enough to work out by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmctl.model.generate.sampling import Sampling, choose, penalize, row_keys, truncate_logits

P = np.array([[0.5, 0.05, 0.3, 0.15]])
LOGITS = jnp.log(P)


def kept(**rules):
    return np.flatnonzero(np.isfinite(np.asarray(truncate_logits(LOGITS, Sampling(**rules))[0]))).tolist()


def test_rules_keep_what_they_say():
    assert kept() == [0, 1, 2, 3]
    assert kept(top_k=2) == [0, 2]
    assert kept(top_k=9) == [0, 1, 2, 3]
    assert kept(top_p=0.4) == [0]  # the likeliest alone passes 0.4
    assert kept(top_p=0.79) == [0, 2]
    assert kept(top_p=0.9) == [0, 2, 3]
    assert kept(min_p=0.25) == [0, 2, 3]  # at least 0.125
    assert kept(min_p=1.0) == [0]
    # top-p counts within what top-k left: 0.5 / 0.8 = 0.625.
    assert kept(top_k=2, top_p=0.6) == [0]
    assert kept(top_k=2, top_p=0.7) == [0, 2]


def test_the_penalty_lowers_what_was_seen_whatever_its_sign():
    got = penalize(jnp.array([[2.0, -2.0, 1.0]]), jnp.array([[True, True, False]]), 4.0)
    np.testing.assert_array_equal(got, [[0.5, -8.0, 1.0]])


def test_greedy_takes_the_likeliest_and_the_penalty_can_change_it():
    keys = row_keys(0, 1)
    assert choose(LOGITS, None, keys, 0, Sampling()).tolist() == [0]
    seen = jnp.array([[True, False, False, False]])
    assert choose(LOGITS, seen, keys, 0, Sampling(repetition_penalty=10.0)).tolist() == [2]


def test_draws_follow_the_narrowed_distribution_at_its_temperature():
    n = 4000
    rules = Sampling(temperature=0.5, top_k=3)
    drawn = choose(jnp.repeat(LOGITS, n, axis=0), None, row_keys(3, n), 5, rules)
    share = np.bincount(np.asarray(drawn), minlength=4) / n
    sharp = np.where(np.arange(4) == 1, 0, P[0] ** 2)  # temperature 1/2 squares the probabilities
    np.testing.assert_allclose(share, sharp / sharp.sum(), atol=0.03)


def test_steps_and_rows_draw_differently():
    uniform = jnp.zeros((2, 1000))
    keys = row_keys(0, 2)
    first, second = (choose(uniform, None, keys, s, Sampling(temperature=1.0)).tolist() for s in (0, 1))
    assert len({*first, *second}) == 4
    assert jax.random.key_data(keys).shape[0] == 2


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_p": 0.0}, {"min_p": 2.0}, {"repetition_penalty": 0.0}])
def test_impossible_rules_are_refused(wrong):
    with pytest.raises(ValueError, match="must"):
        Sampling(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": math.inf},
        {"temperature": math.nan},
        {"temperature": 1e39},
        {"temperature": 1e-30},
        {"repetition_penalty": math.nan},
        {"repetition_penalty": math.inf},
        {"top_p": math.nan},
        {"min_p": math.nan},
    ],
)
def test_rules_that_leave_the_range_of_float32(wrong):
    with pytest.raises(ValueError, match="must"):
        Sampling(**wrong)
