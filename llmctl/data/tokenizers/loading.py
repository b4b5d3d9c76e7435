"""Train or load a tokenizer, and detect its kind from the files in a folder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Annotated, Any

from etils import epath
from pydantic import BaseModel, Field

from llmctl.config.containment import within
from llmctl.config.errors import RequestError
from llmctl.config.text_input import parse_json
from llmctl.data import file_bytes
from llmctl.data.config import TokenizerConfig
from llmctl.data.paths import folder
from llmctl.data.tokenizers import sentencepieces
from llmctl.data.tokenizers.base import DESCRIPTOR, TextTemplate, Tokenizer
from llmctl.data.tokenizers.byte_tokenizer import ByteTokenizer
from llmctl.data.tokenizers.tokenizer_json import JsonTokenizer

__all__ = ["Tokenizer", "chat_template", "load", "load_or_train", "train"]

KINDS: dict[str, type[Tokenizer]] = {c.kind: c for c in (JsonTokenizer, sentencepieces.SentencePieces, ByteTokenizer)}
"""Tokenizer classes by kind. A folder that llmctl wrote names the kind in a JSON file. Other folders are searched for
model files, in the order of this table."""
BOS = {"auto": None, "yes": True, "no": False}


TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class _Template(BaseModel, extra="forbid"):
    """Store the fields of a `TextTemplate` that are read from JSON."""

    begin: tuple[TokenId, ...]
    end: tuple[TokenId, ...]
    between: tuple[TokenId, ...]


class _Descriptor(BaseModel, extra="allow"):
    """Check the types in the JSON file that describes a saved tokenizer (`DESCRIPTOR`)."""

    kind: str
    file: str
    digest: str
    bos: bool = True
    special: dict[str, str] | None = None
    template: _Template | None = None
    prefix: tuple[TokenId, ...] = ()


def train(texts: Iterable[str], cfg: TokenizerConfig) -> Tokenizer:
    """Train a tokenizer on `texts`. Equal texts and settings give equal files.

    Raises:
        RequestError: If the vocabulary is too small, or larger than the corpus supports. The message gives the limit.
    """
    if cfg.kind == "bytes":
        return ByteTokenizer.new(cfg.sentinels, cfg.bos != "no")
    return sentencepieces.train(texts, cfg)


def load_or_train(texts: Iterable[str], cfg: TokenizerConfig) -> Tokenizer:
    """Load the tokenizer at `cfg.path`, or train a tokenizer on `texts` if no path is set.

    Raises:
        RequestError: If there is no valid tokenizer at the path, or if the corpus is too small for the vocabulary.
    """
    return load(folder(cfg.path), BOS[cfg.bos]) if cfg.path else train(texts, cfg)


def load(path: epath.PathLike, add_bos: bool | None = None) -> Tokenizer:
    """Load the tokenizer at `path`. Nothing is unpickled or executed.

    Args:
        path: An artifact's tokenizer folder, another folder with `tokenizer.json` or `tokenizer.model`, or one of these
            files.
        add_bos: Whether texts begin with `bos`; None uses the value in the folder's JSON files or in the model file.

    Raises:
        RequestError: If there is no tokenizer. If the tokenizer's kind is unknown. If a file is damaged or outside the
            folder. If `add_bos` is true but there is no beginning-of-sequence token.
    """
    path = epath.Path(path)
    described: dict = {}
    if (path / DESCRIPTOR).is_file():
        try:
            content = within(path, DESCRIPTOR).read_bytes()
            parse_json(content)
            described = _Descriptor.model_validate_json(content, strict=True).model_dump(exclude_unset=True)
        except (ValueError, TypeError):
            raise RequestError(f"{path / DESCRIPTOR}: damaged tokenizer descriptor") from None
        kind, file, digest = described["kind"], within(path, described["file"]), described["digest"]
        if kind not in KINDS:
            raise RequestError(
                f"{path}: tokenizer of unknown kind {kind!r} (known: {', '.join(KINDS)}); a newer llmctl?"
            )
        if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != digest:
            raise RequestError(f"{file}: the tokenizer is damaged (its digest differs from the descriptor's)")
    else:
        places = [(k, path / name) for k, c in KINDS.items() for name in (c.file, *c.other_files)]
        found = [(k, place) for k, place in places if place.is_file()]
        if path.is_file():
            found = [("json" if path.read_bytes()[:1] == b"{" else "sentencepiece", path)]
        if not found:
            files = ", ".join(c.file for c in KINDS.values())
            raise RequestError(f"{path}: no tokenizer there (looked for {DESCRIPTOR}, {files})")
        kind, file = found[0]
        if file is not path:
            within(path, file.name)
    told = {} if add_bos is None else {"bos": add_bos}
    if not described and not told and isinstance(begins := _config(file.parent).get("add_bos_token"), bool):
        told = {"bos": begins}
    try:
        tokenizer = KINDS[kind].open(file.read_bytes(), described | told, file.parent)
    except ValueError as error:
        raise RequestError(f"{file}: not a usable tokenizer ({error})") from None
    if add_bos is None and (template := described.get("template")):
        tokenizer.own_template = TextTemplate(**template)
    tokenizer.prefix = described.get("prefix", ())
    tokenizer.chat_template = chat_template(file.parent)
    if add_bos and not tokenizer.add_bos:
        raise RequestError(f"{file}: has no begin-of-sequence token to begin with; tokenizer.bos must be auto or no")
    return tokenizer


def chat_template(folder: epath.PathLike) -> str | None:
    """Return the chat template of a tokenizer folder, or None if there is none.

    The template is in chat_template.jinja or in tokenizer_config.json.

    Raises:
        RequestError: If a file is damaged.
    """
    alone = within(epath.Path(folder), "chat_template.jinja")
    if alone.is_file():
        return file_bytes.content(alone)
    found = _config(epath.Path(folder)).get("chat_template")
    if isinstance(found, list):  # a list holds several templates with names
        found = next((t.get("template") for t in found if isinstance(t, dict) and t.get("name") == "default"), None)
    return found if isinstance(found, str) else None


def _config(folder: epath.Path) -> dict[str, Any]:
    """Return the content of a folder's tokenizer_config.json, or an empty dict if the file is missing."""
    file = within(folder, "tokenizer_config.json")
    try:
        return dict(parse_json(file.read_bytes())) if file.is_file() else {}
    except (ValueError, TypeError) as e:
        raise RequestError(f"{file}: damaged ({e})") from None
