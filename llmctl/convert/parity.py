"""Check that two sets of weights give the same outputs for the same tokens.

Shapes: B sequences, T tokens.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmctl.config.errors import RequestError, WorkError
from llmctl.model import functional
from llmctl.model.config import ModelConfig

TOLERANCE = 1e-4
"""Maximum difference between two outputs, divided by the largest output or by 1, whichever is larger."""


def probe(cfg: ModelConfig, length: int = 16) -> dict[str, jax.Array]:
    """Return a fixed batch of random tokens: one full row, one padded row, and one row of two packed sequences."""
    T = min(length, cfg.max_seq_len)
    rng = np.random.default_rng(0)
    segments = np.ones((3, T), np.int32)
    segments[1, T - T // 4 :] = 0
    segments[2, T // 2 :] = 2
    positions = np.tile(np.arange(T, dtype=np.int32), (3, 1))
    positions[2, T // 2 :] -= T // 2
    batch = {"tokens": rng.integers(0, cfg.vocab_size, (3, T)), "segments": segments, "positions": positions}
    if cfg.encoder_layers:
        batch |= {f"encoder_{k}": v for k, v in batch.items()}
        batch["encoder_tokens"] = rng.integers(0, cfg.vocab_size, (3, T))
    return {k: jnp.asarray(v, jnp.int32) for k, v in batch.items()}


def prompted(cfg: ModelConfig, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Return the batch with the ids of a model's trained prompt at the start of each row.

    In an encoder-decoder, the prompt is added to the encoder's rows. If the batch has token types, the prompt's tokens
    get the type 0, as in PEFT and in rows of data.
    """
    side, P = "encoder_" if cfg.encoder_layers else "", cfg.prompt_tokens
    rows = len(batch[f"{side}tokens"])
    before = {
        "tokens": jnp.tile(cfg.vocab_size + jnp.arange(P), (rows, 1)),
        "segments": batch[f"{side}segments"][:, :1].repeat(P, axis=1),
        "positions": jnp.tile(jnp.arange(P), (rows, 1)),
    }
    if f"{side}types" in batch:
        before["types"] = jnp.zeros((rows, P))
    after = {name: batch[f"{side}{name}"] for name in before}
    after["positions"] = after["positions"] + P
    return batch | {
        f"{side}{name}": jnp.concatenate([before[name], after[name]], axis=1).astype(jnp.int32) for name in before
    }


def answers(cfg: ModelConfig, params: dict[str, Any], batch: dict[str, jax.Array]) -> jax.Array:
    """Return a model's outputs in float32, flattened to one vector per row of the batch. Outputs at padding are 0.

    The outputs are the logits of a language model, the outputs of a task head, or both concatenated.
    """
    return _answers(cfg.model_dump_json(), params, batch)


@jax.jit(static_argnums=0)
def _answers(config: str, params: dict[str, Any], batch: dict[str, jax.Array]) -> jax.Array:
    cfg = ModelConfig.model_validate_json(config)
    x_BTD = functional.hidden(cfg, params, batch)
    B = x_BTD.shape[0]
    found = []
    if cfg.head_kind.vocabulary:
        logits_BTV = functional.lm_logits(cfg, params, x_BTD)
        found.append(jnp.where(batch["segments"][..., None] > 0, logits_BTV, 0))
    if cfg.task_head:
        y = functional.outputs(cfg, params, x_BTD, batch)
        per_token = cfg.head_kind.per_token
        found.append(jnp.where(batch["segments"][..., None] > 0, y, 0) if per_token else y)
    return jnp.concatenate([f.astype(jnp.float32).reshape(B, -1) for f in found], axis=1)


def difference(ours: Any, theirs: Any) -> tuple[float, float]:
    """Return the largest absolute difference between two outputs, and the largest difference that is allowed.

    If an output is NaN or infinite, the first value is inf.
    """
    a, b = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
    largest = float(np.max(np.abs(b), initial=1.0))
    delta = float(np.max(np.abs(a - b), initial=0.0))
    return (delta if np.isfinite(delta) else float("inf")), TOLERANCE * (largest if np.isfinite(largest) else 1.0)


def prove(what: str, ours: Any, theirs: Any) -> float:
    """Check that two outputs are equal within the tolerance, and return their largest absolute difference.

    Raises:
        WorkError: If the difference exceeds the tolerance.
    """
    delta, most = difference(ours, theirs)
    if not delta <= most:
        raise WorkError(
            f"{what}: the answers differ by {delta:.3g} (at most {most:.3g} is allowed); nothing was written"
        )
    return delta


def against_reference(cfg: ModelConfig, params: dict[str, Any], reference: dict[str, np.ndarray], where: str) -> float:
    """Check that the model's logits equal stored logits within the tolerance, and return the largest absolute
    difference.

    Args:
        cfg: Config of the model.
        params: Parameters of the model.
        reference: {input_ids [B, T], logits [B, T, V], optionally attention_mask [B, T]}. An encoder-decoder also needs
            decoder_input_ids. Padding (mask 0) is not compared.
        where: Name of the reference in error messages.

    Raises:
        RequestError: If the reference lacks arrays, or has other shapes than the model. If the largest difference
            exceeds the tolerance.
    """
    needed = ["input_ids", "logits"] + (["decoder_input_ids"] if cfg.encoder_layers else [])
    if absent := [n for n in needed if n not in reference]:
        raise RequestError(f"{where}: lacks {', '.join(absent)}")
    ids = reference["input_ids"].astype(np.int32)
    mask = reference.get("attention_mask", np.ones_like(ids)).astype(np.int32)

    def rows(prefix: str, ids: np.ndarray, mask: np.ndarray) -> dict[str, Any]:
        positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
        return {f"{prefix}tokens": ids, f"{prefix}segments": mask, f"{prefix}positions": positions}

    if cfg.encoder_layers:
        out = reference["decoder_input_ids"].astype(np.int32)
        batch = rows("", out, np.ones_like(out)) | rows("encoder_", ids, mask)
    else:
        batch = rows("", ids, mask)
    expected = reference["logits"].astype(np.float32)
    shown = batch["segments"][..., None] if expected.ndim == 3 else np.ones(1)
    got = np.asarray(answers(cfg, params, {k: jnp.asarray(v, jnp.int32) for k, v in batch.items()}))
    if got.size != expected.size:
        raise RequestError(
            f"{where}: logits of shape {list(expected.shape)} are not this model's ({got.size:,} numbers)"
        )
    delta, most = difference(got.reshape(expected.shape) * shown, expected * shown)
    if not delta <= most:
        raise RequestError(f"{where}: the logits differ by {delta:.3g} (at most {most:.3g} is allowed)")
    return delta
