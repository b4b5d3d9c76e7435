"""The report of structured pruning: layers by hand, sizes by count, curves and a picture."""

import jax
import numpy as np
import pytest

from llmctl.compress.structured_pruning import importance_plot, latency, structured_report
from llmctl.model import functional
from llmctl.model.array_bytes import bytes_of
from llmctl.model.config import ModelConfig

FOUND = {
    "layers_kept": {"decoder": [0, 2]},
    "influence": {"decoder": [0.5, 0.01, 0.25]},
    "units": [
        {"stack": "decoder", "layer": i, "error": 0.1 * i, "kept": {"attn/heads": [0, 1], "mlp/neurons": [1]},
         "importance": {"attn/heads": [1.0, 4.0, 2.0, 0.0], "mlp/neurons": [1.0, 2.0]}}
        for i in range(2)
    ],
}  # fmt: skip


def test_each_layer_has_what_is_left_of_it(tiny):
    after = tiny.model_copy(update={"layers": 2, "heads": 2, "kv_heads": 1, "d_ff": 8})
    left = {"heads": 2, "kv_heads": 1, "neurons": 8}
    records = structured_report.layers(tiny, after, FOUND)
    assert records == [
        {"stack": "decoder", "layer": 0, "kept": True, "influence": 0.5, **left, "error": 0.0},
        {"stack": "decoder", "layer": 1, "kept": False, "influence": 0.01},
        {"stack": "decoder", "layer": 2, "kept": True, "influence": 0.25, **left, "error": 0.1},
    ]
    table = structured_report.layers_table(records, tiny)
    cells = {str(c.header): list(c.cells) for c in table.columns}
    assert cells["heads"] == ["2/4", "removed", "2/4"] and cells["output error"] == ["0.0000", "", "0.1000"]


def test_sizes_are_those_of_the_arrays(tiny, fresh):
    found = structured_report.sizes(tiny, fresh, 8, {"prefill": 0.002})
    assert found["parameters"] == sum(a.size for a in jax.tree.leaves(fresh)) and found["bytes"] == bytes_of(fresh)
    small = {**found, "parameters": found["parameters"] // 2, "prefill_seconds": 0.001}
    table = structured_report.sizes_table(found, small)
    assert [list(c.cells)[-1] for c in table.columns] == ["prefill", "2 ms", "1 ms", "0.500"]
    assert len(table.rows) == 2


def test_curves_fall_from_one_and_the_picture_is_written(tmp_path):
    channels = {"importance": [0.5, 2.0, 1.0], "kept": [1, 2]}
    drawn = importance_plot.curves({**FOUND, "channels": channels})
    assert drawn.keys() == {"heads", "neurons", "channels"}
    np.testing.assert_allclose(drawn["heads"][0][0], [1, 0.5, 0.25, 0])
    assert drawn["heads"][0][1].tolist() == [True, False, True, False]
    assert drawn["channels"][0][0].tolist() == [1, 0.5, 0.25]
    assert drawn["channels"][0][1].tolist() == [True, True, False]
    pytest.importorskip("matplotlib")
    assert not importance_plot.plot({}, tmp_path / "none.png") and not (tmp_path / "none.png").exists()
    found = {**FOUND, "sizes": {"before": {"layers": 3, "heads": 4, "kv_heads": 2, "neurons": 24, "hidden": 16}}}
    found["structured_layers"] = [{"kept": True, "influence": 0.5}, {"kept": False, "influence": 0.1}]
    found["budget"] = {"losses": {"layers": {"2": 0.1, "1": 2.0}, "heads": {"1": 0.5}}}
    assert importance_plot.plot(found, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_times_of_all_phases_are_measured(family, monkeypatch):
    """Abstract parameters suffice; each time is positive. Copies of the weights run in turn."""
    monkeypatch.setattr(latency, "ROUNDS", 2)
    cfg = ModelConfig.model_validate({
        "family": family, "vocab_size": 16, "d_model": 8, "layers": 1, "heads": 2, "kv_heads": 2, "head_dim": 4,
        "d_ff": 8, "max_seq_len": 32, "encoder_layers": int(family == "t5"),
    })  # fmt: skip
    phases = latency.phases(cfg, 8)
    found = latency.measure({"one": (cfg, functional.abstract(cfg))}, phases)["one"]
    assert list(found) == [t.phase for t in phases] == ["prefill"] + ["decode"] * (family != "bert")
    assert all(t > 0 for t in found.values())
    with latency.on_one_device():
        run = latency.runner(cfg, [latency.zeros(functional.abstract(cfg))] * 2, phases[-1])
        assert len(run()) == 2 and min(run()) > 0


@pytest.mark.parametrize(("after", "met"), [(0.0054, True), (0.0056, False), (0.0044, False)])
def test_a_missed_latency_is_said(after, met):
    timed = {"of": "decode", "batch_size": 1, "context": 64, "predicted_seconds": 0.005}
    again = {"before": {"decode": 0.01}, "after": {"decode": after}}
    timed |= structured_report.latencies(timed, again, 0.5)
    assert (timed["ratio"], timed["met"]) == (pytest.approx(after / 0.01), met)
    line = structured_report.latency_line(timed)
    assert line.startswith("warning: ") != met and "predicted 5 ms" in line and "asked 0.5" in line
    assert met or ("10% above" if after > 0.005 else "10% below") in line
