"""Compare a student with its teachers: a student that was trained for a format is compared after rounding."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np

from llmctl.config.settings import TrainConfig
from llmctl.train import teacher_comparison
from llmctl.train.fake_quantize_settings import FakeQuantizeConfig


def test_a_student_that_was_trained_for_a_format_is_compared_after_rounding(monkeypatch):
    w = jnp.array([[7.5], [-3.2], [0.49]])
    params = {"decoder": {"blocks": {"mlp": {"up": {"kernel": w[None]}}}}}
    seen = []

    def held_out(params):
        seen.append(params)
        return {}

    held_out.rows, held_out.mesh = (), None

    def of_validation(*_):
        return lambda models: seen.append(models["all"][0]) or {"agreement": 0.5}

    monkeypatch.setattr(teacher_comparison, "Validation", of_validation)
    task = SimpleNamespace(best=lambda labels: "accuracy")
    learner = SimpleNamespace(task=task, model=None, labels=[])
    for given, want in (({"format": "int4"}, [7.0, -3.0, 0.0]), ({}, w.ravel())):
        config = SimpleNamespace(train=TrainConfig(), fake_quantize=FakeQuantizeConfig(**given))
        found = teacher_comparison.compared(config, learner, [], params, held_out)  # type: ignore[arg-type]
        assert found == {"validation_agreement": 0.5}
        assert len(seen) == 2  # once beside the teachers, once alone
        for own in seen:
            np.testing.assert_array_equal(own["decoder"]["blocks"]["mlp"]["up"]["kernel"].ravel(), want)
        seen.clear()
