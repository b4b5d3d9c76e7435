"""Kills at file operations, in a script of its own: its processes fork from one without threads."""

import json
import subprocess
import sys
from pathlib import Path

import kill_points
import pytest


@pytest.mark.slow
def test_killed_before_any_file_operation_nothing_is_lost():
    done = subprocess.run(
        [sys.executable, Path(kill_points.__file__), "2"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [f["command"] for f in found] == list(kill_points.COMMANDS)
    assert sum(f["kills"] for f in found) >= len(found)
