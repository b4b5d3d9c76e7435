"""Robust losses of real networks: every family, adapters over integers, memory, and what is refused."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix

from llmctl.artifacts.workspace import Context
from llmctl.config.errors import RequestError
from llmctl.config.settings import MeshConfig, OptimConfig, TrainConfig
from llmctl.distributed import mesh as meshes
from llmctl.evaluate.tasks.registry import TASKS
from llmctl.model import functional, weights
from llmctl.model.config import ModelConfig
from llmctl.pipeline.stages import finetune
from llmctl.train import learner, loop
from llmctl.train.adapters.registry import METHODS
from llmctl.train.robust import robust_job

SIZES = {"vocab_size": 32, "d_model": 16, "layers": 2, "heads": 2, "kv_heads": 2, "head_dim": 8, "d_ff": 24}
HEAD = {"head": "classify", "labels": 3, "next_sentence": False, "head_transform": False}
KEY = jax.random.key(1)
B, T = 4, 6
REGULAR = {"r_drop": 1.0, "neftune": 5.0, "l2_start": 0.1, "mixout": 0.5}
CASES = [
    ("bert", "classify", {"adversarial": {"method": "fgm"}}),
    ("bert", "classify", {"adversarial": {"method": "smart"}}),
    ("bert", "lm", {"adversarial": {"method": "freelb"}}),
    ("llama", "classify", {"adversarial": {"method": "pgd"}, "regularize": REGULAR | {"class_weights": {"a": 2.0}}}),
    ("llama", "lm", {"adversarial": {"method": "smart"}, "regularize": {"neftune": 5.0}}),
    ("gemma2", "lm", {"adversarial": {"method": "fgm"}}),
    ("gpt2", "lm", {"regularize": REGULAR}),
    ("t5", "lm", {"adversarial": {"method": "freelb"}, "regularize": REGULAR}),
]


def model(family, task="classify"):
    sizes = SIZES | ({"encoder_layers": 2} if family == "t5" else {})
    head = HEAD if task == "classify" else {"head": "lm", "next_sentence": False}
    return ModelConfig.model_validate({"family": family, **sizes, **head, "max_seq_len": 16})


def batch_of(cfg):
    rng = np.random.default_rng(0)
    segments = (np.arange(T) < np.array([6, 3, 5, 4])[:, None]).astype(np.int32)
    one = {"tokens": rng.integers(3, 32, (B, T)), "segments": segments, "positions": np.arange(T) * segments}
    batch = one | ({f"encoder_{k}": v for k, v in one.items()} if cfg.encoder_layers else {})
    batch = {k: jnp.asarray(v, jnp.int32) for k, v in batch.items()}
    return batch | {
        "label": jnp.array([0, 1, 2, 0]),
        "targets": jnp.asarray(rng.integers(3, 32, (B, T))),
        "weights": jnp.asarray(segments, jnp.float32),
    }


class Rows:
    """Rows of a batch, endlessly."""

    def __init__(self, batch):
        self.arrays = {k: np.asarray(a) for k, a in batch.items()}

    def __len__(self):
        return B

    def __getitem__(self, i):
        return {k: a[i % B] for k, a in self.arrays.items()}

    def batch(self, rows_B):
        return {k: a[rows_B % B] for k, a in self.arrays.items()}


def job_of(cfg, task="classify", dropout=0.1, params=None, method="full", rows=None, **sections):
    """The job of a stage with these sections."""
    params = functional.abstract(cfg) if params is None else params
    train = TrainConfig(steps=20, seq_len=T, batch_size=B)
    config = finetune.Config.model_validate({"train": train, "method": method, **sections})
    trains = METHODS[method].trains(config, cfg, params)
    made = learner.Learner(cfg, params, TASKS[task], dropout, labels=["a", "b", "c"], job_fields={"trains": trains})
    made = robust_job.attached(config, made)
    return learner.job(config, made, rows or Rows(batch_of(cfg)), lambda params: {"accuracy": 0.0}, 20)


def memory_of(job):
    named = {n: a for n, a in weights.arrays(job.params).items() if job.trains(n)}
    return {"memory": jax.eval_shape(job.memory, named)} if job.reads_memory else {}


@pytest.mark.parametrize(("family", "task", "sections"), CASES, ids=str)
def test_every_family_and_head_has_robust_losses(family, task, sections):
    """Traced only: shapes, dtypes and the tree of gradients fit."""
    cfg = model(family, task)
    job = job_of(cfg, task, **sections)
    loss = jax.value_and_grad(job.loss, has_aux=True)
    (total, sums), gradients = jax.eval_shape(loss, job.params, batch_of(cfg), KEY, **memory_of(job))
    assert total.shape == () and {"loss", "accuracy", "weight"} <= set(sums)
    assert jax.tree.map(jnp.shape, gradients) == jax.tree.map(jnp.shape, job.params)


def test_adapters_over_integers_get_the_only_gradients():
    cfg, mesh = model("bert"), meshes.make(MeshConfig())
    config = finetune.Config(method="lora", merge=False)

    def attach(params):
        down = "encoder/blocks/mlp/down/kernel"
        stored = qwix.quantize(weights.flatten(params)[down], "int8", channelwise_axes=[0, 2])
        integers = weights.updated(params, {down: weights.Quantized(stored)})
        return METHODS["lora"].attach(config, cfg, integers, KEY, mesh)

    job = job_of(cfg, params=jax.eval_shape(attach, functional.abstract(cfg)), method="lora", **CASES[2][2])
    named = weights.arrays(job.params)
    adapters = {n: a for n, a in named.items() if job.trains(n)}

    def loss(trained):
        return job.loss(weights.rebuild(job.params, named_zeros | trained), batch_of(cfg), KEY)

    named_zeros = {n: jnp.zeros(a.shape, a.dtype) for n, a in named.items()}
    traced = jax.make_jaxpr(jax.grad(loss, has_aux=True))(adapters)
    loops = [e for e in traced.eqns if e.primitive.name == "scan" and e.params["length"] == 3]
    carried = {v.aval.shape for e in loops for v in e.outvars}
    assert {a.shape for a in adapters.values()} <= carried  # gradients that FreeLB adds over its steps
    assert named["encoder/blocks/mlp/up/kernel:base"].shape not in carried


@pytest.fixture(scope="module")
def bert():
    cfg = model("bert")
    return cfg, jax.jit(lambda key: functional.init(cfg, key))(jax.random.key(0)), batch_of(cfg)


def test_padding_does_not_change_the_gradients(bert):
    """A row's perturbation has the size of its own tokens, however long the padded row is."""
    cfg, params, batch = bert
    job = job_of(cfg, dropout=0.0, params=params, adversarial={"method": "freelb", "steps": 2, "start": 0.0})
    short = {k: a[:, :5] if a.ndim == 2 else a for k, a in batch.items()}
    short = {k: a[jnp.array([1, 2, 3])] for k, a in short.items()}
    whole = {k: a[jnp.array([1, 2, 3])] for k, a in batch.items()}
    one, two = (jax.jit(jax.grad(job.loss, has_aux=True))(params, b, KEY)[0] for b in (short, whole))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), one, two)


def test_smart_without_a_difference_is_plain_training(bert):
    """The average equals the weights at first, and the smoothness term grows with the perturbation."""
    cfg, params, batch = bert
    plain = job_of(cfg, dropout=0.0, params=params)
    near = {"method": "smart", "epsilon": 1e-6, "start": 1e-6}
    strong = {"method": "smart", "epsilon": 1.0, "step_size": 1.0}
    memory = {"average": weights.arrays(params)}

    def value(job):
        return jax.jit(lambda p, **more: job.loss(p, batch, KEY, **more)[0])

    base = value(plain)(params)
    close = value(job_of(cfg, dropout=0.0, params=params, adversarial=near))
    np.testing.assert_allclose(close(params, memory=memory), base, rtol=1e-6)
    far = value(job_of(cfg, dropout=0.0, params=params, adversarial=strong))
    assert far(params, memory=memory) > base + 1e-5
    moved = {"average": {n: a * 1.1 for n, a in memory["average"].items()}}
    assert far(params, memory=moved) > far(params, memory=memory) + 1e-5


def test_the_average_forgets_faster_at_first():
    cfg = model("bert")
    job = job_of(cfg, adversarial={"method": "smart", "momentum": 0.999})
    state = {"params": {"w": jnp.array([1.0])}, "memory": {"average": {"w": jnp.array([0.0])}}}
    for step, share in ((1, 0.01), (2, 0.01), (3, 0.001)):
        found = job.after_step(state, jnp.int32(step))["memory"]["average"]["w"]
        np.testing.assert_allclose(found, share, rtol=1e-3)


def test_a_method_with_a_memory_of_its_own_keeps_it():
    def after_step(state, step):
        return state | {"memory": {"budget": state["memory"]["budget"] - step}}

    job = SimpleNamespace(memory=lambda named: {"budget": jnp.int32(9)}, after_step=after_step)
    kept = [(lambda named: {"start": named["w"]}, lambda memory, named, step: {"start": memory["start"]})]
    real = loop.Job(params={}, loss=None, rows=None, validate=None, **vars(job))
    found = robust_job.remembering(real, kept)
    memory = found.memory({"w": jnp.float32(3)})
    after = found.after_step({"params": {"w": jnp.float32(5)}, "memory": memory}, jnp.int32(2))["memory"]
    assert (after["budget"], after["start"]) == (7, 3)


def fit(folder, steps=4, search=None, **mesh):
    """Train with SMART, L2-SP and Mixout; return the arrays by name."""
    cfg, devices = model("bert"), meshes.make(MeshConfig(**mesh))
    train = TrainConfig(steps=steps, seq_len=T, batch_size=8, checkpoint_every=2, log_every=4, tensorboard=False)
    job = job_of(
        cfg, dropout=0.0, params=loop.initialize(cfg, 0, devices), rows=Rows(batch_of(cfg)),
        adversarial={"method": "smart", "epsilon": 1.0, "step_size": 1.0} | (search or {}),
        regularize={"l2_start": 0.1, "mixout": 0.3},
    )  # fmt: skip
    optim = OptimConfig(name="sgd", learning_rate=0.1, schedule="constant", warmup=0)
    params = loop.fit(job, train, optim, devices, Context(folder / "out", folder, "key"), 0, "toy")[0]
    return jax.tree.map(np.asarray, weights.arrays(params))


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path):
    """The average of weights and the start of L2-SP are parts of the state."""
    whole = fit(tmp_path / "whole")
    fit(tmp_path / "cut", steps=2)
    jax.tree.map(np.testing.assert_array_equal, whole, fit(tmp_path / "cut"))


@pytest.mark.slow
def test_eight_devices_compute_the_same(tmp_path):
    # Near the clean embeddings the gradient of the divergence is almost zero, so that rounding decides its direction.
    far = {"norm": "l2", "start": 1.0}
    one, eight = fit(tmp_path / "one", search=far), fit(tmp_path / "eight", search=far, data=4, fsdp=2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), one, eight)


@pytest.mark.parametrize(
    ("task", "changes", "error"),
    [
        ("classify", {"regularize": {"r_drop": 1.0}, "dropout": 0.0}, "r_drop: two passes are equal without dropout"),
        (
            "classify",
            {"regularize": {"r_drop": 1.0}, "adversarial": {"method": "smart"}},
            "adversarial.method = 'smart' and regularize.r_drop both compare outputs",
        ),
        ("multilabel", {"regularize": {"class_weights": "balanced"}}, "not for task 'multilabel', which has no single"),
        ("tokens", {"regularize": {"balance": True}}, "balance: not for task 'tokens', whose rows have no single"),
        ("classify", {"regularize": {"balance": True, "class_weights": "balanced"}}, "correct the same"),
        ("classify", {"regularize": {"l2_start": 1.0}, "method": "head"}, "'head' trains no weights of the parent"),
        (
            "classify",
            {"regularize": {"mixout": 0.5}, "method": "bitfit"},
            "mixout: mixes the parent's weights",
        ),
        ("classify", {"regularize": {"class_weights": {"d": 1.0}}}, "no class 'd'"),
    ],
    ids=str,
)
def test_what_would_do_nothing_is_refused(task, changes, error):
    with pytest.raises(RequestError, match=error):
        job_of(model("bert"), task, **changes)


def test_a_plain_stage_has_the_loss_of_its_task_and_a_robust_one_counts_its_passes():
    cfg = model("bert")
    plain = job_of(cfg)
    assert plain.loss.__qualname__ == "Losses.loss_of.<locals>.loss" and not plain.reads_memory
    freelb = job_of(cfg, adversarial={"method": "freelb", "steps": 4}, regularize={"r_drop": 1.0})
    assert freelb.flops == 8 * plain.flops
