"""Print the answers of a language model, or of several adapters over one base, for `llmctl generate`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from llmctl.cli.filtering import filter_answer, filter_rows
from llmctl.cli.named_models import NamedModel, NamedModels
from llmctl.config.terminal import visible
from llmctl.evaluate.harm.output_filter import OutputFilter
from llmctl.model.generate import chat as chats
from llmctl.model.generate.beam import Beams, BeamSearch
from llmctl.model.generate.chat_template import Template
from llmctl.model.generate.continuations import Continuation, Speed, begin, continue_rows, search_rows
from llmctl.model.generate.decode import Decoder
from llmctl.model.generate.speculative import SpeculativeDecoder
from llmctl.pipeline import console


def continue_texts(
    named_models: NamedModels,
    batches: Iterable[list[str]],
    interactive: bool,
    json: bool,
    *,
    width: Beams,
    max_new: int,
    sampling: Any,
    seed: int,
    stops: Iterable[str],
    output_filter: OutputFilter | None = None,
) -> None:
    """Print prompts with their continuations. A single continuation is printed while it is generated.

    If there is a filter, it checks each complete continuation before the continuation is printed.

    If a person types the prompts (`interactive`), only the selected model continues them. Otherwise, all adapters
    continue the prompts.
    """
    speed, done, first = Speed(), [], 0
    searches: dict[int, BeamSearch] = {}
    for batch in batches:
        if interactive and named_models.select(batch[0]):
            continue
        chosen = [named_models.selected] if interactive else named_models.answering
        for named_model in chosen:
            decoder = named_models.decoder(named_model)
            encoded = decoder.model.architecture == "encoder_decoder"
            live = len(batch) == 1 and not json and not output_filter
            label = f"[{named_model.name}] " if len(chosen) > 1 else ""
            if live:
                _write(label + ("" if interactive or encoded else batch[0]))
            start = partial(begin, named_model.words, batch, list(stops), encoded=encoded)
            if width.width > 1 and isinstance(decoder, Decoder):
                rows = start()
                search = searches.setdefault(id(decoder), BeamSearch(decoder, width))
                search_rows(search, named_model.words, rows, max_new, ends=named_model.ends, speed=speed)
                if live:
                    _write(rows[0].text)
                filtered = filter_rows(output_filter, rows, start, seed)
            else:
                rules: dict[str, Any] = {"max_new": max_new, "sampling": sampling, "first": first, "speed": speed}
                sample = partial(_sampled, decoder, named_model, start, **rules)
                rows = sample(seed=seed, write=_write if live else None)
                filtered = filter_rows(output_filter, rows, sample, seed)
            if live:
                _write("\n")
            elif not json:
                _write("".join(f"{label}{'' if interactive or encoded else r.prompt}{r.text}\n" for r in rows))
            done += [
                {"prompt": r.prompt, "text": r.text, "tokens": len(r.ids), "ended": r.ended}
                | ({"score": r.score} if width.width > 1 else {})
                | ({"adapter": named_model.name} if len(named_models.by_name) > 1 else {})
                | ({"filtered": one.report()} if one.finding else {})
                for r, one in zip(rows, filtered, strict=True)
            ]
        first += len(batch)
    _report(named_models, json, {"results": done}, speed)


def _sampled(
    decoder: Decoder | SpeculativeDecoder,
    named_model: NamedModel,
    start: Callable[[], list[Continuation]],
    *,
    max_new: int,
    speed: Speed,
    write: Callable[[str], None] | None = None,
    **options: Any,
) -> list[Continuation]:
    """Return the complete continuations of a batch. If `write` is given, it is called with each new piece of the first
    row's text.
    """
    rows = start()
    for new in continue_rows(decoder, named_model.words, rows, max_new, ends=named_model.ends, speed=speed, **options):
        if write:
            write(new[0])
    return rows


def chat(
    named_models: NamedModels,
    turns: Iterable[list[dict[str, Any]]],
    system: str,
    json: bool,
    tools: list[Any] | None = None,
    output_filter: OutputFilter | None = None,
    **options: Any,
) -> None:
    """Answer each list of new messages with the selected model, and print the answers while they are generated.

    The model reads the complete conversation so far, and may call `tools`. If there is a filter, it checks
    each complete answer before the answer is printed. The conversation continues with the filtered answer.
    """
    changed: list[dict[str, Any]] = []
    talks: dict[str, chats.Conversation] = {}
    messages: list[Any] = [{"role": "system", "content": system}] if system else []
    speed = Speed()
    for turn in turns:
        if len(turn) == 1 and named_models.select(str(turn[0]["content"])):
            continue
        named_model = named_models.selected
        decoder = named_models.decoder(named_model)
        if named_model.name not in talks:
            template = Template(named_model.words.chat_template, named_model.words)
            talks[named_model.name] = chats.Conversation(template, decoder, named_model.ends)
            talks[named_model.name].messages, talks[named_model.name].speed = messages, speed
            talks[named_model.name].tools = tools
        messages += turn
        if output_filter:
            filtered = filter_answer(output_filter, talks[named_model.name], **options)
            changed += [{"message": len(messages) - 1, **why} for why in [filtered.report()] if why]
            if not json:
                _write(filtered.text)
        else:
            for new in talks[named_model.name].answer(**options):
                if not json:
                    _write(new)
        if not json:
            _write("\n")
    result: dict[str, Any] = {"messages": messages} | ({"filtered": changed} if changed else {})
    _report(named_models, json, result, speed)


def fill(named_models: NamedModels, texts: Iterable[str], k: int, json: bool) -> None:
    """Print every text with its masks replaced by the most likely tokens.

    If `json` is true, print the `k` most likely tokens of each mask as JSON instead.
    """
    assert named_models.filler is not None
    done = []
    for text in texts:
        for filled in named_models.filler.fill([text], k):
            masks = [[{"token": token, "probability": p} for token, p in mask] for mask in filled.masks]
            done.append({"prompt": filled.prompt, "text": filled.text, "masks": masks})
            if not json:
                _write(filled.text + "\n")
                console.say("\n".join("  " + ", ".join(f"{t} {p:.0%}" for t, p in mask) for mask in filled.masks))
    if json:
        console.result({**_identity(named_models), "results": done})


def _identity(named_models: NamedModels) -> dict[str, Any]:
    """Return the name and the digest of the model, and the names and digests of its adapters."""
    identities = [
        {"artifact": named_model.artifact.manifest.name, "digest": named_model.artifact.manifest.digest}
        for named_model in named_models.by_name.values()
    ]
    return identities[0] | ({"adapters": identities[1:]} if len(identities) > 1 else {})


def _report(named_models: NamedModels, json: bool, result: dict[str, Any], speed: Speed) -> None:
    rate, fast = speed.tokens_per_second, named_models.speculative
    counts = fast.acceptance if fast else None
    if json:
        if counts:
            about = {"acceptance": counts.rate, "tokens_per_step": counts.tokens_per_step}
            result |= {"draft": named_models.draft | about}
        console.result({**_identity(named_models), **result, "tokens_per_second": rate})
        return
    line = f"{speed.tokens} tokens" + (f", {rate:.1f} tokens/s" if rate else "")
    if counts and counts.rate is not None:
        line += f", {counts.rate:.1%} of the draft's tokens accepted, {counts.tokens_per_step:.2f} tokens per step"
    console.say(line)


def _write(text: str) -> None:
    """Write generated text to stdout. If stdout is a terminal, control characters are replaced."""
    sys.stdout.write(visible(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()
