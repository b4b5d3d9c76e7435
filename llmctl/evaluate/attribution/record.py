"""Format explanations as JSON data, and read them back for a report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmctl.evaluate.attribution.averages import averages, extremes
from llmctl.evaluate.attribution.explain import Explainer, Explanation
from llmctl.evaluate.tasks.predictions import short

BASELINES = {
    "zero": "zero embeddings of the text's tokens",
    "pad": "the padding token in place of the text's tokens",
}


def record(explainer: Explainer, found: Sequence[Explanation], top: int) -> dict[str, Any]:
    """Return explanations as JSON data: the artifact, the method, the texts, and the averages by target.

    Args:
        explainer: Explainer that made the explanations.
        found: Explanations, in the order of the rows.
        top: Maximum number of words in the averages of a target, both for and against the target.
    """
    manifest, config = explainer.found.manifest, explainer.config
    about: dict[str, Any] = {
        "artifact": manifest.name,
        "digest": manifest.digest,
        "task": explainer.task.title,
        "method": config.method,
        "unit": explainer.unit,
    }
    if config.method == "integrated_gradients":
        about["tolerance"] = config.tolerance
    if config.method != "rollout":
        about["baseline"] = f"{BASELINES[config.baseline]}; special tokens and positions are kept"
    classes = []
    for target, means in averages(found).items() if len(found) > 1 else ():
        sides = extremes(means, top)
        named = [[{"word": a.word, "mean": short(a.mean), "count": a.count} for a in side] for side in sides]
        texts = sum(one.target == target for one in found)
        classes.append({"target": target, "texts": texts, "for": named[0], "against": named[1]})
    return about | {"texts": [_text(one) for one in found], "averages": classes}


def _text(one: Explanation) -> dict[str, Any]:
    tokens = [
        {"text": piece.text, "kind": piece.kind, "part": piece.part, "first": piece.first, "last": piece.last,
         "attribution": short(value)}
        for piece, value in one.units
    ]  # fmt: skip
    out: dict[str, Any] = {"texts": one.texts, "target": one.target, "output": short(one.output)}
    if one.baseline is not None:
        out |= {"baseline_output": short(one.baseline), "difference": short(one.output - one.baseline)}
    out["sum"] = short(one.values_T.sum())
    if one.error is not None:
        out |= {"completeness_error": short(one.error), "steps": one.steps}
    return out | {"tokens": tokens}
