"""Assemble the report of a run from its sections, and write it as files."""

from __future__ import annotations

from pathlib import Path

from llmctl.artifacts import atomic
from llmctl.cli.report import (
    attributions,
    curves,
    evaluations,
    html_page,
    lineage,
    markdown,
    quality,
    reproduction,
    run_contents,
    samples,
    stage_details,
)
from llmctl.cli.report.document import Block, Document, Section, cell
from llmctl.cli.report.run_contents import Contents
from llmctl.config.errors import RequestError

HTML, MARKDOWN = "report.html", "report.md"


def document(contents: Contents, title: str = "") -> Document:
    """Return the report of a run. Equal contents give equal reports."""
    overview: list[Block] = [lineage.table(contents)] if contents.models else []
    sections = [
        *([Section("Overview", overview)] if overview else []),
        lineage.section(contents),
        quality.section(contents),
        curves.section(contents),
        evaluations.section(contents),
        samples.section(contents),
        *attributions.sections(contents),
        stage_details.section(contents),
        reproduction.section(contents),
    ]
    what = "Artifact" if contents.single else "Run"
    counted = (
        ("model", contents.models),
        ("evaluation", contents.evaluations),
        ("unfinished stage", contents.unfinished),
    )
    counts = [f"{len(found)} {name}{'' if len(found) == 1 else 's'}" for name, found in counted if found]
    lead = f"{what} {contents.folder}: {', '.join(counts)}."
    return Document(cell(title or f"Report of {contents.folder}").text, cell(lead).text, sections, contents.summary)


def write(folder: Path, out: Path | None, title: str = "") -> list[Path]:
    """Write the report of the run in `folder` as report.html and report.md, and return the paths.

    Args:
        folder: Folder of a run, or of one artifact.
        out: Folder to write both files to. None uses the run's folder or, for an artifact, the folder that contains it.
        title: Title of the page.

    Raises:
        RequestError: If the folder has no artifact, if a file is damaged, or if a package for the plots is missing.
    """
    html_page.check_installed()
    contents = run_contents.read(folder, attributions.is_valid)
    target = out or (folder.resolve().parent if contents.single else folder)
    if target.exists() and not target.is_dir():
        raise RequestError(f"--out {target}: is a file; name a folder")
    made = document(contents, title)
    page, text = html_page.page(made), markdown.text(made)
    target.mkdir(parents=True, exist_ok=True)
    paths = [target / HTML, target / MARKDOWN]
    for path, content in zip(paths, (page, text), strict=True):
        atomic.write_text(path, content)
    return paths
