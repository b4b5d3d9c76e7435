"""Compile time of a training step with 24 layers versus 6 layers; scanned layers should make it independent of depth.

Prints both medians, their ratio, and the number of instructions in the compiled programs. The two compilations
alternate, so that the ratio is robust to drift of the machine's speed. The compilation cache is not used.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import time
from typing import Any

from _figures import show, where

BATCH, LENGTH = 8, 256


def lowered(layers: int, axes: dict[str, int], **sizes: Any) -> Any:
    """Trace, without compiling, the training step of a Llama with width 384 and `layers` layers (or other sizes)."""
    import jax
    import jax.numpy as jnp

    from llmctl.config.settings import MeshConfig, OptimConfig, TrainConfig
    from llmctl.distributed import mesh as meshes
    from llmctl.evaluate.tasks.registry import default
    from llmctl.model import functional, pipeline_parallel
    from llmctl.model.config import ModelConfig
    from llmctl.train import step

    mesh = meshes.make(MeshConfig(**axes))
    model = ModelConfig(preset="llama-mini", layers=layers, **sizes)
    shapes = functional.abstract(model)
    lies = functional.shardings(model, shapes, mesh)
    params = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, lies)
    job = step.Job(params=params, loss=default(model).loss_of(model), rows=None, validate=lambda _: {})
    runs = step.program(job, TrainConfig(batch_size=BATCH, seq_len=LENGTH), OptimConfig(), mesh, 0)
    whole = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32, sharding=meshes.batch_sharding(mesh, 2))
    batch = dict.fromkeys(("tokens", "targets", "segments", "positions"), whole)
    batch |= {"weights": whole.update(dtype=jnp.dtype("float32"))}
    with meshes.use(mesh), pipeline_parallel.use(axes.get("pipeline", 1)):
        return runs.step.lower(runs.state, (runs.fixed, ()), batch)


def instructions(text: str) -> int:
    """Count the instructions of a compiled program, including those in loop bodies."""
    return len(re.findall(r"^ +(?:ROOT )?%\S+ = ", text, flags=re.MULTILINE))


def main() -> None:
    """Print one line per figure; `--json` prints one object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs=2, default=(6, 24), metavar="N")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pipeline", type=int, default=1, help="stages, on as many fake CPU devices")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.pipeline > 1:
        os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={args.pipeline}"

    import jax

    jax.config.update("jax_enable_compilation_cache", False)
    axes = {"pipeline": args.pipeline} if args.pipeline > 1 else {}
    seconds: dict[int, list[float]] = {n: [] for n in args.layers}
    processor: dict[int, list[float]] = {n: [] for n in args.layers}
    counts = {}
    lowered(args.layers[0], axes)  # one-time work of the process
    for _ in range(args.rounds):
        for n in args.layers:
            began, used = time.perf_counter(), time.process_time()
            compiled = lowered(n, axes).compile()
            seconds[n].append(time.perf_counter() - began)
            processor[n].append(time.process_time() - used)
            counts[n] = instructions(compiled.as_text())
    few, many = args.layers
    median = {n: statistics.median(s) for n, s in seconds.items()}
    busy = {n: statistics.median(s) for n, s in processor.items()}
    result = {
        **where("jax", "jaxlib", "flax"),
        "stages": args.pipeline,
        "seconds": {n: round(s, 2) for n, s in median.items()},
        "ratio": round(median[many] / median[few], 3),
        "processor_seconds": {n: round(s, 2) for n, s in busy.items()},
        "processor_ratio": round(busy[many] / busy[few], 3),
        "instructions": counts,
        "instructions_ratio": round(counts[many] / counts[few], 3),
    }
    show(result, args.json)


if __name__ == "__main__":
    main()
