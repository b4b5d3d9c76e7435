"""Define the command `llmctl report`."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    path: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, or an artifact.")],
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder for report.html and report.md. Default: the run's folder."),
    ] = None,
    title: Annotated[str, typer.Option(metavar="TEXT", help="Title of the page. Default: the run's name.")] = "",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write the report of a run: one HTML page that needs no network, and one Markdown file.

    The page shows the lineage, learning curves, quality against size and latency, and all results with intervals. The
    page also has samples, and a recipe that makes the run again. Plots need the extra `report`.
    """
    from llmctl.cli.report import report as reports
    from llmctl.pipeline import console

    html, text = reports.write(path, out, title)
    if json:
        console.result({"html": str(html), "markdown": str(text)})
    else:
        for file in (html, text):
            console.say(f"report: {file} ({file.stat().st_size:,} bytes)")
