"""Steps of a toy job (one linear layer): every optimizer resumes bit for bit, outliers are skipped."""

import json
import os
import shutil
import signal
import threading
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmctl.artifacts.workspace import Context
from llmctl.config.errors import Interrupted, RequestError, WorkError
from llmctl.config.settings import MeshConfig, OptimConfig, TrainConfig
from llmctl.distributed import mesh as meshes
from llmctl.evaluate.metrics.base import METRICS, Metric
from llmctl.train import loop
from llmctl.train.job import split
from llmctl.train.step import SETTLED, TOO_MANY_BAD, make_step, program
from llmctl.train.training_state import fresh
from llmctl.train.validation import Validation

D = 4
TRAIN = TrainConfig(steps=8, batch_size=8, checkpoint_every=3, log_every=1, tensorboard=False)
CLIPPED = {"learning_rate": 0.05, "warmup": 0, "schedule": "constant"}


class Rows:
    """Inputs and a linear answer; row i is a pure function of i."""

    def __init__(self, at=lambda step: 1.0):
        self.at = at

    def __len__(self):
        return 64

    def batch(self, rows_B):
        x = np.stack([np.random.default_rng(int(i)).normal(size=D) for i in rows_B]).astype(np.float32)
        scale = np.float32(self.at(int(rows_B[0]) // 8) or 1.0)
        return {"x": x * scale, "segments": np.ones((len(rows_B), 1), np.int32)}


def loss(params, batch, key, *_):
    w = params["decoder"]["blocks"]["m"]["kernel"]
    y = (batch["x"] @ w[0]) @ w[1] + jax.random.normal(key, (D,)) * 0.01
    square = jnp.square(y - batch["x"][:, ::-1]).sum()
    return square, {"loss": square, "weight": jnp.float32(batch["x"].shape[0])}


def job_of(rows=None, **changes):
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(2, D, D)).astype(np.float32)) * 0.5
    params = {"decoder": {"blocks": {"m": {"kernel": kernel}}}, "embed": {"tokens": jnp.ones((3, D))}}
    changes.setdefault("validate", lambda p: {"loss": float(p["decoder"]["blocks"]["m"]["kernel"].sum())})
    return loop.Job(params=params, loss=loss, rows=rows or Rows(), **changes)


@pytest.fixture(scope="module")
def one():
    return meshes.make(MeshConfig())


def fit(folder, mesh, job, optim, config=TRAIN):
    params = jax.device_put(job.params, meshes.replicated(mesh))
    job = loop.Job(**{**vars(job), "params": params})
    context = Context(folder / "out", folder, "key")
    params, metrics = loop.fit(job, config, OptimConfig(**(CLIPPED | optim)), mesh, context, 0, "toy")
    return np.asarray(params["decoder"]["blocks"]["m"]["kernel"]), metrics


def stop_at(when):
    def at(step):
        if step == when and threading.current_thread() is not threading.main_thread():
            os.kill(os.getpid(), signal.SIGTERM)

    return Rows(at)


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


EVERY = [*({"name": n} for n in ("sgd", "adafactor", "lion", "muon")), {"ema": 0.9, "spike": 6.0}]


@pytest.mark.parametrize("optim", EVERY, ids=str)
def test_interrupted_and_resumed_is_uninterrupted_bit_for_bit(one, tmp_path, optim):
    whole, _ = fit(tmp_path / "whole", one, job_of(), optim)
    with pytest.raises(Interrupted, match="toy: stopped at step"):
        fit(tmp_path / "cut", one, job_of(stop_at(5)), optim)
    resumed, _ = fit(tmp_path / "cut", one, job_of(), optim)
    np.testing.assert_array_equal(whole, resumed)
    assert [e["step"] for e in log(tmp_path / "cut")] == list(range(1, 9))


def test_a_run_goes_on_on_another_mesh(one, tmp_path):
    whole, _ = fit(tmp_path / "whole", one, job_of(), {"name": "adamw", "ema": 0.9})
    with pytest.raises(Interrupted):
        fit(tmp_path / "cut", one, job_of(stop_at(4)), {"name": "adamw", "ema": 0.9})
    eight = meshes.make(MeshConfig(data=4, fsdp=2))
    resumed, metrics = fit(tmp_path / "cut", eight, job_of(), {"name": "adamw", "ema": 0.9})
    np.testing.assert_allclose(resumed, whole, atol=1e-6)
    assert metrics["steps"] == 8


def test_averaged_weights_are_validated_and_saved(one, tmp_path):
    seen = []
    job = job_of(validate=lambda p: seen.append(np.asarray(p["decoder"]["blocks"]["m"]["kernel"])) or {"loss": 0.0})
    want = np.array(job.params["decoder"]["blocks"]["m"]["kernel"])  # before training takes it
    averaged, _ = fit(tmp_path / "a", one, job, {"ema": 0.99})
    for n in range(1, 9):
        w, _ = fit(tmp_path / str(n), one, job_of(), {}, TRAIN.model_copy(update={"steps": n}))
        want = want + (1 - min(0.99, (1 + n) / (10 + n))) * (w - want)
    np.testing.assert_allclose(averaged, want, atol=1e-6)
    np.testing.assert_array_equal(seen[-1], averaged)


def steps_of(job, optim, scales, config=TRAIN):
    """States after each of the steps whose inputs are `scales` times as large."""
    optim = OptimConfig(**(CLIPPED | optim))
    step, optimizer = make_step(job, config, optim, 0)
    named, fixed = split(job)
    state = jax.jit(partial(fresh, optimizer, optim, memory=job.memory))(named)
    step = jax.jit(step)
    states = [state]
    for i, scale in enumerate(scales):
        batch = Rows(lambda _, s=scale: s).batch(np.arange(8) + 8 * i)
        states.append(step(states[-1], (fixed, ()), batch)[0])
    return states


def test_an_outlier_is_skipped_and_counted_once_the_run_has_settled():
    usual = [1.0] * SETTLED
    states = steps_of(job_of(), {"spike": 6.0}, [*usual, 30.0, 1.0])
    before, skipped, after = states[-3:]
    assert (skipped["skips"], skipped["skipped"], skipped["step"]) == (1, 1, before["step"] + 1)
    for key in ("params", "optimizer", "usual"):
        jax.tree.map(np.testing.assert_array_equal, before[key], skipped[key])
    assert (after["skips"], after["skipped"]) == (1, 0)
    assert (after["params"]["decoder/blocks/m/kernel"] != before["params"]["decoder/blocks/m/kernel"]).any()
    assert steps_of(job_of(), {}, [*usual, 30.0])[-1]["skips"] == 0
    assert steps_of(job_of(), {"spike": 6.0}, [1.0, 1.0, 30.0])[-1]["skips"] == 0  # nothing is usual yet


def test_running_mean_and_variance_are_those_of_all_steps_at_first():
    states = steps_of(job_of(), {"spike": 6.0}, [1.0] * 10)
    found = []
    for before, i in zip(states, range(10), strict=False):
        batch = Rows().batch(np.arange(8) + 8 * i)
        tree = {"decoder": {"blocks": {"m": {"kernel": before["params"]["decoder/blocks/m/kernel"]}}}}
        key = jax.random.fold_in(jax.random.key(0), i)
        found.append(float(loss(tree, batch, key)[0]) / 8)
    usual = states[-1]["usual"]
    assert usual["mean"][0] == pytest.approx(np.mean(found), rel=1e-4)
    assert usual["variance"][0] == pytest.approx(np.var(found), rel=1e-3)


def test_too_many_bad_steps_hold_still_until_somebody_looks(one, tmp_path):
    states = steps_of(job_of(), {}, [np.nan] * TOO_MANY_BAD + [1.0])
    assert states[-1]["skipped"] == TOO_MANY_BAD  # a good batch comes too late
    jax.tree.map(np.testing.assert_array_equal, states[0]["params"], states[-1]["params"])
    config = TRAIN.model_copy(update={"steps": 60, "log_every": 50, "checkpoint_every": 10})
    rows = Rows(lambda step: np.nan if 12 <= step < 40 else 1.0)
    with pytest.raises(WorkError, match="the last good checkpoint is kept"):
        fit(tmp_path, one, job_of(rows), {}, config)
    kept = sorted(int(p.name) for p in (tmp_path / "checkpoints" / "steps").iterdir() if p.name.isdecimal())
    assert kept == [20, 30]  # none of the state that is given up


def test_skipped_steps_are_shown(one, tmp_path, capsys):
    config = TRAIN.model_copy(update={"log_every": 4})
    _, metrics = fit(tmp_path, one, job_of(Rows(lambda step: np.nan if step in (1, 2, 5) else 1.0)), {}, config)
    said = capsys.readouterr().err
    assert "step 4: 2 steps since the last line" in said and "step 8: 1 steps" in said and "(3 in all)" in said
    assert metrics["skipped_steps"] == 3
    assert [e["skipped"] for e in log(tmp_path)] == [2, 3]


def test_best_by_a_named_metric(one, tmp_path):
    found = iter([1.0, 3.0, 2.0, 9.0, 0.0])
    job = job_of(validate=lambda p: {"loss": 0.0, "entity_f1": next(found)})
    config = TRAIN.model_copy(update={"eval_every": 2, "best_by": "entity_f1"})
    _, metrics = fit(tmp_path / "a", one, job, {}, config)
    assert metrics["best_step"] == 8  # 9.0, and more is better
    with pytest.raises(RequestError, match="no metric 'rmse' here; there are loss"):
        fit(tmp_path / "b", one, job_of(), {}, config.model_copy(update={"best_by": "rmse"}))


@pytest.mark.parametrize(
    ("name", "refusal"),
    [
        ("micro_f2", "best_by: unknown metric 'micro_f2', did you mean 'micro_f1'"),
        ("tone", "tone has no better direction"),
    ],
)
def test_a_metric_that_cannot_choose_is_refused_before_the_first_step(monkeypatch, one, tmp_path, name, refusal):
    monkeypatch.setitem(METRICS.own, "tone", Metric("tone", "tone", "neither"))

    def untouched(step):
        raise AssertionError("a row was read")

    config = TRAIN.model_copy(update={"eval_every": 2, "best_by": name})
    with pytest.raises(RequestError, match=refusal):
        fit(tmp_path, one, job_of(Rows(untouched)), {}, config)


def test_best_by_a_loss_is_the_least_whatever_it_is_the_loss_of(one, tmp_path):
    found = iter([1.0, 3.0, 0.5, 2.0, 0.5])
    job = job_of(validate=lambda p: {"loss": 0.0, "next_sentence_loss": next(found)})
    config = TRAIN.model_copy(update={"eval_every": 2, "best_by": "next_sentence_loss"})
    assert fit(tmp_path, one, job, {}, config)[1]["best_step"] == 6


def test_a_best_that_another_replaced_is_looked_for_anew(one, tmp_path, capsys):
    """The checkpoint of step 3 says that step 2 was best, and step 4 replaced it before the run died: elsewhere, where
    rounding is another, step 4 may be worse than step 2."""

    def dies(step):
        if step == 4:
            raise KeyError
        return 1.0

    config, saw = TRAIN.model_copy(update={"eval_every": 2}), iter([2.0, 1.0])
    with pytest.raises(KeyError):
        fit(tmp_path, one, job_of(Rows(dies), keep_best=True, validate=lambda p: {"loss": next(saw)}), {}, config)
    saw = iter([3.0, 4.0, 5.0, 3.0])
    _, metrics = fit(tmp_path, one, job_of(keep_best=True, validate=lambda p: {"loss": next(saw)}), {}, config)
    assert metrics["best_step"] == 4 and "of step 2, are gone" in capsys.readouterr().err


def test_a_best_that_was_not_yet_written_is_the_checkpoints(one, tmp_path):
    def dies(step):
        if step == 7:
            raise KeyError
        return 1.0

    config, saw = TRAIN.model_copy(update={"eval_every": 6}), iter([2.0])
    with pytest.raises(KeyError):
        fit(tmp_path, one, job_of(Rows(dies), keep_best=True, validate=lambda p: {"loss": next(saw)}), {}, config)
    shutil.rmtree(tmp_path / "checkpoints" / "best" / "6")  # killed between the two
    saw = iter([3.0, 2.0])  # at the last step, and what is kept
    best, metrics = fit(tmp_path, one, job_of(keep_best=True, validate=lambda p: {"loss": next(saw)}), {}, config)
    assert metrics["best_step"] == 6
    six, _ = fit(tmp_path / "six", one, job_of(), {}, config.model_copy(update={"steps": 6}))
    np.testing.assert_array_equal(best, six)


def test_a_stop_in_the_middle_of_a_validation_leaves_it_to_whoever_resumes(one, tmp_path):
    """A grace period may be shorter than a validation."""
    config, built = TRAIN.model_copy(update={"eval_every": 4}), []

    class Held(Rows):
        def __len__(self):
            return 8 * 60

    def told(batch):
        built.append(batch)
        if len(built) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return 1.0

    def judged(at=lambda batch: 1.0):
        return Validation(lambda p, batch: loss(p, batch, jax.random.key(0)), Held(at), 8, 60, one)

    with pytest.raises(Interrupted, match="stopped at step 4"):
        fit(tmp_path / "cut", one, job_of(validate=judged(told)), {}, config)
    assert len(built) < 40
    resumed, _ = fit(tmp_path / "cut", one, job_of(validate=judged()), {}, config)
    whole, _ = fit(tmp_path / "whole", one, job_of(validate=judged()), {}, config)
    np.testing.assert_array_equal(whole, resumed)
    validated = [[e["validation_loss"] for e in log(tmp_path / n) if "validation_loss" in e] for n in ("cut", "whole")]
    assert validated[0] == validated[1] and len(validated[0]) == 2


def test_a_stop_in_time_for_validation_leaves_it_to_whoever_resumes(one, tmp_path):
    config = TRAIN.model_copy(update={"eval_every": 1, "patience": 8})
    with pytest.raises(Interrupted):
        fit(tmp_path / "cut", one, job_of(stop_at(4)), {}, config)
    fit(tmp_path / "cut", one, job_of(), {}, config)
    fit(tmp_path / "whole", one, job_of(), {}, config)
    validated = [[e["validation_loss"] for e in log(tmp_path / n) if "validation_loss" in e] for n in ("cut", "whole")]
    assert validated[0] == validated[1] and len(validated[0]) == 8


def test_a_trace_of_the_steps_asked_for_lies_with_the_curves(one, tmp_path):
    config = TRAIN.model_copy(update={"profile": "3:4", "tensorboard": True})
    fit(tmp_path / "work", one, job_of(), {}, config)
    assert list((tmp_path / "work" / "tensorboard" / "toy" / "plugins" / "profile").glob("*/*.xplane.pb"))
    assert list((tmp_path / "work" / "tensorboard" / "toy").glob("events.out.tfevents.*"))


@pytest.mark.parametrize("text", ["10", "5:3", "0:3", "a:b", ":"])
def test_profile_names_steps(text):
    with pytest.raises(ValueError, match="first:last"):
        TrainConfig(profile=text)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"batch_size": 32, "accumulate": 3}, "accumulate 3 does not divide batch_size 32"),
        ({"patience": 2}, "set eval_every"),
        ({"best_by": "loss"}, "set eval_every"),
    ],
)
def test_settings_that_would_do_nothing_or_fail_hours_later(settings, line):
    with pytest.raises(ValueError, match=line):
        TrainConfig(**settings)


def with_extra(params, batch, key, extra):
    """The toy loss with a trained shift of the inputs."""
    return loss(params, {**batch, "x": batch["x"] + extra["shift"]}, key)


def shifted(params, extra):
    return {**params, "shift": extra["shift"]}


def test_extra_parameters_train_change_the_loss_and_resume_bit_for_bit(one, tmp_path):
    """The parameters are averaged, so optimizer state, average, checkpoint and validation all hold `extra`."""

    def run(folder, rows=None, **changes):
        extra = jax.device_put({"shift": jnp.full(D, 0.5)}, meshes.replicated(one))
        job = job_of(rows, **({"extra": extra, "result": shifted} | changes))
        job = loop.Job(
            **{**vars(job), "loss": with_extra, "params": jax.device_put(job.params, meshes.replicated(one))}
        )
        context = Context(folder / "out", folder, "key")
        return loop.fit(job, TRAIN, OptimConfig(**CLIPPED, ema=0.9), one, context, 0, "toy")

    seen = []
    whole, _ = run(tmp_path / "whole", validate=lambda p: seen.append(np.asarray(p["shift"])) or {"loss": 0.0})
    assert (np.asarray(whole["shift"]) != 0.5).all()
    np.testing.assert_array_equal(seen[-1], whole["shift"])
    assert log(tmp_path / "whole")[0]["loss"] != pytest.approx(first_loss(one, tmp_path / "plain"), rel=1e-3)
    with pytest.raises(Interrupted):
        run(tmp_path / "cut", stop_at(5))
    resumed, _ = run(tmp_path / "cut")
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)
    unasked, _ = run(tmp_path / "model", result=loop.Job.result)
    assert sorted(unasked) == ["decoder", "embed"]


def first_loss(mesh, folder):
    fit(folder, mesh, job_of(), {}, TRAIN.model_copy(update={"steps": 1}))
    return log(folder)[0]["loss"]


def masks(state, step):
    """Prune column 0 of the matrices from step 3, column 1 too from step 6."""
    pruned = (jnp.arange(D) == 0) & (step >= 3) | (jnp.arange(D) == 1) & (step >= 6)
    name = "decoder/blocks/m/kernel"
    return {**state, "params": state["params"] | {name: jnp.where(pruned, 0, state["params"][name])}}


def test_a_function_after_each_step_is_part_of_it_and_resumes_bit_for_bit(one, tmp_path):
    states = steps_of(job_of(after_step=masks), {}, [1.0] * 6 + [np.nan])
    zeros = [int((s["params"]["decoder/blocks/m/kernel"] == 0).all(axis=(0, 1)).sum()) for s in states]
    assert zeros == [0, 0, 0, 1, 1, 1, 2, 2]  # before the first step, and after each
    jax.tree.map(np.testing.assert_array_equal, states[-1]["params"], states[-2]["params"])  # the bad step is skipped
    whole, _ = fit(tmp_path / "whole", one, job_of(after_step=masks), {})
    assert (whole == 0).all(axis=(0, 1)).tolist() == [True, True, False, False]
    with pytest.raises(Interrupted):
        fit(tmp_path / "cut", one, job_of(stop_at(5), after_step=masks), {})
    resumed, _ = fit(tmp_path / "cut", one, job_of(after_step=masks), {})
    np.testing.assert_array_equal(whole, resumed)


def count_gradients(state, step):
    """Sum the absolute gradients of every array over the steps."""
    return {**state, "memory": {n: m + jnp.abs(state["gradients"][n]) for n, m in state["memory"].items()}}


def test_memory_and_gradients_of_a_function_after_each_step_resume_bit_for_bit(one, tmp_path):
    """The memory is summed, so that the gradients of a skipped step and of an interrupted run would show."""

    def job(rows=None, **changes):
        return job_of(rows, memory=lambda named: jax.tree.map(jnp.zeros_like, named), **changes)

    states = steps_of(job(after_step=count_gradients), {"clip": 1e-3}, [1.0, 1.0, np.nan])
    name = "decoder/blocks/m/kernel"
    sums = [np.asarray(s["memory"][name]) for s in states]
    assert not sums[0].any() and np.sqrt((sums[1] ** 2).sum()) == pytest.approx(1e-3, rel=1e-4)  # as clipped
    assert (sums[2] > sums[1]).any()
    np.testing.assert_array_equal(sums[3], sums[2])
    plain = steps_of(job_of(), {"clip": 1e-3}, [1.0, 1.0])
    np.testing.assert_array_equal(plain[-1]["params"][name], states[2]["params"][name])

    def shrink(state, step):  # so that the memory decides the parameters
        state = count_gradients(state, step)
        factor = 1 / (1 + state["memory"][name])
        return {**state, "params": {**state["params"], name: state["params"][name] * factor}}

    whole, _ = fit(tmp_path / "whole", one, job(after_step=shrink), {})
    with pytest.raises(Interrupted):
        fit(tmp_path / "cut", one, job(stop_at(5), after_step=shrink), {})
    resumed, _ = fit(tmp_path / "cut", one, job(after_step=shrink), {})
    np.testing.assert_array_equal(whole, resumed)


def test_a_rate_multiplies_updates_and_a_penalty_is_added_to_the_mean():
    """With sgd, twice the rate is twice the first update; the penalty's gradient is that of 0.5 * 3 * w^2."""
    name = "decoder/blocks/m/kernel"
    sgd = {"name": "sgd", "clip": 0.0, "weight_decay": 0.0}

    def moved(**changes):
        before, after = steps_of(job_of(**changes), sgd, [1.0])
        return np.asarray(before["params"][name]), np.asarray(after["params"][name] - before["params"][name])

    start, once = moved()
    np.testing.assert_allclose(moved(rate=lambda n: 2.0 if n == name else 1.0)[1], 2 * once, rtol=1e-5, atol=1e-7)
    held = moved(penalty=lambda params: 1.5 * jnp.square(params["decoder"]["blocks"]["m"]["kernel"]).sum())[1]
    np.testing.assert_allclose(held - once, -0.05 * 3 * start, rtol=1e-4, atol=1e-6)


def test_the_best_is_chosen_from_a_step_on(one, tmp_path):
    """The metric falls, so the first validation would be the best; patience starts with the step too."""
    train = TRAIN.model_copy(update={"eval_every": 2, "patience": 1})
    values = iter([0.1, 0.2, 0.5, 0.6, 0.0])
    job = job_of(validate=lambda p: {"loss": next(values)}, keep_best=True, best_from=6)
    _, metrics = fit(tmp_path, one, job, {}, train)
    assert (metrics["best_step"], metrics["steps"]) == (6, 8)


def test_hooks_keep_the_shardings_of_the_state():
    mesh = meshes.make(MeshConfig(data=4, fsdp=2))
    column = jax.NamedSharding(mesh, jax.P(None, None, "fsdp"))
    job = job_of(after_step=masks)
    params = {**job.params, "decoder": jax.device_put(job.params["decoder"], column)}
    params["embed"] = jax.device_put(job.params["embed"], meshes.replicated(mesh))
    extra = {"shift": jax.device_put(jnp.zeros(D), jax.NamedSharding(mesh, jax.P("fsdp")))}
    job = loop.Job(**{**vars(job), "params": params, "extra": extra, "loss": with_extra})
    runs = program(job, TRAIN, OptimConfig(**CLIPPED), mesh, 0)
    state = runs.begin(runs.named)
    state, _ = runs.step(state, (runs.fixed, ()), Rows().batch(np.arange(8)))
    assert state["params"]["decoder/blocks/m/kernel"].sharding.is_equivalent_to(column, 3)
    moments = [a for path, a in jax.tree.leaves_with_path(state["optimizer"]) if "extra/shift" in str(path)]
    assert len(moments) == 2
    assert all(a.sharding.spec == jax.P("fsdp") for a in [*moments, state["params"]["extra/shift"]])
