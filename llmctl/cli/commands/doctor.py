"""Define the command `llmctl doctor`."""

from pathlib import Path
from typing import Annotated

import typer


def doctor(
    recipe_file: Annotated[
        Path | None, typer.Argument(metavar="RECIPE", help="Also check that this machine can run a recipe.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Report this machine's devices, versions, memory and disk, and whether a recipe can run on it."""
    from llmctl.cli import doctor as doctors
    from llmctl.pipeline import console, data_check, recipe

    chosen = recipe.read(recipe_file) if recipe_file else None
    platforms = [step.config.platform for step in chosen.steps] if chosen else []
    if chosen:
        data_check.check(chosen, missing=True)
    found = doctors.examine(platforms, chosen.run if chosen else Path())
    if chosen:
        found["recipe"] = {"path": str(recipe_file), "stages": [step.name for step in chosen.steps]}
    if json:
        console.result(found)
    else:
        console.show(doctors.table(found))
