"""Results of an evaluation as tables: for people in a terminal and for a file that is read later.

A result is {"artifact", "digest", "task", "protocol", "metrics": {}} with what the artifact is beside it: {"stage",
"parameters", "bytes", "sparsity", "bits"}. An artifact with several results (one a task) is one line of a table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

Result = dict[str, Any]

_COLUMNS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("artifact", "artifact", str),
    ("stage", "stage", str),
    ("parameters", "parameters", lambda n: f"{n:,}"),
    ("bytes", "bytes", lambda n: f"{n:,}"),
    ("sparsity", "sparsity", lambda s: f"{s:.0%}" if s else "–"),
    ("bits", "bits", lambda b: f"{b:.3g}"),
    ("accuracy", "accuracy", lambda a: f"{a:.2%}"),
    ("macro_f1", "macro F1", lambda f: f"{f:.4f}"),
    ("entity_f1", "entity F1", lambda f: f"{f:.4f}"),
    ("exact_match", "exact match", lambda e: f"{e:.2%}"),
    ("answer_f1", "answer F1", lambda f: f"{f:.4f}"),
    ("recall_at_1", "recall@1", lambda r: f"{r:.2%}"),
    ("spearman", "Spearman", lambda r: f"{r:.3f}"),
    ("rmse", "RMSE", lambda e: f"{e:.4g}"),
    ("pearson", "Pearson", lambda r: f"{r:.3f}"),
    ("token_accuracy", "token accuracy", lambda a: f"{a:.2%}"),
    ("next_sentence_accuracy", "next sentence", lambda a: f"{a:.2%}"),
    ("perplexity", "perplexity", lambda p: f"{p:.3f}"),
    ("word_perplexity", "per word", lambda p: f"{p:.2f}"),
    ("bits_per_byte", "bits/byte", lambda b: f"{b:.4f}"),
    ("latency_p50", "p50 ms", lambda s: f"{s * 1e3:.2f}"),
    ("examples_per_second", "examples/s", lambda r: f"{r:,.0f}"),
    ("tokens_per_second", "tokens/s", lambda r: f"{r:,.0f}"),
)


def lines(results: Sequence[Result]) -> list[Result]:
    """One flat record an artifact, in the order of the results; metrics of all its tasks side by side."""
    merged: dict[str, Result] = {}
    for result in results:
        flat = {k: v for k, v in result.items() if k not in ("metrics", "task", "protocol")}
        merged.setdefault(result["artifact"], {}).update({**flat, **result["metrics"]})
    return list(merged.values())


_WIDE = frozenset({"stage", "macro_f1", "word_perplexity", "bits_per_byte", "latency_p50"})
"""Columns that the file has and a terminal of 100 places has no room for."""


def cells(results: Sequence[Result], wide: bool = True) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of text; a column that no artifact has is left out, a missing value is a dash."""
    records = lines(results)
    columns = [c for c in _COLUMNS if any(r.get(c[0]) is not None for r in records) and (wide or c[0] not in _WIDE)]
    body = [[form(r[key]) if r.get(key) is not None else "–" for key, _, form in columns] for r in records]
    return [title for _, title, _ in columns], body


def protocols(results: Sequence[Result]) -> list[str]:
    """What was measured and how, once each: a number without these words cannot be compared."""
    return list(dict.fromkeys(f"{r['task']}: {r['protocol']}" for r in results))


def markdown(results: Sequence[Result]) -> str:
    """The table as Markdown with the protocols and the digests of the scored weights under it."""
    head, body = cells(results)
    table = ["| " + " | ".join(row) + " |" for row in (head, ["---"] + ["--:"] * (len(head) - 1), *body)]
    digests = [f"- `{r['artifact']}`: `{r['digest']}`" for r in lines(results)]
    notes = [f"- {p}" for p in protocols(results)]
    return "\n".join([*table, "", "Protocols", "", *notes, "", "Digests of the scored weights", "", *digests, ""])


def table(results: Sequence[Result], title: str = "") -> Table:
    """The table for a terminal, protocols as its caption."""
    from rich.table import Table

    head, body = cells(results, wide=False)
    rich_table = Table(title=title or None, caption="\n".join(protocols(results)), title_justify="left")
    for i, heading in enumerate(head):
        rich_table.add_column(heading, justify="right" if i else "left", no_wrap=True)
    for row in body:
        rich_table.add_row(*row)
    return rich_table
