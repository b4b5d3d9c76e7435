"""Prefix tuning: what the prefix is, the projection that is left out of the artifact, and what is refused."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from llmctl.config.errors import RequestError
from llmctl.config.settings import MeshConfig, TrainConfig
from llmctl.convert import architectures
from llmctl.data.pretraining.packing import PackedRows
from llmctl.distributed import mesh as meshes
from llmctl.model import flops, functional, positions, weights, wiring
from llmctl.model.attention_xla import Keys, attend, attend_to_parts
from llmctl.model.config import ModelConfig
from llmctl.pipeline.stages import finetune
from llmctl.train.adapters import prefix, selection
from llmctl.train.adapters.registry import METHODS

METHOD = METHODS["prefix"]
SIZES = {"vocab_size": 32, "d_model": 8, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 4, "d_ff": 8,
         "max_seq_len": 16}  # fmt: skip
FAMILIES = {"llama": {}, "bert": {}, "gpt2": {}, "t5": {"encoder_layers": 2}}


def model(family, **changes):
    return ModelConfig.model_validate({"family": family, **SIZES, **FAMILIES[family], **changes})


def settings(**changes):
    return finetune.Config(method="prefix", **{"prefix": {"tokens": 3}, **changes})


def attached(config, cfg):
    wide, rng = METHOD.network(config, cfg), np.random.default_rng(0)
    params = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), jnp.float32), functional.abstract(cfg))
    return wide, METHOD.attach(config, wide, params, jax.random.key(0), meshes.make(MeshConfig()))


def test_attention_to_parts_is_that_to_all_keys():
    cfg = model("llama", attn_softcap=2.0)
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    q, mask, bias = normal(2, 5, 4, 4), jnp.asarray(rng.random((2, 5, 9)) < 0.6), normal(4, 5, 9)
    k, v = normal(2, 9, 2, 4), normal(2, 9, 2, 4)
    parts = [Keys(k[:, s], v[:, s], mask[:, :, s], bias[:, :, s]) for s in (slice(3), slice(3, 9))]
    np.testing.assert_allclose(attend_to_parts(q, parts, cfg), attend(q, k, v, mask, bias, cfg), atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_prefix_is_two_arrays_of_the_stack_that_reads_the_tokens(family):
    cfg = model(family)
    wide, params = attached(settings(), cfg)
    stack = "encoder" if family == "bert" else "decoder"
    more = weights.flatten(params).keys() - weights.flatten(functional.abstract(cfg)).keys()
    assert more == {f"{stack}/blocks/attn/prefix/{part}" for part in "kv"}
    assert flops.parameters(wide)["total"] == weights.count(params)
    assert weights.count(params) - weights.count(functional.abstract(cfg)) == 2 * 2 * 3 * 8
    source = 5 if family == "t5" else 0
    assert flops.row(wide, 7, source) - flops.row(cfg, 7, source) == 4 * 16 * 2 * 7 * 3  # scores and sums of values
    assert wide.max_seq_len == (16 if family == "t5" else 13)
    trains = METHOD.trains(settings(), wide, params)
    assert {n for n in weights.arrays(params) if trains(n) and not n.startswith("head/")} == more
    assert METHOD.network(settings(), wide) == wide
    groups = next(u for u in wiring.units(wide, stack) if u.name == "attn/groups")
    assert groups.writers == ("attn/k", "attn/v", "attn/prefix")


def test_the_projection_is_that_of_peft_and_trains_alone():
    """Its network is PEFT's, whose weights are copied; a step's gradients reach it through the folded vectors."""
    config = settings(task="lm", prefix={"tokens": 3, "projection": 5})
    wide, params = attached(config, model("llama"))
    extra = prefix.projection(config, params)
    assert {n: a.shape for n, a in extra.items()} == {
        "embedding": (3, 8), "first": (8, 5), "first_bias": (5,), "last": (5, 32), "last_bias": (32,)
    }  # fmt: skip
    bounds = {"first": 8**-0.5, "first_bias": 8**-0.5, "last": 5**-0.5, "last_bias": 5**-0.5}
    assert all(np.abs(extra[n]).max() <= bound for n, bound in bounds.items())
    t = {n: torch.tensor(np.asarray(a), requires_grad=True) for n, a in extra.items()}
    flat = torch.tanh(t["embedding"] @ t["first"] + t["first_bias"]) @ t["last"] + t["last_bias"]
    k, v = flat.view(3, 4, 8).permute(1, 0, 2).view(2, 2, 3, 8).unbind(1)  # PEFT's order: layer, key or value
    cotangent = np.random.default_rng(1).normal(size=(2, 2, 3, 8)).astype(np.float32)
    (torch.stack([k, v]) * torch.tensor(cotangent)).sum().backward()

    @jax.jit
    def ours(extra):
        out = jnp.stack([*prefix.vectors(prefix.projected(params, extra)).values()])
        return jnp.sum(out * cotangent), out

    (_, out), slopes = jax.value_and_grad(ours, has_aux=True)(extra)
    np.testing.assert_allclose(out, torch.stack([k, v]).detach(), atol=1e-6)
    for name, slope in slopes.items():
        np.testing.assert_allclose(slope, t[name].grad, atol=1e-5, err_msg=name)
    fields = selection.job_fields(config, METHOD, wide, params)
    assert not any(fields["trains"](n) for n in weights.arrays(params))
    fields = selection.during(config, METHOD, wide, params, 10)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), params)
    abstract = prefix.projection(config, shapes)  # for `plan`
    assert {n: a.shape for n, a in abstract.items()} == {n: a.shape for n, a in extra.items()}
    assert all(a.sharding.is_fully_replicated for a in abstract.values())
    assert fields["trains_result"] and fields["extra"].keys() == extra.keys()


def test_frequencies_stay_those_of_the_parent():
    scaling = {"rope_type": "yarn", "factor": 4.0}
    cfg = ModelConfig(preset="llama-tiny", head_dim=64, max_seq_len=2048, rope_scaling=scaling)
    wide = METHOD.network(settings(prefix={"tokens": 50}), cfg)
    before, now = (positions.scale_frequencies(1e4 ** -(jnp.arange(32) / 32), c)[0] for c in (cfg, wide))
    np.testing.assert_array_equal(before, now)


def test_refusals():
    cfg = model("llama")
    manifest = SimpleNamespace(pruned=False, sparsity=0.0)

    def check(base=cfg, **changes):
        train = TrainConfig(seq_len=8)
        METHOD.check(settings(**{"train": train, **changes}), SimpleNamespace(
            params={}, path="parent", manifest=manifest, model=base))  # fmt: skip

    check()
    tuned, relative = METHOD.network(settings(), cfg), cfg.model_copy(update={"positions": "relative"})
    for changes, line in (
        ({"freeze_layers": 1}, r"freeze_layers: not for method 'prefix', whose vectors in frozen layers would stay"),
        ({"trained": {"last_layers": 1}}, r"trained.last_layers: not for method 'prefix'"),
        ({"prefix": {"tokens": 9}}, r"prefix.tokens = 9: leaves 7 of the 16 positions of parent for texts, and train"),
        ({"base": tuned, "prefix": {"tokens": 3, "projection": 4}}, r"parent has a trained prefix, from which a proj"),
        ({"prefix": {"projection": 4, "deviation": 1.0}}, r"prefix.deviation: has no effect with prefix.projection"),
        ({"base": tuned, "prefix": {"tokens": 4}}, r"prefix.tokens = 4: the parent has a trained prefix of 3 tokens"),
        ({"base": relative}, r"parent is a decoder with relative positions, which are counted from the padding"),
    ):
        with pytest.raises(RequestError, match=line):
            check(**changes)
    t5 = METHOD.network(settings(), model("t5"))
    check(t5, task="classify", prefix={"tokens": 4})  # the decoder is dropped, and its prefix with it
    packed = PackedRows.__new__(PackedRows)  # the rows' kind alone is asked
    METHOD.check_rows(settings(), cfg, packed)
    with pytest.raises(RequestError, match=r"task 'classify' packs several texts into a row, and this model's"):
        METHOD.check_rows(settings(), t5, packed)
    with pytest.raises(RequestError, match=r"mesh.context = 2: devices that share a text do not exchange the trained"):
        functional.check_mesh(tuned, meshes.make(MeshConfig(context=2)))
    with pytest.raises(RequestError, match=r"the model has a trained prefix"):
        architectures.of(tuned)
