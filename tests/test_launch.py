"""Expand the launch files of `recipes/launch` with stubs for the schedulers, and parse the commands that they start."""

import os
import re
import shlex
import subprocess
import tomllib
from math import prod

import pytest
import yaml
from readme import README

from llmctl.cli import app
from llmctl.distributed import processes

ROOT = README.parent
LAUNCH = ROOT / "recipes" / "launch"
SET = "data.path=/shared/my 'own' corpus/*.txt"

# `ssh` and `gcloud` run the remote command here, so that its quoting is tested too.
STUBS = {
    "llmctl": """
        printf '%s\\0' "$@" > "$(mktemp -p "$LOG" call.XXXXXX)"
        mark=$LOG/seen-$(printf %s "$*" | cksum | tr -d ' ')
        if [ "$CODE" = stop ]; then
          tail -f /dev/null & trap 'kill $!; exit 3' TERM
          echo $$ > "$LOG/pid"; kill -TERM "$LAUNCHER"; wait $!
        fi
        [ "$CODE" = 3 ] || exit "$CODE"
        [ -e "$mark" ] || { touch "$mark"; exit 3; }
    """,
    "ssh": 'bash -c "${@: -1}"',
    "gcloud": """
        printf '%s\\0' "$@" > "$LOG/gcloud"
        for word in "$@"; do case $word in
          --command=*) exec bash -c "${word#*=}";;
          --metadata-from-file=startup-script=*) exec bash "${word##*=}";;
        esac; done
    """,
    "pkill": 'printf %s "${@: -1}" > "$LOG/pattern"; kill -TERM "$(cat "$LOG/pid")"',
    "kubectl": 'cat > "$LOG/jobset.yaml"',
    "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
    "squeue": "echo RUNNING",
    "scontrol": 'echo "$@" > "$LOG/scontrol"',
    **dict.fromkeys(("mkdir", "mount", "mount.nfs"), ""),
    "mountpoint": "exit 1",
}


@pytest.fixture
def launch(tmp_path):
    """Run a launch file, and return its exit code and the arguments of each llmctl process."""

    def run(name, code=3, **variables):
        log, stubs = tmp_path / "log", tmp_path / "bin"
        log.mkdir()
        stubs.mkdir()
        for stub, text in STUBS.items():
            (stubs / stub).write_text(f"#!/bin/bash\n{text}\n")
            (stubs / stub).chmod(0o755)
        env = {"PATH": f"{stubs}:{os.environ['PATH']}", "LOG": str(log), "CODE": str(code), "LLMCTL": "llmctl"}
        env |= {"SLURM_CPUS_ON_NODE": "4", "SLURM_JOB_ID": "7", "RUN": "/shared/runs/a", "RECIPE": "/shared/r.toml"}
        command = f'export LAUNCHER=$$; exec bash {LAUNCH / name} --set "$0"'
        done = subprocess.run(
            ["bash", "-c", command, SET], env=env | variables, capture_output=True, text=True, timeout=50
        )
        calls = [file.read_text().split("\0")[:-1] for file in sorted(log.glob("call.*"))]
        return done.returncode, calls, log

    return run


def parsed(arguments):
    """Return the settings that the command line finds in the arguments of `llmctl run`."""
    import typer

    assert arguments[0] == "run"
    found = typer.main.get_command(app.app("run")).commands["run"].make_context("run", arguments[1:]).params
    assert (str(found["recipe_file"]), str(found["folder"])) == ("/shared/r.toml", "/shared/runs/a")
    assert found["sets"] == [SET]
    return found


def test_ssh_joins_the_hosts_and_runs_again_after_an_interruption(launch):
    code, calls, _ = launch("ssh.sh", HOSTS="me@one two three")
    assert code == 0
    joins = [{n: p[n] for n in ("coordinator", "num_processes", "process_id")} for p in map(parsed, calls)]
    assert sorted(j["process_id"] for j in joins) == [0, 0, 1, 1, 2, 2]
    for join in joins:
        assert processes._arguments(**join)["coordinator_address"] == "one:8476"
        assert join["num_processes"] == 3


@pytest.mark.parametrize("name", ["tpu-pod.sh", "tpu-queued.sh", "slurm.sh"])
def test_found_processes_get_no_flags(launch, name):
    code, calls, log = launch(name)
    for call in calls:
        found = parsed(call)
        assert (found["coordinator"], found["num_processes"], found["process_id"]) == ("", 0, -1)
    if name == "slurm.sh":  # the scheduler runs the file again
        assert (code, len(calls), (log / "scontrol").read_text()) == (3, 1, "requeue 7\n")
    else:
        assert (code, len(calls)) == (0, 2)
        words = (log / "gcloud").read_text().split("\0")
        assert words[:3] == ["compute", "tpus", {"tpu-pod.sh": "tpu-vm", "tpu-queued.sh": "queued-resources"}[name]]


@pytest.mark.parametrize("name", ["ssh.sh", "tpu-pod.sh", "tpu-queued.sh", "slurm.sh"])
@pytest.mark.parametrize("code", [1, 2])
def test_failures_are_not_run_again(launch, name, code):
    found, calls, log = launch(name, code, HOSTS="one two")
    assert found == code and len(calls) == (2 if name == "ssh.sh" else 1)
    assert not (log / "scontrol").exists()


@pytest.mark.parametrize("name", ["ssh.sh", "tpu-pod.sh"])
def test_a_signal_stops_the_run_with_a_checkpoint(launch, name):
    code, calls, log = launch(name, "stop", HOSTS="one")
    assert (code, len(calls)) == (3, 1)
    pattern = (log / "pattern").read_text()
    line = shlex.join(["/shared/venv/bin/python", "/shared/venv/bin/llmctl", *calls[0]])
    assert re.search(pattern, line) and not re.search(pattern, f"pkill -TERM -f {pattern}")
    assert not re.search(pattern, line.replace("/runs/a", "/runs/ab"))


def test_slurm_starts_one_process_per_node():
    """Then llmctl gives each process all GPUs of its node (`processes.cluster_arguments`)."""
    text = (LAUNCH / "slurm.sh").read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", text, flags=re.M))
    assert options["ntasks-per-node"] == "1" and options["gpus-per-node"] == "8" and options["signal"] == "TERM@300"


def test_the_jobset_has_a_pod_per_host(launch):
    code, _, log = launch("gke.sh")
    spec = yaml.safe_load((log / "jobset.yaml").read_text())["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    container = pod["containers"][0]
    found = parsed(container["args"])
    assert code == 0 and "command" not in container and found["process_id"] == -1
    chips = prod(map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")))
    assert job["completions"] == job["parallelism"] == chips // container["resources"]["limits"]["google.com/tpu"]
    codes = job["podFailurePolicy"]["rules"][0]["onExitCodes"]
    assert codes["values"] == [2] and codes["containerName"] == container["name"] and job["backoffLimit"] == 0
    assert [v["name"] for v in pod["volumes"]] == [m["name"] for m in container["volumeMounts"]]


def test_the_image_installs_an_extra_and_does_not_run_as_root():
    lines = [line.split() for line in (LAUNCH / "Containerfile").read_text().splitlines() if line[:1].isupper()]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"tpu", "cuda"} <= set(project["optional-dependencies"]) and ["ARG", "EXTRA=tpu"] in lines
    copied = {word for words in lines if words[0] == "COPY" for word in words[1:-1]}
    assert copied == {"pyproject.toml", "llmctl", project["readme"], *project["license-files"]}
    assert ["USER", "llmctl"] in lines and lines[-1] == ["ENTRYPOINT", '["llmctl"]']
