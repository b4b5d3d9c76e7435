"""Hidden width: silent channels go and the outputs stay, in every family; shapes are the config's."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmctl.compress.calibration.layer_files import Saved
from llmctl.compress.quantization.quantize import quantize
from llmctl.compress.structured_pruning import channel_choice, channel_cut
from llmctl.compress.structured_pruning.gates import accumulate
from llmctl.compress.structured_pruning.shrink import target
from llmctl.compress.structured_pruning.structured_method import StructuredMethod
from llmctl.config.errors import RequestError
from llmctl.convert import architectures
from llmctl.evaluate.tasks.registry import default
from llmctl.model import functional
from llmctl.model.config import ModelConfig
from llmctl.model.weights import flatten, unflatten

SIZES = {"vocab_size": 32, "d_model": 16, "layers": 2, "heads": 4, "kv_heads": 4, "head_dim": 4, "d_ff": 24}
CASES: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama", "kv_heads": 2, "tied": False},
    "gemma": {"family": "gemma3", "kv_heads": 2, "window": 4}, "gpt2": {"family": "gpt2", "max_seq_len": 16},
    "bert": {"family": "bert", "max_seq_len": 16}, "t5": {"family": "t5", "encoder_layers": 2},
    "classifier": {"family": "llama", "head": "classify", "labels": 3},
}  # fmt: skip
EXPORTED = {"llama", "gemma", "t5", "classifier"}
"""Cases whose Hugging Face architecture has a head width apart from the hidden width."""


def model(name: str) -> tuple[ModelConfig, dict[str, Any]]:
    cfg = ModelConfig.model_validate({**SIZES, "dropout": 0.0, "norm_eps": 1e-9, **CASES[name]})
    flat = flatten(jax.jit(lambda key: functional.init(cfg, key))(jax.random.key(0)))
    for i, (path, w) in enumerate(flat.items()):
        flat[path] = w + 0.1 * jax.random.normal(jax.random.key(i), w.shape)
    return cfg, unflatten(flat)


def answers(cfg: ModelConfig, params: dict[str, Any], batch: dict[str, Any]) -> np.ndarray:
    def run(params):
        x_BTD = functional.hidden(cfg, params, batch)
        return functional.lm_logits(cfg, params, x_BTD) if cfg.head == "lm" else functional.outputs(
            cfg, params, x_BTD, batch
        )  # fmt: skip

    return np.asarray(jax.jit(run)(params))


@pytest.mark.parametrize("name", CASES)
def test_copies_of_channels_go_and_the_outputs_stay(name, make_rows):
    """A model with every channel twice (and half the weight to read it) equals the model with every channel once.

    Mean and mean square over channels are those of the half, so norms are too. This holds for all arrays at once.
    """
    cfg, params = model(name)
    wide = cfg.model_copy(update={"d_model": 32})
    flat = dict(flatten(params))
    axes = channel_cut.hidden_axes(cfg)
    readers = {feed.readers for feed in channel_choice.norm_feeds(cfg)}
    reading = {r if r == "embed/tokens" else f"{r}/kernel" for group in readers for r in group}
    for path, own in axes.items():
        for axis in own:
            flat[path] = jnp.concatenate([flat[path]] * 2, axis=axis)
        if path in reading and path != "embed/tokens":
            flat[path] = flat[path] / 2
    root = 2**0.5
    if not cfg.embed_scale:  # the wide model multiplies by the root of its own width
        flat["embed/tokens"] = flat["embed/tokens"] / root
    norm = next((p for p in ("lm_head/norm", "decoder/norm") if f"{p}/scale" in flat), "")
    factor = 1.0
    if cfg.tied and cfg.head == "lm":  # a tied table reads every channel twice
        factor *= (root if not cfg.embed_scale else 1.0) / 2
    factor *= root if not cfg.logit_scale else 1.0
    if factor != 1.0:
        flat[f"{norm}/scale"] = (flat[f"{norm}/scale"] + cfg.norm_plus_one) * factor - cfg.norm_plus_one
        if f"{norm}/bias" in flat:
            flat[f"{norm}/bias"] = flat[f"{norm}/bias"] * factor
    batch = make_rows(cfg, 3)
    double = unflatten(flat)
    before = answers(wide, double, batch)
    np.testing.assert_allclose(before, answers(cfg, params, batch), atol=1e-4 * np.abs(before).max())
    small, cut = channel_cut.cut_channels(wide, double, np.arange(16))
    expected = {path: a.shape for path, a in flatten(functional.abstract(small)).items()}
    assert {path: a.shape for path, a in flatten(cut).items()} == expected
    # Each remaining channel is read once instead of twice: readers are half as large, and so are tied logits.
    halved = {p: w * 2 if p in reading and p != "embed/tokens" else w for p, w in flatten(cut).items()}
    if cfg.tied and cfg.head == "lm":
        halved[f"{norm}/scale"] = (halved[f"{norm}/scale"] + cfg.norm_plus_one) * 2 - cfg.norm_plus_one
        if f"{norm}/bias" in halved:
            halved[f"{norm}/bias"] = halved[f"{norm}/bias"] * 2
    np.testing.assert_allclose(answers(small, unflatten(halved), batch), before, atol=1e-4 * np.abs(before).max())
    why = architectures.notice(cfg.model_copy(update={"d_model": 12}))
    assert bool(why) == (name not in EXPORTED), why


@pytest.mark.parametrize(("name", "importance"), [
    ("llama", "contribution"), ("bert", "activation"), ("t5", "taylor"), ("classifier", "magnitude"),
])  # fmt: skip
def test_a_channel_that_nothing_writes_is_the_least_important(name, importance, make_rows):
    cfg, params = model(name)
    flat = dict(flatten(params))
    for path, axes in channel_cut.hidden_axes(cfg).items():
        for axis in axes:
            at = tuple(slice(None) for _ in range(flat[path].ndim + axis))
            flat[path] = flat[path].at[(*at, jnp.array([3, 7]))].set(0)
    silent, batch = unflatten(flat), make_rows(cfg, 5)
    batch |= {"targets": np.roll(batch["tokens"], -1, 1), "weights": np.ones(batch["tokens"].shape, np.float32)}
    method, found = StructuredMethod(importance), None
    if importance == "taylor":
        read = channel_choice.gate_paths(cfg, silent)
        found = accumulate(default(cfg), cfg, silent, [batch], read)
    small, cut, about = channel_choice.prune_channels(cfg, silent, [batch], 14, method, found=found)
    assert about["kept"] == [i for i in range(16) if i not in (3, 7)]
    expected = {path: a.shape for path, a in flatten(functional.abstract(small)).items()}
    assert {path: a.shape for path, a in flatten(cut).items()} == expected


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_repair_brings_the_outputs_nearer(name, make_rows, tmp_path):
    """Channels are made from fewer, so the kept ones can stand in for the removed ones; a killed repair goes on."""
    cfg, params = model(name)
    mix = np.linalg.qr(np.random.default_rng(0).normal(size=(16, 16)))[0][:12].T @ np.eye(12, 16)
    flat = {p: w @ mix.T.astype(np.float32) if p == "embed/tokens" else w for p, w in flatten(params).items()}
    params, batches = unflatten(flat), [make_rows(cfg, seed, batch=8) for seed in range(2)]
    before = answers(cfg, params, batches[0])
    lost = {}
    for repair in (False, True):
        own = jax.tree.map(jnp.copy, params)
        small, cut, _ = channel_choice.prune_channels(cfg, own, batches, 12, StructuredMethod("activation", repair))
        lost[repair] = np.linalg.norm(answers(small, cut, batches[0]) - before)
    assert lost[True] < lost[False], lost
    if name != "llama":
        return
    seen: list[Any] = []

    def kill(report):
        seen.append(report)
        if len(seen) == 5:  # three reports of the scores, one of the first layer
            raise KeyboardInterrupt

    run = partial(
        channel_choice.prune_channels, cfg, batches=batches, keep=12, method=StructuredMethod("activation", True),
        saved=Saved(tmp_path / "channels"),
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        run(params=jax.tree.map(jnp.copy, params), progress=kill)
    _, again, _ = run(params=jax.tree.map(jnp.copy, params))
    jax.tree.map(np.testing.assert_array_equal, again, cut)


def test_quantized_models_are_cut_and_groups_and_sinusoids_refused(make_rows):
    cfg, params = model("llama")
    int8, _ = quantize(jax.tree.map(jnp.copy, params), scheme="int8")
    small, cut, _ = channel_choice.prune_channels(cfg, int8, [make_rows(cfg, 0)], 8, StructuredMethod())
    assert np.isfinite(answers(small, cut, make_rows(cfg, 0))).all()
    grouped, _ = quantize(params, scheme="int8", group=4)
    with pytest.raises(RequestError, match="quantized in groups of 4 along what would be cut"):
        channel_cut.check(cfg, grouped, 8)
    with pytest.raises(RequestError, match="hidden: sinusoidal positions are computed from the hidden width"):
        channel_cut.check(cfg.model_copy(update={"positions": "sinusoidal"}), {}, 8)


def test_sizes(tiny):
    assert target(tiny, hidden=0.25).d_model == 12 and target(tiny, hidden=8, ffn=0.5).d_model == 8
    assert target(tiny, hidden=0.3, multiple=4).d_model == 12
    for request, message in ((20, "hidden: 20 to keep, but the artifact has 16"), (0.01, "removed by hidden = 0.01")):
        with pytest.raises(RequestError, match=message):
            target(tiny, hidden=request)
