"""The training loop: exact resume, meshes that agree, zeros and layers that stay, bad steps that change nothing."""

import os
import shutil
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_training import MODEL, OPTIM, TRAIN, Rows, digest, fit, job_of, losses

from llmctl.config.errors import Interrupted, RequestError, WorkError
from llmctl.config.settings import MeshConfig
from llmctl.distributed import mesh as meshes
from llmctl.evaluate.tasks.registry import default
from llmctl.model import weights
from llmctl.train import loop
from llmctl.train.adapters import lora
from llmctl.train.adapters.settings import LoraConfig
from llmctl.train.checkpoints import Checkpoints
from llmctl.train.step import split
from llmctl.train.training_state import fresh


@pytest.fixture(scope="module")
def one():
    return meshes.make(MeshConfig())


@pytest.fixture(scope="module")
def uninterrupted(one, tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    params, metrics = fit(path, one)
    return params, metrics, losses(path)


def test_it_learns_and_logs_every_step_once(uninterrupted):
    _, metrics, curve = uninterrupted
    assert sorted(curve) == list(range(1, 13))
    assert curve[12] < 0.96 * curve[1] and metrics["validation_loss"] < curve[1]


@pytest.mark.parametrize("how", ["sigterm", "dies"])
def test_interrupted_and_resumed_is_uninterrupted_bit_for_bit(one, tmp_path, uninterrupted, how):
    class Died(Exception):
        pass

    def stop(step):
        if step == 7 and threading.current_thread() is not threading.main_thread():
            if how == "dies":
                raise Died
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted if how == "sigterm" else Died):
        fit(tmp_path, one, job_of(one, rows=Rows(at=stop)))
    params, _ = fit(tmp_path, one)
    assert digest(params) == digest(uninterrupted[0])
    assert losses(tmp_path) == uninterrupted[2]


@pytest.mark.parametrize("how", ["cut short", "half written"])
def test_a_damaged_checkpoint_is_passed_over(one, tmp_path, uninterrupted, capsys, how):
    def stop(step):
        if step == 11:
            raise KeyError

    with pytest.raises(KeyError):
        fit(tmp_path, one, job_of(one, rows=Rows(at=stop)))
    newest = max((tmp_path / "checkpoints" / "steps").iterdir(), key=lambda p: int(p.name))
    for file in [*newest.rglob("*")]:
        if how == "half written" and "meta" in file.parts[len(newest.parts) :]:
            shutil.rmtree(file, ignore_errors=True)
        elif how == "cut short" and file.is_file() and file.stat().st_size > 1000:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    params, _ = fit(tmp_path, one)
    assert f"checkpoint of step {newest.name} is damaged" in capsys.readouterr().err
    assert (tmp_path / "checkpoints" / "damaged" / newest.name).is_dir()
    assert digest(params) == digest(uninterrupted[0])


HYBRIDS = [
    *({"data": 1, "fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 2, "context": 2, "tensor": 2}),
    # Axes that the meshes above have too.
    *(
        pytest.param(m, marks=pytest.mark.slow)
        for m in ({"data": 8}, {"data": 1, "context": 8}, {"data": 4, "tensor": 2})
    ),
]
LONG = TRAIN.model_copy(update={"steps": 20})
DRY = MODEL.model_copy(update={"dropout": 0.0})
"""What is dropped depends on how a sequence lies on its devices."""


@pytest.fixture(scope="module")
def of_one_device(one, tmp_path_factory):
    path = tmp_path_factory.mktemp("one")
    fit(path, one, job_of(one, DRY), LONG)
    return losses(path)


@pytest.mark.parametrize("axes", HYBRIDS, ids=str)
def test_a_mesh_follows_one_device(tmp_path, of_one_device, axes):
    mesh = meshes.make(MeshConfig(**axes))
    job = job_of(mesh, DRY)
    named = weights.arrays(job.params)
    ways = axes.get("fsdp", 1) * axes.get("context", 1) * axes.get("tensor", 1)
    _, optimizer = loop.make_step(job, LONG, OPTIM, 0)
    state = jax.eval_shape(lambda n: fresh(optimizer, OPTIM, n), named)
    lies = loop.state_shardings(optimizer, OPTIM, named, mesh)
    name = "decoder/blocks/mlp/up/kernel"
    for part in (lambda s: s["params"], lambda s: s["optimizer"][0].mu, lambda s: s["optimizer"][0].nu):
        a, sharding = part(state)[name], part(lies)[name]
        assert np.prod(sharding.shard_shape(a.shape)) * ways == a.size
    params, _ = fit(tmp_path, mesh, job, LONG)
    kernel = weights.arrays(params)[name]
    assert {shard.data.nbytes for shard in kernel.addressable_shards} == {kernel.nbytes // ways}
    found = losses(tmp_path)
    assert sorted(found) == list(range(1, 21))
    for step, loss in found.items():
        assert abs(loss - of_one_device[step]) < 1e-4


def test_optimizer_moments_lie_where_their_parameters_lie():
    mesh = meshes.make(MeshConfig(data=1, fsdp=4, tensor=2))
    job = job_of(mesh)
    _, optimizer = loop.make_step(job, TRAIN, OPTIM, 0)
    named = weights.arrays(job.params)
    shardings = loop.state_shardings(optimizer, OPTIM, named, mesh)
    mu = shardings["optimizer"][0].mu
    assert mu == {name: a.sharding for name, a in named.items()}


def step_once(job, config=TRAIN, batch=None):
    step, optimizer = loop.make_step(job, config, OPTIM, 0)
    named, fixed = split(job)
    state = fresh(optimizer, OPTIM, named)
    batch = Rows().batch(np.arange(8)) if batch is None else batch
    return state, *jax.jit(step)(state, (fixed, job.constants), batch)


def test_accumulated_gradients_are_those_of_the_whole_batch(one):
    job = job_of(one, MODEL.model_copy(update={"dropout": 0.0}))
    batch = Rows().batch(np.arange(8))
    batch["weights"][:5] = 0  # microbatches of unequal weight
    results = [step_once(job, TRAIN.model_copy(update={"accumulate": a}), batch) for a in (1, 4)]
    (_, a, ma), (_, b, mb) = results
    np.testing.assert_allclose(ma["loss"], mb["loss"], rtol=1e-6)
    np.testing.assert_allclose(ma["gradient_norm"], mb["gradient_norm"], rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-4), a["params"], b["params"])


@pytest.mark.parametrize("weight", [0.0, np.nan])
def test_a_batch_without_labels_or_sense_changes_nothing(one, weight):
    before, after, _ = step_once(job_of(one), batch=Rows(weight).batch(np.arange(8)))
    jax.tree.map(np.testing.assert_array_equal, before["params"], after["params"])
    jax.tree.map(np.testing.assert_array_equal, before["optimizer"], after["optimizer"])
    assert after["skipped"] == 1 and after["step"] == 1


def test_too_many_bad_steps_end_the_run_with_the_checkpoint_kept(one, tmp_path):
    config = TRAIN.model_copy(update={"steps": 40})
    with pytest.raises(WorkError, match="20 steps in a row"):
        fit(tmp_path, one, job_of(one, rows=Rows(np.nan)), config)
    assert list((tmp_path / "checkpoints" / "steps").iterdir())


def test_zeros_of_a_pruned_matrix_stay_zero(one):
    def prune(path, a):
        return jnp.where(jnp.abs(a) < 0.1, 0, a) if "blocks" in str(path) and a.ndim == 3 else a

    params = jax.tree_util.tree_map_with_path(prune, loop.initialize(MODEL, 0, one))
    job = job_of(one, params=params, holds_zeros=lambda name: "/blocks/" in name and name.endswith("kernel"))
    before, after, _ = step_once(job)
    for name, a in before["params"].items():
        if name.endswith("kernel") and "/blocks/" in name:
            assert (np.asarray(a) == 0).mean() > 0.2
            np.testing.assert_array_equal(np.asarray(a) == 0, np.asarray(after["params"][name]) == 0)


def test_frozen_layers_do_not_move(one):
    before, after, _ = step_once(job_of(one, frozen_layers=1))
    for name, a in before["params"].items():
        moved = np.asarray(a != after["params"][name])
        if name.startswith("embed/"):
            assert not moved.any()
        elif "/blocks/" in name:
            assert not moved[0].any() and moved[1].any()


def test_lora_starts_as_the_base_trains_pairs_alone_and_merges_exactly(one):
    plain = MODEL.model_copy(update={"dropout": 0.0})
    base = loop.initialize(plain, 0, one)
    params = lora.attach(plain, base, LoraConfig(rank=4, alpha=8.0, targets=["q", "v", "down"]), jax.random.key(1), one)
    batch = Rows().batch(np.arange(8))
    loss = jax.jit(lambda p: default(plain).loss_of(plain)(p, batch)[0])
    assert loss(params) == loss(base)
    job = job_of(one, plain, params=params, trains=weights.adapter_names(params).__contains__)
    before, after, _ = step_once(job)
    assert len(before["params"]) == 6
    fixed = {k: a for k, a in weights.arrays(params).items() if k not in weights.adapter_names(params)}
    tuned = weights.rebuild(params, after["params"] | fixed)
    assert loss(tuned) < loss(base)
    np.testing.assert_allclose(loss(weights.merge_adapters(tuned)), loss(tuned), rtol=1e-5)


def test_masters_are_float32_whatever_the_parent_stores(one, tmp_path):
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), loop.initialize(MODEL, 0, one))
    params, _ = fit(tmp_path, one, job_of(one, params=half), TRAIN.model_copy(update={"steps": 2}))
    assert {str(a.dtype) for a in weights.arrays(params).values()} == {"float32"}


def test_early_stopping_keeps_the_best(one, tmp_path):
    job = job_of(one)
    seen = []

    def validate(params):
        seen.append(digest(params))
        return {"loss": [3.0, 1.0, 2.0, 2.0][len(seen) - 1] if len(seen) <= 4 else 1.0}

    job = loop.Job(**{**vars(job), "validate": validate, "keep_best": True})
    config = TRAIN.model_copy(update={"steps": 40, "eval_every": 2, "patience": 2})
    params, metrics = fit(tmp_path, one, job, config)
    assert metrics["steps"] == 8 and metrics["best_step"] == 4
    assert digest(params) == seen[1]


def test_a_best_checkpoint_newer_than_the_last_one_is_no_obstacle(one, tmp_path, uninterrupted):
    def stop(step):
        if step == 7:
            raise KeyError

    config = TRAIN.model_copy(update={"eval_every": 3})  # best at 6, checkpoint at 4
    with pytest.raises(KeyError):
        fit(tmp_path, one, job_of(one, rows=Rows(at=stop), keep_best=True), config)
    params, metrics = fit(tmp_path, one, job_of(one, keep_best=True), config)
    assert metrics["best_step"] == 12
    assert digest(params) == digest(uninterrupted[0])


def test_a_full_disk_is_one_line_and_names_the_intact_checkpoint(tmp_path, monkeypatch):
    state = {"a": jnp.arange(4.0)}
    with (
        pytest.raises(WorkError, match="full; the checkpoint of step 1 is intact"),
        Checkpoints(tmp_path, 2, print) as c,
    ):
        c.save(1, state, {}, wait=True)

        def full(*args, **kwargs):
            raise ValueError("RESOURCE_EXHAUSTED: write failed: No space left on device")

        monkeypatch.setattr(c._latest, "save", full)
        c.save(2, state, {})


@pytest.mark.parametrize(
    "axes, message",
    [
        ({"data": 1, "tensor": 8}, "heads|kv_heads"),
        ({"data": 3}, "does not fit 8 cpu devices"),
        ({"data": -1, "fsdp": -1}, "one axis at most"),
    ],
)
def test_meshes_that_do_not_fit(axes, message):
    with pytest.raises(RequestError, match=message):
        loop.initialize(MODEL, 0, meshes.make(MeshConfig(**axes)))


def test_a_batch_that_does_not_divide(tmp_path):
    mesh = meshes.make(MeshConfig(data=8))
    with pytest.raises(RequestError, match="do not divide"):
        fit(tmp_path, mesh, job_of(mesh), TRAIN.model_copy(update={"batch_size": 12}))
