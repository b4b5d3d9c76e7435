"""Classes of the data against those of an artifact."""

import pytest

from llmctl.config.errors import RequestError
from llmctl.evaluate.setup import label_map


def test_numbers_of_an_older_artifact_come_with_advice():
    """Data that declares class names had numbers as classes before."""
    with pytest.raises(RequestError, match=r'does not know \(0, 1\); .*data\.classes = \["0", "1"\]$'):
        label_map(("neg", "pos"), ["0", "1"], "a")
    for classes, names in ((("neg", "sky"), ["neg", "pos"]), (("0", "2"), ["0", "1"])):
        with pytest.raises(RequestError, match=r"does not know \([^)]*\)$"):
            label_map(classes, names, "a")
    assert label_map(("1", "0"), ["0", "1"], "a").tolist() == [1, 0]
