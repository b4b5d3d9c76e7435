"""Training step versus Hugging Face transformers with torch (eager and compiled): same machine, same run, same shapes.

The model is a Llama with 6 layers of width 384 and a vocabulary of 8192, in float32 with AdamW and batches of 16 x 256.
The programs alternate, so that the ratio is robust to drift of the machine's speed. The output also has:

- the fraction of this machine's measured float32 matmul peak that each program reaches;
- the fraction that the step's matrix products reach when each runs alone, and their share of the step;
- the peak memory of each program, measured in a separate process.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _figures import show, where

BATCH, LENGTH, VOCAB, WIDTH, LAYERS, HEADS, FF = 16, 256, 8192, 384, 6, 6, 1024
SIZES = {"n": BATCH * LENGTH, "d": WIDTH, "e": WIDTH, "f": FF, "v": VOCAB, "g": BATCH * HEADS, "t": LENGTH, "s": LENGTH}
SIZES |= {"k": WIDTH // HEADS}
PRODUCTS = {
    "projections": ("nd,de->ne", 4 * LAYERS),
    "gate and up": ("nd,df->nf", 2 * LAYERS),
    "down": ("nf,fd->nd", LAYERS),
    "scores": ("gtk,gsk->gts", LAYERS),
    "values": ("gts,gsk->gtk", LAYERS),
    "vocabulary": ("nd,dv->nv", 1),
}
"""Matrix products of the forward pass, and the number of each."""
PROGRAMS = ("llmctl", "eager", "compiled")


def ours() -> Callable[[], float]:
    """Create llmctl's step; it waits for the loss."""
    import jax
    import numpy as np

    from llmctl.config.settings import MeshConfig, OptimConfig, TrainConfig
    from llmctl.data import device_batches
    from llmctl.distributed import mesh as meshes
    from llmctl.evaluate.tasks.registry import default
    from llmctl.model.config import ModelConfig
    from llmctl.train import loop, step, training_state

    mesh = meshes.make(MeshConfig())
    model = ModelConfig(
        preset="llama-mini", vocab_size=VOCAB, d_model=WIDTH, layers=LAYERS, heads=HEADS, kv_heads=HEADS, d_ff=FF
    )
    config = TrainConfig(batch_size=BATCH, seq_len=LENGTH)
    params = loop.initialize(model, 0, mesh)
    job = step.Job(
        params=params, loss=default(model).loss_of(model, remat=config.remat), rows=None, validate=lambda _: {}
    )
    function, optimizer = step.make_step(job, config, OptimConfig(), 0)
    compiled = jax.jit(function, donate_argnums=0)
    state = training_state.fresh(optimizer, OptimConfig(), step.split(job)[0])
    tokens = np.random.default_rng(0).integers(0, VOCAB, (BATCH, LENGTH + 1)).astype(np.int32)
    ones = np.ones((BATCH, LENGTH), np.int32)
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": ones.astype(np.float32),
        "segments": ones,
        "positions": np.arange(LENGTH, dtype=np.int32) * ones,
    }
    batch = device_batches.place(batch, mesh)

    def run() -> float:
        nonlocal state
        state, metrics = compiled(state, ({}, ()), batch)
        return float(metrics["loss"])

    return run


def theirs(compile_it: bool) -> Callable[[], float]:
    """Create the step of transformers' Llama with torch's AdamW; it waits for the loss."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=HEADS, intermediate_size=FF, max_position_embeddings=2048, tie_word_embeddings=True,
        use_cache=False,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, foreach=True)
    forward = torch.compile(model) if compile_it else model
    tokens = torch.randint(0, VOCAB, (BATCH, LENGTH))

    def run() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = forward(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(loss.detach())

    return run


def build(name: str) -> Callable[[], float]:
    """Create the program with this name."""
    return ours() if name == "llmctl" else theirs(name == "compiled")


def matmul_peak() -> float:
    """Measure this machine's float32 matmul rate in FLOP/s: the best of several products of 2048 x 2048."""
    import jax
    import jax.numpy as jnp

    product = jax.jit(jnp.matmul)
    a = jnp.ones((2048, 2048))
    return 2 * 2048**3 / fastest(lambda: product(a, a))


def flops(name: str) -> float:
    """Return the FLOPs per step of one kind of product, forward and (twice as many) backward.

    Causal attention is counted in full.
    """
    spec, times = PRODUCTS[name]
    return 3.0 * times * 2 * math.prod(SIZES[axis] for axis in set(spec) - set(",->"))


def products_alone() -> dict[str, float]:
    """Measure the seconds per step of each kind of product alone, forward and backward, as the best of several runs."""
    import jax
    import jax.numpy as jnp

    seconds = dict.fromkeys(PRODUCTS, 0.0)
    for name, (forward, times) in PRODUCTS.items():
        a, b, c = forward.replace("->", ",").split(",")
        for x, y, z in ((a, b, c), (c, b, a), (a, c, b)):  # the product, and its gradients for both operands
            product = jax.jit(lambda p, q, spec=f"{x},{y}->{z}": jnp.einsum(spec, p, q))
            operands = [jnp.ones([SIZES[axis] for axis in axes]) for axes in (x, y)]
            seconds[name] += times * fastest(lambda product=product, operands=operands: product(*operands))
    return seconds


def fastest(product: Callable[[], Any]) -> float:
    """Return the best time of a dozen runs, in seconds."""
    best = float("inf")
    for _ in range(12):
        began = time.perf_counter()
        product().block_until_ready()
        best = min(best, time.perf_counter() - began)
    return best


def memory(name: str) -> int:
    """Measure the peak resident bytes of a process (on Linux) that runs three steps of the named program."""
    out = subprocess.run([sys.executable, __file__, "--memory", name], check=True, capture_output=True, text=True)
    return int(out.stdout.split()[-1])


def main() -> None:
    """Print one line per program, and the ratio; `--json` prints one object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory", metavar="PROGRAM")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--programs", nargs="+", default=list(PROGRAMS))
    parser.add_argument("--json", action="store_true")
    # All programs run on the CPU. libtpu, if installed for planning, would count as llmctl's memory.
    os.environ["JAX_PLATFORMS"] = "cpu"
    args = parser.parse_args()
    if args.memory:
        run = build(args.memory)
        for _ in range(3):
            run()
        # getrusage would include the memory of the process that forked this one.
        peak = re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        print(int(peak[0]) * 1024)  # noqa: T201
        return
    runs = {name: build(name) for name in args.programs}
    for run in runs.values():  # compile and warm up
        run(), run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(args.rounds):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    peak, alone, median = matmul_peak(), products_alone(), {name: statistics.median(s) for name, s in seconds.items()}
    rate = {name: BATCH * LENGTH / s for name, s in median.items()}
    best = max((r for name, r in rate.items() if name != "llmctl"), default=float("nan"))
    all_of_it = sum(map(flops, PRODUCTS))
    result = {
        **where("jax", "torch", "transformers"),
        "tokens_per_second": {name: round(r) for name, r in rate.items()},
        "ratio_to_faster_peer": round(rate["llmctl"] / best, 3),
        "share_of_matmul_peak": {name: round(all_of_it / s / peak, 3) for name, s in median.items()},
        "products_alone": {
            "share_of_matmul_peak": round(all_of_it / sum(alone.values()) / peak, 3),
            "of_each": {name: round(flops(name) / s / peak, 3) for name, s in alone.items()},
            "share_of_step": {name: round(sum(alone.values()) / s, 3) for name, s in median.items()},
        },
        "matmul_peak_gflops": round(peak / 1e9, 1),
        "peak_memory_mib": {name: memory(name) // 2**20 for name in runs},
    }
    show(result, args.json)


if __name__ == "__main__":
    main()
