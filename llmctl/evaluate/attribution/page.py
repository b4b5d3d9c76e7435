"""Write attributions as one self-contained HTML page, from their JSON record (`record.record`).

The page needs no script and no network. Colors follow the reader's light or dark mode. Every value is also text: in the
title of its token and in a table. Tokens with a large attribution against the target have a dotted underline.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from llmctl.config.terminal import visible

LARGE = 0.1
"""Attributions against the target get a dotted underline if they exceed this fraction of the text's largest
attribution."""
MOST = 100
"""Maximum number of texts on a page. The JSON record has all texts."""

STYLE = """
.attributions { --for: 9 105 218; --against: 207 92 20; --depth: .5; --rule: #d0d7de; --quiet: #59636e; --warn: #9a3412;
  overflow-wrap: anywhere; }
@media (prefers-color-scheme: dark) {
  .attributions { --for: 56 139 253; --against: 226 105 30; --depth: .6; --rule: #3d444d; --quiet: #9198a1;
    --warn: #ffa657; }
}
.attributions h3 { margin: 1.6rem 0 .2rem; font-size: 1.05rem; }
.attributions p { margin: .3rem 0; }
.attributions .quiet { color: var(--quiet); font-size: .9rem; }
.attributions .warn { color: var(--warn); font-weight: 600; }
.attributions .text { white-space: pre-wrap; line-height: 2; font-size: 1.05rem; margin: .5rem 0; }
.attributions mark, .attributions .bar { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.attributions mark { color: inherit; border-radius: .2em; padding: .15em .05em;
  background: rgb(var(--for) / calc(var(--a) * var(--depth))); }
.attributions mark.against { background: rgb(var(--against) / calc(var(--a) * var(--depth))); }
.attributions mark.dotted { text-decoration: underline dotted; text-underline-offset: .25em; }
.attributions .aside { color: var(--quiet); font-size: .8em; border: 1px solid var(--rule); }
.attributions .cut { color: var(--quiet); font-size: .85em; font-style: italic; }
.attributions details { margin: .3rem 0 .8rem; }
.attributions summary { cursor: pointer; color: var(--quiet); font-size: .9rem; }
.attributions .scroll { max-height: 24rem; overflow: auto; }
.attributions table { border-collapse: collapse; font-size: .9rem; }
.attributions caption { text-align: left; font-weight: 600; padding: .3rem 0; }
.attributions th, .attributions td { text-align: left; padding: .15rem .7rem .15rem 0;
  border-bottom: 1px solid var(--rule); }
.attributions .number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.attributions .bar { display: inline-block; height: .75em; border-radius: .15em; background: rgb(var(--for)); }
.attributions .against .bar { background: rgb(var(--against)); }
.attributions .sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr));
  gap: 0 2rem; }
.attributions .sides table { width: 100%; align-self: start; }
.attributions .sides .scale { width: 28%; }
@media print { .attributions .scroll { max-height: none; } }
"""

_PAGE = """:root { color-scheme: light dark; --paper: #fff; --ink: #1f2328; }
@media (prefers-color-scheme: dark) { :root { --paper: #0d1117; --ink: #e6edf3; } }
body { margin: 0 auto; padding: 1rem; max-width: 56rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: .5rem 0; } h2 { font-size: 1.15rem; margin: 1.8rem 0 .3rem; }
"""

METHODS = {
    "integrated_gradients": "integrated gradients (Sundararajan et al., 2017)",
    "gradient_input": "gradient times input",
    "rollout": "attention rollout (Abnar and Zuidema, 2020)",
}


def page(record: dict[str, Any]) -> str:
    """Return the HTML page of a record."""
    title = escape(f"Token attributions of {record['artifact']}")
    head = (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>\n{_PAGE}{STYLE}</style>\n</head>\n"
    )
    return f"{head}<body>\n<main>\n<h1>{title}</h1>\n{section(record)}</main>\n</body>\n</html>\n"


def section(record: dict[str, Any]) -> str:
    """Return the part of the page without head and title, for other pages that already include `STYLE`."""
    return "".join(f"{line}\n" for line in _section(record))


def _section(record: dict[str, Any]) -> Iterator[str]:
    gradients = record["method"] != "rollout"
    yield '<div class="attributions">'
    yield f"<p>Method: {METHODS[record['method']]}. Unit: {escape(record['unit'])}."
    yield f"Baseline: {escape(record['baseline'])}.</p>" if gradients else "The shares of a text sum to 1.</p>"
    yield '<p class="quiet">Task: ' + escape(record["task"]) + f". Weights: {escape(record['digest'][:16])}.</p>"
    if gradients:
        yield (
            '<p>A <mark style="--a:.8">blue token</mark> raises the output for the target, and an '
            '<mark class="against dotted" style="--a:.8">orange token</mark> lowers it.</p>'
        )
    else:
        yield '<p>The darker a <mark style="--a:.8">token</mark>, the more of it reaches the output.</p>'
    if record["averages"]:
        yield "<h2>Mean attribution per word</h2>"
        for one in record["averages"]:
            yield from _average(one)
    if len(texts := record["texts"]) > 1:
        yield "<h2>Texts</h2>"
    for number, text in enumerate(texts[:MOST], 1):
        yield from _text(number, text, record)
    if len(texts) > MOST:
        yield f'<p class="quiet">{len(texts) - MOST:,} more texts are in the JSON output.</p>'
    yield "</div>"


def _average(one: dict[str, Any]) -> Iterator[str]:
    rows = [*one["for"], *one["against"]]
    largest = max((abs(row["mean"]) for row in rows), default=0) or 1
    yield f'<h3>Target “{_text_of(one["target"])}” <span class="quiet">({counted(one["texts"])})</span></h3>'
    yield '<div class="sides">'
    for side, title in (("for", "For the target"), ("against", "Against the target")):
        if not one[side]:
            continue
        yield f'<table class="{side}"><caption>{title}</caption>'
        yield '<tr><th scope="col">word</th><th scope="col" class="number">mean</th>'
        yield '<th scope="col" class="number">count</th><td class="scale"></td></tr>'
        for row in one[side]:
            width = 100 * abs(row["mean"]) / largest
            yield f'<tr><th scope="row">{_text_of(row["word"])}</th><td class="number">{number(row["mean"])}</td>'
            yield f'<td class="number">{row["count"]:,}</td>'
            yield f'<td class="scale" aria-hidden="true"><span class="bar" style="width:{width:.1f}%"></span></td></tr>'
        yield "</table>"
    yield "</div>"


def _text(at: int, text: dict[str, Any], record: dict[str, Any]) -> Iterator[str]:
    output = f' <span class="quiet">(output {number(text["output"])})</span>'
    yield f"<h3>Text {at}: target “{_text_of(text['target'])}”{output}</h3>"
    if "completeness_error" in text:
        yield f'<p class="quiet">{completeness(text)}</p>'
        if text["completeness_error"] > record["tolerance"]:
            yield f'<p class="warn">Warning: {warning(text, record)}</p>'
    largest = max((abs(t["attribution"]) for t in text["tokens"] if t["kind"] == "text"), default=0) or 1
    shown = record["method"] == "rollout"
    for part in range(len(text["texts"])):
        yield f'<p class="text">{_marked(text, part, largest, shown)}</p>'
    listed = [t for t in text["tokens"] if shown or t["kind"] == "text"]
    yield f"<details><summary>Values of {len(listed):,} tokens as a table</summary>"
    yield '<div class="scroll" tabindex="0" role="region" aria-label="Table of tokens"><table><tr>'
    yield '<th scope="col">token</th><th scope="col" class="number">attribution</th></tr>'
    for token in listed:
        yield f'<tr><th scope="row">{_name(token)}</th><td class="number">{number(token["attribution"])}</td></tr>'
    yield "</table></div></details>"


def _marked(text: dict[str, Any], part: int, largest: float, special: bool) -> str:
    """Return one text with its tokens marked.

    Characters that no token covers are white space, or were cut because the text is too long.
    """
    whole, at, out = text["texts"][part], 0, []
    inside = [i for i, t in enumerate(text["tokens"]) if t["kind"] == "text" and t["part"] == part]
    begin = inside[0] if part else 0
    later = [i for i, t in enumerate(text["tokens"]) if t["kind"] == "text" and t["part"] > part]
    for token in text["tokens"][begin : later[0] if later else None]:
        if token["kind"] != "text":
            out.append(_mark(token, _name(token), largest, " aside") if special else "")
            continue
        out.append(_gap(whole[at : token["first"]]))
        covered = whole[max(at, token["first"]) : token["last"]]
        bare = covered.strip()
        before = covered[: len(covered) - len(covered.lstrip())]
        out += [
            escape(before),
            _mark(token, _text_of(bare), largest) if bare else "",
            covered[len(before) + len(bare) :],
        ]
        at = max(at, token["last"])
    return "".join([*out, _gap(whole[at:])])


def _gap(text: str) -> str:
    return f' <span class="cut">[{len(text):,} characters are not read]</span> ' if text.strip() else escape(text)


def _mark(token: dict[str, Any], shown: str, largest: float, kind: str = "") -> str:
    value = token["attribution"]
    title = f"{_name(token)}: {number(value)}"
    names = ("against" if value < 0 else "for") + " dotted" * (value < -LARGE * largest) + kind
    return f'<mark class="{names}" style="--a:{min(abs(value) / largest, 1):.3f}" title="{title}">{shown}</mark>'


def _name(token: dict[str, Any]) -> str:
    """Return the text of a token for a table. If the token is only white space, symbols replace it."""
    text = token["text"]
    return _text_of(text.strip() or text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥") or "∅")


def _text_of(text: str) -> str:
    return escape(visible(text))


def number(value: float) -> str:
    """Format a signed value with three significant digits.

    Example:
        >>> number(-0.12345), number(12.0)
        ('−0.123', '+12')
    """
    return f"{value:+.3g}".replace("-", "−")


def counted(texts: int) -> str:
    """Return a number of texts in words, such as "1 text"."""
    return f"{texts:,} text" + "s" * (texts != 1)


def completeness(text: dict[str, Any]) -> str:
    """Return a sentence that compares the sum of the attributions of a text with the change of its output."""
    return (
        f"Sum of the attributions {number(text['sum'])}, change of the output {number(text['difference'])} (baseline "
        f"{number(text['baseline_output'])}, text {number(text['output'])}): completeness error "
        f"{text['completeness_error']:.2%} after {text['steps']:,} gradients."
    )


def warning(text: dict[str, Any], record: dict[str, Any]) -> str:
    """Return a warning about a text whose completeness error exceeds the tolerance."""
    return (
        f"completeness error {text['completeness_error']:.1%}, more than {record['tolerance']:.0%}, after "
        f"{text['steps']:,} gradients; raise --steps, or take --baseline pad"
    )


def unfinished(record: dict[str, Any]) -> Sequence[int]:
    """Return the indices of the texts whose completeness error exceeds the tolerance."""
    errors = [text.get("completeness_error", 0.0) for text in record["texts"]]
    return [i for i, error in enumerate(errors) if error > record.get("tolerance", 1.0)]
