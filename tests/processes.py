"""Real processes of the command line, for tests: a small recipe on fake devices, watched through its log."""

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

RECIPE = """
data = {{ source = "text", path = "corpus.txt", documents = "line", validation = 0.1 }}
mesh = {{ {mesh} }}
platform = "cpu"
[[stage]]
kind = "pretrain"
tokenizer = {{ kind = "bpe", vocab_size = 300 }}
model = {{ d_model = 32, layers = 2, heads = 4, kv_heads = 2, head_dim = 8, d_ff = 48, dropout = 0.1 }}
train = {{ steps = {steps}, batch_size = 8, seq_len = 32, checkpoint_every = 15, log_every = 1, tensorboard = false }}
"""


def write(folder, steps, mesh="", more=""):
    """A corpus and a recipe that pretrains on it, then `more`."""
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
    draw = random.Random(0)
    lines = (f"{i} " + " ".join(draw.choices(words, k=12)) for i in range(400))
    (folder / "corpus.txt").write_text("\n".join(lines))
    (folder / "recipe.toml").write_text(RECIPE.format(steps=steps, mesh=mesh) + more)
    return folder


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def started(arguments, cwd, count=1, devices=1, flags=True, envs=()):
    """`count` Python processes with these arguments, `devices` each, told of each other; none outlives the block."""
    address = f"127.0.0.1:{free_port()}"
    found = []
    try:
        for i in range(count):
            joins = ["--coordinator", address, "--num-processes", str(count), "--process-id", str(i)]
            env = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
            env |= {"LLMCTL_HEARTBEAT": "30"} | (envs[i] if envs else {})
            command = [sys.executable, *arguments, *(joins if flags and count > 1 else [])]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            found.append(subprocess.Popen(command, cwd=cwd, env=env, **pipes))
        yield found
    finally:
        for process in found:
            if process.poll() is None:
                process.kill()
            process.communicate()


def run(place, folder, count=1, devices=1):
    """The recipe in `place` under way, as `started`."""
    return started(["-m", "llmctl", "run", "recipe.toml", "--run", folder, "--json"], place, count, devices)


def finish(processes):
    """[(exit code, stdout, stderr)], of all at once: a full pipe would stop one, and the others would wait for it."""
    with ThreadPoolExecutor(len(processes)) as threads:
        ends = list(threads.map(subprocess.Popen.communicate, processes))
    return [(p.returncode, *end) for p, end in zip(processes, ends, strict=True)]


def logged(place, folder):
    """The last step in the log, which is what a person would look at; 0 before the first."""
    log = place / folder / ".work" / "pretrain" / "log.jsonl"
    lines = [line for line in log.read_text().splitlines() if line.endswith("}")] if log.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def interrupted(place, folder, step, number, count=1, devices=1):
    """The recipe until its log is at `step`, and beyond what an earlier run left there; then the last process gets the
    signal `number`: [(exit code, out, err)]."""
    step = max(step, logged(place, folder) + 1)
    with run(place, folder, count, devices) as processes:
        while logged(place, folder) < step:
            assert processes[0].poll() is None, processes[0].communicate()[1]
            time.sleep(0.02)
        processes[-1].send_signal(number)
        return finish(processes)


def finished(place, folder, count=1, devices=1):
    """What the first process of the recipe says on its way to the end."""
    with run(place, folder, count, devices) as processes:
        ends = finish(processes)
    assert all(code == 0 for code, *_ in ends), "\n".join(said for *_, said in ends)
    return ends[0][2]
