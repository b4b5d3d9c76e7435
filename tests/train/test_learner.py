"""Length of a training run: steps, epochs, and what the sources hold."""

from types import SimpleNamespace

import pytest

from llmctl.config.errors import RequestError
from llmctl.config.settings import TrainConfig
from llmctl.data.config import DataConfig
from llmctl.train import learner


class Rows:
    """Ten rows per epoch, of which `total` are left by the epochs of the sources."""

    def __init__(self, total=None):
        self.total = total

    def __len__(self):
        return 10


def config(data=None, **train):
    return SimpleNamespace(train=TrainConfig(batch_size=4, **train), data=data or DataConfig())


def test_epochs_give_steps_and_a_line():
    settings, about = learner.with_length(config(epochs=2), Rows())
    assert (settings.steps, settings.epochs, about) == (5, 0, ["2 epochs of 10 rows in batches of 4: 5 steps"])
    assert learner.with_length(config(steps=7), Rows()) == (TrainConfig(batch_size=4, steps=7), [])


def test_epochs_beyond_those_of_prepared_sources_are_refused_before_training():
    # A prepared mixture carries the epochs of its parts, so `data.epochs` is 0.
    assert learner.with_length(config(epochs=2), Rows(total=20))[0].steps == 5
    with pytest.raises(RequestError, match="20 rows are to be read and the sources' epochs hold 15"):
        learner.with_length(config(epochs=2), Rows(total=15))
    with pytest.raises(RequestError, match=r"train.epochs and data.epochs exclude each other"):
        learner.with_length(config(DataConfig(epochs=1), epochs=2), Rows())
