"""Pruning during training: schedules by hand, masks against NumPy, exact resume, and settings that do not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_training import TRAIN, Rows, digest, fit, job_of, losses

from llmctl.compress.pruning import masks
from llmctl.compress.pruning.pattern import Pattern
from llmctl.config.base import keyed
from llmctl.config.errors import RequestError, WorkError
from llmctl.config.settings import MeshConfig
from llmctl.config.validation import validate
from llmctl.distributed import mesh as meshes
from llmctl.model import weights
from llmctl.pipeline.stages import distill, finetune, pretrain
from llmctl.train import sparsify
from llmctl.train.sparsify import ENTRY, Schedule, Sparsifier
from llmctl.train.sparsify_settings import SparsifyConfig

NAME = "decoder/blocks/mlp/up/kernel"


def test_the_cubic_schedule_rises_as_zhu_and_gupta():
    cubic = Schedule("cubic", start=2, end=10, every=2)
    np.testing.assert_allclose([cubic.fraction(s) for s in (1, 2, 4, 6, 10, 12)], [0, 0, 37 / 64, 7 / 8, 1, 1])
    settled = jnp.zeros((), bool)
    assert [s for s in range(1, 13) if cubic.due(s, settled)] == [4, 6, 8, 10, 11, 12]
    assert [s for s in range(1, 13) if cubic.due(s, settled | (s > 10))] == [4, 6, 8, 10]


@pytest.mark.parametrize(
    "given, steps, due",
    [
        ({}, (0, 75, 1), [*range(1, 76)]),
        ({"start": 0.1, "end": 50, "every": 20}, (10, 50, 20), [30, 50]),
        ({"schedule": "once", "end": 1.0}, (99, 100, 1), [100]),
        ({"schedule": "constant", "start": 5}, (5, 6, 1), [6]),
        ({"schedule": "constant", "score": "movement", "end": 0.5, "every": 20}, (0, 50, 20), [1, 21, 41, 50]),
    ],
)
def test_the_steps_of_a_run_of_100(given, steps, due):
    asked = SparsifyConfig(sparsity=0.8, **given)
    assert asked.steps(100) == steps
    schedule = Schedule(asked.schedule, *steps)
    assert [s for s in range(1, 101) if schedule.due(s, jnp.asarray(s > schedule.end))] == due
    assert all(schedule.fraction(s) == 1 for s in range(schedule.full_from, 101))


def by_hand(score_LIO, dense_LIO, zeros):
    """Return the dense weights without the `zeros` lowest scores of each layer; zeros come first, then equal scores."""
    out = np.array(dense_LIO)
    for layer, score in zip(out, np.where(dense_LIO == 0, -np.inf, score_LIO), strict=True):
        layer.reshape(-1)[np.argsort(score.reshape(-1), kind="stable")[:zeros]] = 0
    return out


@pytest.mark.parametrize("movement", [False, True])
def test_steps_follow_numpy(movement):
    rng = np.random.default_rng(0)
    start = rng.normal(size=(2, 6, 5)).astype(np.float32)
    start[:, 0, :2] = 0  # zeros of a pruned parent
    made = Sparsifier((NAME,), Pattern(0.6), Schedule("cubic", 0, 6, 2), movement)
    after = jax.jit(made.after_step)
    state = {"params": {NAME: jnp.asarray(start)}, "ema": {NAME: jnp.ones_like(start)}, "memory": None}
    state["memory"] = made.memory(state["params"])
    w, scores, last = start, np.zeros_like(start), np.zeros_like(start)
    returned = 0
    for step in range(1, 9):
        g = rng.normal(size=start.shape).astype(np.float32)
        new = np.where(w == 0, 0, w - np.float32(0.1) * g)  # the optimizer's step, with zeros held
        read = {"before": state["params"], "dense_gradients": {NAME: jnp.asarray(g)}, "gradients": {}}
        state = after({**state, "params": {NAME: jnp.asarray(new)}, **read}, jnp.int32(step))
        if step <= 6:
            scores = scores - np.where(w == 0, last, w) * g
        w = new
        if step in (2, 4, 6):
            zeros = {2: round(18 * 19 / 27), 4: round(18 * 26 / 27), 6: 18}[step]
            dense = np.where(w == 0, last, w) if movement else w
            new = by_hand(scores if movement else abs(w), dense, zeros)
            returned += int(((w == 0) & (new != 0)).sum())
            last, w = np.where(new == 0, dense, 0), new
        np.testing.assert_allclose(state["params"][NAME], w, rtol=1e-6)
        np.testing.assert_array_equal(np.asarray(state["ema"][NAME])[w == 0][: 6 * (step >= 6)], 0)
    assert (w == 0).sum(axis=(1, 2)).tolist() == [18, 18] and (w[start == 0] == 0).all()
    assert bool(returned) == movement
    assert made.state_metrics(state)["sparsity"] == pytest.approx(0.6)


def test_an_n_m_pattern_is_reached_in_steps():
    made = Sparsifier((NAME,), Pattern.parse("2:4", 0.5), Schedule("cubic", 0, 4, 1))
    score = jnp.asarray(np.random.default_rng(1).normal(size=(1, 8, 3)), jnp.float32)
    for fraction, kept in ((0.2, 4), (0.5, 3), (0.7, 3), (0.8, 2), (1.0, 2)):
        mask = np.asarray(made.mask(score, jnp.float32(fraction)))
        assert set(mask.reshape(2, 4, 3).sum(axis=1).ravel()) == {kept}
    np.testing.assert_array_equal(mask[0], masks.mask(score[0], Pattern.parse("2:4", 0.5), "matrix"))


def test_blocks_are_pruned_whole_in_steps():
    made = Sparsifier((NAME,), Pattern.parse("4x1", 0.5), Schedule("cubic", 0, 4, 1))
    score = jnp.asarray(np.random.default_rng(1).random((1, 8, 3)), jnp.float32)
    order = np.argsort(score.reshape(2, 4, 3).sum(axis=1).ravel())
    for fraction, gone in ((0.2, 1), (0.6, 2), (1.0, 3)):
        mask = np.asarray(made.mask(score, jnp.float32(fraction))).reshape(2, 4, 3)
        expected = ~np.isin(np.arange(6), order[:gone]).reshape(2, 3)
        np.testing.assert_array_equal(mask, np.repeat(expected[:, None], 4, axis=1))


ASKED = {
    "cubic": SparsifyConfig(sparsity=0.8, end=8, every=2),
    "movement": SparsifyConfig(pattern="2:4", score="movement", end=8, every=2),
}


def pruned_job(mesh, name="cubic", rows=None, **changes):
    return sparsify.attached(ASKED[name], job_of(mesh, rows=rows, **changes), TRAIN.steps)


@pytest.fixture(scope="module")
def one():
    return meshes.make(MeshConfig())


@pytest.fixture(scope="module", params=ASKED)
def trained(request, one, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    config = TRAIN.model_copy(update={"eval_every": 3})
    return request.param, *fit(path, one, pruned_job(one, request.param, keep_best=True), config), path


def test_the_result_has_its_sparsity_and_logs_it(trained):
    name, params, metrics, path = trained
    asked = ASKED[name]
    for m in weights.matrices(params, "block"):
        zeros = np.asarray(m.weight == 0)
        size = zeros[0].size
        assert set(zeros.sum(axis=(1, 2))) == {round(0.8 * size) if asked.sparsity else size // 2}
        if asked.pattern == "2:4":
            assert set(zeros.reshape(len(zeros), -1, 4, zeros.shape[2]).sum(axis=2).ravel()) == {2}
    logged = losses(path, "sparsity")
    assert logged[1] == 0 and logged[2] > 0 and logged[8] == logged[12] == pytest.approx(asked.zeros.sparsity, abs=1e-3)
    assert sparsify.result_metrics(asked, params) == {"block_sparsity": pytest.approx(logged[12], abs=1e-6)}
    assert metrics["best_step"] >= 9  # not before the last zeros


@pytest.mark.parametrize("trained", ["movement"], indirect=True)  # it has all the state of magnitude and more
def test_a_killed_run_resumes_with_the_same_masks(one, tmp_path, trained):
    def stop(step):
        if step == 7:
            raise KeyError

    name, params, _, _ = trained
    config = TRAIN.model_copy(update={"eval_every": 3})
    with pytest.raises(KeyError):
        fit(tmp_path, one, pruned_job(one, name, Rows(at=stop), keep_best=True), config)
    assert digest(fit(tmp_path, one, pruned_job(one, name, keep_best=True), config)[0]) == digest(params)


def test_eight_devices_choose_the_masks_of_one(one):
    many = meshes.make(MeshConfig(data=1, fsdp=4, tensor=2))
    masks = []
    for mesh in (one, many):
        job = pruned_job(mesh)
        named = {n: a for n, a in weights.arrays(job.params).items() if job.holds_zeros(n)}
        state = {"params": named, "memory": job.memory(named)}
        state = jax.jit(job.after_step)(state, jnp.int32(8))
        assert state["memory"][ENTRY]["settled"]
        masks.append({n: np.asarray(a != 0) for n, a in state["params"].items()})
    jax.tree.map(np.testing.assert_array_equal, *masks)
    assert len(masks[0]) == 7


def test_jobs_that_do_not_train_all_matrices_are_refused(one):
    for changes in ({"trains": lambda n: "norm" in n}, {"frozen_layers": 1}, {"starts": lambda n: 3}):
        with pytest.raises(RequestError, match="all matrices of the layers to be trained in every step"):
            pruned_job(one, **changes)


def test_models_that_do_not_fit_are_refused(one):
    params = job_of(one).params
    with pytest.raises(RequestError, match="3:5 does not divide the 32 inputs"):
        sparsify.check(SparsifyConfig(pattern="3:5"), params, None)
    with pytest.raises(RequestError, match="rounds to no weight"):
        sparsify.check(SparsifyConfig(sparsity=1e-6), params, None)
    with pytest.raises(WorkError, match=r"have 0.0% zeros and not 80.0%"):
        sparsify.result_metrics(SparsifyConfig(sparsity=0.8), params)


OF = {"pretrain": pretrain.Config, "finetune": finetune.Config, "distill": distill.Config}


@pytest.mark.parametrize(
    "stage, given, message",
    [
        ("pretrain", {"sparsify": {"schedule": "once"}}, "schedule: prune nothing without a sparsity"),
        ("pretrain", {"sparsify": {"sparsity": 0.8, "pattern": "2:4"}}, "sparsity 0.8 contradicts pattern 2:4"),
        ("pretrain", {"sparsify": {"pattern": "4:2"}}, "pattern '4:2' is not known"),
        ("pretrain", {"sparsify": {"pattern": "4x1"}}, "pattern: prune nothing without a sparsity"),
        ("distill", {"sparsify": {"sparsity": 0.8, "end": 501}}, "end not after the last step"),
        ("distill", {"sparsify": {"sparsity": 0.8, "start": 400}}, "start must be before end"),
        ("pretrain", {"sparsify": {"sparsity": 0.8, "schedule": "once", "every": 3}}, "every: not for schedule 'once'"),
        ("finetune", {"sparsify": {"sparsity": 0.8}, "optim": {"spike": 5.0}}, "optim.spike: not with sparsify"),
        ("finetune", {"sparsify": {"sparsity": 0.8}, "method": "lora"}, "sparsify: not for method 'lora'"),
        ("finetune", {"sparsify": {"pattern": "2:4"}, "freeze_layers": 1}, "freeze_layers: not with sparsify"),
        ("finetune", {"sparsify": {"sparsity": 0.8}, "regularize": {"mixout": 0.1}}, "regularize.mixout: not with"),
    ],
)
def test_settings_that_do_not_fit_are_refused(stage, given, message):
    given = given | ({"teacher": "teacher"} if stage == "distill" else {})
    with pytest.raises(RequestError, match=message) as e:
        validate(OF[stage], given, lambda path: path)
    assert "\n" not in str(e.value)


def test_recipes_without_it_keep_their_keys():
    for stage, config in OF.items():
        given = {"teacher": "teacher"} if stage == "distill" else {}
        assert "sparsify" not in keyed(config(**given))
        assert keyed(config(**given, sparsify=SparsifyConfig(sparsity=0.5)))["sparsify"]["sparsity"] == 0.5
