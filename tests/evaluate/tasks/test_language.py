"""Label smoothing and z-loss change the minimized loss, but not the reported metrics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmctl.evaluate.tasks.registry import default
from llmctl.model import chunked_loss, flops, functional
from llmctl.model.config import ModelConfig
from llmctl.model.losses import class_sums

SIZES = {"d_model": 8, "layers": 1, "heads": 2, "kv_heads": 2, "head_dim": 4, "d_ff": 8, "vocab_size": 11}


def test_class_smoothing_and_z_loss_by_hand():
    logits, label, weight = (
        jnp.asarray([[2.0, 0.0, -1.0], [0.5, 0.5, 3.0]]),
        jnp.asarray([0, 1]),
        jnp.asarray([1.0, 0.5]),
    )
    z = np.log(np.exp(np.asarray(logits)).sum(1))
    target = 0.9 * np.eye(3)[[0, 1]] + 0.1 / 3
    want = (target * (z[:, None] - np.asarray(logits))).sum(1) + 0.01 * z**2
    total, sums = class_sums(logits, label, weight, 0.1, 0.01)
    assert total == pytest.approx((want * np.asarray(weight)).sum(), rel=1e-6)
    assert sums["loss"] == pytest.approx(((z - [2.0, 0.5]) * np.asarray(weight)).sum(), rel=1e-6)


def test_settings_reach_the_language_model():
    cfg = ModelConfig(preset="llama-tiny", **SIZES)
    params = jax.jit(lambda key: functional.init(cfg, key))(jax.random.key(0))
    ones = np.ones((1, 4), np.int32)
    batch = {"tokens": ones * 3, "targets": ones * 5, "weights": ones * 1.0, "segments": ones, "positions": ones}
    plain, sums = default(cfg).loss_of(cfg)(params, batch)
    total, same = default(cfg).loss_of(cfg, label_smoothing=0.2, z_loss=0.1)(params, batch)
    logits = np.asarray(jax.jit(lambda p, b: functional.lm_logits(cfg, p, functional.hidden(cfg, p, b)))(params, batch))
    z = np.log(np.exp(logits).sum(-1))
    want = 0.8 * (z - logits[..., 5]) + 0.2 * (z - logits.mean(-1)) + 0.1 * z**2
    assert total == pytest.approx(want.sum(), rel=1e-5)
    assert plain == pytest.approx((z - logits[..., 5]).sum(), rel=1e-5)
    jax.tree.map(np.testing.assert_array_equal, sums, same)


BERT = {**SIZES, "max_seq_len": 16}


def masked_batch():
    rng = np.random.default_rng(0)
    weights = np.zeros((3, 8), np.float32)
    weights[0, [2, 5]], weights[1, [1]], weights[2, [0, 3, 7]] = 1, 1, 1
    ones = np.ones((3, 8), np.int32)
    tokens, targets = rng.integers(1, 11, (2, 3, 8), dtype=np.int32)
    places = np.array([[1, 2, 5, 7], [0, 1, 2, 3], [0, 3, 6, 7]], np.int32)
    types = np.tile(np.repeat([0, 1], 4).astype(np.int32), (3, 1))
    return {
        "tokens": tokens, "targets": targets, "weights": weights, "segments": ones, "types": types,
        "positions": ones * np.arange(8, dtype=np.int32), "places": places,
        "next_label": np.array([0, -1, 1], np.int32),
    }  # fmt: skip


def test_predicting_at_the_places_alone_changes_nothing():
    cfg = ModelConfig(preset="bert-tiny", **BERT | {"next_sentence": False})
    params = jax.jit(lambda key: functional.init(cfg, key))(jax.random.key(0))
    batch = masked_batch()
    both = jax.jit(jax.value_and_grad(default(cfg).loss_of(cfg), has_aux=True))
    everywhere = {name: a for name, a in batch.items() if name != "places"}
    (_, found), gradients = both(params, batch)
    (_, same), same_gradients = both(params, everywhere)
    assert found["weight"] == 6 and set(found) == {"loss", "accuracy", "weight"}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, same)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), gradients, same_gradients)


def test_next_sentences_have_a_mean_of_their_own():
    cfg = ModelConfig(preset="bert-tiny", **BERT)
    params = jax.jit(lambda key: functional.init(cfg, key))(jax.random.key(0))
    batch, loss = masked_batch(), jax.jit(default(cfg).loss_of(cfg))
    total, sums = loss(params, batch)
    answers = jax.jit(lambda p, b: functional.outputs(cfg, p, functional.hidden(cfg, p, b), b))
    logits = np.asarray(answers(params, batch))
    nll = -np.asarray(jax.nn.log_softmax(logits))[[0, 2], [0, 1]]
    assert sums["next_sentence_weight"] == 2
    assert sums["next_sentence_loss"] == pytest.approx(nll.sum(), rel=1e-5)
    assert sums["next_sentence_accuracy"] == (logits[[0, 2]].argmax(1) == [0, 1]).sum()
    # a pair weighs as much as the places of a row
    assert total == pytest.approx(float(sums["loss"]) + 4 * nll.sum(), rel=1e-5)
    means = chunked_loss.means(sums)
    assert set(means) == {"loss", "accuracy", "next_sentence_loss", "next_sentence_accuracy"}
    assert means["loss"] == pytest.approx(float(sums["loss"]) / 6)
    assert means["next_sentence_loss"] == pytest.approx(nll.mean(), rel=1e-5)
    # rows that only fill a batch count for nothing
    _, less = loss(params, batch | {"row_weight": np.array([1, 1, 0], np.float32)})
    assert less["next_sentence_weight"] == 1 and less["next_sentence_loss"] == pytest.approx(nll[0], rel=1e-5)


def test_rows_cost_what_their_parts_cost():
    cfg = ModelConfig(preset="bert-tiny")
    matrices = 2 * (4 * 128 * 128 + 2 * 128 * 512)
    want = 64 * (2 * matrices + 2 * 4 * 128 * 64) + 16 * 2 * (128 * 30_522 + 128 * 128)
    assert flops.of_rows(cfg, {"tokens": (64,), "places": (16,)}) == pytest.approx(want / 64)
    t5 = ModelConfig(preset="t5-tiny")
    encoder = 128 * (2 * matrices + 2 * 4 * 128 * 128)
    decoder = 40 * (2 * (matrices + 2 * 2 * 128 * 128) + 2 * 128 * 32_128 + 2 * 4 * 128 * (41 / 2 + 128))
    cross = 128 * 2 * 2 * 2 * 128 * 128
    # The FLOPs are a quadratic function of the number of encoder tokens, which may be 0.
    each = [flops.row(t5, 40, source) for source in range(4)]
    assert each[0] == pytest.approx(3 * each[1] - 3 * each[2] + each[3])
    assert flops.of_rows(t5, {"tokens": (40,)}) == each[0] / 40
    found = flops.of_rows(t5, {"tokens": (40,), "encoder_tokens": (128,)})
    assert found == pytest.approx((encoder + decoder + cross) / 168)


def test_what_the_backward_pass_recomputes_changes_no_gradient():
    cfg = ModelConfig(preset="llama-tiny", **{**SIZES, "layers": 3})
    params = jax.jit(lambda key: functional.init(cfg, key))(jax.random.key(0))
    ones = np.ones((2, 8), np.int32)
    positions = np.arange(8, dtype=np.int32) * ones
    batch = {"tokens": positions + 1, "targets": ones * 5, "weights": ones * 1.0, "segments": ones}
    batch["positions"] = positions
    grads, steps = {}, {}
    for remat in ("none", "minimal", "qkv", "full", "offload"):
        grad = jax.grad(lambda p, remat=remat: default(cfg).loss_of(cfg, remat=remat)(p, batch, jax.random.key(0))[0])
        steps[remat] = str(jax.make_jaxpr(grad)(params))
        grads[remat] = jax.jit(grad)(params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grads[remat], grads["none"])
    products = {remat: text.count("dot_general") for remat, text in steps.items()}
    assert products["none"] == products["minimal"] < products["offload"] < products["qkv"] == products["full"] - 3
    assert "host" in steps["offload"] and "host" not in steps["minimal"]
