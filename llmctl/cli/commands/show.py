"""Define the command `llmctl show`."""

from pathlib import Path
from typing import Annotated

import typer


def show(
    path: Annotated[Path | None, typer.Argument(metavar="[PATH]", help="Artifact, or folder of a run.")] = None,
    config: Annotated[
        str,
        typer.Option(
            metavar="PRESET|TOML", help="Instead: parameters, bytes and FLOPs of a model that does not exist yet."
        ),
    ] = "",
    presets: Annotated[
        bool, typer.Option("--presets", help="Instead: all values of model.preset, with family and size.")
    ] = False,
    seq_len: Annotated[int, typer.Option(min=0, help="With --config: tokens per sequence; 0 uses the model's.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show an artifact, a run as a table in lineage order, the presets, or the size of a model."""
    from rich.text import Text

    from llmctl.cli import model_sizes
    from llmctl.cli import summary as shown
    from llmctl.config.errors import RequestError
    from llmctl.config.terminal import visible
    from llmctl.pipeline import console
    from llmctl.pipeline.recipe import MANIFEST

    if (path is not None) + bool(config) + presets != 1:
        raise RequestError("show: name an artifact or a run, or --config with a preset or a TOML file, or --presets")
    if presets:
        found = model_sizes.presets()
        if json:
            console.result({"presets": found})
        else:
            console.show(model_sizes.preset_table(found))
        return
    if path is None:
        from llmctl.model import size_report

        sizes = {"config": config, **size_report.report(model_sizes.model(config), seq_len)}
        if json:
            console.result(sizes)
        else:
            console.show(model_sizes.size_table(sizes))
        return
    if not path.is_dir():
        raise RequestError(f"{path}: no such folder")
    if not (path / MANIFEST).exists():
        found = shown.run(path)
        if json:
            console.result(found)
        else:
            console.show(shown.run_table(found, str(path)))
        return
    found = shown.one(path)
    if json:
        console.result(found)
        return
    console.show(shown.table([found], str(path)))
    for key in ("format", "digest", "key", "parent", "labels", "metrics", "model", "config", "versions"):
        if found.get(key):
            console.show(Text.assemble((key, "bold"), f" {visible(_plain(found[key]))}"))


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return "  ".join(f"{k}={_plain(v)}" for k, v in value.items())
    return str(value)
