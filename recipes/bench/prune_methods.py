"""Perplexity of SmolLM2-135M after pruning by each method, with and without repair, at 50 % and at 2:4.

`_compressed.py` describes the texts. `protocol` in the result names the rest. Each model is pruned in a process of its
own, whose peak memory is measured. The same command continues an interrupted benchmark.

    pip install --no-deps --target runs/evals evals==3.0.1.post1
    python recipes/bench/prune_methods.py --texts runs/evals --out runs/prune_methods
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import _figures
from _compressed import Bench, arguments

METHODS = ("magnitude", "wanda", "ria", "sparsegpt")
PATTERNS: dict[str, list[Any]] = {"50%": ["--sparsity", 0.5], "2:4": ["--pattern", "2:4"]}


def variants(patterns: list[str], methods: list[str]) -> Iterator[tuple[str, list[Any]]]:
    """Yield the name and the flags of every pruned model. SparseGPT's solver is a repair of its own."""
    for repair in (False, True):
        for pattern in patterns:
            for method in methods:
                if repair and method == "sparsegpt":
                    continue
                name = f"{pattern} {method}{' + repair' * repair}"
                yield name, ["--method", method, *PATTERNS[pattern], *["--repair"] * repair]


def main() -> None:
    """Prune, measure and print perplexity, mean error of the layers, seconds and peak memory of every variant."""
    parser = arguments(__doc__, "runs/prune_methods", examples=128, scored=0)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--patterns", default=",".join(PATTERNS))
    given = parser.parse_args()
    bench = Bench(given)
    if "dense" not in bench.results:
        bench.measure("dense", bench.model)
    for name, words in variants(given.patterns.split(","), given.methods.split(",")):
        bench.compress(name, "prune", [*bench.calibration, *words])
    shown: dict[str, Any] = _figures.where("jax") | {"protocol": bench.protocol}
    _figures.show(shown | {name: bench.described(name) for name in bench.results}, given.json)


if __name__ == "__main__":
    main()
