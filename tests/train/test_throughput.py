"""Throughput, memory and peak performance against arithmetic."""

import json
from types import SimpleNamespace

import jax
import pytest

from llmctl.train import throughput


def chip(kind, platform="tpu", stats=None):
    return SimpleNamespace(device_kind=kind, platform=platform, process_index=0, memory_stats=lambda: stats)


@pytest.mark.parametrize(
    "kind, tera",
    [
        ("TPU v4", 275), ("TPU v5 lite", 197), ("TPU v5e", 197), ("TPU v5p", 459), ("TPU v5", 459),
        ("TPU v6 lite", 918), ("TPU v6e", 918), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989), ("NVIDIA A100-SXM4-40GB", 312),
    ],
)  # fmt: skip
def test_peaks(tmp_path, kind, tera):
    assert throughput.peak([chip(kind)] * 4, tmp_path / "peak.json") == pytest.approx(4 * tera * 1e12)


def test_an_unknown_chip_has_no_peak(tmp_path):
    assert throughput.peak([chip("NVIDIA T4", "gpu")], tmp_path / "peak.json") is None


def test_a_cpu_is_measured_once(tmp_path, monkeypatch):
    monkeypatch.setattr(throughput, "SIDE", 64)
    first = throughput.peak(jax.devices(), tmp_path / "peak.json")
    assert first and first > 1e6
    (tmp_path / "peak.json").write_text(json.dumps({"flops_per_second": 5e9}))
    assert throughput.peak(jax.devices(), tmp_path / "peak.json") == 5e9


def test_the_timer(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(throughput.time, "monotonic", lambda: now[0])
    timer = throughput.Timer()
    now[0] += 1.0
    timer.tokens, timer.steps = 400, 2
    with timer.paused():
        now[0] += 50.0
    now[0] += 3.0
    found = timer.read(waited=1.0, flops=1e9, peak=1e12)
    assert found == {"tokens_per_second": 100.0, "step_seconds": 2.0, "input_wait": 0.25, "mfu": pytest.approx(0.1)}
    now[0] += 1.0
    assert timer.read(waited=1.5) == {}  # no step, no speed
    timer.tokens, timer.steps = 10, 1
    now[0] += 2.0
    assert timer.read(waited=2.0)["input_wait"] == 0.25  # 0.5 s since the last reading
    for tokens, mfu in ((400, 1.0), (100, 0.25)):  # the peak 1e11 was measured too low: the model reached 4e11
        timer.tokens, timer.steps = tokens, 1
        now[0] += 1.0
        assert timer.read(waited=2.0, flops=1e9, peak=1e11)["mfu"] == pytest.approx(mfu)


def test_memory_is_that_of_the_fullest_device():
    devices = [chip("TPU v4", stats={"peak_bytes_in_use": n * 2**30}) for n in (1, 3, 2)]
    assert throughput.memory(devices) == {"memory_gib": 3.0}
    assert throughput.memory([chip("TPU v4", stats=None)]) == {}
    assert throughput.memory(jax.devices())["memory_gib"] > 0.01
