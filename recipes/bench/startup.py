"""Startup time of `llmctl --help`: the median over new processes. The limit is 0.5 s."""

import statistics
import subprocess
import sys
import time

RUNS = 11


def main() -> None:
    """Print the median and maximum of `RUNS` processes, without the first one (cold disk)."""
    seconds = []
    for _ in range(RUNS + 1):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "llmctl", "--help"], check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - began)
    warm = seconds[1:]
    sys.stdout.write(f"llmctl --help: median {statistics.median(warm):.3f} s, slowest {max(warm):.3f} s of {RUNS}\n")


if __name__ == "__main__":
    main()
