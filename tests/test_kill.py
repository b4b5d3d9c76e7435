"""Real processes that die: killed twice, told to stop, interrupted; the same command ends where a quiet run ends."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from llmctl import artifact

pytestmark = pytest.mark.slow
STEPS = 600
RECIPE = f"""
data = {{ source = "text", path = "corpus.txt", documents = "line", validation = 0.1 }}
[[stage]]
kind = "pretrain"
tokenizer = {{ kind = "bpe", vocab_size = 300 }}
model = {{ d_model = 32, layers = 2, heads = 4, kv_heads = 2, head_dim = 8, d_ff = 48, dropout = 0.1 }}
train = {{ steps = {STEPS}, batch_size = 8, seq_len = 32, checkpoint_every = 20, log_every = 5, tensorboard = false }}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kill")
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
    draw = random.Random(0)
    lines = (f"{i} " + " ".join(draw.choices(words, k=12)) for i in range(400))
    (folder / "corpus.txt").write_text("\n".join(lines))
    (folder / "recipe.toml").write_text(RECIPE)
    return folder


def start(place, run):
    command = [sys.executable, "-m", "llmctl", "run", "recipe.toml", "--run", run]
    env = {**os.environ, "XLA_FLAGS": ""}  # one device, as a person at a shell has
    return subprocess.Popen(command, cwd=place, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def at_step(place, run, step, process):
    """Returns once the log has reached `step`; the log is what a person would look at."""
    log = place / run / ".work" / "pretrain" / "log.jsonl"
    while process.poll() is None:
        if log.exists():
            lines = [line for line in log.read_text().splitlines() if line.endswith("}")]
            if lines and json.loads(lines[-1])["step"] >= step:
                return
        time.sleep(0.02)
    raise AssertionError(process.stderr.read())


def finish(place, run):
    process = start(place, run)
    said = process.communicate()[1]
    assert process.returncode == 0, said
    return artifact.read_manifest(place / run / "pretrain").digest, said


@pytest.fixture(scope="module")
def quiet(place):
    return finish(place, "quiet")[0]


def test_killed_twice_is_uninterrupted_bit_for_bit(place, quiet):
    draw = random.Random()
    for step in sorted(draw.sample(range(30, STEPS - 100), 2)):
        process = start(place, "killed")
        at_step(place, "killed", step, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    digest, said = finish(place, "killed")
    assert "going on from step" in said
    assert digest == quiet


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=str)
def test_told_to_stop_it_saves_and_exits_3(place, quiet, number):
    run = f"told{int(number)}"
    process = start(place, run)
    at_step(place, run, 50, process)
    process.send_signal(number)
    said = process.communicate()[1]
    assert process.returncode == 3 and "the same command goes on from there" in said
    assert finish(place, run)[0] == quiet
