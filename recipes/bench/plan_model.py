"""Accuracy of the cost model behind `plan --search`, compared with programs of the TPU compiler.

The points are pretraining steps of three Llama sizes with AdamW in bfloat16. The meshes shard parameters (fsdp), layers
(tensor), both, or sequences (context), with two rematerialization policies each. Every point is the step that the stage
runs, compiled ahead of time with libtpu; no TPU is needed. A point takes one to two minutes on an idle core.
`plan_model.md` has the table.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SIZES: dict[str, dict[str, Any]] = {
    "1B": {
        "d_model": 2048, "layers": 16, "heads": 16, "kv_heads": 16, "head_dim": 128, "d_ff": 5632,
        "vocab_size": 32_768, "tied": False, "max_seq_len": 4096,
    },
    "3B": {"preset": "llama3.2-3b"},
    "7B": {"preset": "llama2-7b"},
}  # fmt: skip


@dataclass(frozen=True)
class Point:
    """One program of the comparison."""

    size: str
    layout: str
    topology: str
    mesh: dict[str, int]
    rows: int
    seq_len: int
    remat: str

    @property
    def name(self) -> str:
        """Name of the point for --points."""
        return f"{self.size}-{self.layout}-{self.remat}"


def _both(size: str, layout: str, topology: str, mesh: dict[str, int], rows: int, seq_len: int) -> list[Point]:
    return [Point(size, layout, topology, {"data": 1} | mesh, rows, seq_len, r) for r in ("full", "minimal")]


POINTS = [
    *_both("1B", "fsdp", "v5e:4x4", {"fsdp": 16}, 64, 2048),
    *_both("1B", "tensor", "v5e:4x4", {"data": 2, "tensor": 8}, 32, 2048),
    *_both("3B", "tensor", "v5p:2x2x4", {"data": 2, "tensor": 8}, 16, 4096),
    *_both("3B", "hybrid", "v5p:2x4x4", {"fsdp": 4, "tensor": 8}, 32, 4096),
    *_both("3B", "context", "v5p:2x4x4", {"fsdp": 8, "context": 4}, 32, 4096),
    *_both("7B", "fsdp", "v5p:4x4x4", {"fsdp": 64}, 64, 4096),
    *_both("7B", "tensor", "v5p:2x2x4", {"data": 2, "tensor": 8}, 16, 4096),
    *_both("7B", "hybrid", "v5p:4x4x4", {"fsdp": 16, "tensor": 4}, 64, 4096),
]


def compiled(point: Point) -> dict[str, Any]:
    """Compile a point, and return the compiler's figures."""
    from jax.experimental import topologies as devices

    from llmctl.config.validation import validate
    from llmctl.distributed import mesh as meshes
    from llmctl.pipeline.stages import pretrain
    from llmctl.plan import topologies
    from llmctl.plan.hlo import counts as hlo

    model = SIZES[point.size]
    vocab = model.get("vocab_size") or validate_model(model).vocab_size
    config = validate(
        pretrain.Config,
        {
            "kind": "pretrain", "model": model, "tokenizer": {"vocab_size": vocab}, "mesh": point.mesh,
            "train": {"batch_size": point.rows, "seq_len": point.seq_len, "dtype": "bfloat16", "remat": point.remat},
        },
        lambda path: path,
    )  # fmt: skip
    found = devices.get_topology_desc(**topologies.find(point.topology).arguments).devices
    mesh = meshes.make(config.mesh, found)
    program = pretrain.programs(config, None, {}, mesh)[0][0]
    began = time.monotonic()
    done = program.trace().lower().compile()
    memory, counts = done.memory_analysis(), hlo.count(done.as_text(), dict(mesh.shape))
    return {
        "peak": memory.peak_memory_in_bytes,
        "arguments": memory.argument_size_in_bytes,
        "flops": counts.flops + counts.kernel_flops,
        "products": counts.flops,
        "payload": sum(c.payload for c in counts.collectives),
        "sent": sum(c.bytes for c in counts.collectives),
        "collectives": [asdict(c) for c in counts.collectives],
        "moved": counts.bytes,
        "seconds": time.monotonic() - began,
    }


def validate_model(model: dict[str, Any]) -> Any:
    """Return the ModelConfig of a size."""
    from llmctl.model.config import ModelConfig

    return ModelConfig(**model)


def row(point: Point, found: dict[str, Any]) -> list[str]:
    """Return one row of the table: compiled figure, modelled figure, and their ratio."""
    from llmctl.config.settings import OptimConfig, TrainConfig
    from llmctl.plan import analytic_counts, analytic_memory, analytic_setup

    train = TrainConfig(batch_size=point.rows, seq_len=point.seq_len, dtype="bfloat16", remat=point.remat)  # pyright: ignore[reportArgumentType]
    setup = analytic_setup.of_training(validate_model(SIZES[point.size]), train, OptimConfig(), point.mesh)
    memory, counts = analytic_memory.estimate(setup), analytic_counts.counts(setup)
    flops = counts.flops + counts.kernel_flops
    state = memory.parameters + memory.optimizer + memory.batch

    def apart(model: float, truth: float) -> str:
        return f"{100 * (model / truth - 1):+.1f} %"

    return [
        point.size, point.topology, " × ".join(f"{a} {n}" for a, n in point.mesh.items() if n > 1),
        f"{point.rows} × {point.seq_len}", point.remat, f"{found['peak'] / 2**30:.2f}", f"{memory.total / 2**30:.2f}",
        apart(memory.total, found["peak"]), apart(state, found["arguments"]), apart(flops, found["flops"]),
        apart(sum(c.bytes for c in counts.collectives), found["sent"]),
    ]  # fmt: skip


HEAD = ["model", "slice", "mesh", "batch", "remat", "compiled GiB", "model GiB", "apart", "state", "FLOPs", "sent"]


def main() -> None:
    """Print the table, each row as soon as it is known; --keep caches the compiled figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", nargs="+", default=[p.name for p in POINTS], metavar="NAME")
    parser.add_argument("--keep", type=Path, help="a folder for the compiler's figures: what is there is not compiled")
    args = parser.parse_args()
    os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    out = sys.stdout.write
    out("| " + " | ".join(HEAD) + " |\n|" + "---|" * len(HEAD) + "\n")
    for point in (p for p in POINTS if p.name in args.points):
        kept = args.keep and args.keep / f"{point.name}.json"
        if kept and kept.exists():
            found = json.loads(kept.read_text())
        else:
            found = compiled(point)
            if kept:
                kept.parent.mkdir(parents=True, exist_ok=True)
                kept.write_text(json.dumps(found))
        out("| " + " | ".join(row(point, found)) + " |\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
