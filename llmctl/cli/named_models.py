"""Load the models that answer in `llmctl generate`: one model, or several adapters over one base."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmctl.artifacts import artifact
from llmctl.data.tokenizers import loading as tokenizers
from llmctl.model.generate import served
from llmctl.model.generate.continuations import end_ids
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
        """Make the selected model generate by speculative decoding, with the draft that the decoders hold.

        Exactly one model must be loaded. `manifest` is the manifest of the draft. The draft proposes `tokens` tokens
        per step.
        """
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
