"""What is minimized is not what is reported: smoothing and z-loss change the first alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmctl.model import ModelConfig, calls
from llmctl.model.loss import class_sums, loss_of

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
    params = calls.init(cfg, jax.random.key(0))
    ones = np.ones((1, 4), np.int32)
    batch = {"tokens": ones * 3, "targets": ones * 5, "weights": ones * 1.0, "segments": ones, "positions": ones}
    plain, sums = loss_of(cfg)(params, batch)
    total, same = loss_of(cfg, label_smoothing=0.2, z_loss=0.1)(params, batch)
    logits = np.asarray(calls.lm_logits(cfg, params, calls.hidden(cfg, params, batch)))
    z = np.log(np.exp(logits).sum(-1))
    want = 0.8 * (z - logits[..., 5]) + 0.2 * (z - logits.mean(-1)) + 0.1 * z**2
    assert total == pytest.approx(want.sum(), rel=1e-5)
    assert plain == pytest.approx((z - logits[..., 5]).sum(), rel=1e-5)
    jax.tree.map(np.testing.assert_array_equal, sums, same)
