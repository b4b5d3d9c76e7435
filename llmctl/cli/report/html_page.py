"""Format a report as one HTML page that contains its styles, scripts and data, and loads nothing.

Every text is escaped by Jinja. A content security policy allows only the scripts of the page itself, by their digests,
and no requests. Even if a text is left unescaped by mistake, it therefore cannot run as a script.
"""

from __future__ import annotations

import base64
import hashlib
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from llmctl.cli.report import vega
from llmctl.cli.report.document import Document
from llmctl.config.terminal import as_json, visible

check_installed = vega.check_installed
"""Check that the packages for the plots are installed (see `llmctl.cli.report.vega.check_installed`)."""

ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}
"""Characters of JSON data that become escape sequences in a page, so that no tag or comment begins or ends in the
data."""


def page(document: Document) -> str:
    """Return the report as the text of an HTML file. Equal documents give equal texts."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, finalize=_shown, trim_blocks=True, lstrip_blocks=True
    )
    scripts = [vega.javascript(), _file("page.js")]
    numbered = _Numbers()
    environment.globals |= {
        "kind": lambda block: type(block).__name__,
        "number": numbered.next,
        "svg": lambda plot: Markup(vega.svg(plot.spec, plot.width)),
        "vega": lambda plot: script_json(vega.compiled(plot.spec)),
    }
    return environment.from_string(_file("page.html")).render(
        document=document,
        css=Markup(_file("page.css")),
        scripts=[Markup(script) for script in scripts],
        policy=_policy(scripts),
        data=script_json(document.data),
    )


def script_json(value: Any) -> Markup:
    r"""Return `value` as JSON text for a script element of a page. A JSON parser reads the same value from the text.

    Example:
        >>> print(script_json({"name": "</script>"}))
        {"name": "\u003c/script\u003e"}
    """
    text = as_json(value)
    for character, escape in ESCAPES.items():
        text = text.replace(character, escape)
    return Markup(text)


def _shown(value: Any) -> Any:
    """Replace control characters in text by escape sequences. Markup, and values that are no text, stay unchanged."""
    return visible(value) if type(value) is str else value


def _policy(scripts: list[str]) -> str:
    """Return a content security policy that allows only these scripts, and no requests.

    Vega compiles its expressions, which needs 'unsafe-eval'. The expressions are those of `llmctl.cli.report.plots`.
    """
    digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    parts = ("default-src 'none'", f"script-src {allowed} 'unsafe-eval'", "style-src 'unsafe-inline'")
    return "; ".join((*parts, "img-src data:", "base-uri 'none'", "form-action 'none'"))


def _file(name: str) -> str:
    return resources.files("llmctl.cli.report").joinpath(name).read_text(encoding="utf-8")


class _Numbers:
    """Number the elements of a page. The number is a part of the element's id."""

    def __init__(self) -> None:
        self.count = 0

    def next(self) -> int:
        """Return the next number."""
        self.count += 1
        return self.count
