"""Check that an artifact can be the draft of another artifact in speculative decoding."""

from __future__ import annotations

from llmctl.artifacts.manifest import Manifest
from llmctl.config.base import with_article
from llmctl.config.errors import RequestError


def check_draft(where: str, draft: Manifest, target: Manifest, target_name: str) -> None:
    """Check that draft and target read the same token ids, and that both predict the next token.

    The tokenizers are compared by their digests. In `llmctl plan`, a tokenizer that is not trained yet has no digest,
    and is accepted.

    Args:
        where: Name of the draft in messages.
        draft: Manifest of the draft.
        target: Manifest of the target.
        target_name: Name of the target in messages.

    Raises:
        RequestError: If the two models differ in tokenizer, architecture or trained prompt. If one of the models does
            not generate text.
    """
    if draft.model.architecture != target.model.architecture or not draft.model.head_kind.vocabulary:
        kind = f"{with_article(draft.model.architecture)} with the head {draft.model.head!r}"
        other = with_article(target.model.architecture)
        raise RequestError(f"{where}: is {kind}, and {target_name} is {other}; a draft continues texts as its target")
    if target.model.architecture == "encoder":
        raise RequestError(f"{where}: {target_name} is an encoder, and continues no text")
    if not target.model.head_kind.vocabulary:
        raise RequestError(f"{where}: {target_name} has the head {target.model.head!r}, and continues no text")
    if draft.tokenizer and target.tokenizer and draft.tokenizer != target.tokenizer:
        raise RequestError(f"{where}: has another tokenizer than {target_name}; a draft needs its target's")
    if draft.model.prompt_tokens != target.model.prompt_tokens:
        raise RequestError(f"{where}: has another number of trained prompt tokens than {target_name}")
