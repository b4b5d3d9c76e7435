"""Padding of training rows: shares and lengths by hand."""

import numpy as np

from llmctl.data import padding


class Rows:
    """Rows of these lengths in 16 positions."""

    def __init__(self, lengths, name="segments"):
        self.lengths, self.name = np.array(lengths), name

    def __len__(self):
        return len(self.lengths)

    def batch(self, rows_B):
        return {
            self.name: (np.arange(16)[None] < self.lengths[rows_B][:, None]).astype(np.int32),
            "row_weight": np.ones(len(rows_B)),
        }


def test_much_padding_is_said_with_the_lengths():
    # 4 rows of 16 positions hold 4 + 4 + 8 + 8 = 24 tokens of 64
    (line,) = padding.describe(Rows([4, 4, 8, 8]))
    assert line.startswith("62% of the positions are padding: 95% of the rows have at most 8 tokens, the longest of")
    assert padding.describe(Rows([4] * 4, "encoder_segments"))[0].startswith("75%")


def test_a_quarter_of_padding_and_rows_without_segments_are_not_mentioned():
    assert padding.describe(Rows([12, 12])) == []
    assert padding.describe(Rows([4], "other")) == []
