"""`llmctl prepare`."""

import os
from pathlib import Path
from typing import Annotated

import typer


def prepare(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the prepared data.")],
    recipe_file: Annotated[
        Path | None,
        typer.Argument(
            metavar="RECIPE", help="TOML recipe, for its data and tokenizer and those of its pretrain stage."
        ),
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a setting: data.path=x.csv, tokenizer.kind=bpe."),
    ] = None,
    name: Annotated[
        str, typer.Option(metavar="STAGE", help="Name of the pretrain stage, if the recipe has several.")
    ] = "",
    workers: Annotated[
        int, typer.Option(min=0, help="Number of processes; 0 is one per core. The result is the same.")
    ] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print what was prepared as one JSON object.")] = False,
) -> None:
    """Tokenize a corpus once, in parallel, for training with data.source = "prepared" and data.path = the folder.

    The same command resumes where an interrupted one stopped.
    """
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn
    from rich.table import Table

    from llmctl.data.pretraining.prepare import prepare
    from llmctl.pipeline import console, recipe

    config = recipe.single("pretrain", {"name": name} if name else {}, out, recipe_file, sets or ()).steps[0].config
    screen = console.Console(stderr=True)
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
