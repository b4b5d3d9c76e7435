"""A disk that really fills up in the middle of a checkpoint: one line, the checkpoint before survives, it goes on."""

import json
import os
import subprocess
import sys

import pytest

from llmctl.artifacts import artifact

pytestmark = pytest.mark.slow
RECIPE = """
data = { source = "text", path = "corpus.txt", documents = "line", validation = 0.1 }
[[stage]]
kind = "pretrain"
tokenizer = { kind = "bytes" }
model = { d_model = 64, layers = 2, heads = 4, kv_heads = 2, head_dim = 16, d_ff = 128, dropout = 0.1 }
train = { steps = 60, batch_size = 8, seq_len = 32, checkpoint_every = 20, log_every = 5, tensorboard = false }
"""


@pytest.fixture
def small(tmp_path):
    """A folder on a disk of 6 MiB: beside a ballast of 4 a checkpoint of the recipe fits once and not twice."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk is not permitted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def run(place, folder):
    command = [sys.executable, "-m", "llmctl", "run", "recipe.toml", "--run", str(folder)]
    env = {**os.environ, "XLA_FLAGS": ""}
    return subprocess.run(command, cwd=place, env=env, capture_output=True, text=True)


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(tmp_path, small):
    (tmp_path / "corpus.txt").write_text("\n".join(f"line {i} of some text" for i in range(400)))
    (tmp_path / "recipe.toml").write_text(RECIPE)
    quiet = run(tmp_path, tmp_path / "quiet")
    assert quiet.returncode == 0, quiet.stderr
    (small / "ballast").write_bytes(bytes(4 << 20))
    full = run(tmp_path, small / "run")
    assert full.returncode == 1
    last = full.stderr.splitlines()[-1]
    assert "the disk is full; the checkpoint of step 20 is intact, free some space" in last
    assert "Traceback" not in full.stderr
    (small / "ballast").unlink()
    again = run(tmp_path, small / "run")
    assert again.returncode == 0 and "going on from step 20" in again.stderr
    made, wanted = (artifact.read_manifest(f / "pretrain").digest for f in (small / "run", tmp_path / "quiet"))
    assert made == wanted
    log = [json.loads(line) for line in (small / "run/pretrain/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if "loss" in line] == list(range(5, 61, 5))
