"""Define the command `llmctl prepare`."""

import os
from pathlib import Path
from typing import Annotated

import typer


def prepare(
    recipe_file: Annotated[
        Path | None,
        typer.Argument(
            metavar="RECIPE", help="TOML recipe, for its data and tokenizer and those of its pretrain stage."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of the prepared data.")] = None,
    splits: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Instead: write train, validation and test split as JSON lines there."),
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a setting: data.path=x.csv, tokenizer.kind=bpe."),
    ] = None,
    name: Annotated[
        str, typer.Option(metavar="STAGE", help="Name of the stage whose data it is, if the recipe has several.")
    ] = "",
    workers: Annotated[
        int, typer.Option(min=0, help="Number of processes; 0 is one per core. The result is the same.")
    ] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print what was prepared as one JSON object.")] = False,
) -> None:
    """Tokenize a corpus once, in parallel. To train on it, set data.source = "prepared" and data.path to the folder.

    If the command is interrupted, run it again to resume.
    """
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn
    from rich.table import Table

    from llmctl.artifacts import atomic
    from llmctl.config.errors import RequestError
    from llmctl.config.terminal import terminal
    from llmctl.data.pretraining.prepare import prepare
    from llmctl.pipeline import console, recipe

    if (out is None) == (splits is None):
        raise RequestError("prepare: say --out DIR for the prepared data, or --splits DIR for the splits as JSON lines")
    if splits:
        atomic.check(splits, "--splits")
        _write_splits(recipe_file, splits, sets or [], name, json)
        return
    assert out is not None
    config = recipe.single("pretrain", {"name": name} if name else {}, out, recipe_file, sets or ()).steps[0].config
    screen = terminal(stderr=True)
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=screen, disable=not screen.is_terminal) as bar:
        task = bar.add_task("documents", total=None)
        found = prepare(
            config.data,  # pyright: ignore[reportAttributeAccessIssue]: a pretrain config
            config.tokenizer,  # pyright: ignore[reportAttributeAccessIssue]
            out,
            workers or os.cpu_count() or 1,
            lambda done, total: bar.update(task, completed=done, total=total),
            console.say,
        )
    counts = {
        split: {
            "documents": found.documents(split),
            "tokens": found.tokens(split),
            "shards": sum(len(part.shards) for part in parts),
        }
        for split, parts in found.splits.items()
    }
    if json:
        console.result({"prepared": str(out), "tokenizer": found.tokenizer, "splits": counts})
        return
    table = Table("split", "documents", "tokens", "shards", title=str(out))
    for split, row in counts.items():
        table.add_row(split, *(f"{n:,}" for n in row.values()))
    console.show(table)


def _write_splits(recipe_file: Path | None, folder: Path, sets: list[str], name: str, json: bool) -> None:
    """Write the data splits of the stage called `name` as JSON lines. If `name` is empty, use the first stage with
    data.

    Raises:
      RequestError: If the stage has no data.
    """
    from rich.table import Table

    from llmctl.config.base import hint
    from llmctl.config.errors import RequestError
    from llmctl.data import write_splits
    from llmctl.pipeline import console, recipe

    if recipe_file:
        steps = recipe.read(recipe_file, None, sets).steps
    else:
        steps = recipe.single("pretrain", {}, folder, None, sets).steps
    found = {step.name: step.config for step in steps if getattr(step.config, "data", None)}
    if name and name not in found:
        raise RequestError(f"prepare: --name {name}: no stage with data{hint(name, list(found))}: {', '.join(found)}")
    if not found:
        raise RequestError(f"{recipe_file}: no stage has data")
    config = found[name] if name else next(iter(found.values()))
    counts, loaded = write_splits.write(config.data, folder)  # pyright: ignore[reportAttributeAccessIssue]: it has data
    if json:
        files = {split: {"file": str(path), "rows": n} for split, (path, n) in counts.items()}
        console.result({"splits": files, "rows": loaded.rows, "left_out": loaded.left_out})
        return
    columns = ", ".join(loaded.examples["train"].columns)
    table = Table("split", "rows", "file", title=f"columns: {columns}", title_justify="left")
    for split, (path, n) in counts.items():
        table.add_row(split, f"{n:,}", str(path))
    console.show(table)
    console.show(loaded.describe())
