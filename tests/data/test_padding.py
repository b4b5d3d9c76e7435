"""Padding of training rows: shares and lengths by hand."""

import numpy as np

from llmctl.data import padding
from llmctl.data.pretraining.mixing import MixedRows


class Rows:
    """Rows of these lengths in 16 positions."""

    tokens, waste = 0, 0.0

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
    assert line.endswith("train.seq_len = 8 is faster")
    assert padding.describe(Rows([4] * 4, "encoder_segments"))[0].startswith("75%")


def test_the_advice_is_a_length_that_is_shorter():
    # one row in 30 fills all 16 positions; if more than 5% do, no shorter length keeps 95% of the rows
    (line,) = padding.describe(Rows([4] * 29 + [16]))
    assert line.endswith("at most 4 tokens, the longest of the sample 16; train.seq_len = 4 is faster")
    assert padding.describe(Rows([4] * 8 + [16] * 2)) == []


def test_a_quarter_of_padding_and_rows_without_segments_are_not_mentioned():
    assert padding.describe(Rows([12, 12])) == []
    assert padding.describe(Rows([4], "other")) == []


def test_rows_after_the_sources_epochs_are_not_read():
    # data.epochs = 0.5 leaves 2 of 4 rows; of two epochs, the rows of the first are read.
    for epochs, found in ((0.5, 2), (1.0, 4), (2.0, 4)):
        rows = MixedRows([Rows([4, 4, 4, 4])], [1.0], [epochs])
        assert padding.lengths(rows)["segments"][0].tolist() == [4] * found
        assert padding.describe(rows)[0].startswith("75%")
