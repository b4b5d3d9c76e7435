"""Bottleneck adapters: a layer equals one written in torch, new ones change nothing, and what they train."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from llmctl.compress.quantization.quantize import quantize
from llmctl.config.errors import RequestError
from llmctl.config.settings import MeshConfig
from llmctl.convert import architectures
from llmctl.distributed import mesh as meshes
from llmctl.model import flops, functional, layerwise, weights, wiring
from llmctl.model.config import ModelConfig
from llmctl.pipeline.stages import finetune
from llmctl.train import step
from llmctl.train.adapters.registry import METHODS

SIZES = {"vocab_size": 32, "d_model": 16, "layers": 2, "heads": 4, "kv_heads": 4, "head_dim": 4, "d_ff": 24,
         "max_seq_len": 16}  # fmt: skip
FAMILIES = {"llama": {}, "bert": {}, "t5": {"encoder_layers": 2}, "gemma2": {}}
FORMS = ("sequential", "parallel")


def model(family, form="", **changes):
    adapters = {"adapter_size": 4, "adapter_form": form, "adapter_scale": 2.0} if form else {}
    return ModelConfig.model_validate({"family": family, **SIZES, **FAMILIES[family], **adapters, **changes})


def theirs(p, x, cfg):
    """One layer in torch; p has its parameters by path."""

    def dense(name, x):
        return x @ p[f"{name}/kernel"] + p[f"{name}/bias"]

    def norm(name, x):
        return F.layer_norm(x, (cfg.d_model,), p[f"{name}/scale"], p[f"{name}/bias"], cfg.norm_eps)

    def attend(x):
        q, k, v = (dense(f"attn/{n}", x).unflatten(-1, (cfg.heads, -1)).transpose(1, 2) for n in "qkv")
        return dense("attn/o", F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))

    def feed_forward(x):
        return dense("mlp/down", F.relu(dense("mlp/up", x)))

    for name, sublayer in (("attn", attend), ("mlp", feed_forward)):
        read = x if cfg.norm_position == "post" else norm(f"{name}_norm", x)
        y = sublayer(read)
        if cfg.adapter_form == "sequential":  # figure 2 of the paper
            inner = F.gelu(dense(f"{name}_adapter/reduce", y))
            y = y + cfg.adapter_scale * dense(f"{name}_adapter/expand", inner)
        elif name == "mlp":
            y = y + cfg.adapter_scale * dense("mlp_adapter/expand", F.relu(dense("mlp_adapter/reduce", read)))
        x = norm(f"{name}_norm", x + y) if cfg.norm_position == "post" else x + y
    return x


@pytest.mark.parametrize(("form", "position"), [("sequential", "post"), ("parallel", "pre")])
def test_a_layer_and_its_gradients_are_those_of_torch(form, position):
    plain = {"norm": "layer", "norm_position": position, "positions": "none", "gated": False, "activation": "relu",
             "qkv_bias": True, "out_bias": True, "mlp_bias": True}  # fmt: skip
    cfg = model("llama", form, **plain)
    rng = np.random.default_rng(0)
    shapes = weights.flatten(functional.abstract(cfg)["decoder"]["blocks"])
    flat = {path: rng.normal(size=a.shape[1:]).astype(np.float32) * 0.4 for path, a in shapes.items()}
    x, g = rng.normal(size=(2, 2, 6, 16)).astype(np.float32)
    batch = {"segments": jnp.ones((2, 6), jnp.int32), "positions": jnp.tile(jnp.arange(6), (2, 1))}

    def ours(flat, x):
        params = {"embed": {"tokens": jnp.zeros((32, 16))}}
        carry = layerwise.embed(cfg, params, batch | {"tokens": batch["segments"]})
        out = layerwise.block(cfg, "decoder", weights.unflatten(flat), carry._replace(x_BTD=x))[0].x_BTD
        return (out * g).sum(), out

    (_, out), grads = jax.jit(jax.value_and_grad(ours, has_aux=True))(flat, x)
    tensors = {path: torch.tensor(a, requires_grad=True) for path, a in flat.items()}
    expected = theirs(tensors, torch.tensor(x), cfg)
    (expected * torch.tensor(g)).sum().backward()
    np.testing.assert_allclose(out, expected.detach(), rtol=1e-5, atol=1e-5)
    assert sum("adapter" in path for path in flat) == {"sequential": 8, "parallel": 4}[form]
    for path, t in tensors.items():
        np.testing.assert_allclose(grads[path], t.grad, rtol=1e-4, atol=1e-5, err_msg=path)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_and_matrices_are_counted(family, form):
    cfg, bare = model(family, form), model(family)
    tree = weights.flatten(functional.abstract(cfg))
    assert flops.parameters(cfg)["total"] == weights.count(functional.abstract(cfg))
    assert wiring.matrices(cfg) == sorted(
        {p.removesuffix("/kernel") for p in tree if p.endswith("/kernel")} | ({"embed/tokens"} if cfg.tied else set())
    )
    more = {p: a for p, a in tree.items() if weights.parse(p).bottleneck}
    assert tree.keys() - more.keys() == weights.flatten(functional.abstract(bare)).keys()
    adapters = {"sequential": 2, "parallel": 1}[form]
    layers = [2 * adapters, 2 * (adapters + (form == "sequential"))] if family == "t5" else [2 * adapters]
    assert sum(a.size for a in more.values()) == sum(layers) * (2 * 16 * 4 + 16 + 4)
    source = 5 if family == "t5" else 0
    products = 7 * layers[-1] + source * (layers[0] if source else 0)
    assert flops.row(cfg, 7, source) - flops.row(bare, 7, source) == 2 * products * 2 * 16 * 4


def attached(config, cfg, params):
    method = METHODS["houlsby"]
    wide = method.network(config, cfg)
    return wide, method.attach(config, wide, params, jax.random.key(1), meshes.make(MeshConfig()))


@pytest.mark.parametrize("form", FORMS)
def test_new_adapters_change_nothing_and_train_alone(form):
    cfg = model("t5")
    config = finetune.Config(method="houlsby", houlsby={"size": 4, "form": form})
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), jnp.float32), functional.abstract(cfg))
    wide, tuned = attached(config, cfg, params)
    assert wide.adapter_scale == {"sequential": 1.0, "parallel": 4.0}[form]
    batch = {k: v + 1 for k, v in functional.example_batch(cfg, 2, 6).items()}
    outputs = [jax.jit(partial(functional.hidden, c))(p, batch) for c, p in ((cfg, params), (wide, tuned))]
    np.testing.assert_array_equal(*outputs)
    trains = METHODS["houlsby"].trains(config, wide, tuned)
    names = {n for n in weights.arrays(tuned) if trains(n)}
    norms = {n for n in names if n.endswith("norm/scale")}
    assert names - norms == weights.flatten(tuned).keys() - weights.flatten(params).keys()
    assert len(norms) == {"sequential": 5, "parallel": 0}[form]  # of each sublayer, and no final norm
    again, same = attached(config, wide, tuned)
    assert again == wide and same is tuned


def test_refusals():
    cfg = model("llama", "parallel")
    with pytest.raises(RequestError, match=r"bottleneck adapters already \(size 4, parallel, scale 2\), which these"):
        METHODS["houlsby"].network(finetune.Config(method="houlsby", houlsby={"size": 8}), cfg)
    with pytest.raises(RequestError, match=r"houlsby.size = 64 is above the width of the layers"):
        METHODS["houlsby"].network(finetune.Config(method="houlsby"), model("llama"))
    with pytest.raises(RequestError, match=r"the model has bottleneck adapters, which no other format holds"):
        architectures.of(cfg)
    params = quantize(functional.init(cfg, jax.random.key(0)), scheme="int8")[0]
    base = SimpleNamespace(
        params=params, path="parent", model=cfg, manifest=SimpleNamespace(pruned=False, sparsity=0.0)
    )
    with pytest.raises(RequestError, match=r"parent: has bottleneck adapters that are quantized, and integers cannot"):
        METHODS["houlsby"].check(finetune.Config(method="houlsby"), base)
    floats = {p: w for p, w in weights.flatten(params).items() if not weights.parse(p).bottleneck}
    METHODS["houlsby"].check(finetune.Config(method="houlsby"), SimpleNamespace(**vars(base) | {"params": floats}))


def test_zeros_of_an_adapter_that_was_never_trained_are_no_mask():
    """Of two layers, the first one was frozen, so that its adapter is still zero."""
    tree = functional.abstract(model("llama", "parallel"))
    adapter, matrix = (
        next(n for n in weights.arrays(tree) if part in n and n.endswith("kernel"))
        for part in ("mlp_adapter/expand", "mlp/down")
    )
    old = jnp.array([[[0.0, 0.0]], [[0.0, 2.0]]])
    new = step.hold_zeros({adapter: old, matrix: old}, dict.fromkeys((adapter, matrix), old + 1), {adapter, matrix})
    assert new[adapter].tolist() == [[[1.0, 1.0]], [[0.0, 3.0]]]
    assert new[matrix].tolist() == [[[0.0, 0.0]], [[0.0, 3.0]]]


@pytest.mark.parametrize("freezing", [{"freeze_layers": 1}, {"trained": {"last_layers": 1}}])
def test_new_adapters_of_a_pruned_parent_are_trained_in_every_layer(freezing):
    def check(pruned, cfg, **given):
        manifest = SimpleNamespace(pruned=pruned, sparsity=0.5)
        base = SimpleNamespace(params={}, path="parent", manifest=manifest, model=cfg)
        METHODS["houlsby"].check(finetune.Config(method="houlsby", **given), base)

    bare, wide = model("llama"), model("llama", "parallel")
    check(True, bare)
    check(True, wide, **freezing)
    check(False, bare, **freezing)
    with pytest.raises(RequestError, match=r"parent is pruned, so later stages would hold the zeros of new adapters"):
        check(True, bare, **freezing)
