"""Regression test of planned steps: demo and Llama 2 7B on 16 TPU chips, compared with `plan_check.json`.

It fails if the TPU compiler refuses a step, or if a step needs more than `LIMIT` times the recorded memory or FLOPs. It
also fails if they shrink by as much, because then the counting is doubtful. `--write` records new figures after an
intended change. No TPU is needed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
FIGURES = HERE / "plan_check.json"
LIMIT = 1.5
"""Maximum ratio to the recorded figures: well below 2, and well above the changes between compiler releases."""
TOPOLOGY = "v5e:4x4"
SMALL = ("batch_size=16", "accumulate=1", 'remat="full"')
"""Overrides for one row per chip in a microbatch, because the recipe's batch is for more chips."""
STEPS = {
    "demo": ["demo.toml", "--stage", "pretrain"],
    "llama2-7b": ["llama2-7b.toml", *(word for s in SMALL for word in ("--set", f"stage.pretrain.train.{s}"))],
}


def planned(words: list[str]) -> dict[str, float]:
    """Run `llmctl plan` in a separate process, and return the bytes and FLOPs of one device.

    Raises:
        CalledProcessError: If it fails. A step too large for the chip is not a failure.
    """
    recipe, *rest = words
    command = [sys.executable, "-m", "llmctl", "plan", str(HERE.parent / recipe), "--topology", TOPOLOGY, "--json"]
    found = json.loads(subprocess.run([*command, *rest], check=True, stdout=subprocess.PIPE).stdout)
    return {"hbm_bytes": found["hbm_bytes"]["total"], "device_flops": found["device_flops"]}


def main() -> None:
    """Print each figure with the recorded one; the exit code is 1 if they differ too much."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="commit to what is found")
    args = parser.parse_args()
    found = {name: planned(words) for name, words in STEPS.items()}
    if args.write:
        FIGURES.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    committed = json.loads(FIGURES.read_text(encoding="utf-8"))
    apart = False
    for name, figures in found.items():
        for figure, now in figures.items():
            before = committed[name][figure]
            apart |= not before / LIMIT <= now <= LIMIT * before
            sys.stdout.write(f"{name} {figure}: {now:.4g}, committed {before:.4g}, {now / before:.3f} times\n")
    if apart:
        sys.exit(f"more than {LIMIT} times what it was, or less by as much: find out why, or take it anew with --write")


if __name__ == "__main__":
    main()
