"""Real processes on one machine, joined by gloo: they train as one, stop together, and go on as any number of them."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time

import pytest

from llmctl import artifact, hosts
from llmctl.errors import RequestError

STEPS = 150
RECIPE = f"""
data = {{ source = "text", path = "corpus.txt", documents = "line", validation = 0.1 }}
mesh = {{ data = 2, fsdp = 2 }}
platform = "cpu"
[[stage]]
kind = "pretrain"
tokenizer = {{ kind = "bpe", vocab_size = 300 }}
model = {{ d_model = 32, layers = 2, heads = 4, kv_heads = 2, head_dim = 8, d_ff = 48, dropout = 0.1 }}
train = {{ steps = {STEPS}, batch_size = 8, seq_len = 32, checkpoint_every = 15, log_every = 1, tensorboard = false }}
[[stage]]
kind = "eval"
speed = false
plot = false
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hosts")
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
    draw = random.Random(0)
    (folder / "corpus.txt").write_text("\n".join(f"{i} " + " ".join(draw.choices(words, k=12)) for i in range(400)))
    (folder / "recipe.toml").write_text(RECIPE)
    return folder


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def started(count, arguments, cwd, devices=1, flags=True, envs=()):
    """`count` processes of the command line, `devices` each; none outlives the block."""
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


def finish(processes):
    """[(exit code, stdout, stderr)], read as they come: a full pipe would stop them."""
    ends = [process.communicate() for process in processes]
    return [(p.returncode, *end) for p, end in zip(processes, ends, strict=True)]


def run(place, folder, count=2, devices=2):
    return started(count, ["-m", "llmctl", "run", "recipe.toml", "--run", folder, "--json"], place, devices)


def at_step(place, folder, step, process):
    """Returns once the log has reached `step`."""
    log = place / folder / ".work" / "pretrain" / "log.jsonl"
    while process.poll() is None:
        if log.exists():
            lines = [line for line in log.read_text().splitlines() if line.endswith("}")]
            if lines and json.loads(lines[-1])["step"] >= step:
                return
        time.sleep(0.02)
    raise AssertionError(process.communicate()[1])


def losses(place, folder):
    lines = map(json.loads, (place / folder / "pretrain" / "log.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.fixture(scope="module")
def alone(place):
    """One process with the four devices."""
    with run(place, "alone", 1, 4) as processes:
        [(code, _, said)] = finish(processes)
    assert code == 0, said
    return losses(place, "alone")


def same(found, wanted):
    assert sorted(found) == sorted(wanted) == list(range(1, STEPS + 1))
    assert max(abs(found[step] - wanted[step]) for step in wanted) < 1e-4


def test_two_processes_make_what_one_makes(place, alone):
    with run(place, "two") as processes:
        first, second = finish(processes)
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert second[1:] == ("", "")  # the first speaks for both
    assert [a["name"] for a in json.loads(first[1])["artifacts"]] == ["pretrain"]
    same(losses(place, "two"), alone)
    params = artifact.load(place / "two" / "pretrain")  # checks the digest that two processes wrote
    assert params.manifest.metrics["validation_loss"] == pytest.approx(alone_metrics(place), rel=1e-4)
    scores = [json.loads((place / name / "eval" / "results.json").read_text())[0] for name in ("two", "alone")]
    assert scores[0]["metrics"]["nll"] == pytest.approx(scores[1]["metrics"]["nll"], rel=1e-4)


def alone_metrics(place):
    return artifact.read_manifest(place / "alone" / "pretrain").metrics["validation_loss"]


@pytest.mark.slow
def test_stopped_on_two_killed_on_two_and_finished_on_one(place, alone):
    with run(place, "moves") as processes:
        at_step(place, "moves", 20, processes[0])
        processes[1].send_signal(signal.SIGTERM)
        first, second = finish(processes)
    assert (first[0], second[0]) == (3, 3), first[2] + second[2]
    assert "the same command goes on from there" in first[2] and second[1:] == ("", "")
    saved = max(int(p.name) for p in (place / "moves/.work/pretrain/checkpoints/steps").iterdir() if p.name.isdigit())
    with run(place, "moves") as processes:
        at_step(place, "moves", saved + 20, processes[0])
        processes[1].kill()
        first, second = finish(processes)
    assert first[0] == 1 and f"going on from step {saved}" in first[2]
    assert first[2].splitlines()[-1].startswith("llmctl: process 1 of 2: died or cannot be reached; the same command")
    with run(place, "moves", 1, 4) as processes:
        [(code, _, said)] = finish(processes)
    assert code == 0 and "going on from step" in said
    same(losses(place, "moves"), alone)


SCRIPT = """
import os, sys, time
from llmctl import cli, fate, hosts
from llmctl.errors import RequestError
fate.GRACE = 0.2
def work(*_, **__):
    hosts.join(*[kind(sys.argv[i]) for i, kind in ((2, str), (4, int), (6, int)) if len(sys.argv) > 1])
    assert hosts.gather(hosts.index()) == [0, 1] and hosts.tell(lambda: hosts.index()) == 0
    BODY
    print(hosts.index(), "is done")
cli.app = lambda chosen: work
cli.main([])
"""


def joined(body, place, **how):
    with started(2, ["-c", SCRIPT.replace("BODY", body)], place, **how) as processes:
        return finish(processes)


def test_an_error_in_one_process_ends_the_other(tmp_path):
    waits = "if hosts.index() == 1: raise RequestError('no such file'); \n    hosts.together('never')"
    first, second = joined(waits, tmp_path)
    assert first == (2, "", "llmctl: process 1 of 2: no such file\n") and second == (2, "", "")


def test_the_death_of_the_first_process_ends_the_other(tmp_path):
    first, second = joined("hosts.index() or os.kill(os.getpid(), 9); hosts.together('never')", tmp_path)
    assert first[0] == -9 and second[:2] == (1, "")
    assert "llmctl: process 0 of 2: died or cannot be reached; the same command goes on" in second[2]


def test_slurm_says_who_is_who(tmp_path):
    port = str(free_port())
    slurm = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost,other", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}
    slurm |= {"SLURM_STEP_NUM_NODES": "2", "JAX_COORDINATOR_PORT": port}
    ends = joined("import jax; assert jax.process_count() == 2", tmp_path, flags=False,
                  envs=[slurm | {"SLURM_PROCID": str(i)} for i in range(2)])  # fmt: skip
    assert ends == [(0, f"{i} is done\n", "") for i in range(2)]


def test_a_pod_finds_itself_and_one_host_stays_alone(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "one,two")
    assert hosts.found() == {"cluster_detection_method": "gketpu"}
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "one")
    assert hosts.found() is None


@pytest.mark.parametrize("told", [("", 2, 0), ("here:1", 2, -1), ("here", 2, 0), ("here:1", 2, 2), ("here:1", 0, 0)])
def test_flags_that_do_not_belong_together(told):
    with pytest.raises(RequestError, match="--"):
        hosts.join(*told)
    assert hosts.count() == 1
