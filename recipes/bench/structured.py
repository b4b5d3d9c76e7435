"""Speed and perplexity of SmolLM2-135M after structured pruning of heads and neurons, before any healing.

`_compressed.py` describes the texts. Three comparisons: perplexity by importance at equal sizes;
tokens per second against the dense model, timed in turns, beside the ratio of FLOPs; and a budget of half the
parameters against uniform ratios of at most as many parameters. The same command continues an interrupted benchmark.

    pip install --no-deps --target runs/evals evals==3.0.1.post1
    python recipes/bench/structured.py --texts runs/evals --out runs/structured
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _figures
from _compressed import Bench, arguments
from _figures import llmctl

IMPORTANCES = ("activation", "contribution", "taylor", "magnitude", "random")
TIMED = "activation"
"""Importance of the pruned models that are timed. Models of equal size are equally fast."""
PROMPT, NEW = 512, 65
"""Numbers of tokens of the timed prompt and of the continuation. The first new token is part of the prefill."""


def variants(fractions: list[float], importances: list[str]) -> Iterator[tuple[str, list[Any]]]:
    """Yield the name and the flags of every model with the same fraction of heads and neurons removed."""
    for fraction in fractions:
        for importance in importances:
            sizes = ("--remove-heads", fraction, "--remove-ffn", fraction)
            yield f"{fraction:.0%} {importance}", [*sizes, "--importance", importance]


def uniform(dense: Path, share: float) -> list[Any]:
    """Return the flags of uniform ratios with at most a share of the parameters."""
    from llmctl.artifacts.artifact import read_manifest
    from llmctl.compress.structured_pruning.search_space import Space
    from llmctl.model import flops

    def size(model: Any) -> int:
        return flops.parameters(model)["total"]

    cfg = read_manifest(dense).model
    found = Space(cfg).uniform(share * size(cfg), size)
    kept = {"layers": found.layers, "heads": found.heads, "ffn": found.d_ff, "hidden": found.d_model}
    old = {"layers": cfg.layers, "heads": cfg.heads, "ffn": cfg.d_ff, "hidden": cfg.d_model}
    return [word for part, n in kept.items() if n != old[part] for word in (f"--keep-{part}", n)]


def speeds(folders: list[Path], rounds: int) -> dict[str, list[float]]:
    """Return ratios of the second artifact's tokens per second to the first's, timed in turns, and ratios of FLOPs.

    Each list has one ratio per round. The ratios of FLOPs are those of the first artifact to the second's.
    """
    from llmctl.artifacts import artifact
    from llmctl.model import flops
    from llmctl.model.generate.decode import Decoder

    loaded = [artifact.load(folder) for folder in folders]
    decoders = [Decoder(one.model, one.params) for one in loaded]

    def run(decoder: Decoder) -> tuple[float, float]:
        began = time.perf_counter()
        chunks = decoder.generate([list(range(1, PROMPT + 1))], NEW)
        next(chunks)
        middle = time.perf_counter()
        for _ in chunks:
            pass
        return middle - began, time.perf_counter() - middle

    for decoder in decoders:
        run(decoder)  # compile and warm up
    turns = [[run(decoder) for decoder in decoders] for _ in range(rounds)]
    prefill = [flops.row(one.model, PROMPT, predicted=1) for one in loaded]
    both = [flops.row(one.model, PROMPT + NEW, predicted=NEW) for one in loaded]
    decode = [total - first for total, first in zip(both, prefill, strict=True)]
    return {
        "prefill": [old[0] / new[0] for old, new in turns],
        "decode": [old[1] / new[1] for old, new in turns],
        "flops": [prefill[0] / prefill[1], decode[0] / decode[1]],
    }


def main() -> None:
    """Prune, measure and print sizes, perplexity and speed of every variant."""
    parser = arguments(__doc__, "runs/structured", examples=32, scored=32)
    parser.add_argument("--importances", default=",".join(IMPORTANCES))
    parser.add_argument("--fractions", default="0.5,0.25")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-budget", action="store_true", help="leave out the budget of half the parameters")
    given = parser.parse_args()
    bench = Bench(given)

    def measure(name: str, artifact: Path, **more: Any) -> None:
        manifest = json.loads((artifact / "manifest.json").read_text(encoding="utf-8"))
        sizes = {part: manifest["model"][part] for part in ("layers", "heads", "kv_heads", "d_ff", "d_model")}
        bench.measure(name, artifact, parameters=manifest["parameters"], sizes=sizes, **more)

    def prune(name: str, words: list[Any]) -> Path:
        made = given.out / name.replace(" ", "-").replace("%", "percent")
        if not (made / "manifest.json").exists() or name not in bench.results:
            began = time.monotonic()
            llmctl("prune", bench.model, "--out", made, "--method", "structured", *bench.calibration, *words)
            measure(name, made, pruned_in=round(time.monotonic() - began))
        return made

    if "dense" not in bench.results:
        measure("dense", bench.model)
    for name, words in variants([float(f) for f in given.fractions.split(",")], given.importances.split(",")):
        made = prune(name, words)
        timed = f"speed of {name}"
        if name.endswith(f" {TIMED}") and timed not in bench.results:
            bench.keep(timed, speeds([bench.model, made], given.rounds))
    if not given.no_budget:
        prune("half uniform", uniform(bench.model, 0.5))
        prune("half budget", ["--budget.parameters", 0.5])
    shown: dict[str, Any] = _figures.where("jax") | {"protocol": bench.protocol}
    for name, found in bench.results.items():
        if "perplexity" in found:
            sizes = ", ".join(f"{part} {n}" for part, n in found["sizes"].items())
            shown[name] = f"{found['perplexity']:.2f}, {found['parameters']:,} parameters ({sizes})"
            continue
        for part, ratio in zip(("prefill", "decode"), found["flops"], strict=True):
            low, high = min(found[part]), max(found[part])
            middle = statistics.median(found[part])
            shown[f"{name}, {part}"] = f"{middle:.2f} ({low:.2f} to {high:.2f}), FLOPs {ratio:.2f}"
    _figures.show(shown, given.json)


if __name__ == "__main__":
    main()
