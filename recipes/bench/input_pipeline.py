"""Speed of the input pipeline alone, relative to the training step that it feeds.

The first stage of a recipe is trained for some steps as in `llmctl run`. The step speed and input wait are read from
its log. The same batches are then built and put on the devices without training, on the same machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from _figures import show, where


def trained(recipe: str, run: Path, steps: int) -> tuple[str, list[dict[str, float]]]:
    """Train the first stage, and return its name and the log lines that contain a speed."""
    from llmctl.pipeline import console, runner
    from llmctl.pipeline import recipe as recipes

    found = recipes.read(recipe, run)
    name = found.steps[0].name
    found = recipes.read(recipe, run, [f"stage.{name}.train.steps={steps}", f"stage.{name}.train.log_every=10"])
    runner.run(found, only=[name], say=console.say)
    lines = [json.loads(line) for line in (run / name / "log.jsonl").read_text().splitlines()]
    return name, [line for line in lines if "tokens_per_second" in line]


def alone(recipe: str, artifact: Path, cache: Path, batches: int) -> float:
    """Return the tokens per second of building the stage's batches and putting them on the devices."""
    from llmctl.data.device_batches import DeviceBatches
    from llmctl.data.pretraining.lm_corpus import Text
    from llmctl.data.tokenizers import loading
    from llmctl.distributed import mesh as meshes
    from llmctl.pipeline import recipe as recipes

    config: Any = recipes.read(recipe).steps[0].config
    feeding = DeviceBatches(meshes.make(config.mesh), config.train.batch_size)
    rows = Text(config.data).rows(
        "train", loading.load(artifact / "tokenizer"), config.train.seq_len, cache,
        seed=config.seed, packing=config.packing,
    )  # fmt: skip
    first = batches // 10
    with feeding.training(rows, 0, first + batches) as built:
        for _ in range(first):  # threads start and pages are loaded
            next(built)
        began = time.perf_counter()
        for _ in range(batches):
            next(built)
        seconds = time.perf_counter() - began
    return batches * config.train.batch_size * config.train.seq_len / seconds


def main() -> None:
    """Print one line per figure; `--json` prints one object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="recipes/demo.toml")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batches", type=int, default=3000)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        name, lines = trained(args.recipe, run, args.steps)
        step = statistics.median(line["tokens_per_second"] for line in lines)
        pipe = alone(args.recipe, run / name, Path(folder) / "cache", args.batches)
    waits = [line["input_wait"] for line in lines]
    result = {
        **where("jax", "grain"),
        "step_tokens_per_second": round(step),
        "pipeline_tokens_per_second": round(pipe),
        "ratio": round(pipe / step, 1),
        "input_wait_median": round(statistics.median(waits), 4),
        "input_wait_most": round(max(waits), 4),
    }
    show(result, args.json)


if __name__ == "__main__":
    main()
