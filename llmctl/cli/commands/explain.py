"""Define the command `llmctl explain`."""

from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from llmctl.config.containment import regular
from llmctl.config.errors import RequestError
from llmctl.data.config import Split
from llmctl.evaluate.attribution.settings import AttributionConfig, Baseline, Method
from llmctl.pipeline import console

DEFAULTS = AttributionConfig()


def explain(
    artifact_dir: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="Artifact with a task, or language model.")],
    texts: Annotated[list[str] | None, typer.Argument(metavar="[TEXT]...", help="Texts to explain.")] = None,
    base: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Base of an adapter, if it is not next to the adapter.")
    ] = None,
    file: Annotated[Path | None, typer.Option(help="File with rows to explain (.jsonl, .csv, .tsv, .txt).")] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(metavar="OURS=THEIRS", help="Column with another name, as text=review (repeatable)."),
    ] = None,
    split: Annotated[
        str, typer.Option(help="Split of the data that the artifact was finetuned on: train, validation or test.")
    ] = "",
    examples: Annotated[int, typer.Option(min=1, help="Number of rows at most, of --file or --split.")] = 200,
    target: Annotated[
        str, typer.Option(help="Class, number of a choice (from 0), or continuation; the prediction by default.")
    ] = "",
    method: Annotated[str, typer.Option(help="integrated_gradients, gradient_input or rollout.")] = DEFAULTS.method,
    baseline: Annotated[
        str,
        typer.Option(
            help="Baseline of gradients: zero (embeddings) or pad (padding token); zero by default, pad with RMSNorm."
        ),
    ] = DEFAULTS.baseline,
    steps: Annotated[int, typer.Option(min=12, help="Gradients per text at most.")] = DEFAULTS.steps,
    tolerance: Annotated[
        float, typer.Option(help="Completeness error to reach, as a share of the output's change.")
    ] = DEFAULTS.tolerance,
    top: Annotated[int, typer.Option(min=1, help="Tokens to list per text, and words per class.")] = 10,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="New HTML page for the attributions.")] = None,
    png: Annotated[Path | None, typer.Option(metavar="FILE", help="New PNG for the attributions (extra demo).")] = None,
    seq_len: Annotated[int, typer.Option(min=0, help="Tokens per row at most; 0 takes that of training, or 512.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Gradients per call.")] = DEFAULTS.batch_size,
    dtype: Annotated[str, typer.Option(help="Compute type: float32 or bfloat16.")] = DEFAULTS.dtype,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Explain an output by the tokens of its text: which tokens raise or lower it, and by how much.

    The output of a classifier is the log odds of the predicted class. The output of a language model is the
    log-likelihood of a continuation, by default of the most likely next token. If there are several texts, the mean
    attribution of each word is listed per class.
    """
    for flag, value, known in (
        ("method", method, get_args(Method)),
        ("baseline", baseline or "zero", get_args(Baseline)[1:]),
    ):
        if value not in known:
            raise RequestError(f"--{flag} {value}: must be {', '.join(known[:-1])} or {known[-1]}")
    if dtype not in ("float32", "bfloat16"):
        raise RequestError(f"--dtype {dtype}: must be float32 or bfloat16")
    if not 0 < tolerance < 1:
        raise RequestError(f"--tolerance {tolerance}: must be between 0 and 1")
    if split not in ("", *get_args(Split)):
        raise RequestError(f"--split {split}: must be {', '.join(get_args(Split))}")
    if bool(texts) + bool(file) + bool(split) != 1:
        raise RequestError("explain: give texts, --file or --split, one of the three")
    if column and not file:
        raise RequestError(f"--column {column[0]}: names a column of --file; leave it out")
    if baseline and method == "rollout":
        raise RequestError(f"--baseline {baseline}: rollout has no baseline; leave it out")
    _check_outputs(html, png)
    settings = {"method": method, "baseline": baseline, "tolerance": tolerance, "steps": steps}
    config = AttributionConfig.model_validate(settings | {"seq_len": seq_len, "batch_size": batch_size, "dtype": dtype})

    from llmctl.artifacts import adapters, artifact, atomic
    from llmctl.config.settings import MeshConfig
    from llmctl.distributed import mesh as meshes
    from llmctl.evaluate.attribution import page, picture
    from llmctl.evaluate.attribution.explain import Explainer
    from llmctl.evaluate.attribution.record import record

    bases = [base] if base else []
    adapters.check_bases([artifact_dir], bases)
    rows = _rows(artifact_dir, texts or [], file, column or [], split, examples)
    explainer = Explainer(artifact.load(artifact_dir, meshes.make(MeshConfig()), bases=bases), config)
    for where, row in rows:
        explainer.check(row, where)
    found = record(explainer, explainer([row for _, row in rows], target), top)
    if html:
        atomic.write_text(html, page.page(found))
    if png:
        picture.draw(found, png)
    for i in page.unfinished(found):
        console.say(f"warning: {rows[i][0]}: {page.warning(found['texts'][i], found)}")
    console.result(found) if json else _show(found, top)


def _check_outputs(html: Path | None, png: Path | None) -> None:
    from llmctl.artifacts import atomic

    if html and html == png:
        raise RequestError(f"--png {png}: is the file of --html; name another")
    for flag, out in (("--html", html), ("--png", png)):
        if out and out.exists():
            raise RequestError(f"{flag} {out}: exists already; name a new file")
        if out:
            atomic.check(out)
    import importlib.util

    if png and importlib.util.find_spec("matplotlib") is None:
        raise RequestError("--png: the picture needs matplotlib: pip install 'llmctl[demo]'")


def _rows(
    artifact_dir: Path, texts: list[str], file: Path | None, columns: list[str], split: str, most: int
) -> list[tuple[str, Any]]:
    """Return pairs (location, row) of the texts, of the file, or of a split of the artifact's data.

    Raises:
        RequestError: If a row cannot be read, if there is no row, or if the artifact's settings name no data.
    """
    from llmctl.data import row_stream

    if texts:
        return [(f"text {i}", {"text": text}) for i, text in enumerate(texts, 1)]
    if split:
        return _split_rows(artifact_dir, split, most)
    assert file
    pairs = dict(row_stream.column_names(text) for text in columns)
    found = []
    try:
        with regular(file).open("rb") as stream:
            for where, row in row_stream.rows(stream, str(file), row_stream.of_path(file), pairs):
                if isinstance(row, RequestError):
                    raise row
                found.append((where, row))
                if len(found) == most:
                    break
    except OSError as e:
        raise RequestError(f"{file}: cannot be read: {e.strerror}") from None
    if not found:
        raise RequestError(f"{file}: holds no row")
    return found


def _split_rows(artifact_dir: Path, split: str, most: int) -> list[tuple[str, Any]]:
    from llmctl.artifacts.manifest_file import read_manifest
    from llmctl.data import splits
    from llmctl.data.config import DataConfig
    from llmctl.evaluate.tasks.registry import of

    manifest = read_manifest(artifact_dir)
    if not manifest.config.get("data"):
        raise RequestError(f"{artifact_dir}: its settings name no data for --split; give the rows with --file")
    task = of(manifest)
    loaded = splits.load(
        DataConfig.model_validate(manifest.config["data"]),
        labels=task.reads_labels,
        conversations=task.reads_conversations,
    )
    chosen = loaded[split].sample(most)
    return [(chosen.source.where(int(chosen.index[i])), chosen[i]) for i in range(len(chosen))]


def _show(found: dict[str, Any], top: int) -> None:
    """Print the tokens with the largest attributions of each text, and the averages per class."""
    from rich.table import Table

    from llmctl.evaluate.attribution.page import counted, number

    table = Table(title=f"{found['artifact']}: {found['method']}, {found['unit']}")
    for name in ("text", "target", "output", "largest attributions"):
        table.add_column(name, justify="right" if name == "output" else "left", overflow="fold")
    for i, text in enumerate(found["texts"], 1):
        tokens = [t for t in text["tokens"] if t["kind"] == "text" and t["text"].strip()]
        largest = sorted(tokens, key=lambda t: -abs(t["attribution"]))[:top]
        said = ", ".join(f"{t['text'].strip()} {number(t['attribution'])}" for t in largest)
        table.add_row(str(i), text["target"], number(text["output"]), said)
    console.show(table)
    for one in found["averages"]:
        table = Table(title=f"{one['target']}: mean attribution per word ({counted(one['texts'])})")
        for name in ("for", "mean", "count", "against", "mean", "count"):
            table.add_column(name, justify="left" if name in ("for", "against") else "right")
        for row in range(max(len(one["for"]), len(one["against"]))):
            sides = [one[side][row] if row < len(one[side]) else None for side in ("for", "against")]
            cells = [[s["word"], number(s["mean"]), f"{s['count']:,}"] if s else ["", "", ""] for s in sides]
            table.add_row(*cells[0], *cells[1])
        console.show(table)
