"""The original Transformer versus torch's layers, with positions from the paper's formula."""

import math

import jax.numpy as jnp
import numpy as np
import torch

from llmctl.model import functional, weights
from llmctl.model.config import ModelConfig

SIZES = {"vocab_size": 31, "d_model": 12, "layers": 2, "encoder_layers": 3, "heads": 3, "kv_heads": 3, "head_dim": 4}
CONFIG = ModelConfig(preset="transformer-tiny", **SIZES, d_ff=20, dropout=0.0)


def attention(flat, prefix, layer):
    """Our matrices as the packed ones of torch."""
    pick = lambda n, leaf: np.asarray(flat[f"{prefix}/{n}/{leaf}"][layer])  # noqa: E731
    return {
        "in_proj_weight": np.concatenate([pick(n, "kernel").T for n in "qkv"]),
        "in_proj_bias": np.concatenate([pick(n, "bias") for n in "qkv"]),
        "out_proj.weight": pick("o", "kernel").T,
        "out_proj.bias": pick("o", "bias"),
    }


def layer_of_torch(cls, flat, stack, layer, norms):
    made = cls(12, 3, 20, dropout=0.0, activation="relu", layer_norm_eps=1e-6, batch_first=True, norm_first=False)
    blocks = f"{stack}/blocks"
    state = {f"self_attn.{k}": v for k, v in attention(flat, f"{blocks}/attn", layer).items()}
    if stack == "decoder":
        state |= {f"multihead_attn.{k}": v for k, v in attention(flat, f"{blocks}/cross", layer).items()}
    for theirs, ours in (("linear1", "mlp/up"), ("linear2", "mlp/down")):
        state[f"{theirs}.weight"] = np.asarray(flat[f"{blocks}/{ours}/kernel"][layer]).T
        state[f"{theirs}.bias"] = np.asarray(flat[f"{blocks}/{ours}/bias"][layer])
    for i, name in enumerate(norms):
        state[f"norm{i + 1}.weight"] = np.asarray(flat[f"{blocks}/{name}/scale"][layer])
        state[f"norm{i + 1}.bias"] = np.asarray(flat[f"{blocks}/{name}/bias"][layer])
    made.load_state_dict({k: torch.tensor(np.array(v)) for k, v in state.items()})
    return made.eval()


def embedded(table, ids):
    """sqrt(D) * embedding + PE(pos, 2i) = sin(pos / 10000^(2i/D)), PE(pos, 2i + 1) = cos of the same."""
    x = math.sqrt(12) * table[ids]
    for pos in range(len(ids)):
        for i in range(6):
            angle = pos / 10_000 ** (2 * i / 12)
            x[pos, 2 * i] += math.sin(angle)
            x[pos, 2 * i + 1] += math.cos(angle)
    return torch.tensor(x, dtype=torch.float32)[None]


def test_logits_are_those_of_torchs_layers():
    rng = np.random.default_rng(0)
    flat = {
        k: jnp.asarray(rng.normal(0, 0.3, s.shape) + k.endswith("norm/scale"), jnp.float32)
        for k, s in weights.flatten(functional.abstract(CONFIG)).items()
    }
    source, target = rng.integers(0, 31, 7), rng.integers(0, 31, 5)
    table = np.array(flat["embed/tokens"], np.float64)
    x = embedded(table, source)
    with torch.no_grad():
        for i in range(3):
            x = layer_of_torch(torch.nn.TransformerEncoderLayer, flat, "encoder", i, ("attn_norm", "mlp_norm"))(x)
        y, future = embedded(table, target), torch.triu(torch.full((5, 5), -torch.inf), 1)
        for i in range(2):
            norms = ("attn_norm", "cross_norm", "mlp_norm")
            layer = layer_of_torch(torch.nn.TransformerDecoderLayer, flat, "decoder", i, norms)
            y = layer(y, x, tgt_mask=future)
        expected = (y[0] @ torch.tensor(table, dtype=torch.float32).T).numpy()

    def row(prefix, ids):  # with two places of padding
        n = len(ids)
        tokens, segments = np.zeros((2, 1, n + 2), np.int32)
        tokens[0, :n], segments[0, :n] = ids, 1
        arrays = {"tokens": tokens, "segments": segments, "positions": np.arange(n + 2)[None]}
        return {f"{prefix}{k}": jnp.asarray(v, jnp.int32) for k, v in arrays.items()}

    params = weights.unflatten(flat)
    hidden = functional.hidden(CONFIG, params, row("encoder_", source) | row("", target))
    logits = functional.lm_logits(CONFIG, params, hidden)[0, :5]
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(logits, expected, atol=1e-4)
