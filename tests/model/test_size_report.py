"""Sizes from arithmetic equal those of the arrays and the published counts."""

import json
import math

import jax
import pytest

from llmctl.model import flops, functional, size_report
from llmctl.model.config import ModelConfig, presets

SMALL = {"d_model": 24, "heads": 4, "kv_heads": 4, "head_dim": 6, "d_ff": 40, "vocab_size": 67, "max_seq_len": 32}


@pytest.mark.parametrize("preset", [p for p in presets() if p.endswith(("tiny", "2b", "270m", "0.6b", "0.5b", "v0.3"))])
def test_parameters_are_those_of_the_tree(preset):
    cfg = ModelConfig(preset=preset)
    total = sum(math.prod(x.shape) for x in jax.tree.leaves(functional.abstract(cfg)))
    assert flops.parameters(cfg)["total"] == total


@pytest.mark.parametrize("head", ["classify", "regress", "tokens", "span", "embed"])
def test_heads_are_counted(head):
    cfg = ModelConfig(preset="bert-tiny", head=head, labels=3, next_sentence=False, **SMALL)
    total = sum(math.prod(x.shape) for x in jax.tree.leaves(functional.abstract(cfg)))
    assert flops.parameters(cfg)["total"] == total


def test_published_sizes():
    for preset, published in {
        "llama2-7b": 6_738_415_616, "llama3-8b": 8_030_261_248, "gpt2": 124_439_808, "smollm2-135m": 134_515_008,
        "gemma2-2b": 2_614_341_888, "qwen3-0.6b": 596_049_920, "mistral-7b": 7_241_732_096, "t5-small": 60_506_624,
        "roberta-base": 124_697_433,
    }.items():  # fmt: skip
        assert flops.parameters(ModelConfig(preset=preset))["total"] == published, preset


def test_operations_and_cache_of_llama3_by_hand():
    cfg = ModelConfig(preset="llama3-8b")
    matrices = 32 * (4096 * 128 * (32 + 8 + 8 + 32) + 3 * 4096 * 14_336)
    found = size_report.report(cfg)
    assert found["flops_per_token"] == 2 * matrices + 2 * 4096 * 128_256 + 32 * 4 * 4096 * 2049 / 2
    assert found["training_flops_per_token"] == 3 * found["flops_per_token"]
    assert found["kv_cache_bytes_per_token"] == 2 * 32 * 8 * 128 * 2
    assert found["kv_cache_bytes"] == 8192 * 131_072


def test_show_config_needs_no_arrays_and_reads_presets_and_files(tmp_path, capsys):
    from llmctl.cli import app

    (tmp_path / "recipe.toml").write_text(
        '[[stage]]\nkind = "pretrain"\n[stage.model]\npreset = "bert-tiny"\nlayers = 3\n'
    )
    found = {}
    for spec in ("llama3-70b", str(tmp_path / "recipe.toml")):
        assert app.run(["show", "--config", spec, "--json"]) == 0
        found[spec] = json.loads(capsys.readouterr().out)
    assert found["llama3-70b"]["parameters"] == 70_553_706_496
    assert found["llama3-70b"]["bytes"]["bfloat16"] == 2 * 70_553_706_496
    assert found["llama3-70b"]["kv_cache_bytes_per_token"] == 2 * 80 * 8 * 128 * 2
    assert found[str(tmp_path / "recipe.toml")]["family"] == "bert"
    assert app.run(["show", "--config", "llama3-8b"]) == 0
    assert "8,030,261,248" in capsys.readouterr().out
    for argv, said in (
        (["--config", "lama3-8b"], "did you mean 'llama3-8b'"),
        ([], "show: name an artifact"),
        ([str(tmp_path), "--config", "gpt2"], "show: name an artifact"),
    ):
        assert app.run(["show", *argv]) == 2
        assert said in capsys.readouterr().err
