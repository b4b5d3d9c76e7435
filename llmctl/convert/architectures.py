"""Select the conversion of a model: the Bridge of its family, and the Head of that Bridge."""

from __future__ import annotations

from llmctl.config.errors import RequestError
from llmctl.model.config import ModelConfig, families, family
from llmctl.model.hf_config import Bridge, Head


def bridges() -> dict[str, tuple[str, Bridge]]:
    """Return {model_type of Hugging Face: (name of the family, its Bridge)}."""
    found = {f: getattr(family(f), "BRIDGE", None) for f in families()}
    return {b.model_type: (f, b) for f, b in found.items() if b}


def of(model: ModelConfig) -> tuple[Bridge, Head]:
    """Return the Bridge and the Head that convert a model to the Hugging Face format.

    Raises:
        RequestError: If the family has no Hugging Face counterpart, or the counterpart has no such head.
    """
    bridge: Bridge | None = getattr(family(model.family), "BRIDGE", None)
    if bridge is None:
        known = sorted(f for f, _ in bridges().values())
        raise RequestError(
            f"family {model.family!r} has no counterpart to export to; those that have: {', '.join(known)}"
        )
    head = bridge.heads.get("lm+next_sentence" if model.next_sentence else model.head)
    if head is None:
        raise RequestError(f"{bridge.model_type} models have no head {model.head!r} to export to")
    return bridge, head
