"""Define the command `llmctl verify`."""

from pathlib import Path
from typing import Annotated

import typer


def verify(
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATH…", help="Artifact, folder of a run, or folder of prepared data.")
    ],
    base: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Base of an adapter, if it is not next to the adapter.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compare artifacts, complete runs or prepared data with the checksums that were saved with them.

    All weights and shards are read, and also the weights of an adapter's base. The exit code is 2 if anything differs.
    """
    from rich.table import Table

    from llmctl.cli import verification
    from llmctl.config.errors import RequestError
    from llmctl.pipeline import console

    found = [entry for path in paths for entry in verification.run(path, console.say, [base] if base else [])]
    damaged = [entry["path"] for entry in found if entry["state"] == "damaged"]
    if json:
        console.result({"checked": found, "damaged": damaged})
    else:
        table = Table("path", "state", "differences")
        for entry in found:
            table.add_row(entry["path"], entry["state"], "\n".join(entry["differences"] + entry["notes"]))
        console.show(table)
    if damaged:
        raise RequestError(
            f"{', '.join(damaged[:3])}{f' and {len(damaged) - 3} more' if len(damaged) > 3 else ''}: damaged; remove "
            "what is damaged and make it again with the same command"
        )
