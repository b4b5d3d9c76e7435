"""Tokenize sample texts and pairs of texts. Exported files and llmctl are compared by their outputs on these samples.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from llmctl.convert import parity
from llmctl.convert.tokenizers import projects_pooled, reads_texts
from llmctl.data.examples.labelled import templated
from llmctl.data.tokenizers import loading
from llmctl.data.tokenizers.base import Tokenizer
from llmctl.model.config import ModelConfig

TEXTS = (
    "The film was better than the book.",
    "x",
    "Ein Satz, 12 Worte?  Two spaces",
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen",
)
"""Sample texts of unequal length. The last text is truncated, because it has more than `LENGTH` tokens."""
PAIRS = (("It was good.", "Was it 12 times bad?"), ("x", "a b"), ("A 12", "x"))
"""Sample pairs of texts. Pairs that are longer than a row are left out, because programs truncate pairs differently."""
LENGTH = 24
"""Maximum number of tokens per row."""

Rows = list[list[int]]


@dataclass(frozen=True)
class Samples:
    """Store sample texts and pairs of texts, and their token ids. The pairs come after the texts."""

    texts: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]
    rows: Rows
    """Token ids of each text and of each pair."""
    types: Rows
    """Type of each token: 1 for the second text of a pair."""
    length: int
    """Maximum number of tokens per row, T."""

    def with_rows(self, rows: Rows) -> Samples:
        """Return the samples with the token ids `rows` in place of their own. All tokens get the type 0."""
        return replace(self, rows=rows, types=[[0] * len(ids) for ids in rows])

    def difference(self, what: str, there: Rows) -> str:
        """Describe the first text whose token ids differ from those in `there`; return "" if all are equal."""
        for text, a, b in zip((*self.texts, *self.pairs), self.rows, there, strict=True):
            if a != b:
                ids = f"{b[:8]}…{b[-2:]} ({len(b)} tokens), llmctl as {a[:8]}…{a[-2:]}"
                return f"{what}: others read {text!r} as {ids}"
        return ""


def samples_of(cfg: ModelConfig, folder: Path, seq_len: int = 0) -> Samples:
    """Return samples, tokenized by the tokenizer in a folder.

    Pairs of texts are included if the model projects a pooled vector, as classifiers of pairs do. Without a tokenizer,
    there is one row of random tokens.
    """
    T = min(LENGTH, cfg.max_seq_len, seq_len or LENGTH)
    if not (folder / loading.DESCRIPTOR).is_file():
        ids = np.random.default_rng(1).integers(0, cfg.vocab_size, T).tolist()
        return Samples((), (), [ids], [[0] * T], T)
    words = loading.load(folder)
    found = [_row(cfg, words, text, T) for text in TEXTS]
    pairs: list[tuple[str, str]] = []
    if projects_pooled(cfg) and reads_texts(cfg) and not cfg.encoder_layers:
        for pair in PAIRS:
            first_N, second_N = (np.array(words.encode(text), np.int32) for text in pair)
            if len(words.template.row(first_N, second_N)) <= T:
                pairs.append(pair)
                found.append(templated(words.template, first_N, second_N, T))
    rows, types = ([np.asarray(part).tolist() for part in parts] for parts in zip(*found, strict=True))
    return Samples(TEXTS, tuple(pairs), rows, types, T)


def _row(cfg: ModelConfig, words: Tokenizer, text: str, T: int) -> tuple[np.ndarray, np.ndarray]:
    if reads_texts(cfg):
        return templated(words.template, np.array(words.encode(text), np.int32), None, T)
    ids = np.array(words.prompt(text)[:T])
    return ids, np.zeros_like(ids)


def batch_of(cfg: ModelConfig, samples: Samples) -> dict[str, jax.Array]:
    """Return the batch of `parity.probe` (random tokens), extended by one row for each sample."""
    T = samples.length
    probe = {k: np.asarray(v) for k, v in parity.probe(cfg, T).items()}
    side = _padded(samples.rows, T, "encoder_" if cfg.encoder_layers else "")
    if cfg.encoder_layers:
        side |= _padded([decoded(ids, T) for ids in samples.rows], T, "")
    elif cfg.token_types:
        probe["types"] = np.zeros_like(probe["tokens"])
        side["types"] = _padded(samples.types, T, "")["tokens"]
    return {k: jnp.asarray(np.concatenate([v, side[k]]), jnp.int32) for k, v in probe.items()}


def decoded(ids: Sequence[int], T: int) -> list[int]:
    """Return tokens for the decoder of an encoder-decoder: the start token, and up to five tokens of the text."""
    return [0, *ids[: min(5, T - 1)]]


def _padded(rows: Rows, T: int, prefix: str) -> dict[str, np.ndarray]:
    tokens, segments = np.zeros((2, len(rows), T), np.int32)
    for b, ids in enumerate(rows):
        tokens[b, : len(ids)], segments[b, : len(ids)] = ids, 1
    positions = np.arange(T, dtype=np.int32) * segments
    return {f"{prefix}tokens": tokens, f"{prefix}segments": segments, f"{prefix}positions": positions}
