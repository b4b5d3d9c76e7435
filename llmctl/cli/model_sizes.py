"""Show the sizes of models that do not exist yet: presets, and the parameters, bytes and FLOPs of a config."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from llmctl.cli.summary import size
from llmctl.config.base import read_toml
from llmctl.config.validation import validate
from llmctl.model import config as model_config
from llmctl.model.config import ModelConfig


def model(spec: str) -> ModelConfig:
    """Return the model config of a preset or a TOML file.

    In a file, the config is the first table found: `[model]`, or else the table `model` of a stage. If there is no such
    table, the complete file is the config.

    Raises:
      RequestError: If the preset or file does not exist, or a setting in it is invalid.
    """
    if not spec.endswith(".toml"):
        return validate(ModelConfig, {"preset": spec}, lambda _: "--config")
    given = read_toml(spec)
    inner = [("model", given)]
    stages = given.get("stage", [])
    inner += [(f"stage.{i}.model", s) for i, s in enumerate(stages if isinstance(stages, list) else [])]
    inner = [(place, table) for place, table in inner if isinstance(table, dict)]
    place, values = next(((p, g["model"]) for p, g in inner if isinstance(g.get("model"), dict)), ("", given))
    return validate(ModelConfig, values, lambda at: f"{spec}: {'.'.join(filter(None, (place, at)))}")


def presets() -> list[dict[str, Any]]:
    """Return the name, family, export formats and sizes of every preset, sorted by family and then by parameters."""
    from llmctl.convert import architectures
    from llmctl.model import flops

    found = []
    for name in model_config.presets():
        cfg = ModelConfig(preset=name)
        parameters = flops.parameters(cfg)["total"]
        sizes = {k: getattr(cfg, k) for k in ("layers", "d_model", "vocab_size", "max_seq_len")}
        layers = sizes["layers"] + cfg.encoder_layers
        one = {"preset": name, "family": cfg.family, "architecture": cfg.architecture, "parameters": parameters}
        found.append(one | sizes | {"layers": layers, "exports": architectures.formats(cfg.family)})
    return sorted(found, key=lambda p: (p["family"], p["parameters"]))


def preset_table(found: list[dict[str, Any]]) -> Table:
    """Format the result of `presets` as a table with one row per preset."""
    out = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold", caption=EXPORTS, caption_justify="left")
    for column in ("preset", "family", "architecture"):
        out.add_column(column, overflow="fold")
    for column in ("parameters", "layers", "width", "vocabulary", "positions"):
        out.add_column(column, justify="right")
    out.add_column("export", overflow="fold")
    for p in found:
        figures = (p["parameters"], p["layers"], p["d_model"], p["vocab_size"], p["max_seq_len"])
        formats = ", ".join(f for f in p["exports"] if f in ("hf", "gguf")) or "–"
        out.add_row(p["preset"], p["family"], p["architecture"], *(f"{n:,}" for n in figures), formats)
    return out


EXPORTS = (
    "export: what `llmctl export --to` can write. hf includes compressed-tensors for quantized models and peft for\n"
    "unmerged adapters; gguf is for language models. –: the family exists in llmctl only."
)
"""Caption of the table of presets, which explains the table's column "export"."""


def size_table(found: dict[str, Any]) -> Table:
    """Format the result of `llmctl.model.size_report.report`, the sizes of a model, as a table."""
    out = Table(title=found["config"], title_justify="left", show_header=False)
    for _ in range(2):
        out.add_column(overflow="fold")
    parts = ", ".join(f"{name} {n:,}" for name, n in found["parameters_by_part"].items() if n)
    out.add_row("parameters", f"{found['parameters']:,} ({parts})")
    out.add_row("bytes", ", ".join(f"{name} {size(n)}" for name, n in found["bytes"].items()))
    forward, trained = found["flops_per_token"], found["training_flops_per_token"]
    out.add_row("FLOPs per token", f"{forward:.4g} forward, {trained:.4g} trained (sequences of {found['seq_len']:,})")
    if found["kv_cache_bytes"]:
        each, whole = size(found["kv_cache_bytes_per_token"]), size(found["kv_cache_bytes"])
        out.add_row("KV cache, bfloat16", f"{each} per token, {whole} at {found['max_seq_len']:,} tokens")
        less = found["quantized_kv_cache_bytes_per_token"].items()
        out.add_row("KV cache, quantized", ", ".join(f"{name} {size(n)}" for name, n in less) + " per token")
    return out
