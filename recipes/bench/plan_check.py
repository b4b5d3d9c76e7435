"""The steps of the demo and of Llama 2 7B planned for 16 TPU chips, against the figures of `plan_check.json`.

Fails where the TPU compiler refuses a step, or where one takes more than `LIMIT` times the memory or the operations
that it once took, or so much less that the counting is to be doubted. `--write` takes the figures anew, after a change
that is meant. No TPU is needed.
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
"""Well below a doubling, well above what another release of the compiler changes."""
TOPOLOGY = "v5e:4x4"
SMALL = ("batch_size=16", "accumulate=1", 'remat="full"')
"""A microbatch of one row a chip: the recipe's own batch is for more chips."""
STEPS = {
    "demo": ["demo.toml", "--stage", "pretrain"],
    "llama2-7b": ["llama2-7b.toml", *(word for s in SMALL for word in ("--set", f"stage.pretrain.train.{s}"))],
}


def planned(words: list[str]) -> dict[str, float]:
    """`llmctl plan`, in a process of its own: bytes and operations of one device.

    Raises CalledProcessError where it fails; a step too large for the chip is no failure, but a figure.
    """
    recipe, *rest = words
    command = [sys.executable, "-m", "llmctl", "plan", str(HERE.parent / recipe), "--topology", TOPOLOGY, "--json"]
    found = json.loads(subprocess.run([*command, *rest], check=True, stdout=subprocess.PIPE).stdout)
    return {"hbm_bytes": found["hbm_bytes"]["total"], "device_flops": found["device_flops"]}


def main() -> None:
    """Prints each figure beside the committed one; exit code 1 where they are too far apart."""
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
