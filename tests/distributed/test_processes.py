"""Run real processes on one machine, joined by Gloo: they train as one, stop together, and resume in any number."""

import json
import signal
import socket
import threading

import jax
import pytest
from processes import finish, finished, free_port, interrupted, run, started, write

from llmctl.artifacts import artifact
from llmctl.config.errors import RequestError
from llmctl.distributed import liveness
from llmctl.distributed import processes as hosts

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
    """Run one process with the four devices."""
    finished(place, "alone", 1, 4)
    return losses(place, "alone")


def same(found, wanted, steps=STEPS):
    assert sorted(found) == sorted(wanted) == list(range(1, steps + 1))
    assert max(abs(found[step] - wanted[step]) for step in wanted) < 1e-4


def test_two_processes_make_what_one_makes(tmp_path):
    """Train few steps: the slow tests stop and resume the long recipe."""
    place = write(tmp_path, 20, "data = 2, fsdp = 2", MEASURED)
    finished(place, "alone", 1, 4)
    with run(place, "two", 2, 2) as processes:
        first, second = finish(processes)
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert second[1:] == ("", "")  # process 0 prints for both
    assert [a["name"] for a in json.loads(first[1])["artifacts"]] == ["pretrain"]
    same(losses(place, "two"), losses(place, "alone"), 20)
    two, alone = (artifact.load(place / name / "pretrain") for name in ("two", "alone"))  # checks the digests
    found, wanted = (made.manifest.metrics["validation_loss"] for made in (two, alone))
    assert found == pytest.approx(wanted, rel=1e-4)
    scores = [json.loads((place / name / "eval" / "results.json").read_text())[0] for name in ("two", "alone")]
    assert scores[0]["metrics"]["nll"] == pytest.approx(scores[1]["metrics"]["nll"], rel=1e-4)


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


@pytest.mark.slow
def test_a_checkpoint_that_one_process_cannot_read_is_passed_over(tmp_path):
    write(tmp_path, 60, "data = 1, fsdp = 4")
    interrupted(tmp_path, "run", 40, signal.SIGKILL, 2, 2)
    newest = max((tmp_path / "run/.work/pretrain/checkpoints/steps").iterdir(), key=lambda p: int(p.name))
    for file in newest.rglob("ocdbt.process_1/d/*"):  # files that the second process wrote and that only it reads
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with run(tmp_path, "run", 2, 2) as processes:
        first, second = finish(processes)
    assert (first[0], second[0]) == (0, 0) and "Traceback" not in first[2] + second[2]
    assert f"checkpoint of step {newest.name} is damaged" in first[2] and "going on from step" in first[2]


@pytest.mark.slow
def test_two_processes_keep_checkpoints_and_bests_beside_each_other(tmp_path):
    """Regression test: concurrent saves of a checkpoint and of the best parameters deadlocked."""
    write(tmp_path, 60, "data = 1, fsdp = 2")
    sets = [f"stage.0.train.{setting}" for setting in ("eval_every=1", "best_by=loss", "checkpoint_every=2")]
    command = ["-m", "llmctl", "run", "recipe.toml", "--run", "run", *(word for s in sets for word in ("--set", s))]
    with started(command, tmp_path, 2) as processes:
        assert [code for code, *_ in finish(processes)] == [0, 0]
    assert sorted(losses(tmp_path, "run")) == list(range(1, 61))


SCRIPT = """
import os, sys, time
from llmctl.cli import app as cli
from llmctl.config.errors import RequestError
from llmctl.distributed import liveness as fate
from llmctl.distributed import processes as hosts
fate.GRACE = 0.2
def work(*_, **__):
    hosts.join(*[kind(sys.argv[i]) for i, kind in ((2, str), (4, int), (6, int)) if len(sys.argv) > 1])
    assert hosts.gather(hosts.index()) == list(range(hosts.count())) and hosts.broadcast(lambda: hosts.index()) == 0
    BODY
    print(hosts.index(), "is done")
cli.app = lambda chosen: work
cli.main([])
"""


def joined(body, place, count=2, **how):
    with started(["-c", SCRIPT.replace("BODY", body)], place, count, **how) as processes:
        return finish(processes)


CHAIN = """
[[stage]]
kind = "prune"
ffn = 0.5
heads = 0.5
layers = 1
examples = 20
batch_size = 8
[[stage]]
kind = "prune"
name = "zeros"
method = "wanda"
examples = 20
[[stage]]
kind = "quantize"
[[stage]]
kind = "eval"
name = "texts"
batch_size = 6
speed = false
plot = false
[[stage]]
kind = "finetune"
from = "zeros"
data = { source = "csv", path = "labels.csv" }
train = { steps = 20, eval_every = 0, checkpoint_every = 20 }
[[stage]]
kind = "eval"
name = "labels"
of = ["finetune"]
data = { source = "csv", path = "labels.csv", test = 0.3 }
repeats = 2
plot = false
"""


@pytest.mark.slow
def test_every_stage_makes_with_two_processes_what_it_makes_with_one(tmp_path):
    """Batches of six rows, and smaller last batches, do not divide over four devices, so they are replicated."""
    write(tmp_path, 60, "data = 2, fsdp = 2", CHAIN)
    texts = (tmp_path / "corpus.txt").read_text().splitlines()
    lines = [f"{text},{'even' if i % 2 else 'odd'}" for i, text in enumerate(texts)]
    (tmp_path / "labels.csv").write_text("text,label\n" + "\n".join(lines))
    for folder, count in (("one", 1), ("two", 2)):
        finished(tmp_path, folder, count, 4 // count)
    for name in ("prune", "zeros", "quantize", "finetune"):
        one, two = (artifact.read_manifest(tmp_path / folder / name) for folder in ("one", "two"))
        assert one.metrics.get("layers_kept") == two.metrics.get("layers_kept")
        for key in ("layer_error", "weight_error", "validation_loss"):
            found = [jax.tree.leaves(m.metrics.get(key)) for m in (one, two)]
            assert found[1] == pytest.approx(found[0], rel=1e-3), (name, key)
    for name, key in (("texts", "nll"), ("labels", "accuracy")):
        one, two = (json.loads((tmp_path / folder / name / "results.json").read_text()) for folder in ("one", "two"))
        found = [[scored["metrics"][key] for scored in results] for results in (one, two)]
        assert found[1] == pytest.approx(found[0], rel=1e-4), name


BATCHES = """import hashlib
    from pathlib import Path
    from llmctl.config.settings import MeshConfig
    from llmctl.data.config import DataConfig
    from llmctl.data.device_batches import DeviceBatches
    from llmctl.data.pretraining.lm_corpus import Text
    from llmctl.data.tokenizers.byte_tokenizer import ByteTokenizer
    from llmctl.distributed import host_arrays, mesh
    text = Text(DataConfig(source="text", path="corpus.txt", documents="line"))
    rows = text.rows("train", ByteTokenizer.new(0), 32, Path("cache"))
    batches = DeviceBatches(mesh.make(MeshConfig(data=2, fsdp=2)), 8)
    assert hosts.count() == 1 or sum(b - a for a, b in batches.spans) == 8 // hosts.count()
    with batches.training(rows, FIRST, LAST) as steps:
        for step, batch in steps:
            whole = {name: host_arrays.read(a).tobytes() for name, a in sorted(batch.items())}
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


ANSWERS = """import jax, numpy as np
    from llmctl.config.settings import MeshConfig
    from llmctl.distributed import mesh
    from llmctl.evaluate.setup import Setup, answers
    built = set()
    class Rows:
        def __len__(self):
            return 11
        def batch(self, rows_B):
            built.update(rows_B.tolist())
            return {"tokens": np.repeat(rows_B[:, None], 4, 1).astype(np.int32), "label": rows_B.astype(np.int32)}
    setup = Setup(mesh.make(MeshConfig(data=2)), 4, 4, 4, "tail", "float32")
    found = list(answers(jax.jit(lambda params, batch: batch["tokens"].sum(1)), {}, Rows(), setup))
    labels, sums = (np.concatenate(part).tolist() for part in zip(*((b["label"], said) for b, said in found)))
    assert labels == list(range(11)) and sums == [4 * i for i in range(11)]
    assert built == {min(i, 10) for i in range(12) if i % 4 // 2 == hosts.index()}
"""


def test_each_process_builds_its_own_rows_to_measure_and_hears_of_all(tmp_path):
    assert joined(ANSWERS, tmp_path) == [(0, f"{i} is done\n", "") for i in range(2)]


def test_an_error_in_one_process_ends_the_other(tmp_path):
    waits = "if hosts.index() == 1: raise RequestError('no such file'); \n    hosts.barrier('never')"
    first, second = joined(waits, tmp_path)
    assert first == (2, "", "llmctl: process 1 of 2: no such file\n") and second == (2, "", "")


UNLIKE = """from llmctl.pipeline import recipe, runner
    runner.run(recipe.read('recipe.toml', 'run', [f'stage.0.train.checkpoint_every={2 + hosts.index()}']))
"""


def test_processes_that_were_told_otherwise_end_at_once(tmp_path):
    """The checkpoint frequency is not part of a key, but a process that saves alone waits forever."""
    first, second = joined(UNLIKE, write(tmp_path, 4))
    assert first[:2] == second[:2] == (2, "") and second[2] == ""
    assert "process 1 was given something else as the recipe than process 0; start all alike" in first[2]


def test_strangers_do_not_deafen_the_first_process():
    run, server = liveness._Run(0, 2), socket.create_server(("127.0.0.1", 0))
    run.ended.add(0)
    threading.Thread(target=liveness._serve, args=(run, server, "secret", 30), daemon=True).start()
    for said in (b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b'{"secret": "\xc3\xa4"}\n', b'{"secret": "x", "from": 1}\n'):
        with socket.create_connection(server.getsockname()) as stranger:
            stranger.sendall(said)
    with socket.create_connection(server.getsockname()) as link:
        link.sendall(b'{"secret": "secret", "from": 1}\n{"from": 1, "code": 0}\n')
        assert run.all_succeeded.wait(60) and run.ended == {0, 1}


def test_the_death_of_the_first_process_ends_the_other(tmp_path):
    first, second = joined("hosts.index() or os.kill(os.getpid(), 9); hosts.barrier('never')", tmp_path)
    assert first[0] == -9 and second[:2] == (1, "")
    assert "llmctl: process 0 of 2: died or cannot be reached; the same command finishes the work" in second[2]


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
    assert hosts.cluster_arguments() == {"cluster_detection_method": "gketpu"}
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "one")
    assert hosts.cluster_arguments() is None


@pytest.mark.parametrize("told", [("", 2, 0), ("here:1", 2, -1), ("here", 2, 0), ("here:1", 2, 2), ("here:1", 0, 0)])
def test_flags_that_do_not_belong_together(told):
    with pytest.raises(RequestError, match="--"):
        hosts.join(*told)
    assert hosts.count() == 1
