"""Weights of signals that change: by hand, equal to constants of the same value, and refused if wrong."""

import jax
import numpy as np
import pytest
import tiny_distillation as tiny

from llmctl.artifacts import artifact
from llmctl.cli import app
from llmctl.config.settings import MeshConfig
from llmctl.distributed import mesh as meshes
from llmctl.model import functional
from llmctl.pipeline.stages import distill
from llmctl.train import distillation
from llmctl.train.signal_schedules import ScheduledRows, weight_at

CHANGE = {"from": 1.0, "to": 0.2}


def test_weights_by_hand():
    steps = np.arange(6)
    np.testing.assert_allclose(weight_at(CHANGE, steps, 4), [1.0, 0.8, 0.6, 0.4, 0.2, 0.2], rtol=1e-6)
    np.testing.assert_allclose(weight_at(CHANGE | {"steps": 2}, steps, 4), [1.0, 0.6, 0.2, 0.2, 0.2, 0.2], rtol=1e-6)
    np.testing.assert_allclose(weight_at({"from": 0, "to": 1, "steps": 0.25}, steps, 8), [0, 0.5, 1, 1, 1, 1])


def test_rows_carry_the_weights_of_their_steps():
    class Rows:
        total = 7

        def batch(self, rows_B):
            return {"tokens": rows_B}

    config = distill.Config(teacher="t", signals={"logits": 1.0, "hard": CHANGE}, train={"steps": 4, "batch_size": 2})
    rows = ScheduledRows(Rows(), config, 4)
    found = rows.batch(np.array([0, 1, 2, 5]))
    np.testing.assert_allclose(found["signal_hard"], [1.0, 1.0, 0.8, 0.6], rtol=1e-6)
    assert set(found) == {"tokens", "signal_hard"} and rows.total == 7


@pytest.mark.parametrize("kind", ["classes", "tokens", "stored tokens"])
def test_a_weight_of_the_batch_equals_a_constant(kind, tmp_path):
    """Loss and gradient of a step in the middle are those of constants with the weights of this step."""
    made = tiny.classifier if kind == "classes" else lambda folder, name, **k: tiny.made(folder, tiny.MODELS[name], **k)
    teacher, student = (artifact.load(made(tmp_path, "decoder", seed=seed)) for seed in (0, 1))
    mesh, B = meshes.make(MeshConfig()), 2
    batch = {n: a + 1 for n, a in functional.example_batch(student.model, B, 5).items()}
    batch |= {"label": np.array([0, 1]), "targets": batch["tokens"], "weights": np.ones((B, 5), np.float32)}
    inner = {} if kind == "stored tokens" else {"hidden": 0.5}
    cached = {"cache": "c", "top_k": 4} if kind == "stored tokens" else {}
    if cached:
        shape = (B, 5, 4)
        batch |= {
            "teacher_ids": np.tile(np.arange(4, dtype=np.int32), (B, 5, 1)),
            "teacher_rest": np.log(np.full((B, 5), 0.2)),
        }
        batch |= {"teacher_log_p": np.log(np.full(shape, 0.2, np.float32))}
    found = []
    for weights in ({"logits": 0.6, "hard": 0.25, **inner}, dict.fromkeys(("logits", "hard", *inner), CHANGE)):
        config = distill.Config(teacher="t", signals=weights, train=tiny.TRAIN, **cached)
        learns = distillation.make_learner(config, [teacher], student, mesh)
        constants = () if cached else (teacher.params,)
        now = {f"signal_{n}": np.full(B, w, np.float32) for n, w in [("logits", 0.6), ("hard", 0.25), *inner.items()]}
        given = batch | (now if config.signals.schedules else {})

        def loss(params, given=given, learns=learns, constants=constants):
            return learns.loss(params, given, jax.random.key(0), *constants)[0]

        found.append(jax.jit(jax.value_and_grad(loss))(learns.params))
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_change_between_equal_weights_trains_as_the_constant(tmp_path):
    teacher, student = (tiny.classifier(tmp_path, "encoder", seed=seed) for seed in (0, 1))
    given = {"data": tiny.data(tmp_path, "text", "label"), "mesh": MeshConfig()}
    made = [
        tiny.go(tmp_path / str(i), teacher, student, signals={"logits": 1.0, "hidden": weight}, **given)
        for i, weight in enumerate((0.5, {"from": 0.5, "to": 0.5}))
    ]
    assert tiny.largest_difference(*made) < 1e-6


@pytest.mark.parametrize(("weight", "line"), [
    ({"from": 1.0}, "from = 1}: a weight that changes has from and to"),
    ({"from": 1.0, "to": 0.0, "step": 3}, "a weight that changes has from and to, and may have steps"),
    ({"from": -1.0, "to": 0.0}, "from and to must not be negative"),
    ({"from": 0.0, "to": 0.0}, "nor both 0"),
    ({"from": 1.0, "to": 0.0, "steps": 0}, "steps must be above 0"),
])  # fmt: skip
def test_tables_that_are_no_schedule(weight, line):
    with pytest.raises(ValueError, match=line):
        distill.Config(teacher="t", signals={"hidden": weight})


def test_flags_take_numbers_and_tables(tmp_path, capsys):
    for text, line in (
        ("{from = 1.0}", "signals.hidden: {from = 1}: a weight that changes has"),
        ("-1", "signals.hidden"),
    ):
        argv = ["distill", "--teacher", "x", "--out", str(tmp_path / "o"), f"--signals.hidden={text}"]
        assert app.run(argv) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and line in err
