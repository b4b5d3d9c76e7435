"""Choose the format of each matrix by patterns on module paths (mixed precision).

A rule is a pair of a pattern and a format. A pattern is a glob (`*`, `?`, `[…]`) on the last keys of a module's path:
`q`, `attn/q`, `mlp/*`, `encoder/*`. The path of a module in the layers is `decoder/blocks/attn/q`. The path has no
layer number: the matrices of all layers are stored in one array, which has one format.

The module does not import JAX, so that settings can be checked early.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection

from llmctl.config.base import hint
from llmctl.config.errors import RequestError

NONE = "none"
"""Name that a rule gives in place of a format, to leave matrices unquantized."""
Rules = tuple[tuple[str, str], ...]
"""Pairs (pattern, format)."""


def matches(module: str, pattern: str) -> bool:
    """Return whether a pattern matches the path of a module, or its last keys.

    >>> [matches("decoder/blocks/mlp/up", pattern) for pattern in ("mlp/*", "up", "decoder/*", "p", "mlp")]
    [True, True, True, False, False]
    """
    return fnmatch.fnmatchcase(f"/{module}", f"*/{pattern}")


def format_of(module: str, rules: Rules, default: str) -> str:
    """Return the name of a module's format: the format of the longest pattern that matches, otherwise `default`.

    The length of a pattern is its number of characters other than `*` and `?`.

    >>> rules = (("attn/*", "int8"), ("attn/o", "none"))
    >>> [format_of(f"decoder/blocks/{module}", rules, "int4") for module in ("attn/o", "attn/q", "mlp/up")]
    ['none', 'int8', 'int4']

    Raises:
      RequestError: If two patterns of the same length match and have different formats.
    """
    found = [
        (len(pattern) - sum(map(pattern.count, "*?")), pattern, name)
        for pattern, name in sorted(rules)
        if matches(module, pattern)
    ]
    if not found:
        return default
    size, pattern, name = max(found, key=lambda rule: rule[0])
    for other_size, other, another in found:
        if other_size == size and another != name:
            raise RequestError(
                f"rules: {pattern!r} ({name}) and {other!r} ({another}) are equally long and both match {module}; "
                "the longest pattern decides, so write one of them out"
            )
    return name


def check(modules: Collection[str], rules: Rules, unselected: Collection[str] = ()) -> None:
    """Check that every pattern matches a module.

    Args:
      modules: paths of the modules whose matrices are quantized.
      rules: the rules.
      unselected: paths of modules whose matrices are not quantized because of the settings `embeddings` and `head`.

    Raises:
      RequestError: If a pattern matches no module. The message names modules that patterns can select.
    """
    from llmctl.model import weights

    for pattern, _ in rules:
        if any(matches(module, pattern) for module in modules):
            continue
        if left := [module for module in unselected if matches(module, pattern)]:
            setting = "embeddings" if left[0].startswith("embed/") else "head"
            raise RequestError(f"rules: {pattern!r} matches only {left[0]}; set {setting} = true to quantize it")
        within = sorted({weights.parse(f"{module}/kernel").module for module in modules})
        if any(key.isdigit() for key in pattern.split("/")) or "layers" in pattern:
            raise RequestError(
                f"rules: {pattern!r} selects a layer, but the layers of a stack are stored in one array per module and "
                f"share its format; patterns select modules: {', '.join(within)}"
            )
        raise RequestError(
            f"rules: {pattern!r} matches no matrix{hint(pattern, within)}; there are {', '.join(within)}"
        )
