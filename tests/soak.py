"""Run many small stages in one process, and print its memory, threads and descriptors: `python tests/soak.py 200`.

Six stages repeat with the same shapes: pretrain, finetune, prune, quantize, distill, eval. Compiled programs of new
shapes legitimately stay in memory, so the figures grow for a few cycles, and must level off then.
"""

import gc
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

TINY = "--model.d-model 16 --model.layers 2 --model.heads 2 --model.kv-heads 1 --model.head-dim 8 --model.d-ff 24"
DATA = "--data.source csv --data.path reviews.csv --data.validation 0.2 --data.test 0.2"
TRAIN = "--train.batch-size 8 --train.seq-len 16 --train.log-every 1 --train.checkpoint-every 2 --train.steps 2"
CYCLE = (
    f"pretrain --out pretrain {DATA} {TINY} {TRAIN} --tokenizer.kind bytes",
    f"finetune pretrain --out finetune {DATA} {TRAIN}",
    f"prune finetune --out prune {DATA} --method wanda --examples 8 --seq-len 16",
    "quantize prune --out quantize",
    f"distill --from prune --teacher finetune --out distill {DATA} {TRAIN}",
    f"eval distill --out eval {DATA} --no-plot --examples 16 --batch-size 8",
)


def figures() -> dict[str, float]:
    """Return the memory in MiB, the number of threads, and the number of open descriptors of this process."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    memory = int(status["VmRSS"].split()[0]) / 1024
    return {"MiB": round(memory, 1), "threads": int(status["Threads"]), "descriptors": len(os.listdir("/proc/self/fd"))}


def soak(stages: int) -> list[dict[str, float]]:
    """Run stages in the current folder; return the figures after each."""
    from llmctl.cli import app

    rows = [f"{'good' if i % 2 else 'bad'} film {i} with some words," + ("pos" if i % 2 else "neg") for i in range(80)]
    Path("reviews.csv").write_text("\n".join(["text,label", *rows]))
    found = []
    for stage in range(stages):
        words = CYCLE[stage % len(CYCLE)].split()
        shutil.rmtree(words[words.index("--out") + 1], ignore_errors=True)
        begun = time.monotonic()
        code = app.run(words)
        assert code == 0, (words, code)
        gc.collect()
        found.append(figures())
        about = {"stage": stage + 1, "kind": words[0], **found[-1], "seconds": round(time.monotonic() - begun, 1)}
        sys.stdout.write(json.dumps(about) + "\n")
        sys.stdout.flush()
    return found


def main(stages: str) -> None:
    """Run the stages in a folder of their own, and compare the last quarter with the one before."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        found = soak(int(stages))
        os.chdir("/")
    quarter = len(found) // 4
    for name in found[0]:
        before, after = (
            sum(one[name] for one in part) / quarter for part in (found[-2 * quarter : -quarter], found[-quarter:])
        )
        sys.stdout.write(f"{name}: {before:.1f}, then {after:.1f} in the last {quarter} stages\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
