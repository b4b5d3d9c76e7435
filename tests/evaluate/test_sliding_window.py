"""Each token scored once, by hand and for many lengths."""

import numpy as np
import pytest

from llmctl.evaluate.sliding_window import Rows, Window, pack, slide


def rows(*of, **how):
    """All of them."""
    found = Rows(*of, **how)
    whole = found.batch(np.arange(len(found)))
    assert found.scored == whole["weights"].sum()
    return whole


def test_sliding_windows_by_hand():
    assert list(slide(0, 10, context=4, stride=2)) == [
        Window(0, 0, 0, 4),
        Window(0, 2, 4, 6),
        Window(0, 4, 6, 8),
        Window(0, 6, 8, 10),
    ]
    assert list(slide(1, 9, context=4, stride=4)) == [Window(1, 0, 0, 4), Window(1, 4, 4, 8), Window(1, 5, 8, 9)]
    assert list(slide(2, 3, context=4, stride=1)) == [Window(2, 0, 0, 3)]
    assert list(slide(3, 0, context=4, stride=1)) == []


@pytest.mark.parametrize("stride", [1, 3, 7, 8])
def test_every_target_is_scored_exactly_once_after_its_own_input(stride):
    documents = [list(range(100 * d, 100 * d + n)) for d, n in enumerate((1, 2, 8, 9, 23, 40), 1)]
    got = rows(documents, prefix=7, context=8, stride=stride)
    scored = got["weights"] == 1
    assert sorted(got["targets"][scored]) == sorted(t for d in documents for t in d)
    follows = got["tokens"][scored] == np.where(got["targets"][scored] % 100 == 0, 7, got["targets"][scored] - 1)
    assert follows.all()
    # A segment is one stretch with positions from zero, padding is segment 0 and never scored.
    assert (got["positions"][got["segments"] == 0] == 0).all() and not scored[got["segments"] == 0].any()
    for segments, positions in zip(got["segments"], got["positions"], strict=True):
        for s in range(1, segments.max() + 1):
            np.testing.assert_array_equal(positions[segments == s], np.arange((segments == s).sum()))


def test_rows_by_hand():
    got = rows([[11, 12, 13, 14, 15], [21, 22]], prefix=1, context=4, stride=3)
    # Document 0 has inputs 1 11 12 13 14: windows [0,4) and [1,5) scoring its last; document 1 has inputs 1 21.
    np.testing.assert_array_equal(got["tokens"], [[1, 11, 12, 13], [11, 12, 13, 14], [1, 21, 0, 0]])
    np.testing.assert_array_equal(got["targets"], [[11, 12, 13, 14], [12, 13, 14, 15], [21, 22, 0, 0]])
    np.testing.assert_array_equal(got["weights"], [[1, 1, 1, 1], [0, 0, 0, 1], [1, 1, 0, 0]])


def test_without_a_prefix_the_first_token_is_context_only():
    got = rows([[5, 6, 7]], prefix=None, context=4, stride=4)
    np.testing.assert_array_equal(got["targets"][got["weights"] == 1], [6, 7])


def test_packing_fills_rows_best_fit():
    assert pack([3, 5, 2, 6, 4], capacity=8) == [[3, 2], [1, 0], [4]]
    with pytest.raises(ValueError, match="does not fit"):
        pack([9], capacity=8)


def test_a_stride_beyond_the_context_is_refused():
    with pytest.raises(ValueError, match="stride"):
        list(slide(0, 10, context=4, stride=5))


@pytest.mark.parametrize("prefix", [None, 1])
def test_what_is_given_is_context_only(prefix):
    got = rows([[5, 6, 7, 8, 9], [5, 6]], prefix=prefix, context=4, stride=1, given=[3, 1])
    assert sorted(got["targets"][got["weights"] == 1]) == [6, 8, 9]
