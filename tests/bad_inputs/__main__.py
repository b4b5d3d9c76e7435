"""Run the cases whose names contain one of the words, or all; print a line for each that fails, and figures."""

import json
import sys
import tempfile
from pathlib import Path

from valid_inputs import tfds, write

from bad_inputs import cases
from bad_inputs.runner import preload, run


def main(*words: str) -> None:
    """Run the chosen cases."""
    preload()
    chosen = [case for case in cases() if not words or any(word in case.name for word in words)]
    failed, seconds, memory = 0, 0.0, 0
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder).resolve()
        (place / "valid").mkdir()
        valid = write(place / "valid")
        if any("tfds" in case.uses for case in chosen):
            tfds(place / "valid")
        for case in chosen:
            try:
                found = run(case, valid, place / "case")
            except AssertionError as e:
                failed += 1
                sys.stdout.write(f"{' '.join(str(e).split())}\n")
                sys.stdout.flush()
            else:
                seconds, memory = max(seconds, found.seconds), max(memory, found.memory)
    figures = {"inputs": len(chosen), "failed": failed, "most seconds": round(seconds, 1), "most bytes": memory}
    sys.stdout.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
