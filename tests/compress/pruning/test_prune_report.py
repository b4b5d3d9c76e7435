"""The report of pruning counts zeros, and shows only what was measured."""

import io

import jax.numpy as jnp
from rich.console import Console

from llmctl.compress.calibration.calibrate import LayerReport
from llmctl.compress.pruning import prune_report


def matrix(zeros, **more):
    return {"shape": [4, 2], "zeros": zeros, **more}


def shown(layers):
    console = Console(width=120, file=io.StringIO())
    with console.capture() as captured:
        console.print(prune_report.table(layers))
    return captured.get()


def test_records_and_table_of_a_walk():
    notes = [
        {
            "attn/q": matrix(2, error=0.1, error_before_repair=0.2),
            "mlp/up": matrix(6, error=0.3, error_before_repair=0.6),
        },
        {"attn/q": matrix(4, error=0.2, error_before_repair=0.2, fallback="damping 0.1"), "mlp/up": matrix(4)},
    ]
    reports = [LayerReport("decoder", i, 0.5, 0.25 + i, {}, {"matrices": n}) for i, n in enumerate(notes)]
    layers = prune_report.records(reports)
    assert [(r["stack"], r["layer"], r["sparsity"], r["error"]) for r in layers] == [
        ("decoder", 0, 0.5, 0.25), ("decoder", 1, 0.5, 1.25),
    ]  # fmt: skip
    assert prune_report.errors(layers) == {"decoder": [0.25, 1.25]}
    assert prune_report.fallbacks(layers) == ["decoder layer 1, attn/q: fell back to damping 0.1"]
    text = shown(layers)
    rows = [line.split() for line in text.splitlines() if line.startswith(" decoder")]
    assert rows[0] == ["decoder", "0", "50.00%", "0.2500", "0.2000", "0.4000"]
    assert rows[1] == ["decoder", "1", "50.00%", "1.2500", "0.2000", "0.2000", "attn/q"]


def test_without_data_zeros_are_counted_and_columns_of_errors_left_out():
    params = {"decoder": {"blocks": {"mlp": {"up": {"kernel": jnp.ones((2, 4, 2)).at[1, :3].set(0)}}}}}
    layers = prune_report.counted(params)
    assert [layer["sparsity"] for layer in layers] == [0.0, 0.75]
    assert layers[1]["matrices"] == {"mlp/up": {"shape": [4, 2], "zeros": 6}}
    assert prune_report.errors(layers) == {}
    assert "error" not in shown(layers) and "75.00%" in shown(layers)
