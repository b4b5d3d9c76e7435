"""`llmctl plan` of every stage on 8 CPU devices, none of which finds any data: memory by class against arithmetic."""

import json
from typing import Any

import pytest

from llmctl.cli import app
from llmctl.model import flops
from llmctl.model.config import ModelConfig

RECIPE = """
[data]
source = "csv"
path = "there/is/no/such.csv"

[mesh]
data = 2
fsdp = 2
tensor = 2

[[stage]]
kind = "pretrain"
tokenizer = { kind = "bpe", vocab_size = 512 }
model = { family = "llama", d_model = 64, layers = 2, heads = 4, kv_heads = 4, head_dim = 16, d_ff = 128 }
train = { steps = 10, batch_size = 8, seq_len = 16 }

[[stage]]
kind = "finetune"
method = "lora"
lora = { rank = 4, targets = ["q", "down"] }
train = { steps = 10, batch_size = 8, seq_len = 16 }

[[stage]]
kind = "prune"
layers = 0.5
heads = 0.5
ffn = 0.5
examples = 32
batch_size = 8

[[stage]]
kind = "distill"
teacher = "finetune"
train = { steps = 10, batch_size = 8, seq_len = 16 }

[[stage]]
kind = "quantize"

[[stage]]
name = "qlora"
kind = "finetune"
method = "lora"
store = "adapter"
train = { steps = 10, batch_size = 8, seq_len = 16 }

[[stage]]
kind = "eval"
batch_size = 8
of = ["pretrain", "quantize"]
"""
STAGES = ("finetune", "prune", "distill", "quantize", "qlora", "eval")
SIZES: dict[str, Any] = {"family": "llama", "vocab_size": 512, "d_model": 64, "head_dim": 16}
WHOLE = ModelConfig(**SIZES, layers=2, heads=4, kv_heads=4, d_ff=128)
LABELS: dict[str, Any] = {"head": "classify", "labels": 2, "head_bias": False}
SMALL = ModelConfig(**SIZES, layers=1, heads=2, kv_heads=2, d_ff=64, **LABELS)


def share(model):
    """Entries of a device: matrices split over fsdp x tensor, the head's over fsdp, norms whole."""
    norms, head = 64 * (2 * model.layers + 1), 64 * 2 if model.head == "classify" else 0
    return (flops.parameters(model)["total"] - norms - head) // 4 + norms + head // 2


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    file = tmp_path_factory.mktemp("plan") / "chain.toml"
    file.write_text(RECIPE)
    return file


@pytest.fixture(scope="module")
def found(chain):
    """Programs by (stage, title)."""
    with pytest.MonkeyPatch.context() as patch:
        said = []
        patch.setattr("llmctl.pipeline.console.result", lambda found: said.append(json.dumps(found)))
        words = [word for stage in STAGES for word in ("--stage", stage)]
        assert app.run(["plan", str(chain), "--topology", "cpu:8", "--generate", "2x30x20", "--json", *words]) == 0
    return {(p["stage"], p["program"]): p for p in json.loads(said[0])["programs"]}


def test_every_stage_has_its_programs(found):
    assert list(found) == [
        ("finetune", "train step"), ("prune", "influence of a layer"),
        ("prune", "statistics of a layer"), ("prune", "pass through a changed layer"),
        ("prune", "changed layer put back"), ("distill", "train step"),
        ("quantize", "rounding of decoder/blocks/mlp/down/kernel"), ("qlora", "train step"),
        ("eval", "scoring of pretrain"), ("eval", "scoring of quantize"), ("generate by pretrain", "prefill"),
        ("generate by pretrain", "decoding step"),
    ]  # fmt: skip
    assert all(p["compiled"] and p["fits"] and not p["unknown_loops"] for p in found.values())


def test_every_program_is_modelled_for_gpus(chain, found, capsys):
    """Lowered, not compiled; what lies in memory is the same, but for what CPUs alone keep."""
    words = [word for stage in STAGES for word in ("--stage", stage)]
    assert app.run(["plan", str(chain), "--topology", "h100:8", "--generate", "2x30x20", "--json", *words]) == 0
    got = {(p["stage"], p["program"]): p for p in json.loads(capsys.readouterr().out)["programs"]}
    assert list(got) == list(found) and not any(p["compiled"] for p in got.values())
    for name, one in got.items():
        assert one["checked"] and one["fits"] and one["step_seconds"] > 0, name
        if "generate" not in name[0]:
            assert one["hbm_bytes"]["parameters"] == found[name]["hbm_bytes"]["parameters"], name
    generated = got["generate by pretrain", "decoding step"]["hbm_bytes"]
    assert generated["parameters"] == 4 * flops.parameters(WHOLE)["total"]  # a tied table once


def test_low_rank_pairs_alone_have_moments(found):
    hbm = found["finetune", "train step"]["hbm_bytes"]
    classifier = WHOLE.model_copy(update=LABELS)
    # q: a [2, 64, 4] over fsdp, b [2, 4, 64] over tensor; down: a [2, 128, 4] over tensor, b [2, 4, 64] over fsdp
    pairs, head = 2 * 4 * (32 + 32 + 64 + 32), 64
    assert hbm["parameters"] == 4 * (share(classifier) + pairs)
    assert hbm["optimizer"] == 2 * 4 * (pairs + head) + 5 * 4


def test_teacher_and_student_lie_on_one_mesh(found):
    hbm = found["distill", "train step"]["hbm_bytes"]
    assert hbm["parameters"] == 4 * (share(WHOLE.model_copy(update=LABELS)) + share(SMALL))
    assert hbm["optimizer"] == 2 * 4 * share(SMALL) + 5 * 4


def test_the_walk_holds_the_stream_of_every_batch(found):
    """Of 4 batches 2 rows of 16 tokens a device: the residual stream, and a little beside it."""
    stream = 4 * 2 * 16 * 64 * 4
    assert 1 <= found["prune", "influence of a layer"]["hbm_bytes"]["batch"] / stream < 2
    stats = found["prune", "statistics of a layer"]["hbm_bytes"]["cache"]
    assert stats == 4 * (4 * 16 * 16 + 128 + 2)  # a Gram matrix per head, squares per neuron, each with its tokens


def test_a_walk_puts_changed_layers_where_they_were(found):
    hbm = found["prune", "changed layer put back"]["hbm_bytes"]
    shallow = WHOLE.model_copy(update={**LABELS, "layers": 1})
    layer = (4 * 64 * 64 + 3 * 64 * 128) // 4 + 2 * 64
    before = share(WHOLE.model_copy(update=LABELS)) + share(shallow)  # the parent, and what is left of its layers
    assert hbm["parameters"] == 4 * (before + 2 * layer)  # the layer as it was and as it is
    assert hbm["temporaries"] < 4 * layer  # no second stack


def test_integers_are_held_as_integers(found):
    matrices, scales = 4 * 64 * 32 + 3 * 64 * 64, 3 * 16 + 32 + 2 * 32 + 32
    floats = share(SMALL) - matrices // 4
    quantized = matrices // 4 + 4 * (scales + floats)
    for name in ("pretrain", "quantize"):  # both are in memory, to be timed in turn
        assert found["eval", f"scoring of {name}"]["hbm_bytes"]["parameters"] == 4 * share(WHOLE) + quantized
    pairs = 8 * (4 * (32 + 16) + 3 * (32 + 32))  # rank 8: a over the inputs' axis, b over the outputs'
    assert found["qlora", "train step"]["hbm_bytes"]["parameters"] == quantized + 4 * pairs
    assert found["qlora", "train step"]["hbm_bytes"]["optimizer"] == 2 * 4 * (pairs + 64) + 5 * 4
    # The adapter alone is written, in full: the pairs of one layer (4 of width 64 x 32, 3 of 64 x 64), and the head.
    assert found["qlora", "train step"]["artifact_bytes"] == 4 * (8 * (4 * (64 + 32) + 3 * (64 + 64)) + 2 * 64)


def test_generation_is_whole_on_every_device(found):
    for title in ("prefill", "decoding step"):
        hbm = found["generate by pretrain", title]["hbm_bytes"]
        assert hbm["cache"] == 2 * 128 * flops.kv_cache(WHOLE, 4)  # 64 slots for the prompt, 64 for 20 new tokens
        # The step reads a tied table the other way round on CPUs, which is kept beside it.
        assert hbm["parameters"] == 4 * (flops.parameters(WHOLE)["total"] + 512 * 64)
    step = found["generate by pretrain", "decoding step"]
    matrices = flops.parameters(WHOLE)["total"] - 5 * 64
    assert step["flops_per_step"] == 2 * (2 * matrices + 4 * 64 * 2 * 50)
