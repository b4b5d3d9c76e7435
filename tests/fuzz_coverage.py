"""Fuzz every parser, guided by the coverage of llmctl's code: `python tests/fuzz_coverage.py SECONDS FOLDER [PARSER…]`.

It needs atheris (libFuzzer for Python), which is no dependency: `pip install atheris`. Two processes share FOLDER: the
inputs that reached new code (`corpus`), and those that ended in something else than a value or a refusal, one per place
in the code (`findings`). The first byte of an input says for which parser it is. A new input is a changed valid file
(`fuzz_inputs`), or one that libFuzzer changed.
"""

import collections
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
import traceback
from pathlib import Path

LIBRARIES = ["llmctl", "gguf", "jinja2", "csv", "json", "tomllib"]
"""Packages whose coverage guides the search."""
MEMORY = 4096
"""Limit of a process's resident size and of one allocation, in MiB."""
STEPS = 100_000
"""Limit of steps of a chat template here, so that endless loops do not take all of the time."""
PROCESSES = 2


def fuzz(seconds: int, folder: Path, names: list[str]) -> None:
    """Fuzz the parsers in this process, which libFuzzer ends."""
    import atheris

    with atheris.instrument_imports(include=LIBRARIES):
        import fuzz_inputs
        import fuzz_parsers
        import valid_inputs

        from llmctl.data import template_sandbox

    template_sandbox.TEMPLATE_STEPS = STEPS
    work = folder / f"work-{os.getpid()}"
    (work / "valid").mkdir(parents=True)
    valid = valid_inputs.write(work / "valid")
    valid_inputs.tfds(valid.folder)
    parsers = fuzz_parsers.parsers(valid)
    chosen = [name for name in parsers if not names or name in names]
    targets, seeds = [], []
    for k, name in enumerate(chosen):
        (work / str(k)).mkdir()
        targets.append(parsers[name].target(work / str(k)))
        seeds.append(bytes([k]) + parsers[name].valid)
        (folder / "corpus" / f"valid-{k}").write_bytes(seeds[-1])
    counts, written = collections.Counter(dict.fromkeys(chosen, 0)), time.monotonic()

    def one(data: bytes) -> None:
        nonlocal written
        if not data or data[0] >= len(chosen):
            return
        name = chosen[data[0]]
        parser, target = parsers[name], targets[data[0]]
        counts[name] += 1
        if time.monotonic() > written + 5:
            written = time.monotonic()
            (work / "counts").write_text(json.dumps(counts))
            (work / "counts").rename(folder / "counts" / str(os.getpid()))
        parser.put(target, data[1:])
        try:
            fuzz_parsers.judge(lambda: parser.read(target))
        except AssertionError as e:
            keep(folder / "findings", name, data[1:], e)

    def change(data: bytes, size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < 0.3 or not data or data[0] >= len(chosen):
            data = seeds[chosen.index(min(counts, key=counts.__getitem__))]
        if rng.random() < 0.3:
            return data[:1] + atheris.Mutate(data[1:], size - 1)
        try:
            return data[:1] + parsers[chosen[data[0]]].change(rng, data[1:])[: size - 1]
        except Exception:  # what was changed before is no longer of its format
            return data[:1] + fuzz_inputs.octets(rng, data[1:])[: size - 1]

    about = [
        f"-max_len={2 * max(map(len, seeds))}",
        "-len_control=0",
        f"-max_total_time={seconds}",
        "-timeout=600",
        "-report_slow_units=600",
    ]
    about += [f"-rss_limit_mb={MEMORY}", f"-artifact_prefix={folder}/crash-", str(folder / "corpus")]
    atheris.Setup([sys.argv[0], *about], one, custom_mutator=change)
    try:
        atheris.Fuzz()
    finally:  # threads of libraries would keep the process
        traceback.print_exc()
        os._exit(1)


def keep(folder: Path, name: str, data: bytes, error: AssertionError) -> None:
    """Save an input with its ending, if it is the first for this parser and place in the code."""
    cause = error.__cause__ or error
    frames = traceback.extract_tb(cause.__traceback__)
    ours = [f for f in frames if "/llmctl/" in f.filename] or frames
    where = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(ours[-3:]))
    title = f"{type(cause).__name__} {where}" if error.__cause__ else re.sub(r"[\d.]+", "N", str(error))
    file = folder / f"{re.sub(r'[^a-z.]', '_', name)}-{hashlib.sha256(title.encode()).hexdigest()[:8]}.bin"
    if not file.exists():
        file.write_bytes(data)
        whole = "".join(traceback.format_exception(cause))
        file.with_suffix(".txt").write_text(f"{name}: {title}\n{error}\n{whole}", errors="replace")


def main(seconds: str, folder: str, *names: str) -> None:
    """Fuzz all parsers, or those named; print how often each ran, and the findings."""
    place, ends = Path(folder).resolve(), time.monotonic() + int(seconds)
    for made in ("corpus", "findings", "counts", "logs"):
        (place / made).mkdir(parents=True, exist_ok=True)
    running: list[subprocess.Popen] = []
    endings: list[str] = []
    while time.monotonic() < ends or running:
        for process in [p for p in running if p.poll() is not None]:
            running.remove(process)
            if process.returncode:
                endings.append(f"{process.pid}: exit {process.returncode}")
        while len(running) < PROCESSES and (left := int(ends - time.monotonic())) > 0:
            log = (place / "logs" / f"{time.monotonic_ns()}").open("w")
            argv = [sys.executable, __file__, "--one", str(left), str(place), *names]
            running.append(subprocess.Popen(argv, stdout=log, stderr=log))
            log.close()
        time.sleep(1)
    counts = collections.Counter()
    for file in (place / "counts").iterdir():
        counts.update(json.loads(file.read_text()))
    for name, count in counts.items():
        sys.stdout.write(f"{name}: {count:,}\n")
    for file in sorted((place / "findings").glob("*.txt")):
        sys.stdout.write(f"finding: {file.read_text().splitlines()[0]}\n")
    for work in place.glob("work-*"):
        shutil.rmtree(work)
    sys.stdout.write(f"{counts.total():,} inputs; other endings: {', '.join(endings) or 'none'}\n")


if __name__ == "__main__":
    if sys.argv[1] == "--one":
        fuzz(int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
    else:
        main(*sys.argv[1:])
