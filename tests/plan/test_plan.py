"""`llmctl plan` on CPU devices: memory by class against arithmetic, FLOPs against arithmetic, and what it refuses."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from llmctl.cli import app
from llmctl.config.errors import WorkError
from llmctl.model import flops
from llmctl.model.config import ModelConfig
from llmctl.plan import compile as compiling
from llmctl.plan import modelled

MODEL = ModelConfig(vocab_size=512, d_model=64, layers=2, heads=4, kv_heads=2, head_dim=16, d_ff=128, tied=False)


def planned(capsys, *words):
    assert app.run(["plan", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_step_is_compiled_from_settings_alone(small, capsys):
    got = planned(capsys, small, "--topology", "cpu:8", "--stage", "pretrain")
    assert {"topology", "chips", "mesh", "hbm_bytes", "fits", "flops_per_step", "collective_bytes", "step_seconds",
            "mfu", "compiled"} <= set(got)  # fmt: skip
    assert (got["topology"], got["chips"], got["compiled"], got["fits"]) == ("cpu:8", 8, True, True)
    assert {axis: n for axis, n in got["mesh"].items() if n > 1} == {"data": 2, "fsdp": 2, "tensor": 2}
    counts = flops.parameters(MODEL)
    norms = 64 * 5  # whole on every device
    hbm = got["hbm_bytes"]
    assert hbm["parameters"] == 4 * ((counts["total"] - norms) // 4 + norms)  # fsdp 2 x tensor 2
    assert hbm["optimizer"] == 2 * hbm["parameters"] + 5 * 4  # two moments and five counters
    assert hbm["batch"] == 5 * 4 * 8 * 32 // 4
    assert hbm["temporaries"] > 0
    assert hbm["total"] == sum(hbm[k] for k in ("parameters", "optimizer", "batch", "temporaries", "cache"))
    assert got["flops_per_step"] == pytest.approx(3 * 8 * 32 * flops.flops(MODEL, 32))
    # Attention in plain XLA multiplies masked pairs too, and again on the way back.
    assert 1.0 <= 8 * got["device_flops"] / got["flops_per_step"] < 1.4
    assert got["collective_bytes"] > 0 and not got["unknown_loops"]


def test_stages_follow_one_another(small, capsys):
    """The finetuning starts from what the pretraining would leave, under a head of its own."""
    got = planned(capsys, small, "--topology", "cpu:4", "--set", "stage.0.mesh={fsdp=2, tensor=2, data=1}")
    assert [p["stage"] for p in got["programs"]] == ["pretrain", "finetune"]
    classifier = MODEL.model_copy(update={"head": "classify", "labels": 2, "head_bias": False})
    assert got["programs"][1]["hbm_bytes"]["parameters"] == 4 * flops.parameters(classifier)["total"]


def test_bytes_have_the_sentinels_that_spans_need(tmp_path, capsys):
    """As pretraining adds them: a hundred where the vocabulary that is asked for is large."""
    stage = (
        'kind = "pretrain"\ntokenizer = { kind = "bytes" }\nmodel = { preset = "t5-tiny" }\ntrain = { seq_len = 32 }'
    )
    (tmp_path / "t5.toml").write_text(f'[data]\nsource = "csv"\npath = "no.csv"\n\n[[stage]]\n{stage}\n')
    got = planned(capsys, tmp_path / "t5.toml", "--topology", "h100:1")
    whole = ModelConfig(preset="t5-tiny", vocab_size=5 + 256 + 100)
    assert got["hbm_bytes"]["parameters"] == 4 * flops.parameters(whole)["total"]


def test_a_gpu_is_modelled_and_says_so(small, capsys):
    """What lies there is arithmetic, as on any platform; the rest is the model's, and no fact."""
    got = planned(capsys, small, "--topology", "h100:8", "--stage", "pretrain")
    there = planned(capsys, small, "--topology", "cpu:8", "--stage", "pretrain")
    assert not got["compiled"] and "lowering for CUDA was checked" in got["checked"] and there["compiled"]
    for name in ("parameters", "optimizer", "batch"):
        assert got["hbm_bytes"][name] == there["hbm_bytes"][name]
    assert got["hbm_bytes"]["capacity"] == 80e9 and got["fits"]
    assert got["device_flops"] == pytest.approx(there["device_flops"], rel=0.05)
    assert got["step_seconds"] > 0 and 0 < got["mfu"] < 1
    # float32: no attention kernel, so the scores are there
    assert not got["kernels"]


def test_products_in_eight_bits_are_modelled_as_such(small, capsys):
    """Two of three feed-forward matrices, forward and twice backward, on 8 devices."""
    plain, eight = (
        planned(capsys, small, "--topology", "h100:8", "--stage", "pretrain", *words)
        for words in ((), ("--set", 'stage.pretrain.train.matmuls={"mlp/up"="int8", "mlp/gate"="int8"}'))
    )
    found = eight["device_flops_by_type"]
    layers, matrices, tokens = 2, 2, 8 * 32
    assert found["int8"] == pytest.approx(3 * 2 * tokens * layers * matrices * 64 * 128 / 8)
    assert sum(found.values()) == pytest.approx(plain["device_flops"])


def test_what_does_not_lower_for_a_gpu_is_an_error():
    """The check can fail: a kernel for TPUs alone."""
    from jax.experimental import pallas as pl

    kernel = pl.pallas_call(lambda x, y: None, out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32))
    traced = jax.jit(lambda x: jax.lax.platform_dependent(x, tpu=kernel)).trace(jnp.zeros((8, 128)))
    with pytest.raises(WorkError, match="does not lower for cuda"):
        modelled.lower(SimpleNamespace(title="step", trace=lambda: traced), "cuda")


def test_the_compilers_refusals_are_read():
    """Both ways in which libtpu says so."""
    assert (
        compiling.required_bytes("Ran out of memory in memory space hbm. Used 21.50G of 15.75G hbm. Exceeded by")
        == 21.5 * 2**30
    )
    words = "The total memory required for HLO temporaries (3.00G) exceeds available HBM (2.00G)"
    assert compiling.required_bytes(words) == 3 * 2**30
    assert compiling.required_bytes("something else") == 0


@pytest.mark.parametrize(
    "words, says",
    [
        (("--topology", "v5e:5x5"), "known: v4:{"),
        (("--topology", "cpu:3", "--stage", "pretrain"), "does not fit 3 cpu devices"),
        (("--topology", "cpu:8", "--set", "stage.0.train.batch_size=6"), "do not divide over data x fsdp = 4"),
        (("--topology", "cpu:8", "--stage", "pretain"), "did you mean 'pretrain'"),
        ((), "--topology"),
    ],
)
def test_what_is_refused_is_one_line(small, capsys, words, says):
    assert app.run(["plan", str(small), *words]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert says in said[-1]
