"""Apply the output filter of `llmctl generate` to continuations and to answers in conversations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llmctl.evaluate.harm.output_filter import Filtered, OutputFilter, attempt_seed
from llmctl.model.generate.chat import Conversation
from llmctl.model.generate.continuations import Continuation
from llmctl.pipeline import console


def filter_rows(
    output_filter: OutputFilter | None, rows: list[Continuation], sample: Callable[..., list[Continuation]], seed: int
) -> list[Filtered]:
    """Filter the continuations of a batch in place.

    If one answer must be sampled again, new continuations of all prompts of the batch are sampled. Only rows whose
    answers were rejected get the new continuations. The new sample of a row therefore does not depend on the other
    rows.

    Args:
        output_filter: The filter; None changes nothing.
        rows: Complete continuations. A continuation that is sampled again is replaced.
        sample: Function that continues all prompts of the batch again, with the argument `seed`.
        seed: Seed of the first samples.
    """
    if not output_filter:
        return [Filtered(row.text) for row in rows]

    def again(attempt: int, rejected: list[int]) -> list[str]:
        more = sample(seed=attempt_seed(seed, attempt))
        for i in rejected:
            rows[i] = more[i]
        return [more[i].text for i in rejected]

    found = output_filter([row.text for row in rows], again)
    for row, one in zip(rows, found, strict=True):
        row.text = one.text
    _report(found)
    return found


def filter_answer(output_filter: OutputFilter, talk: Conversation, seed: int, **options: Any) -> Filtered:
    """Generate the next answer of a conversation, and filter it. The conversation continues with the filtered answer.

    Args:
        output_filter: The filter.
        talk: The conversation.
        seed: Seed of the first sample.
        options: Further arguments of `Conversation.answer`.
    """

    def sample(seed: int) -> str:
        for _ in talk.answer(seed=seed, **options):
            pass
        return str(talk.messages.pop()["content"])

    (found,) = output_filter([sample(seed)], lambda attempt, _: [sample(attempt_seed(seed, attempt))])
    talk.messages.append({"role": "assistant", "content": found.text})
    _report([found])
    return found


def _report(found: Sequence[Filtered]) -> None:
    """Print one line per changed answer: the action, and its reasons."""
    for one in found:
        if one.finding:
            score = [] if one.finding.score is None else [f"classifier {one.finding.score:.2f}"]
            tries = f" after {one.attempts} further samples" if one.attempts else ""
            console.say(f"filter: an answer was {one.action}{tries} ({', '.join([*one.finding.words, *score])})")
