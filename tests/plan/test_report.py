"""What people read of a plan: units that fit the figures, nothing that adds up to something else."""

import json

import pytest

from llmctl.cli import app
from llmctl.config.base import format_toml, parse_value
from llmctl.pipeline import console
from llmctl.plan import report


@pytest.mark.parametrize(
    "count, says", [(0, "0 B"), (1023, "1,023 B"), (1536, "1.50 KiB"), (3 * 2**20, "3.00 MiB"), (2**41, "2,048.00 GiB")]
)
def test_bytes(count, says):
    assert report.size(count) == says


@pytest.mark.parametrize("seconds, says", [(2.5, "2.5 s"), (0.0123, "12.3 ms"), (8.058e-05, "80.6 µs")])
def test_durations(seconds, says):
    assert report.duration(seconds) == says


def test_what_is_spelled_is_read_again():
    value = {
        "steps": 10,
        "learning_rate": 1e-05,
        "remat": "full",
        "matmuls": {"mlp/*": "int8"},
        "of": ["a", True],
        "e": {},
    }
    assert parse_value(format_toml(value)) == value


def test_a_loop_that_counts_once_is_named(small, capsys):
    assert app.run(["plan", str(small), "--topology", "h100:4", "--stage", "finetune", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["programs"][0] | {"unknown_loops": ["while.7"]}
    console.show(report.work_table(found))
    assert "loop while.7" in capsys.readouterr().out


def test_every_program_is_in_the_summary(small, capsys):
    assert app.run(["plan", str(small), "--topology", "h100:4", "--set", "stage.0.mesh={data=4}"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("train step on h100:4") == 2 and shown.count("lowering for CUDA was checked") == 1
    rows = [line.split("│")[1:-1] for line in shown.split("all of it")[1].splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in row][:2] for row in rows] == [
        ["pretrain", "train step"],
        ["finetune", "train step"],
    ]
    assert all(row[3].strip() == "fits" and row[5].strip() == "10" for row in rows)
