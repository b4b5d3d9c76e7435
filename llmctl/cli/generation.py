"""Print the answers of a language model, or of several adapters over one base, for `llmctl generate`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from llmctl.artifacts import artifact
from llmctl.config.terminal import visible
from llmctl.data.tokenizers import loading as tokenizers
from llmctl.model.generate import chat as chats
from llmctl.model.generate import served
from llmctl.model.generate.beam import Beams, BeamSearch
from llmctl.model.generate.chat_template import Template
from llmctl.model.generate.continuations import Speed, begin, continue_rows, end_ids, search_rows
from llmctl.model.generate.decode import Decoder
from llmctl.model.generate.decoders import Decoders
from llmctl.model.generate.fill_mask import Filler
from llmctl.model.generate.speculative import SpeculativeDecoder
from llmctl.pipeline import console

SELECT = "/adapter"
"""First word of a line of standard input that selects an adapter."""


@dataclasses.dataclass(frozen=True)
class NamedModel:
    """Store one model that generates answers: its name, its artifact without arrays, and its tokenizer."""

    name: str
    artifact: artifact.Artifact
    words: Any
    """Tokenizer of the model."""
    ends: Sequence[int]
    """Ids of the end-of-sequence tokens, after which an answer ends."""


@dataclasses.dataclass(frozen=True)
class Draft:
    """Store the folder of the draft for speculative decoding, and the number of proposed tokens per step."""

    path: Path
    tokens: int


class NamedModels:
    """Store the models that generate answers, the decoders of the models, and the selected model."""

    def __init__(self, found: Sequence[NamedModel], decoders: Decoders | None, filler: Filler | None) -> None:
        """Store the models, and select one model.

        A single model is selected. If there are several models, the first model is the base, and all others are
        adapters of the base. The first adapter is then selected.
        """
        self.by_name = {named_model.name: named_model for named_model in found}
        self.answering = found[1:] or found
        self.selected = self.answering[0]
        self._decoders, self.filler = decoders, filler
        self.speculative: SpeculativeDecoder | None = None
        self.draft: dict[str, Any] = {}
        """Name and digest of the draft, and the number of tokens that the draft proposes per step."""

    def add_draft(self, manifest: artifact.Manifest, tokens: int) -> None:
        """Generate by speculative decoding, with the draft of the decoders. There must be a single model."""
        assert self._decoders is not None and self._decoders.draft is not None
        decoder = self._decoders.use(self.selected.name)
        self.speculative = SpeculativeDecoder(decoder, self._decoders.draft, tokens)
        self.draft = {"artifact": manifest.name, "digest": manifest.digest, "tokens": tokens}

    def decoder(self, named_model: NamedModel) -> Decoder | SpeculativeDecoder:
        """Return the decoder, with the parameters of `named_model`, and with the draft if there is one."""
        if self.speculative:
            return self.speculative
        assert self._decoders is not None
        return self._decoders.use(named_model.name)

    def select(self, line: str) -> bool:
        """Select the model that a line such as "/adapter NAME" names, and return whether the line is such a command.

        If no model has this name, print a message and keep the selection.
        """
        command, _, name = line.strip().partition(" ")
        if command != SELECT or len(self.by_name) == 1:
            return False
        if found := self.by_name.get(name.strip()):
            self.selected = found
        else:
            console.say(f"{SELECT} {name.strip()}: no such adapter; there are {', '.join(self.by_name)}")
        return True


def load_models(
    base: Path,
    adapters: Sequence[Path],
    bases: Sequence[Path],
    dtype: str,
    kv_cache: str = "",
    draft: Draft | None = None,
) -> NamedModels:
    """Load a model, or a base with adapters that share its arrays.

    Args:
        base: Folder of the artifact, or of the base of the adapters.
        adapters: Folders of adapters.
        bases: Folders of base artifacts, for adapters whose base is not in a folder next to the adapter.
        dtype: Dtype of the computation.
        kv_cache: Format of cached keys and values; if empty, keys and values have the dtype `dtype`.
        draft: Draft for speculative decoding. If the draft is an adapter of a loaded base, both share the arrays of the
            base.
    """
    paths = [base, *adapters] if len(adapters) > 1 else adapters or [base]
    short = [path.resolve().name for path in paths]
    names = [name if short.count(name) == 1 else str(path) for name, path in zip(short, paths, strict=True)]
    drafts = [draft.path] if draft else []
    if draft and (origin := artifact.read_manifest(draft.path).base) and origin.is_of(artifact.read_manifest(base)):
        bases = [*bases, base]
    every = list(artifact.load_each([*paths, *drafts], bases=bases))
    loaded = dict(zip(names, every, strict=False))
    found = []
    for name, there in loaded.items():
        words = tokenizers.load(there.tokenizer_dir)
        found.append(
            NamedModel(name, dataclasses.replace(there, params={}), words, end_ids(there.tokenizer_dir, words))
        )
    first = loaded[names[0]]
    if first.model.architecture == "encoder":
        return NamedModels(found, None, Filler(first.model, first.params, found[0].words, dtype))
    models = {name: (there.model, there.params) for name, there in loaded.items()}
    drafted = (every[-1].model, every[-1].params) if draft else None
    for line in dict.fromkeys(filter(None, (served.dequantized(there.params) for there in every))):
        console.say(line)
    decoders = Decoders(models, dtype, found[0].words.pad_id, kv_cache, drafted)
    named_models = NamedModels(found, decoders, None)
    if draft:
        named_models.add_draft(every[-1].manifest, draft.tokens)
    return named_models


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
) -> None:
    """Print prompts with their continuations. A single continuation is printed while it is generated.

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
            decoder, words = named_models.decoder(named_model), named_model.words
            encoded, live = decoder.model.architecture == "encoder_decoder", len(batch) == 1 and not json
            label = f"[{named_model.name}] " if len(chosen) > 1 else ""
            if live:
                _write(label + ("" if interactive or encoded else batch[0]))
            rows = begin(words, batch, list(stops), encoded=encoded)
            if width.width > 1 and isinstance(decoder, Decoder):
                search = searches.setdefault(id(decoder), BeamSearch(decoder, width))
                search_rows(search, words, rows, max_new, ends=named_model.ends, speed=speed)
                if live:
                    _write(rows[0].text)
            else:
                options: dict[str, Any] = {"sampling": sampling, "seed": seed, "first": first}
                for new in continue_rows(decoder, words, rows, max_new, ends=named_model.ends, speed=speed, **options):
                    if live:
                        _write(new[0])
            if live:
                _write("\n")
            elif not json:
                _write("".join(f"{label}{'' if encoded else r.prompt}{r.text}\n" for r in rows))
            done += [
                {"prompt": r.prompt, "text": r.text, "tokens": len(r.ids), "ended": r.ended}
                | ({"score": r.score} if width.width > 1 else {})
                | ({"adapter": named_model.name} if len(named_models.by_name) > 1 else {})
                for r in rows
            ]
        first += len(batch)
    _report(named_models, json, {"results": done}, speed)


def chat(
    named_models: NamedModels,
    turns: Iterable[list[dict[str, Any]]],
    system: str,
    json: bool,
    tools: list[Any] | None = None,
    **options: Any,
) -> None:
    """Answer each list of new messages with the selected model, and print the answers while they are generated.

    The model reads the complete conversation so far, and may call `tools`.
    """
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
        for new in talks[named_model.name].answer(**options):
            if not json:
                _write(new)
        if not json:
            _write("\n")
    _report(named_models, json, {"messages": messages}, speed)


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
