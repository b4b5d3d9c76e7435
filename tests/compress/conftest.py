"""One tiny decoder and its calibration batches, for the tests of this folder."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmctl.model import functional
from llmctl.model.config import ModelConfig

TINY = {
    "family": "llama", "vocab_size": 32, "d_model": 16, "layers": 3, "heads": 4, "kv_heads": 2, "head_dim": 4,
    "d_ff": 24,
}  # fmt: skip


def rows(cfg: ModelConfig, seed: int, batch: int = 4, length: int = 8) -> dict[str, np.ndarray]:
    """Random tokens; the last row ends in padding."""
    rng = np.random.default_rng(seed)
    segments = np.ones((batch, length), np.int32)
    segments[-1, length // 2 :] = 0
    positions = np.tile(np.arange(length, dtype=np.int32), (batch, 1))
    out = {"tokens": rng.integers(0, cfg.vocab_size, (batch, length), dtype=np.int32)}
    out |= {"segments": segments, "positions": positions}
    if cfg.encoder_layers:
        out |= {f"encoder_{k}": v for k, v in out.items()}
    return out


@pytest.fixture(scope="session")
def make_rows() -> Callable[..., dict[str, np.ndarray]]:
    return rows


@pytest.fixture(scope="session")
def tiny() -> ModelConfig:
    return ModelConfig.model_validate(TINY)


@pytest.fixture(scope="session")
def fresh(tiny: ModelConfig) -> dict[str, Any]:
    return jax.jit(lambda key: functional.init(tiny, key))(jax.random.key(0))


@pytest.fixture
def params(fresh: dict[str, Any]) -> dict[str, Any]:
    """A test's own: a walk that changes layers takes them."""
    return jax.tree.map(jnp.copy, fresh)


@pytest.fixture(scope="session")
def batches(tiny: ModelConfig) -> list[dict[str, np.ndarray]]:
    return [rows(tiny, seed) for seed in range(2)]
