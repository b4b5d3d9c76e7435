"""Define the command `llmctl run`."""

from pathlib import Path
from typing import Annotated

import typer

from llmctl.cli.flags import Coordinator, NumProcesses, ProcessId


def run(
    recipe_file: Annotated[Path, typer.Argument(metavar="RECIPE", help="TOML recipe.")],
    folder: Annotated[
        Path | None,
        typer.Option("--run", metavar="DIR", help="Folder of the artifacts; runs/<recipe's name> by default."),
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Override a setting: stage.2.sparsity=0.6 (from 0), data.path=x.csv."
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="STAGE", help="Run only this stage (repeatable); its inputs must be up to date."),
    ] = None,
    coordinator: Coordinator = "",
    num_processes: NumProcesses = 0,
    process_id: ProcessId = -1,
    json: Annotated[bool, typer.Option("--json", help="Print the closing table as one JSON object.")] = False,
) -> None:
    """Run all stages of a recipe that are not done, then print a table of all artifacts."""
    from llmctl.cli import summary as shown
    from llmctl.pipeline import console, recipe, runner

    chosen = recipe.read(recipe_file, folder, sets or ())
    processes = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    runner.run(chosen, only or (), console.say, processes)
    found = shown.run(chosen.run)
    for report in shown.reports(chosen.run):
        console.say(f"report: {report}")
    if json:
        console.result(found)
    else:
        console.show(shown.run_table(found, f"{chosen.name} ({chosen.run})"))
