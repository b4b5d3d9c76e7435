"""What a person at a terminal, and a program at a pipe, can rely on."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from llmctl.artifacts import artifact
from llmctl.cli import app
from llmctl.config.errors import RequestError
from llmctl.distributed import backend

RECIPE = """
[[stage]]
kind = "make"
[[stage]]
kind = "change"
[[stage]]
kind = "score"
"""


@pytest.fixture
def place(tmp_path, fake_stages, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo.toml").write_text(RECIPE)
    return tmp_path


@pytest.fixture
def call(capsys):
    """Runs a command in this process: exit code, stdout, stderr."""

    def called(*argv: str):
        code = app.run(list(argv))
        out, err = capsys.readouterr()
        return code, out, err

    return called


def modules_after(*argv: str) -> set[str]:
    """What a fresh process has imported at the end of a command."""
    script = "import sys; from llmctl.cli.app import run; run(sys.argv[1:]); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script, *argv], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


HEAVY = {"jax", "jaxlib", "flax", "optax", "orbax", "grain", "qwix", "tensorflow_datasets", "torch", "pyarrow"}


@pytest.mark.parametrize("argv", [["--help"], ["run", "--help"], ["pretrain", "--help"]])
def test_help_needs_nothing_heavy(argv):
    assert not modules_after(*argv) & HEAVY


def test_the_list_of_commands_needs_no_config_either():
    assert "pydantic" not in modules_after("--help")


def test_show_needs_nothing_heavy(place, call):
    assert call("run", "demo.toml")[0] == 0
    assert not modules_after("show", "runs/demo") & HEAVY
    assert not modules_after("show", "runs/demo/make", "--json") & HEAVY


def test_run_prints_one_json_object_and_nothing_else(place, call):
    code, out, err = call("run", "demo.toml", "--json")
    assert code == 0 and "[1/3] make: new" in err
    found = json.loads(out)["artifacts"]
    assert [a["name"] for a in found] == ["make", "change"]
    assert set(found[0]) == {
        *("name", "stage", "family", "parameters", "weight_bytes", "bytes", "sparsity", "bits", "digest"),
        *("content", "parent", "metrics"),
    }
    assert found[1]["parent"] == {"name": "make", "digest": found[0]["digest"], "content": found[0]["content"]}
    assert found[1]["metrics"] == {"loss": 0.5, "accuracy": 0.75}  # the manifest's, and the report's on the same digest
    assert json.loads(call("show", "runs/demo", "--json")[1])["artifacts"] == found
    assert call("run", "demo.toml")[2].count("up to date, skipped") == 3


def test_results_of_other_weights_are_not_shown(place, call):
    call("run", "demo.toml", "--run", "r")
    call("run", "demo.toml", "--run", "r", "--only", "change", "--set", "stage.1.sparsity=0.75")
    found = json.loads(call("show", "r", "--json")[1])["artifacts"]
    assert [("accuracy" in a["metrics"]) for a in found] == [True, False]


def test_show_for_people(place, call):
    call("run", "demo.toml")
    _, out, _ = call("show", "runs/demo")
    assert [word in out for word in ("make", "change", "1,000", "4 kB", "25%", "75.00%")] == [True] * 6
    _, out, _ = call("show", "runs/demo/change")
    assert "digest" in out and "sparsity=0.5" in out
    assert "window_layers=[]" in out and "\\" not in out


def test_a_stage_is_a_command_with_its_fields_as_flags(place, call):
    call("make", "--out", "a", "--train.log_every", "3")
    code, out, _ = call("change", "--from", "a", "--out", "b", "--sparsity", "0.125", "--train.bold", "--json")
    assert code == 0
    made = json.loads(out)
    assert (made["name"], made["stage"], made["parent"]["name"]) == ("b", "change", "a")
    assert made["config"]["sparsity"] == 0.125 and made["config"]["train"]["bold"] is True
    assert made["config"]["train"]["steps"] == 30


def test_a_flag_beats_set_beats_recipe(place, call):
    (place / "r.toml").write_text('train.steps = 1\n[[stage]]\nkind = "make"\ndata.columns = {a = "b"}')
    argv = (
        "make",
        "--out",
        "a",
        "--recipe",
        "r.toml",
        "--set",
        "train.steps=2",
        "--set",
        "seed=5",
        "--train.steps",
        "3",
    )
    config = json.loads(call(*argv, "--json")[1])["config"]
    assert (config["train"]["steps"], config["seed"], config["data"]["columns"]) == (3, 5, {"a": "b"})


def test_a_report_is_printed_and_kept_where_asked(place, call):
    call("make", "--out", "a")
    code, out, _ = call("score", "--from", "a", "--json")
    result = json.loads(out)
    assert code == 0 and (result["artifact"], result["metrics"]) == ("a", {"accuracy": 0.75})
    assert set(result) == {"artifact", "digest", "task", "protocol", "metrics"}
    assert sorted(p.name for p in place.iterdir() if p.is_dir() and p.name != "fake_stages") == ["a"]


def test_help_of_a_stage_lists_every_field_with_default_and_meaning(place, call):
    _, out, _ = call("change", "--help")
    text = " ".join(out.split())
    assert "--sparsity FLOAT Zeros. [default: 0.5]" in text
    assert "--train.steps INT Steps. [default: 30]" in text  # the stage's default, not the section's
    assert "--train.bold / --no-train.bold Whether. [default: false]" in text
    assert "--platform cpu|gpu|tpu" in text and "--data.columns TABLE" in text and "--kind" not in text


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["runn"], "No such command 'runn'. Did you mean 'run'?"),
        (["banana"], "No such command 'banana'. `llmctl --help` lists the commands."),
        (["run", "demo.toml", "--sett", "x"], "No such option: --sett, did you mean --set?"),
        (["change", "--sparsty", "0.5"], "No such option: --sparsty, did you mean --sparsity?"),
        (
            ["change", "--from", "x", "--out", "y", "--train.steps", "many"],
            '--train.steps: must be a whole number, got "many"',
        ),
        (["change", "--from", "."], "change: --out: say where the artifact goes"),
        (["change", "--from", ".", "--out", "y"], "change: from: . is not an artifact: it has no manifest.json"),
        (["change", "--from", "x", "--out", "y", "--sparsity", "1.5"], "--sparsity: must be <= 1"),
        (["run"], "Missing argument 'RECIPE'."),
        (["run", "dem.toml"], "dem.toml: no such file, did you mean 'demo.toml'?"),
        (
            ["run", "demo.toml", "--set", "stage.1.sparsty=1"],
            "demo.toml: stage.1.sparsty (change): unknown key, did you mean",
        ),
        (["run", "demo.toml", "--run", "demo.toml"], "not a directory; choose another place"),
        (["show", "nowhere"], "nowhere: no such folder"),
        (["show", "."], ".: neither an artifact nor a run"),
    ],
)
def test_a_wrong_request_is_one_line_and_writes_nothing(place, call, argv, line):
    before = sorted(place.rglob("*"))
    code, out, err = call(*argv)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("llmctl: ") and line in err
    assert [p for p in sorted(place.rglob("*")) if "__pycache__" not in str(p)] == before


@pytest.mark.parametrize(
    ("steps", "code", "line"),
    [
        (13, 3, "stopped at step 6"),
        (14, 3, "interrupted; the same command finishes it"),
        (15, 1, "disk full"),
        (16, 1, "ValueError: two lines (LLMCTL_DEBUG=1 shows where)"),
    ],
)
def test_how_work_ends_badly(place, call, steps, code, line):
    got, out, err = call("run", "demo.toml", "--set", f"stage.make.train.steps={steps}")
    assert (got, out) == (code, "") and line in err.splitlines()[-1] and "Traceback" not in err


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "a.npy"),
        OSError("3000000 requested and 1048448 written"),  # NumPy
        RuntimeError("write() failed: No space left on device; writing a.arrayrecord; at byte 294912"),  # ArrayRecord
    ],
)
def test_a_full_disk_is_one_whoever_meets_it(error):
    code, line = app.error_result(error)
    assert code == 1 and line.startswith("disk full")


def test_only_what_goes_on_says_so(place, call, monkeypatch):
    def interrupted(path):
        raise KeyboardInterrupt

    call("make", "--out", "a")
    monkeypatch.setattr(artifact, "read_manifest", interrupted)
    assert call("show", "a") == (3, "", "llmctl: interrupted\n")


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_that_a_library_turns_into_its_own_error_is_an_interrupt(place, call, monkeypatch, stop):
    """Orbax does so while weights load, and the line said that the artifact was damaged."""

    def load(path):
        try:
            signal.raise_signal(stop)
        except KeyboardInterrupt:
            raise RequestError("a/params: damaged (RuntimeError); run the stage that made it again") from None

    call("make", "--out", "a")
    monkeypatch.setattr(artifact, "read_manifest", load)
    monkeypatch.setattr(app, "_stop_requested", threading.Event())
    before = signal.signal(stop, app._stop)
    try:
        assert call("show", "a") == (3, "", "llmctl: interrupted\n")
    finally:
        signal.signal(stop, before)


def test_of_several_stages_prepare_is_told_which(tmp_path, call):
    two = tmp_path / "two.toml"
    two.write_text('[[stage]]\nkind = "pretrain"\n[[stage]]\nkind = "pretrain"\nname = "more"\ntrain.steps = 0\n')
    argv = ("prepare", str(two), "--out", str(tmp_path / "p"))
    assert "has 2 pretrain stages, say which with --name: pretrain, more" in call(*argv)[2]
    assert "--train.steps: must be >= 1, got 0" in call(*argv, "--name", "more")[2]


def test_debug_shows_the_traceback(place, call, monkeypatch):
    monkeypatch.setenv("LLMCTL_DEBUG", "1")
    assert "Traceback" in call("run", "demo.toml", "--set", "stage.make.train.steps=16")[2]


def test_a_platform_that_is_not_there_is_refused(place, call):
    code, _, err = call("run", "demo.toml", "--set", 'platform="tpu"')
    assert code == 2 and "platform 'tpu' is asked for and JAX finds only 'cpu'" in err
    code, out, _ = call("doctor", "demo.toml")
    assert code == 0 and "demo.toml: settings, and the first rows of data that is there, fit" in " ".join(out.split())
    (place / "demo.toml").write_text('platform = "gpu"\n' + RECIPE)
    assert call("doctor", "demo.toml")[0] == 2
    (place / "demo.toml").write_text(RECIPE + 'platform = "cpu"\n[[stage]]\nkind = "teach"\nplatform = "tpu"\n')
    assert "one run uses one platform" in call("run", "demo.toml")[2]


def test_a_platform_is_settled_before_jax_starts(tmp_path):
    script = "from llmctl.distributed import backend; print(backend.initialize(['tpu']))"
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env)
    assert done.returncode == 1 and "RequestError: platform 'tpu'" in done.stderr


def test_libtpu_is_silent_where_there_is_no_tpu():
    """It is loaded, finds nothing and says nothing."""
    pytest.importorskip("libtpu")
    if any(any(Path("/dev").glob(files)) for files in backend.TPU_FILES):
        pytest.skip("a TPU may be here")
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "TPU_"))}
    done = subprocess.run(
        [sys.executable, "-m", "llmctl", "doctor", "--json"], capture_output=True, text=True, env=env, check=True
    )
    assert json.loads(done.stdout)["devices"] and done.stderr == ""


def test_a_tpu_answers_for_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "environ", {"TPU_WORKER_HOSTNAMES": "a,b"})
    (tmp_path / "vfio").mkdir()
    (tmp_path / "vfio" / "0").touch()
    backend.silence_libtpu(tmp_path)
    assert os.environ == {"TPU_WORKER_HOSTNAMES": "a,b"}
    (tmp_path / "vfio" / "0").unlink()
    backend.silence_libtpu(tmp_path)
    assert os.environ == backend.NO_TPU | {"TPU_WORKER_HOSTNAMES": "a,b"}


def test_doctor(call):
    code, out, _ = call("doctor", "--json")
    found = json.loads(out)
    assert code == 0 and found["platform"] == "cpu" and len(found["devices"]) == 8
    assert found["versions"]["jax"] and found["memory_bytes"]["available"] > 0
    assert "8 × cpu" in call("doctor")[1]


def test_version(call):
    assert call("--version")[1].startswith("llmctl 0.")
