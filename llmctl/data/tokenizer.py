"""The way to a tokenizer: train it, load it, find its kind in a folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from llmctl.data import TokenizerConfig, sentencepieces
from llmctl.data.abstract_tokenizer import DESCRIPTOR, Tokenizer
from llmctl.data.paths import folder
from llmctl.errors import RequestError

__all__ = ["Tokenizer", "load", "obtain", "train"]

KINDS = {c.kind: c for c in (sentencepieces.SentencePieces,)}
"""Class of each kind that a descriptor can name, in the order in which foreign folders are searched."""


def train(texts: Iterable[str], cfg: TokenizerConfig) -> Tokenizer:
    """A tokenizer from `texts`; the same texts and config give the same bytes.

    Raises:
        RequestError: a vocabulary that the corpus cannot fill (says the largest possible) or that is too small.
    """
    return sentencepieces.train(texts, cfg)


def obtain(texts: Iterable[str], cfg: TokenizerConfig) -> Tokenizer:
    """The tokenizer that `cfg.path` names, or else one trained on `texts`.

    Raises:
        RequestError: as `load` and `train`.
    """
    return load(Path(folder(cfg.path)), add_bos=cfg.bos) if cfg.path else train(texts, cfg)


def load(path: Path, add_bos: bool | None = None) -> Tokenizer:
    """The tokenizer in folder (or file) `path`; nothing is unpickled or executed.

    Args:
        path: artifact's tokenizer folder, a folder that holds `tokenizer.model`, or such a file.
        add_bos: overrides the descriptor (which is absent beside foreign tokenizers; begins with bos then).

    Raises:
        RequestError: nothing there, an unknown kind, a file that is damaged.
    """
    path = Path(path)
    described: dict = {}
    if (path / DESCRIPTOR).is_file():
        try:
            described = json.loads((path / DESCRIPTOR).read_text())
            kind, file, digest = described["kind"], path / described["file"], described["digest"]
        except (ValueError, KeyError, TypeError):
            raise RequestError(f"{path / DESCRIPTOR}: damaged tokenizer descriptor") from None
        if kind not in KINDS:
            raise RequestError(
                f"{path}: tokenizer of unknown kind {kind!r} (known: {', '.join(KINDS)}); a newer llmctl?"
            )
        if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != digest:
            raise RequestError(f"{file}: the tokenizer is damaged (its digest differs from the descriptor's)")
    else:
        found = [(k, path / c.file) for k, c in KINDS.items() if (path / c.file).is_file()]
        if path.is_file():
            found = [(k, path) for k, c in KINDS.items() if path.suffix == Path(c.file).suffix]
        if not found:
            files = ", ".join(c.file for c in KINDS.values())
            raise RequestError(f"{path}: no tokenizer there (looked for {DESCRIPTOR}, {files})")
        kind, file = found[0]
    try:
        return KINDS[kind](file.read_bytes(), described.get("bos", True) if add_bos is None else add_bos)
    except ValueError as error:
        raise RequestError(f"{file}: not a usable tokenizer ({error})") from None
