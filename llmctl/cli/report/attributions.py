"""Show the attributions of tokens that `llmctl explain --json` computed. Each text shows all models side by side.

The files are NAME.attributions.json in the folder of the run. Their content is the output of `llmctl explain --json`.
"""

from __future__ import annotations

from collections.abc import Sequence

from llmctl.cli.report import figures
from llmctl.cli.report.document import Block, Columns, Folded, Number, Paragraph, Section, Table, Tokens, cell, number
from llmctl.cli.report.run_contents import Contents, Record

SHOWN = 12
"""Maximum number of texts that the report shows."""
MOST_TOKENS = 400
"""Maximum number of tokens that the report shows per text."""
METHODS = {
    "integrated_gradients": "integrated gradients (Sundararajan et al., 2017, arXiv:1703.01365)",
    "gradient_input": "gradient times input",
    "rollout": "attention rollout (Abnar and Zuidema, 2020, arXiv:2005.00928)",
}


def sections(contents: Contents) -> list[Section]:
    """Return the section with attributions, or an empty list if the run has none."""
    found = contents.attributions
    if not found:
        return []
    parts: list[Block] = [
        Paragraph(f"{r['artifact']}: {METHODS.get(r['method'], r['method'])}; {r['unit']}.") for r in found
    ]
    parts.append(
        Paragraph(
            "Blue tokens raise the output for the target. Orange, underlined tokens lower it. The strongest color of a "
            "text marks its largest attribution."
        )
    )
    texts: dict[tuple[str, ...], list[tuple[Record, Record]]] = {}
    for record in found:
        for text in record["texts"]:
            texts.setdefault(tuple(text["texts"]), []).append((record, text))
    chosen = sorted(texts.values(), key=lambda group: -len(group))[:SHOWN]  # texts of several models first
    parts += [Columns([_tokens(record, text) for record, text in group]) for group in chosen]
    if len(texts) > len(chosen):
        parts.append(Paragraph(f"{len(texts) - len(chosen):,} further texts are in the JSON data."))
    averages = [(r, one) for r in found for one in r.get("averages") or []]
    if averages:
        parts.append(Folded("Mean attribution per word and target", [_average(r, one) for r, one in averages]))
    return [Section("Attributions", parts)]


def _tokens(record: Record, text: Record) -> Tokens:
    rollout = record["method"] == "rollout"
    shown = [t for t in text["tokens"] if rollout or t.get("kind", "text") == "text"]
    error = text.get("completeness_error")
    note = f"Completeness error {error:.2%}." if figures.is_number(error) else ""
    most = record.get("tolerance")
    if figures.is_number(error) and figures.is_number(most) and error > most:
        note += f" Warning: this is more than the tolerance of {most:.2%}."
    if len(shown) > MOST_TOKENS:
        note += f" {len(shown) - MOST_TOKENS:,} further tokens are in the JSON data."
    output = f" ({text['output']:+.3g})" if figures.is_number(text.get("output")) and not rollout else ""
    pairs = _spaced(shown[:MOST_TOKENS], text["texts"])
    return Tokens(cell(f"{record['artifact']}: {text['target']}{output}").text, pairs, note.strip())


def _spaced(tokens: Sequence[Record], texts: Sequence[str]) -> list[tuple[str, Number]]:
    """Return (text, attribution) of each token. White space that belongs to no token is added to the token after it."""
    pairs: list[tuple[str, Number]] = []
    ends: dict[int, int] = {}
    for token in tokens:
        part, first, last = (token.get(key) for key in ("part", "first", "last"))
        between = ""
        if isinstance(part, int) and isinstance(first, int) and isinstance(last, int) and last and part < len(texts):
            skipped = texts[part][ends.get(part, 0) : first]
            between = "\n" * (part not in ends and bool(ends)) + (" … " if skipped.strip() else skipped)
            ends[part] = max(ends.get(part, 0), last)
        pairs.append((between + token["text"], token["attribution"]))
    return pairs


def _average(record: Record, one: Record) -> Table:
    words = [w for side in ("for", "against") for w in one.get(side, [])]
    rows = [[cell(w["word"]), number(w["mean"]), number(w["count"])] for w in words]
    caption = f"{record['artifact']}, target {one['target']}: words for it, then against it"
    return Table(cell(caption).text, ["word", "mean attribution", "occurrences"], rows)


def is_valid(record: Record) -> bool:
    """Return whether a JSON value has the fields of attributions that the report reads."""
    if not all(isinstance(record.get(key), str) for key in ("artifact", "digest", "method", "unit")):
        return False
    return isinstance(record.get("texts"), list) and all(map(_is_text, record["texts"])) and _has_averages(record)


def _is_text(text: Record) -> bool:
    return (
        isinstance(text.get("texts"), list)
        and all(isinstance(part, str) for part in text["texts"])
        and "target" in text
        and isinstance(text.get("tokens"), list)
        and all(isinstance(t.get("text"), str) and figures.is_number(t.get("attribution")) for t in text["tokens"])
    )


def _has_averages(record: Record) -> bool:
    words = [w for one in record.get("averages") or [] for side in ("for", "against") for w in one.get(side, [])]
    return all("word" in w and figures.is_number(w.get("mean")) and figures.is_number(w.get("count")) for w in words)
