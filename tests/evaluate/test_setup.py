"""Classes of the data against those of an artifact."""

import numpy as np
import pytest

from llmctl.config.errors import RequestError
from llmctl.evaluate.setup import label_map, trimmed


def test_numbers_of_an_older_artifact_come_with_advice():
    """Data that declares class names had numbers as classes before."""
    with pytest.raises(RequestError, match=r'does not know \(0, 1\); .*data\.classes = \["0", "1"\]$'):
        label_map(("neg", "pos"), ["0", "1"], "a")
    for classes, names in ((("neg", "sky"), ["neg", "pos"]), (("0", "2"), ["0", "1"])):
        with pytest.raises(RequestError, match=r"does not know \([^)]*\)$"):
            label_map(classes, names, "a")
    assert label_map(("1", "0"), ["0", "1"], "a").tolist() == [1, 0]


def test_timed_rows_are_cut_to_the_longest_and_the_encoder_apart():
    segments = np.zeros((2, 64), np.int32)
    segments[0, :20] = segments[1, :5] = 1
    batch = {"segments": segments, "tokens": segments, "choice1_segments": segments[::-1], "encoder_segments": segments
             * (np.arange(64) < 3), "choice1_encoder_segments": segments * 0, "label": np.zeros(2)}  # fmt: skip
    widths = {name: a.shape[1:] for name, a in trimmed(batch).items()}
    assert widths == {
        "segments": (32,), "tokens": (32,), "choice1_segments": (32,), "encoder_segments": (16,),
        "choice1_encoder_segments": (16,), "label": (),
    }  # fmt: skip
