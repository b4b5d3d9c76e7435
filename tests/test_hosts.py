"""Real processes on one machine, joined by gloo: they train as one, stop together, and go on as any number of them."""

import json
import signal

import pytest
from processes import finish, finished, free_port, interrupted, run, started, write

from llmctl import artifact, hosts
from llmctl.errors import RequestError

STEPS = 150
MEASURED = """
[[stage]]
kind = "eval"
speed = false
plot = false
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write(tmp_path_factory.mktemp("hosts"), STEPS, "data = 2, fsdp = 2", MEASURED)


def losses(place, folder):
    lines = map(json.loads, (place / folder / "pretrain" / "log.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.fixture(scope="module")
def alone(place):
    """One process with the four devices."""
    finished(place, "alone", 1, 4)
    return losses(place, "alone")


def same(found, wanted):
    assert sorted(found) == sorted(wanted) == list(range(1, STEPS + 1))
    assert max(abs(found[step] - wanted[step]) for step in wanted) < 1e-4


def test_two_processes_make_what_one_makes(place, alone):
    with run(place, "two", 2, 2) as processes:
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
def test_stopped_on_two_then_on_four_and_finished_on_one(place, alone):
    for count, step in ((2, 20), (4, 70)):
        ends = interrupted(place, "moves", step, signal.SIGTERM, count, 4 // count)
        assert [code for code, *_ in ends] == [3] * count, ends
        assert "the same command goes on from there" in ends[0][2]
        assert all(end[1:] == ("", "") for end in ends[1:])
    assert "going on from step" in ends[0][2]
    assert "going on from step" in finished(place, "moves", 1, 4)
    same(losses(place, "moves"), alone)


@pytest.mark.slow
def test_killed_on_two_and_finished_on_four(place, alone):
    first, second = interrupted(place, "dies", 40, signal.SIGKILL, 2, 2)
    assert (first[0], second[0]) == (1, -signal.SIGKILL)
    assert first[2].splitlines()[-1].startswith("llmctl: process 1 of 2: died or cannot be reached; the same command")
    assert "going on from step" in finished(place, "dies", 4, 1)
    same(losses(place, "dies"), alone)


SCRIPT = """
import os, sys, time
from llmctl import cli, fate, hosts
from llmctl.errors import RequestError
fate.GRACE = 0.2
def work(*_, **__):
    hosts.join(*[kind(sys.argv[i]) for i, kind in ((2, str), (4, int), (6, int)) if len(sys.argv) > 1])
    assert hosts.gather(hosts.index()) == list(range(hosts.count())) and hosts.tell(lambda: hosts.index()) == 0
    BODY
    print(hosts.index(), "is done")
cli.app = lambda chosen: work
cli.main([])
"""


def joined(body, place, count=2, **how):
    with started(["-c", SCRIPT.replace("BODY", body)], place, count, **how) as processes:
        return finish(processes)


BATCHES = """import hashlib
    from pathlib import Path
    from llmctl import arrays, feed, mesh
    from llmctl.data import DataConfig, pipeline
    from llmctl.data.byte_tokenizer import ByteTokenizer
    from llmctl.data.language import Text
    from llmctl.settings import MeshConfig
    text = Text(DataConfig(source="text", path="corpus.txt", documents="line"))
    rows = text.rows("train", ByteTokenizer.new(0), 32, Path("cache"))
    fed = feed.Feed(mesh.make(MeshConfig(data=2, fsdp=2)), 8)
    assert hosts.count() == 1 or sum(b - a for a, b in fed.spans) == 8 // hosts.count()
    with pipeline.batches(rows, 8, FIRST, LAST, fed.place, spans=fed.spans) as batches:
        for step, batch in batches:
            whole = {name: arrays.read(a).tobytes() for name, a in sorted(batch.items())}
            print(step, hashlib.sha256(repr(whole).encode()).hexdigest())
"""


@pytest.mark.slow
def test_any_number_of_processes_reads_the_same_global_batches(tmp_path):
    write(tmp_path, STEPS)

    def read(count, first, last):
        body = BATCHES.replace("FIRST", str(first)).replace("LAST", str(last))
        ends = joined(body, tmp_path, count, devices=4 // count)
        assert [code for code, *_ in ends] == [0] * count, ends
        found = [said.splitlines()[:-1] for _, said, _ in ends]
        assert found == found[:1] * count
        return found[0]

    assert read(2, 100, 103) + read(4, 103, 106) + read(1, 106, 109) == read(1, 100, 109)


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
