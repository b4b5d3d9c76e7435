"""A process that is killed before any of its file operations loses nothing: the same command ends as a quiet one.

Each command runs in a child process. An audit hook counts what it does to files (open for writing, rename, remove,
make a folder) and sends SIGKILL before a chosen operation, so that every phase of writing is met, not only those that
take long. `python tests/kill_points.py 25 [COMMAND…]` kills each command 25 times.
"""

import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "shutil.move"}
TINY = "--model.d-model 16 --model.layers 2 --model.heads 2 --model.kv-heads 1 --model.head-dim 8 --model.d-ff 24"
DATA = "--data.source csv --data.path reviews.csv --data.validation 0.2"
TRAIN = "--train.batch-size 8 --train.seq-len 16 --train.log-every 1 --no-train.tensorboard --train.checkpoint-every 2"
COMMANDS = {
    "pretrain": f"pretrain --out OUT {DATA} {TINY} {TRAIN} --train.steps 6 --tokenizer.kind bytes",
    "finetune": f"finetune BASE --out OUT {DATA} {TRAIN} --train.steps 4 --train.eval-every 2",
    "prune": f"prune BASE --out OUT {DATA} --method wanda --examples 8 --seq-len 16",
    "structured": f"prune BASE --out OUT {DATA} --keep-ffn 12 --examples 8 --seq-len 16",
    "quantize": "quantize BASE --out OUT",
    "distill": f"distill --from BASE --teacher BASE --out OUT {DATA} {TRAIN} --train.steps 4",
    "import": "import HF --out OUT",
    "export": "export BASE --to hf --out OUT",
    "prepare": "prepare prepare.toml --out OUT --workers 1",
    "splits": "prepare prepare.toml --splits OUT",
}
NEW = ("export", "splits")
"""Commands that never replace what is there."""


def _run(place, argv, kill_at, count):
    """Run one command in this process, and kill the process before file operation number `kill_at` (0: never)."""
    os.chdir(place)
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0"
    if not os.environ.get("LLMCTL_DEBUG"):
        sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115
    here, one_at_a_time = str(place), threading.Lock()

    def hook(event, arguments):
        writes = event == "open" and isinstance(arguments[1], str) and set("wax+") & set(arguments[1])
        if not (writes or event in CHANGES):
            return
        path = arguments[0]
        if isinstance(path, int) or (str(path).startswith("/") and not str(path).startswith(here)):
            return
        with one_at_a_time:
            count.value += 1
            if count.value == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    from llmctl.cli.app import run

    sys.addaudithook(hook)
    os._exit(run(argv))


def child(place, command, out, kill_at=0):
    """(exit code, number of file operations) of a command in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    count = context.Value("i", 0, lock=False)  # a lock would be held by the dead
    argv = [{"OUT": out, "BASE": "base", "HF": "hf"}.get(word, word) for word in COMMANDS[command].split()]
    process = context.Process(target=_run, args=(place, argv, kill_at, count))
    process.start()
    process.join(300)
    return process.exitcode, count.value


def content(folder):
    """What a command left, without what differs between equal runs (compressed bytes, dates, the place)."""
    from llmctl.artifacts.manifest_file import read_manifest

    if (folder / "manifest.json").exists():
        made = read_manifest(folder)
        return made.digest, made.content
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.suffix not in (".array_record", ".arrayrecord")
    }


def prepared(folder):
    """Write data, a base artifact and a Hugging Face folder of it."""
    rows = [f"{'good' if i % 2 else 'bad'} film {i} with some words," + ("pos" if i % 2 else "neg") for i in range(80)]
    (folder / "reviews.csv").write_text("\n".join(["text,label", *rows]))
    (folder / "prepare.toml").write_text(
        'data = { source = "csv", path = "reviews.csv" }\n'
        '[[stage]]\nkind = "pretrain"\ntokenizer = { kind = "bytes" }\n'
    )
    assert child(folder, "pretrain", "base")[0] == 0
    assert child(folder, "export", "hf")[0] == 0


def killed(place, command, kills):
    """Kill a command at `kills` of its file operations, one at a time, and run it again; return what was counted."""
    code, operations = child(place, command, f"quiet-{command}")
    assert code == 0 and operations > 2, (command, code, operations)
    wanted = content(place / f"quiet-{command}")
    before = {p.name for p in place.iterdir()}
    points = sorted({1 + round(k * (operations - 1) / max(kills - 1, 1)) for k in range(kills)})
    died = 0
    for at in points:
        out = f"out-{command}"
        code, _ = child(place, command, out, at)
        assert code in (-signal.SIGKILL, 0), (command, at, code)
        died += code != 0
        code, _ = child(place, command, out)
        assert code == 0 or (code == 2 and command in NEW), (command, at, code)  # it was complete, and is not replaced
        assert content(place / out) == wanted, (command, at)
        left = {p.name for p in place.iterdir()} - before
        # A refused command does not write, so it does not remove the lock of the dead process either.
        assert left - ({f".{out}.llmctl-lock"} if code else set()) == {out}, (command, at, left)
        shutil.rmtree(place / out)
    return {"command": command, "operations": operations, "kills": died}


def together(place, command):
    """Start a command twice at once; return both exit codes, after comparing what is there with a quiet run."""
    with ThreadPoolExecutor(2) as both:
        codes = [code for code, _ in both.map(lambda _: child(place, command, f"two-{command}"), range(2))]
    assert sorted(codes) in ([0, 0], [0, 2]), (command, codes)
    assert content(place / f"two-{command}") == content(place / f"quiet-{command}"), command
    return codes


def main(kills, *names):
    """Kill every command, or the named ones, in a folder of its own."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(["llmctl.cli.app", "jax"])
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder).resolve()
        prepared(place)
        for command in names or COMMANDS:
            found = killed(place, command, int(kills)) | {"two at once": together(place, command)}
            sys.stdout.write(json.dumps(found) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
