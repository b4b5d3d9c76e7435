"""A training step against Hugging Face transformers + torch (eager and compiled), same machine, same run, same shapes.

Llama, 6 layers x 384, vocabulary 8192, batch 16 x 256, float32, AdamW. The programs take turns, so that the ratio holds
where the machine's speed drifts. Also printed: the share of this machine's measured float32 matmul peak, and the peak
memory of each, measured in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

BATCH, LENGTH, VOCAB, WIDTH, LAYERS, HEADS, FF = 16, 256, 8192, 384, 6, 6, 1024
PROGRAMS = ("llmctl", "eager", "compiled")


def ours() -> Callable[[], float]:
    """One step of llmctl, its loss read back."""
    import jax
    import numpy as np

    from llmctl import mesh as meshes
    from llmctl import step, train
    from llmctl.model import ModelConfig
    from llmctl.model.loss import loss_of
    from llmctl.settings import MeshConfig, OptimConfig, TrainConfig

    mesh = meshes.make(MeshConfig())
    model = ModelConfig(
        preset="llama-mini", vocab_size=VOCAB, d_model=WIDTH, layers=LAYERS, heads=HEADS, kv_heads=HEADS, d_ff=FF
    )
    config = TrainConfig(batch_size=BATCH, seq_len=LENGTH)
    params = train.initialize(model, 0, mesh)
    job = step.Job(params=params, loss=loss_of(model, remat=config.remat), rows=None, validate=lambda _: {})
    function, optimizer = step.make_step(job, config, OptimConfig(), 0)
    compiled = jax.jit(function, donate_argnums=0)
    state = step.fresh(optimizer, OptimConfig(), step.split(job)[0])
    tokens = np.random.default_rng(0).integers(0, VOCAB, (BATCH, LENGTH + 1)).astype(np.int32)
    ones = np.ones((BATCH, LENGTH), np.int32)
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": ones.astype(np.float32),
        "segments": ones,
        "positions": np.arange(LENGTH, dtype=np.int32) * ones,
    }
    batch = meshes.place(batch, mesh)

    def run() -> float:
        nonlocal state
        state, metrics = compiled(state, ({}, ()), batch)
        return float(metrics["loss"])

    return run


def theirs(compile_it: bool) -> Callable[[], float]:
    """One step of transformers' Llama with torch's AdamW, its loss read back."""
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
    """The named program."""
    return ours() if name == "llmctl" else theirs(name == "compiled")


def matmul_peak() -> float:
    """This machine's float32 matmul rate (FLOP/s), the best of several products of 2048 x 2048."""
    import jax
    import jax.numpy as jnp

    product = jax.jit(jnp.matmul)
    a = jnp.ones((2048, 2048))
    best = float("inf")
    for _ in range(12):
        began = time.perf_counter()
        product(a, a).block_until_ready()
        best = min(best, time.perf_counter() - began)
    return 2 * 2048**3 / best


def flops() -> float:
    """Matrix products of one step: forward, and twice that backward; causal attention counted in full."""
    body = 2 * BATCH * LENGTH * LAYERS * (4 * WIDTH * WIDTH + 3 * WIDTH * FF)
    attention = 4 * BATCH * LENGTH * LENGTH * WIDTH * LAYERS
    return 3.0 * (body + attention + 2 * BATCH * LENGTH * WIDTH * VOCAB)


def memory(name: str) -> int:
    """Peak resident bytes of a process (on Linux) that runs three steps of the named program."""
    out = subprocess.run([sys.executable, __file__, "--memory", name], check=True, capture_output=True, text=True)
    return int(out.stdout.split()[-1])


def main() -> None:
    """Prints a line a program and the ratio; `--json` prints one object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory", metavar="PROGRAM")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--programs", nargs="+", default=list(PROGRAMS))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.memory:
        run = build(args.memory)
        for _ in range(3):
            run()
        # Not getrusage: what it says includes the memory of the process that this one was forked from.
        status = Path("/proc/self/status").read_text()
        print(int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) * 1024)  # noqa: T201
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
    peak, median = matmul_peak(), {name: statistics.median(s) for name, s in seconds.items()}
    rate = {name: BATCH * LENGTH / s for name, s in median.items()}
    fastest = max((r for name, r in rate.items() if name != "llmctl"), default=float("nan"))
    result = {
        "machine": f"{platform.machine()}, {platform.python_version()}",
        "versions": {p: version(p) for p in ("jax", "torch", "transformers")},
        "tokens_per_second": {name: round(r) for name, r in rate.items()},
        "ratio_to_faster_peer": round(rate["llmctl"] / fastest, 3),
        "share_of_matmul_peak": {name: round(flops() / s / peak, 3) for name, s in median.items()},
        "matmul_peak_gflops": round(peak / 1e9, 1),
        "peak_memory_mib": {name: memory(name) // 2**20 for name in runs},
    }
    if args.json:
        print(json.dumps(result))  # noqa: T201
        return
    for key, value in result.items():
        print(f"{key:24s} {value}")  # noqa: T201


if __name__ == "__main__":
    main()
