"""Losses of the task heads: values by hand, filler rows, and equal results on 1 and 8 devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmctl.config.settings import MeshConfig
from llmctl.data import device_batches
from llmctl.distributed import mesh as meshes
from llmctl.evaluate.tasks.embed import similarities
from llmctl.evaluate.tasks.registry import TASKS, default
from llmctl.model import functional
from llmctl.model.config import ModelConfig
from llmctl.model.divergences import Divergence, SoftLoss
from llmctl.model.losses import COSINE_TEMPERATURE

SIZES = {"d_model": 8, "layers": 1, "heads": 2, "kv_heads": 2, "head_dim": 4, "d_ff": 8, "vocab_size": 11}
B, T = 8, 6
MODELS = {
    "tokens": ModelConfig(preset="bert-tiny", head="tokens", labels=3, **{**SIZES, "max_seq_len": 8}, pooler=False,
                          next_sentence=False, head_transform=False),
    "span": ModelConfig(preset="llama-tiny", head="span", **SIZES),
    "embed": ModelConfig(preset="llama-tiny", head="embed", pooling="mean", **SIZES),
}  # fmt: skip


def batch_of(head, scored=False):
    rng = np.random.default_rng(0)
    segments = (np.arange(T) < rng.integers(3, T + 1, (B, 1))).astype(np.int32)
    read = {"tokens": rng.integers(1, 11, (B, T)).astype(np.int32), "segments": segments,
            "positions": np.arange(T, dtype=np.int32) * segments}  # fmt: skip
    if head == "tokens":
        weights = (rng.random((B, T)) < 0.5) * segments
        return read | {"targets": rng.integers(0, 3, (B, T)), "weights": weights.astype(np.float32)}
    if head == "span":
        among = segments * (np.arange(T) != 1)
        return read | {"among": among, "start": np.array([0, 2] * 4), "end": np.array([0, 2] * 4)}
    second = {f"pair_{k}": v[::-1].copy() for k, v in read.items()}
    return read | second | ({"label": rng.random(B).astype(np.float32)} if scored else {})


def params_of(head):
    params = jax.jit(lambda key: functional.init(MODELS[head], key))(jax.random.key(0))
    return jax.tree.map(lambda a: a + 0.1, params)


def answers(cfg, params, batch):
    """Return the outputs of the task's head."""
    return jax.jit(lambda p, b: functional.outputs(cfg, p, functional.hidden(cfg, p, b), b))(params, batch)


def loss_of(cfg, **settings):
    return jax.jit(default(cfg).loss_of(cfg, **settings))


def log_softmax(x):
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_words_count_where_they_are_labelled():
    cfg, params, batch = MODELS["tokens"], params_of("tokens"), batch_of("tokens")
    total, sums = loss_of(cfg)(params, batch)
    logits = np.asarray(answers(cfg, params, batch), np.float64)
    nll = -np.take_along_axis(log_softmax(logits), batch["targets"][..., None], -1)[..., 0]
    assert total == pytest.approx((nll * batch["weights"]).sum(), rel=1e-5)
    assert sums["weight"] == batch["weights"].sum()
    assert sums["accuracy"] == ((logits.argmax(-1) == batch["targets"]) * batch["weights"]).sum()


def test_places_are_told_from_those_of_the_context_alone():
    cfg, params, batch = MODELS["span"], params_of("span"), batch_of("span")
    total, sums = loss_of(cfg, label_smoothing=0.1)(params, batch)
    logits = np.asarray(answers(cfg, params, batch), np.float64)
    want = plain = 0.0
    for b in range(B):
        at = np.flatnonzero(batch["among"][b])
        for k, name in enumerate(("start", "end")):
            log_p = log_softmax(logits[b, at, k])
            own = -log_p[list(at).index(batch[name][b])]
            want, plain = want + (0.9 * own - 0.1 * log_p.mean()) / 2, plain + own / 2
    assert total == pytest.approx(want, rel=1e-5) and sums["loss"] == pytest.approx(plain, rel=1e-5)
    assert sums["weight"] == B


def test_embeddings_are_told_from_all_others_of_the_batch():
    cfg, params, batch = MODELS["embed"], params_of("embed"), batch_of("embed")
    z = []
    for prefix in ("", "pair_"):
        one = {k: jnp.asarray(batch[prefix + k]) for k in ("tokens", "segments", "positions")}
        z.append(np.asarray(answers(cfg, params, one), np.float64))
    near = z[0] @ z[1].T
    for temperature in (COSINE_TEMPERATURE, 0.5):
        total, sums = loss_of(cfg, temperature=temperature)(params, batch)
        assert total == pytest.approx(-np.diag(log_softmax(near / temperature)).sum(), rel=1e-4)
        assert sums["accuracy"] == (near.argmax(1) == np.arange(B)).sum()
    # rows that only fill are nobody's neighbours
    real = (np.arange(B) < 5).astype(np.float32)
    total, sums = loss_of(cfg)(params, batch | {"row_weight": real})
    assert total == pytest.approx(-np.diag(log_softmax(near[:5, :5] / COSINE_TEMPERATURE)).sum(), rel=1e-4)
    assert sums["weight"] == 5
    scored = batch_of("embed", scored=True)
    total, _ = loss_of(cfg)(params, scored)
    assert total == pytest.approx(((np.diag(near) - scored["label"]) ** 2).sum(), rel=1e-4)


ROWS, SEQUENCES = {"data": 2, "fsdp": 4}, {"data": 4, "context": 2}
"""Meshes that split the rows of a batch alone, and their sequences too. Only embeddings compare rows."""


@pytest.mark.parametrize(
    ("head", "axes"),
    [
        *((head, SEQUENCES) for head in MODELS),
        ("embed", ROWS),
        *(pytest.param(head, ROWS, marks=pytest.mark.slow) for head in ("tokens", "span")),
    ],
    ids=str,
)
def test_a_mesh_agrees_with_one_device(head, axes):
    cfg, batch = MODELS[head], batch_of(head)
    params = params_of(head)
    grad = jax.grad(lambda p, b: default(cfg).loss_of(cfg)(p, b)[0])
    one = jax.jit(grad)(params, batch)
    mesh = meshes.make(MeshConfig(**axes))
    with meshes.use(mesh):
        there = jax.device_put(params, functional.shardings(cfg, params, mesh))
        many = jax.jit(grad)(there, device_batches.place(batch, mesh))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), one, jax.device_get(many))


def how(hard):
    """Return the loss with a temperature of 2 and a weight of the labels."""
    return SoftLoss(Divergence(temperature=2.0), 1 - hard, hard)


def test_taught_by_itself_nothing_is_left_but_the_labels():
    for head, cfg in MODELS.items():
        for scored in (False, True)[: 1 + (head == "embed")]:
            batch = {k: jnp.asarray(v) for k, v in batch_of(head, scored).items()}
            params = params_of(head)
            hard, _ = loss_of(cfg)(params, batch)
            if head == "embed":
                rows = jax.random.normal(jax.random.key(1), (2 * B, 8))
                y = rows / jnp.linalg.norm(rows, axis=1, keepdims=True)
            else:
                y = answers(cfg, params, batch)
                mixed, sums = TASKS[head].soft_score(y, y, batch, how(0.25))
                assert mixed == pytest.approx(0.25 * float(hard), rel=1e-5) and abs(float(sums["kl"])) < 1e-5
            soft, _ = TASKS[head].soft_score(y, y, batch, how(0.0))
            assert abs(float(soft)) < 1e-5
            other, _ = TASKS[head].soft_score(y[::-1], y, batch, how(0.0))
            assert other > 1e-3


def test_a_softened_teacher_by_hand():
    batch = {"targets": jnp.asarray([[1]]), "weights": jnp.asarray([[2.0]])}
    teacher, y = np.array([[[2.0, 0.0]]]), np.array([[[0.0, 1.0]]])
    p, log_p, log_q = np.exp(log_softmax(teacher / 2)), log_softmax(teacher / 2), log_softmax(y / 2)
    want = 2 * (0.75 * 4 * (p * (log_p - log_q)).sum() - 0.25 * log_softmax(y)[0, 0, 1])
    got, _ = TASKS["tokens"].soft_score(jnp.asarray(teacher), jnp.asarray(y), batch, how(0.25))
    assert got == pytest.approx(want, rel=1e-5)
    z = jnp.asarray([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [0.8, 0.6]])
    np.testing.assert_allclose(similarities(z, {}), [[0.0, 0.8], [0.8, 0.96]], atol=1e-6)
    np.testing.assert_allclose(similarities(z, {"label": z}), [0.0, 0.96], atol=1e-6)
