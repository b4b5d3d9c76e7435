"""The log holds every step once, whatever happened to the process that wrote it."""

import io
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from llmctl.config.errors import RequestError
from llmctl.train import run_log
from llmctl.train.run_log import LOG, Reporter


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / LOG).read_text().splitlines()]


def quiet() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=200)


def test_a_line_a_call_flushed_at_once(tmp_path):
    with Reporter(tmp_path, 4, "pretrain", tensorboard=False, console=quiet()) as report:
        report.log(1, {"loss": np.float32(2.5), "tokens": 7})
        assert [(e["step"], e["loss"], e["tokens"]) for e in lines(tmp_path)] == [(1, 2.5, 7)]


def test_a_value_that_is_not_finite_is_null(tmp_path):
    with Reporter(tmp_path, 1, "t", tensorboard=False, console=quiet()) as report:
        report.log(1, {"loss": float("nan"), "norm": float("inf")})
    assert lines(tmp_path)[0]["loss"] is None and lines(tmp_path)[0]["norm"] is None


def test_resume_drops_what_will_be_written_again_and_a_half_line(tmp_path):
    with Reporter(tmp_path, 10, "t", tensorboard=False, console=quiet()) as report:
        for step in (2, 4, 6):
            report.log(step, {"loss": 1.0 / step})
    with (tmp_path / LOG).open("a") as f:
        f.write('{"step": 8, "lo')
    with Reporter(tmp_path, 10, "t", tensorboard=False, start=4, console=quiet()) as report:
        report.log(6, {"loss": 0.5})
    assert [(e["step"], e["loss"]) for e in lines(tmp_path)] == [(2, 0.5), (4, 0.25), (6, 0.5)]


def test_a_fresh_start_forgets_the_old_log(tmp_path):
    for _ in range(2):
        with Reporter(tmp_path, 1, "t", tensorboard=False, console=quiet()) as report:
            report.log(0, {"loss": 3.0})
            report.log(1, {"loss": 1.0})
    assert [e["step"] for e in lines(tmp_path)] == [0, 1]


def test_off_a_terminal_a_plain_line_now_and_then_and_at_the_end(tmp_path):
    now = iter([1.0, 2.0, 12.0, 13.0])  # one reading a call
    console = quiet()
    with Reporter(tmp_path, 4, "prune", tensorboard=False, console=console, clock=lambda: next(now)) as report:
        for step in (1, 2, 3, 4):
            report.log(step, {"loss": 2.0, "learning_rate": 1e-5, "tokens_per_second": 12345.6})
    assert console.file.getvalue().splitlines() == [
        "prune: step 1/4  loss 2  lr 1.0e-05  tok/s 12,346",
        "prune: step 3/4  loss 2  lr 1.0e-05  tok/s 12,346  ETA 0:06",  # 11 s for 2 steps, 1 to go
        "prune: step 4/4  loss 2  lr 1.0e-05  tok/s 12,346",
    ]


def test_short_names_are_explained_once_per_process(tmp_path, monkeypatch):
    monkeypatch.setattr(run_log, "_explained", set())
    console = quiet()
    for names in (["gradient_norm"], ["gradient_norm", "input_wait"]):
        with Reporter(tmp_path, 1, "t", tensorboard=False, console=console) as report:
            report.log(1, dict.fromkeys(names, 1.0))
    assert console.file.getvalue().splitlines() == [
        "t: gnorm: norm of the gradient",
        "t: step 1/1  gnorm 1",
        "t: wait: share of the time in which the devices wait for rows",
        "t: step 1/1  gnorm 1  wait 1",
    ]


def test_on_a_terminal_a_bar_with_the_metrics(tmp_path):
    console = Console(file=io.StringIO(), force_terminal=True, width=160, _environ={})
    with Reporter(tmp_path, 4, "pretrain", tensorboard=False, console=console) as report:
        report.log(4, {"loss": 2.125})
        report.say("validating")
    shown = console.file.getvalue()
    assert "4/4" in shown and "loss 2.125" in shown and "pretrain: validating" in shown


def test_other_processes_write_nothing(tmp_path):
    console = quiet()
    with Reporter(tmp_path / "w", 1, "t", console=console, writes=False) as report:
        report.log(1, {"loss": 1.0})
        report.say("hello")
    assert not (tmp_path / "w").exists() and console.file.getvalue() == ""


def test_tensorboard_events_can_be_read_back(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    with Reporter(tmp_path, 1, "t", console=quiet()) as report:
        report.log(1, {"loss": 0.75})
    (file,) = (tmp_path / "tensorboard").glob("events.*")
    data, found = file.read_bytes(), {}
    while data:  # length (8 bytes), its checksum (4), the event, its checksum (4)
        size = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + size])
        found.update({(v.tag, event.step): v.simple_value for v in event.summary.value})
        data = data[16 + size :]
    assert found == {("loss", 1): 0.75}


def test_log_outside_of_the_context_is_a_mistake(tmp_path):
    with pytest.raises(RuntimeError, match="with Reporter"):
        Reporter(tmp_path, 1, "t").log(1, {})


def test_wandb_is_asked_for_by_name_and_gets_every_line(tmp_path, monkeypatch):
    calls: list[tuple] = []
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append((step, values)), finish=lambda exit_code: calls.append(("end", exit_code))
    )
    fake = types.SimpleNamespace(init=lambda **given: calls.append(("init", given["project"], given["name"])) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with Reporter(tmp_path, 1, "prune", tensorboard=False, wandb="mine", console=quiet()) as report:
        report.log(1, {"loss": 2.0})
    assert calls == [("init", "mine", "prune"), (1, {"loss": 2.0}), ("end", 0)]


def test_wandb_that_is_not_installed_is_a_wrong_request(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(RequestError, match=r"pip install 'llmctl\[wandb\]'"), Reporter(tmp_path, 1, "t", wandb="mine"):
        pass


def test_the_real_wandb_offline_and_one_run_across_a_resume(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for start in (0, 2):
        with Reporter(
            tmp_path / "work", 4, "t", False, start=start, lasting=tmp_path, wandb="llmctl-tests", console=quiet()
        ) as report:
            report.log(start + 1, {"loss": 1.5})
            report.log(start + 2, {"loss": 1.0})
    wandb.teardown()  # offline a run is finished before its file is written: that ends with W&B's own process
    (name,) = {p.name for p in (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")}
    assert name == f"run-{(tmp_path / 'work' / 'wandb_id').read_text()}.wandb"
    written = [p.read_bytes() for p in (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")]
    assert len(written) == 2 and all(b"llmctl-tests" in text and b"loss" in text for text in written)
