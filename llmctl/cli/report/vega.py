"""Compile Vega-Lite specifications, render them as SVG, and provide Vega's JavaScript, all without a network.

The package vl-convert contains Vega, and renders without a browser. In its functions, a specification is a dict and an
SVG is a string.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
from typing import Any

from llmctl.config.errors import RequestError

VEGA_LITE = "6.1"
"""Version of Vega-Lite that the specifications are written for."""


def check_installed() -> None:
    """Check that vl-convert is installed.

    Raises:
        RequestError: If vl-convert is not installed.
    """
    if importlib.util.find_spec("vl_convert") is None:
        raise RequestError("report: the plots need vl-convert-python: pip install 'llmctl[report]'")


@functools.cache
def javascript() -> str:
    """Return the JavaScript that defines `window.vegaEmbed`. It does not contain `</script>`."""
    import vl_convert

    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", VEGA_LITE).replace("</script", "<\\/script")


def compiled(spec: dict[str, Any]) -> dict[str, Any]:
    """Compile a Vega-Lite specification to a Vega specification."""
    import vl_convert

    return vl_convert.vegalite_to_vega(spec, VEGA_LITE)


def svg(spec: dict[str, Any], width: int) -> str:
    """Render a Vega-Lite specification as an SVG element that is `width` pixels wide. Texts are escaped."""
    import vl_convert

    fixed = copy.deepcopy(spec) | {"width": width, "autosize": {"type": "fit-x", "contains": "padding"}}
    return vl_convert.vegalite_to_svg(fixed, VEGA_LITE, allowed_base_urls=[])
