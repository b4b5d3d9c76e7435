"""Report the heads and neurons that each layer keeps, and the size of the model before and after structured pruning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from llmctl.compress.pruning.prune_report import layer_table
from llmctl.compress.structured_pruning import stored_bytes
from llmctl.model import flops, functional
from llmctl.model.config import ModelConfig

Record = dict[str, Any]

MISSED = 0.1
"""Largest accepted difference between the measured latency and its target, as a fraction of the target. If the
difference is larger, the target counts as missed."""


def layers(before: ModelConfig, after: ModelConfig, found: Mapping[str, Any]) -> list[Record]:
    """Return one dictionary of JSON data per layer of the unpruned model.

    Args:
      before: config of the unpruned model.
      after: config of the pruned model.
      found: metrics of `prune_structure`.

    Returns:
      {"stack", "layer", "kept", "influence", "heads", "kv_heads", "neurons", "error"}. The numbers of heads and neurons
      are counted after pruning. `error` is the relative error of the layer's output. Values that were not measured are
      omitted. A removed layer has no numbers and no error.
    """
    units = {(u["stack"], u["layer"]): u for u in found.get("units", [])}
    records: list[Record] = []
    for stack in functional.stacks(before):
        every = range(functional.depth(before, stack))
        kept = list(found.get("layers_kept", {}).get(stack, every))
        influence = found.get("influence", {}).get(stack)
        for i in every:
            record: Record = {"stack": stack, "layer": i, "kept": i in kept}
            if influence:
                record["influence"] = round(influence[i], 6)
            if i in kept:
                record |= {"heads": after.heads, "kv_heads": after.kv_heads, "neurons": after.d_ff}
                if unit := units.get((stack, kept.index(i))):
                    record["error"] = unit["error"]
            records.append(record)
    return records


def sizes(cfg: ModelConfig, params: Any, seq_len: int, latency: Mapping[str, float] | None = None) -> Record:
    """Return the size of a model as JSON data.

    Returns:
      {"parameters", "bytes", "flops_per_token", "layers", "heads", "kv_heads", "neurons", "hidden", "vocabulary"}, and
      "prefill_seconds" and "decode_seconds" if the latency was measured. `bytes` is the size of the arrays in memory.
    """
    found: Record = {
        "parameters": flops.parameters(cfg)["total"],
        "bytes": int(stored_bytes.counter(cfg, params)(cfg)),
        "flops_per_token": round(flops.flops(cfg, seq_len)),
        "layers": cfg.layers + cfg.encoder_layers,
        "heads": cfg.heads,
        "kv_heads": cfg.kv_heads,
        "neurons": cfg.d_ff,
        "hidden": cfg.d_model,
        "vocabulary": cfg.vocab_size,
    }
    return found | {f"{part}_seconds": seconds for part, seconds in (latency or {}).items()}


def layers_table(records: Sequence[Record], before: ModelConfig) -> Table:
    """Return a table with one row per layer: kept heads and neurons, block influence, and error of the output."""

    def left(record: Record, name: str, whole: int) -> str:
        return f"{record[name]}/{whole}" if record["kept"] else "removed"

    columns = {
        "layer": [f"{r['stack']} {r['layer']}" for r in records],
        "influence": [f"{r['influence']:.4f}" if "influence" in r else "" for r in records],
        "heads": [left(r, "heads", before.heads) for r in records],
        "neurons": [left(r, "neurons", before.d_ff) for r in records],
        "output error": [f"{r['error']:.4f}" if "error" in r else "" for r in records],
    }
    return layer_table("layers after pruning", columns)


def sizes_table(before: Record, after: Record) -> Table:
    """Return a table of sizes and latencies: before, after, and ratio. Sizes that did not change are omitted."""
    out = Table(title="size of the model", title_justify="left", header_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    out.add_column("")
    for title in ("before", "after", "ratio"):
        out.add_column(title, justify="right")
    for name, old in before.items():
        new = after[name]
        if old == new:
            continue
        timed = name.endswith("_seconds")
        texts = (f"{1e3 * n:.3g} ms" if timed else f"{n:,}" for n in (old, new))
        out.add_row(name.removesuffix("_seconds").replace("_", " "), *texts, f"{new / old:.3f}")
    return out


def latencies(timed: Mapping[str, Any], again: Mapping[str, Mapping[str, float]], target: float) -> Record:
    """Return the measured latency of the pruned model as JSON data.

    Args:
      timed: metrics of the search for a budget of latency.
      again: latencies of the unpruned and the pruned model, which ran in alternation: {"before": {phase: seconds}, …}.
      target: fraction of the latency to keep.

    Returns:
      {"before_seconds", "after_seconds", "ratio", "target", "met"}. `met` is false if the ratio differs from the target
      by more than `MISSED`.
    """
    before, after = (again[name][timed["of"]] for name in ("before", "after"))
    ratio = after / before
    found = {"before_seconds": before, "after_seconds": after, "ratio": ratio, "target": target}
    return found | {"met": abs(ratio / target - 1) <= MISSED}


def latency_line(timed: Mapping[str, Any]) -> str:
    """Return a line about the measured latency of the pruned model. If the target is missed, the line is a warning."""
    before, after, predicted = (1e3 * timed[f"{name}_seconds"] for name in ("before", "after", "predicted"))
    line = (
        f"latency ({timed['of']}, {timed['batch_size']:,} x {timed['context']:,} tokens): {before:.3g} → {after:.3g} "
        f"ms, predicted {predicted:.3g} ms; {timed['ratio']:.3f} of the time before, asked {timed['target']:g}"
    )
    if timed["met"]:
        return line
    side = "above" if timed["ratio"] > timed["target"] else "below"
    return f"warning: {line}, so the latency is more than {MISSED:.0%} {side} the target"
