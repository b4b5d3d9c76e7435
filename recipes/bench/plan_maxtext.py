"""Pretraining steps of llmctl versus MaxText, compiled for the same TPU topologies: memory, FLOPs, collectives.

MaxText's figures were measured once, with version 0.2.5 and the same jax and libtpu: float32 parameters and Adam,
bfloat16 compute, FSDP over all chips, sequences of 2,048. llmctl's steps are compiled here, without a TPU, in one to
three minutes each on an idle core. `plan_maxtext.md` has the table.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass

from plan_model import Point, compiled


@dataclass(frozen=True)
class Theirs:
    """Requirements of MaxText's program per device."""

    peak: float
    """Peak memory in bytes."""
    products: float
    """FLOPs of matrix products, with loops counted, without attention kernels."""
    payload: float
    """Bytes of the full arrays that its collectives move."""


def _point(size: str, topology: str, chips: int, rows: int, remat: str) -> Point:
    return Point(size, "fsdp", topology, {"data": 1, "fsdp": chips}, rows * chips, 2048, remat)


PAIRS = {
    "1B-full": (_point("1B", "v5e:4x4", 16, 4, "full"), Theirs(3.053e9, 5.415e13, 5.06 * 2**30)),
    "1B-minimal": (_point("1B", "v5e:4x4", 16, 4, "minimal"), Theirs(8.529e9, 4.371e13, 5.14 * 2**30)),
    "7B-64-full": (_point("7B", "v5e:8x8", 64, 1, "full"), Theirs(3.422e9, 1.018e14, 36.7 * 2**30)),
    "7B-256-qkv": (_point("7B", "v5e:16x16", 256, 4, "qkv"), Theirs(1.077e10, 3.851e14, 37.2 * 2**30)),
}
"""Pairs of programs.

The last MaxText program saves queries, keys and values ("save_qkv_proj"), and looks up embeddings with a matrix
product.
"""

HEAD = ["program", "slice", "rows a device", "peak bytes", "matmul FLOPs", "collectives GiB"]


def row(name: str) -> list[str]:
    """Return one row of the table: ours / theirs = ratio."""
    point, theirs = PAIRS[name]
    found = compiled(point)

    def beside(ours: float, other: float, unit: float = 1.0) -> str:
        return f"{ours / unit:.4g} / {other / unit:.4g} = {ours / other:.3f}"

    chips = point.mesh["fsdp"]
    return [
        name, point.topology, str(point.rows // chips), beside(found["peak"], theirs.peak),
        beside(found["products"], theirs.products), beside(found["payload"], theirs.payload, 2**30),
    ]  # fmt: skip


def main() -> None:
    """Print the table, each row as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", nargs="+", choices=PAIRS, default=list(PAIRS))
    args = parser.parse_args()
    os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    out = sys.stdout.write
    out("| " + " | ".join(HEAD) + " |\n|" + "---|" * len(HEAD) + "\n")
    for name in args.points:
        out("| " + " | ".join(row(name)) + " |\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
