"""Find the Bridge and the Head that convert a model to and from the Hugging Face format.

A Bridge translates the config and the tensor names of a model family. A Head translates the fields and the tensor names
of one output head.
"""

from __future__ import annotations

from llmctl.config.errors import RequestError
from llmctl.model.config import ModelConfig, families, family
from llmctl.model.hf_names import Bridge, Head


def bridges() -> dict[str, tuple[str, Bridge]]:
    """Return {model_type of Hugging Face: (name of the family, its Bridge)}."""
    found = {f: getattr(family(f), "BRIDGE", None) for f in families()}
    return {b.model_type: (f, b) for f, b in found.items() if b}


GGUF = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma2": "gemma2", "gemma3": "gemma3_text"}
"""Map from the name of an architecture in llama.cpp to the value of `model_type` in transformers."""
TO_GGUF = {v: k for k, v in GGUF.items()} | {"mistral": "llama"}
"""Map from the value of `model_type` in transformers to the name of the architecture in llama.cpp."""


def formats(name: str) -> list[str]:
    """Return the names of the formats to which models of a family can be exported.

    If the family has no Hugging Face counterpart, the list is empty.

    Example:
        >>> formats("llama"), formats("bert"), formats("original")
        (['hf', 'compressed-tensors', 'peft', 'gguf'], ['hf', 'compressed-tensors', 'peft'], [])
    """
    bridge: Bridge | None = getattr(family(name), "BRIDGE", None)
    if bridge is None:
        return []
    packed = [] if bridge.in_out else ["compressed-tensors"]  # it stores only linear layers
    return ["hf", *packed, "peft", *(["gguf"] if bridge.model_type in TO_GGUF else [])]


def of(model: ModelConfig) -> tuple[Bridge, Head]:
    """Return the Bridge and the Head that convert a model to the Hugging Face format.

    Raises:
        RequestError: If the model has bottleneck adapters, a trained prompt or a trained prefix. If the Hugging Face
            format has no model of this family, or no class for the model's head.
    """
    if model.prompt_tokens:
        raise RequestError(
            "the model has a trained prompt, which of the other formats only PEFT's holds (export --to peft); use it "
            "with llmctl, or finetune its parent with method = 'lora'"
        )
    if model.prefix_tokens:
        raise RequestError(
            "the model has a trained prefix of keys and values, which of the other formats only PEFT's holds (export "
            "--to peft); use it with llmctl, or finetune its parent with method = 'lora'"
        )
    if model.adapter_size:
        raise RequestError(
            "the model has bottleneck adapters, which no other format holds and which cannot be merged; use it with "
            "llmctl, or finetune its parent with method = 'lora', whose adapters can"
        )
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


def check(model: ModelConfig) -> tuple[Bridge, Head]:
    """Check that a class of transformers can represent a model, and return the model's Bridge and Head.

    Raises:
        RequestError: If there is no such class, or if the class does not support a setting of the model.
    """
    bridge, head = of(model)
    needed = dict(head.fields)
    if model.head_kind.bare:  # the pooler is optional, and pooling is stored in another file
        needed.pop("pooler", None)
    odd = [f"{k} = {getattr(model, k)!r}" for k, v in needed.items() if getattr(model, k) != v]
    if odd:
        raise RequestError(f"{head.architecture} has no {', '.join(odd)}; this model has no counterpart to export to")
    return bridge, head


def notice(model: ModelConfig, before: ModelConfig | None = None) -> str:
    """Return a warning if a model cannot be exported; otherwise an empty string.

    A stage that changes a model passes the model before the change as `before`. If `before` also cannot be exported,
    the result is an empty string.

    Stages print the warning before they start, so the user can stop before hours of training.

    Example:
        >>> notice(ModelConfig(preset="modern-tiny"))[:56]
        "cannot be exported to other libraries: family 'modern' h"
        >>> notice(ModelConfig(preset="llama-tiny"))
        ''
    """
    why = _refusal(model)
    return f"cannot be exported to other libraries: {why}" if why and not (before and _refusal(before)) else ""


def _refusal(model: ModelConfig) -> str:
    try:
        bridge, _ = check(model)
        bridge.to_config(model)
    except RequestError as e:
        return str(e)
    return ""
