"""The wiring names the matrices of every preset, and scales may be moved where it says so."""

import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmctl.model import functional, layerwise, wiring
from llmctl.model.config import ModelConfig, families, family
from llmctl.model.weights import flatten, unflatten

SMALL = {
    "vocab_size": 32, "d_model": 16, "layers": 2, "heads": 4, "kv_heads": 4, "head_dim": 4, "d_ff": 24,
    "max_seq_len": 16, "dropout": 0.0,
}  # fmt: skip
SIZES = {name: family(name).SIZES for name in families()}
HEADS = [
    {}, {"tied": False}, {"head": "classify", "labels": 3, "next_sentence": False},
    {"head": "regress", "pooler": True, "next_sentence": False}, {"head": "embed", "next_sentence": False},
    {"head": "tokens", "labels": 3, "next_sentence": False, "pooler": False},
    {"head": "span", "next_sentence": False, "pooler": False},
]  # fmt: skip


SIZED = {"preset", "vocab_size", "d_model", "layers", "encoder_layers", "heads", "kv_heads", "head_dim", "d_ff"}


def shapes(name: str) -> list[ModelConfig]:
    """The configs of a family's presets that differ in more than sizes, and every head of the first of them."""
    configs = [ModelConfig(preset=preset) for preset in SIZES[name]]
    configs += [ModelConfig.model_validate({"preset": next(iter(SIZES[name])), **flags}) for flags in HEADS]
    return list({cfg.model_dump_json(exclude=SIZED): cfg for cfg in configs}.values())


@pytest.mark.parametrize("name", families())
def test_every_matrix_is_read_once(name):
    for cfg in shapes(name):
        tree = flatten(functional.abstract(cfg))
        kernels = {p.removesuffix("/kernel") for p in tree if p.endswith("/kernel")}
        kernels |= {"embed/tokens"} if cfg.head == "lm" and cfg.tied else set()
        assert wiring.matrices(cfg) == sorted(kernels), cfg
        modules = {p.rpartition("/")[0] for p in tree} | {"embed/tokens", "embed/positions", "embed/types", ""}
        assert {feed.producer for feed in wiring.feeds(cfg)} <= modules
        for stack in wiring.stacks(cfg):
            found = wiring.residual(cfg, stack)
            assert {*found.writers, *found.readers} <= modules


def tiny(name: str, **flags: Any) -> tuple[ModelConfig, dict[str, Any], dict[str, Any]]:
    """A small model of a family with every parameter away from its initial value, and a batch."""
    size = SMALL | ({"encoder_layers": 2} if "encoder_layers" in next(iter(SIZES[name].values())) else {})
    size |= {"kv_heads": 2} if name in ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3") else {}
    cfg = ModelConfig.model_validate({"family": name, **size, "norm_eps": 1e-9, **flags})
    flat = flatten(jax.jit(lambda key: functional.init(cfg, key))(jax.random.key(0)))
    for i, (path, w) in enumerate(flat.items()):
        flat[path] = w + 0.1 * jax.random.normal(jax.random.key(i), w.shape)
    rng = np.random.default_rng(0)
    batch = {"tokens": rng.integers(0, 32, (2, 8), dtype=np.int32), "segments": np.ones((2, 8), np.int32)}
    batch["positions"] = np.tile(np.arange(8, dtype=np.int32), (2, 1))
    if cfg.encoder_layers:
        batch |= {f"encoder_{k}": np.flip(v, 1) if k == "tokens" else v for k, v in batch.items()}
    return cfg, unflatten(flat), batch


@pytest.mark.parametrize(("name", "flags"), [
    ("llama", {}), ("bert", {"adapter_size": 4, "adapter_form": "parallel"}), ("t5", {"adapter_size": 4}),
])  # fmt: skip
def test_matrices_with_one_input_read_equal_activations(name, flags):
    """Of every layer's captured inputs, exactly those that the wiring calls one are equal."""
    cfg, params, batch = tiny(name, **flags)
    memory = jax.jit(partial(layerwise.encode, cfg))(params, batch) if cfg.encoder_layers else None
    for stack in wiring.stacks(cfg):
        start = layerwise.embed_encoder if stack == "encoder" and cfg.encoder_layers else layerwise.embed
        carry = start(cfg, params, batch) if start is layerwise.embed_encoder else start(cfg, params, batch, memory)
        _, taps = layerwise.block(cfg, stack, layerwise.layer_params(params, stack, 0), carry, taps=True)
        first = wiring.first_readers(cfg, stack)
        assert first.keys() == taps.keys()
        for a, b in itertools.combinations(sorted(taps), 2):
            same = taps[a].shape == taps[b].shape and bool(jnp.array_equal(taps[a], taps[b]))
            assert same == (first[a] == first[b]), (a, b)


def answers(cfg: ModelConfig, batch: dict[str, Any]) -> Any:
    """The compiled outputs of all heads."""

    def run(params):
        x_BTD = functional.hidden(cfg, params, batch)
        found = [functional.lm_logits(cfg, params, x_BTD)] if cfg.head == "lm" else []
        return found + ([functional.outputs(cfg, params, x_BTD, batch)] if cfg.head != "lm" or "head" in params else [])

    return jax.jit(run)


def moved(cfg: ModelConfig, params: dict[str, Any], feed: wiring.Feed) -> dict[str, Any]:
    """The source's channels times random positive numbers, and the readers' rows divided by them."""
    flat = flatten(params)
    source = [p for p in (f"{feed.producer}/{leaf}" for leaf in ("kernel", "bias", "scale")) if p in flat]
    width = flat[source[0]].shape[-1]
    s = jnp.exp(jax.random.normal(jax.random.key(7), (width,)))
    for path in source:
        plus = cfg.norm_plus_one and path.endswith("/scale")
        flat[path] = (flat[path] + plus) * s - plus
    per = jnp.repeat(s.reshape(-1, cfg.head_dim), feed.repeat, axis=0).reshape(-1) if feed.repeat > 1 else s
    for reader in feed.readers:
        path = f"{reader}/kernel"
        flat[path] = flat[path] / per[:, None]
    return unflatten(flat)


CASES = [(name, {}) for name in families()] + [
    ("llama", {"tied": False}), ("llama", {"activation": "relu", "gated": False, "mlp_bias": True}),
    ("llama", {"head": "classify", "labels": 3}), ("modern", {"tied": False}), ("t5", {"tied": False, "gated": True}),
    ("bert", {"tied": False}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "flags"), CASES, ids=str)
def test_scales_move_where_the_wiring_says_so(name, flags):
    cfg, params, batch = tiny(name, **flags)
    run = answers(cfg, batch)
    before = run(params)
    folds = [feed for feed in wiring.feeds(cfg) if feed.foldable]
    assert len(folds) >= (1 if cfg.norm_position == "post" else 3)
    for feed in folds:
        for a, b in zip(run(moved(cfg, params, feed)), before, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max(), err_msg=str(feed))


@pytest.mark.parametrize("name", [n for n in families() if next(iter(SIZES[n].values()))])
def test_the_residual_stream_has_all_its_writers(name):
    """Norms read the stream, so twice everything that is written to it changes nothing, unless norms follow the sum."""
    cfg, params, batch = tiny(name)
    if cfg.norm_position == "post":
        pytest.skip("a post-norm's output is the stream")
    flat = flatten(params)
    for path in sorted({w for stack in wiring.stacks(cfg) for w in wiring.residual(cfg, stack).writers}):
        for full in (p for p in (path, f"{path}/kernel", f"{path}/bias", f"{path}/scale") if p in flat):
            plus = cfg.norm_plus_one and full.endswith("/scale")
            flat[full] = 2 * (flat[full] + plus) - plus
    twice = unflatten(flat)
    both = [jax.jit(lambda p: functional.hidden(cfg, p, batch))(p) for p in (params, twice)]
    np.testing.assert_allclose(both[1], both[0], rtol=1e-4, atol=1e-5)
