"""Define the command `llmctl predict`."""

import contextlib
import csv
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Annotated, Any

import typer

from llmctl.config.containment import regular
from llmctl.config.errors import RequestError
from llmctl.pipeline import console


def predict(
    artifacts: Annotated[
        list[Path],
        typer.Argument(metavar="ARTIFACT...", help="Artifacts; the answers of several are averaged."),
    ],
    base: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Base of an adapter, if it is not next to the adapter.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="Rows to predict (.jsonl, .csv, .tsv, .txt); standard input by default.")
    ] = None,
    kind: Annotated[
        str, typer.Option("--format", help="Format of the rows: jsonl, csv, tsv or text (a text per line).")
    ] = "",
    column: Annotated[
        list[str] | None,
        typer.Option(metavar="OURS=THEIRS", help="Column with another name, as text=review (repeatable)."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="New file for the answers; standard output by default.")
    ] = None,
    to: Annotated[str, typer.Option(help="Format of the answers: jsonl, csv or text (an answer per line).")] = "jsonl",
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Also write the probability of every class.")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="End at the first row that cannot be read.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per batch.")] = 32,
    seq_len: Annotated[int, typer.Option(min=0, help="Tokens per row at most; 0 takes that of training, or 512.")] = 0,
    max_new: Annotated[
        int, typer.Option(min=0, help="Language models: tokens per answer at most; 0 takes that of finetuning, or 64.")
    ] = 0,
    beams: Annotated[
        int, typer.Option(min=0, help="Language models: number of beams; 0 takes that of finetuning, or 1 (greedy).")
    ] = 0,
    dtype: Annotated[str, typer.Option(help="Compute type: float32 or bfloat16.")] = "float32",
) -> None:
    """Predict one answer per new row: a label, number, tags, choice, text or embedding.

    Answers are in the order of the rows. A language model answers a prompt, or a conversation (messages, tools) with a
    chat template. A row that cannot be read is reported on standard error, and its answer has the field "error".
    """
    from llmctl.data import row_stream

    if dtype not in ("float32", "bfloat16"):
        raise RequestError(f"--dtype {dtype}: must be float32 or bfloat16")
    if to not in ("jsonl", "csv", "text"):
        raise RequestError(f"--to {to}: must be jsonl, csv or text")
    kind = kind or (row_stream.of_path(file) if file else "")
    if kind and kind not in row_stream.FORMATS:
        raise RequestError(f"--format {kind}: must be {', '.join(row_stream.FORMATS)}")
    names = dict(row_stream.column_names(text) for text in column or ())
    if out and out.exists():
        raise RequestError(f"--out {out}: exists already; name a new file")

    from llmctl.artifacts import adapters, artifact
    from llmctl.config.settings import MeshConfig
    from llmctl.distributed import mesh as meshes
    from llmctl.evaluate.predict import generates, predictor
    from llmctl.model.generate import served

    bases = [base] if base else []
    adapters.check_bases(artifacts, bases)

    with contextlib.ExitStack() as closing:
        stream, title = row_stream.standard_input(), "stdin"
        if file:
            stream, title = closing.enter_context(_opened(file)), str(file)
        loaded = list(artifact.load_each(artifacts, meshes.make(MeshConfig()), bases=bases))
        lines = [served.dequantized(found.params) for found in loaded if generates(found)]
        for line in dict.fromkeys(filter(None, lines)):
            console.say(line)
        model = predictor(loaded, batch_size, seq_len, dtype, max_new, beams)
        if probabilities and generates(loaded[0]):
            raise RequestError(f"{artifacts[0]}: generates text, which has no classes; leave --probabilities out")
        read = row_stream.rows(stream, title, kind, names)
        write = _writer(closing.enter_context(_output(out)), to, model.task.text_field)
        begun, count, bad = time.monotonic(), 0, 0
        for window in row_stream.in_windows(read, model.window * batch_size):
            found = [_read(model, where, row) for where, row in window]
            if strict and (wrong := next((r for r in found if isinstance(r, RequestError)), None)):
                raise wrong
            answers = iter(model.answers([r for r in found if not isinstance(r, RequestError)], probabilities))
            for number, row in enumerate(found, count + 1):
                if isinstance(row, RequestError):
                    console.say(str(row))
                    bad += 1
                write({"row": number} | ({"error": str(row)} if isinstance(row, RequestError) else next(answers)))
            count += len(window)
    for line in model.remarks:
        console.say(line)
    rate = count / max(time.monotonic() - begun, 1e-9)
    console.say(f"{count:,} rows, {rate:,.0f} rows/s" + (f"; {bad:,} could not be read" if bad else ""))


def _read(model: Any, where: str, row: Any) -> Any:
    """Return `model.read(row)`, the model's input for a row. If the row cannot be read, return the RequestError."""
    try:
        return row if isinstance(row, RequestError) else model.read(row, where)
    except RequestError as e:
        return e


def _opened(file: Path) -> IO[bytes]:
    try:
        return (file if file.is_fifo() else regular(file)).open("rb")  # a shell makes a pipe for `<(…)`
    except OSError as e:
        raise RequestError(f"{file}: cannot be read: {e.strerror}") from None


@contextlib.contextmanager
def _output(out: Path | None) -> Iterator[IO[str]]:
    """Yield the stream to write to: standard output, or a temporary file that is renamed to `out` when it is
    complete.
    """
    if out is None:
        yield sys.stdout
        return
    from llmctl.artifacts import atomic
    from llmctl.distributed import locks

    atomic.check(out)
    draft = locks.scratch(out, "draft")
    with locks.claim(out):
        try:
            with draft.open("w", encoding="utf-8", newline="") as file:
                yield file
            draft.replace(out)
        finally:
            draft.unlink(missing_ok=True)


def _writer(file: IO[str], to: str, field: str) -> Any:
    """Return a function that writes one answer (a dict) to `file` in the format `to`: jsonl, csv or text.

    The columns of CSV are the keys of the first answer without an error, followed by "error". The format text has one
    line per answer, with the value of the key `field`. In this line, spaces replace line breaks and separate the items
    of a list. If a row has an error, its line is empty.
    """
    from llmctl.config.terminal import as_json

    if to == "jsonl":

        def line(answer: dict[str, Any]) -> None:
            file.write(as_json(answer) + "\n")
            file.flush()

        return line
    if to == "text":

        def plain(answer: dict[str, Any]) -> None:
            value = answer.get(field, "")
            text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
            file.write(" ".join(text.splitlines()) + "\n")
            file.flush()

        return plain
    table = csv.writer(file, lineterminator="\n")
    header: list[str] = []
    waiting: list[dict[str, Any]] = []

    def row(answer: dict[str, Any]) -> None:
        if not header:
            waiting.append(answer)
            if "error" in answer:
                return
            header.extend([*answer, "error"])
            table.writerow(header)
            ready, waiting[:] = waiting[:], []
        else:
            ready = [answer]
        for one in ready:
            cells = (one.get(name, "") for name in header)
            table.writerow([as_json(c) if isinstance(c, (list, dict)) else c for c in cells])
        file.flush()

    return row
