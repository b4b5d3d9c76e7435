"""Length of a training run: steps, epochs, and what the sources hold."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from llmctl.config.errors import RequestError
from llmctl.config.settings import MeshConfig, TrainConfig
from llmctl.data.config import DataConfig
from llmctl.data.taught_rows import TaughtRows
from llmctl.distributed import mesh as meshes
from llmctl.pipeline.stages import distill
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


def test_values_are_fitted_on_all_rows_of_a_cached_training():
    """A cache has the outputs of the rows that validation reads, which may be fewer."""
    rows, read, none = Rows(), [], cast(Any, None)
    fit: Any = SimpleNamespace(fit=lambda model, params, rows, setup: {"rows": read.append(rows)})
    learns: Any = SimpleNamespace(task=fit, model=None)
    batches = SimpleNamespace(size=2)
    held_out: Any = SimpleNamespace(mesh=meshes.make(MeshConfig()), rows=TaughtRows(rows, none), batches=batches)
    learner.fitted(distill.Config(teacher="t"), learns, {}, held_out)
    assert read == [rows]
