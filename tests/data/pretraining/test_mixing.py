"""Test mixtures: exact proportions, every row of every source in order, and exhausted sources."""

import numpy as np
import pytest

from llmctl.config.errors import RequestError
from llmctl.data.corpus import tokenize
from llmctl.data.pretraining.mixing import BLOCK, MixedRows, phases, shares
from llmctl.data.pretraining.packing import PackedRows


class Numbers:
    """Source whose row i is [s, i]."""

    tokens, waste = 10, 0.5

    def __init__(self, s, n):
        self.s, self.n = s, n

    def __len__(self):
        return self.n

    def batch(self, rows_B):
        return {"row": np.stack([np.full_like(rows_B, self.s), rows_B], 1)}


def test_shares_hold_in_every_block():
    assert shares(np.array([3.0, 1.0])).tolist() == [768, 256]
    assert shares(np.array([1.0, 1.0, 1.0])).tolist() == [342, 341, 341]
    assert shares(np.array([1.0, 1e-9, 0.0])).tolist() == [BLOCK - 1, 1, 0]
    rows = MixedRows([Numbers(0, 5), Numbers(1, 7)], [3, 1])
    found = rows.batch(np.arange(3 * BLOCK))["row"]
    assert [(found[b * BLOCK : (b + 1) * BLOCK, 0] == 0).sum() for b in range(3)] == [768] * 3
    # The rows of each source come in order, without gaps or repetitions.
    for s in (0, 1):
        np.testing.assert_array_equal(found[found[:, 0] == s, 1], np.arange((found[:, 0] == s).sum()))
    # Each block is shuffled differently.
    assert set(found[:64, 0].tolist()) == {0, 1}
    assert not np.array_equal(found[:BLOCK, 0], found[BLOCK : 2 * BLOCK, 0])
    assert rows.total is None
    assert (len(rows), rows.tokens, rows.waste) == (12, 20, 0.5)


def test_rows_are_pure():
    made = [MixedRows([Numbers(0, 5), Numbers(1, 7)], [0.2, 0.8], seed=3) for _ in range(2)]
    whole = made[0].batch(np.arange(2 * BLOCK))["row"]
    for i in (2 * BLOCK - 1, BLOCK, 0, 17):
        np.testing.assert_array_equal(made[1][i]["row"], whole[i])
    np.testing.assert_array_equal(made[1].batch(np.array([2000, 3, 1024]))["row"], whole[[2000, 3, 1024]])
    other = MixedRows([Numbers(0, 5), Numbers(1, 7)], [0.2, 0.8], seed=4)
    assert not np.array_equal(other.batch(np.arange(BLOCK))["row"], whole[:BLOCK])


def test_a_source_that_has_had_its_epochs_leaves_its_place():
    # The first source has 2 of 3 shares and is exhausted after 1000 * 1.5 rows. The other one is endless.
    rows = MixedRows([Numbers(0, 1000), Numbers(1, 7)], [2, 1], epochs=[1.5, 0])
    found = rows.batch(np.arange(5 * BLOCK))["row"]
    assert (found[:, 0] == 0).sum() == 1500
    assert (found[3000:, 0] == 1).all()
    for s in (0, 1):
        np.testing.assert_array_equal(found[found[:, 0] == s, 1], np.arange((found[:, 0] == s).sum()))
    assert rows.total is None


def test_when_all_have_had_their_epochs_there_are_no_more_rows():
    rows = MixedRows([Numbers(0, 1000), Numbers(1, 300), Numbers(2, 1)], [1, 1, 1], epochs=[1, 2, 3])
    assert rows.total == 1603
    found = rows.batch(np.arange(1603))["row"]
    assert [(found[:, 0] == s).sum() for s in range(3)] == [1000, 600, 3]
    for s in range(3):
        np.testing.assert_array_equal(found[found[:, 0] == s, 1], np.arange((found[:, 0] == s).sum()))
    with pytest.raises(RequestError, match=r"used up after 1603 rows"):
        rows.batch(np.array([0, 1603]))
    assert all(p.blocks >= 1 for p in phases(np.array([1.0, 5.0]), np.array([1e6, 17])))


def test_packed_rows_of_two_sources(letters):
    tokenizer = letters()
    sources = [PackedRows(tokenize([c * 3] * 40, tokenizer), tokenizer, 8) for c in "ab"]
    tokens = MixedRows(sources, [1, 3]).batch(np.arange(256))["tokens"]
    share = (tokens == tokenizer.encode("b")[0]).any(1).mean()
    assert 0.6 < share < 0.9
    assert not ((tokens == 4).any(1) & (tokens == 5).any(1)).any(), "a row is of one source"
