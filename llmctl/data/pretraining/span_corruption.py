"""Define pretraining objectives for encoder-decoders: span corruption and prefix language modeling.

The encoder reads a part of a document, and the decoder predicts the rest. A row may contain several documents, as
segments. A decoder segment attends only to the encoder segment with the same number. Each decoder segment begins with
the padding token, as in T5 (Raffel et al., 2019, arXiv:1910.10683).

Shapes: B rows, S encoder tokens, T decoder tokens, n tokens of a document.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from llmctl.config.errors import RequestError
from llmctl.data.pretraining.objectives import random_bits, round_up_to_8, uniform
from llmctl.data.pretraining.packing import Batch, Packed
from llmctl.data.tokenizers.vocabulary import Vocabulary


def sizes(encoder: int, rate: float, span: float) -> tuple[int, int, int]:
    """Compute row sizes for span corruption, so that the encoder reads about `encoder` tokens per row.

    Of n tokens, k = rate * n are dropped. The k tokens form s = k / span spans of consecutive tokens. One sentinel
    token replaces each span. The encoder therefore reads n - k + s tokens.

    Args:
        encoder: Encoder length in tokens.
        rate: Fraction of tokens to drop.
        span: Mean number of tokens per span.

    Returns:
        Number of tokens per row before corruption, number of decoder tokens, and number of sentinels.
    """
    raw = encoder
    while True:
        k, s = _counts(raw + 1, rate, span)
        if raw + 1 - k + s > encoder:
            break
        raw += 1
    k, s = _counts(raw, rate, span)
    # With several documents per row, each has an end of sequence and its own rounding, hence the margins.
    return raw, round_up_to_8(k + s + 5), s + 4


def _counts(n: int, rate: float, span: float, up: float = 0.5) -> tuple[int, int]:
    """Return (number of tokens to drop from n tokens, number of spans).

    The number of tokens is floor(`rate` * n + `up`), but at least one token is kept.
    """
    k = min(int(rate * n + up), n - 1)
    return (0, 0) if k < 1 else (k, min(max(1, round(k / span)), n - k + 1))


def choose_spans(
    n: int, rate: float, span: float, up: float, gaps: np.ndarray, cuts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Sample the spans (runs of consecutive tokens) to drop from n tokens.

    Spans are separated by kept tokens. All placements of the spans are equally likely, and so are all divisions of the
    dropped tokens into spans.

    Args:
        n: Number of tokens.
        rate: Fraction of tokens to drop.
        span: Mean span length in tokens.
        up: Offset in [0, 1) for rounding: floor(`rate` * n + `up`) tokens are dropped. The rounding is unbiased if the
            offset is sampled uniformly.
        gaps: Random numbers [n], from which the positions of the spans are chosen.
        cuts: Random numbers [n], from which the lengths of the spans are chosen.

    Returns:
        Two masks, bool [n]: dropped tokens, and first tokens of spans.
    """
    dropped, starts = np.zeros(n, bool), np.zeros(n, bool)
    k, s = _counts(n, rate, span, up)
    if k:
        stay_s = np.sort(np.argsort(gaps[: n - k + 1])[:s])  # kept tokens before each span
        divide = np.sort(np.argsort(cuts[: k - 1])[: s - 1]) + 1
        length_s = np.diff([0, *divide, k])
        start_s = stay_s + np.cumsum(length_s) - length_s
        starts[start_s] = True
        for start, length in zip(start_s, length_s, strict=True):
            dropped[start : start + length] = True
    return dropped, starts


def corrupted(
    packed: Packed,
    words: Vocabulary,
    encoder: int,
    decoder: int,
    *,
    rate: float = 0.15,
    span: float = 3.0,
    seed: int = 0,
) -> Batch:
    """Apply span corruption (Raffel et al., 2019, arXiv:1910.10683): drop spans of consecutive tokens, and predict
    them.

    The encoder reads a sentinel in place of each span. The decoder predicts each sentinel and its span, and then the
    end-of-sequence token. Tokens beyond `encoder` or `decoder` are truncated, and a span whose sentinel was truncated
    is not predicted.

    Args:
        packed: Packed rows. The best length is `sizes(encoder, rate, span)[0]` tokens.
        words: Vocabulary of the tokenizer, with sentinels.
        encoder: Encoder length S in tokens.
        decoder: Decoder length T in tokens.
        rate: Fraction of each document's tokens to drop; beginning-of-sequence and end-of-sequence tokens stay.
        span: Mean span length in tokens.
        seed: Seed of the random choices.

    Returns:
        A batch with these arrays:
        - `encoder_tokens`, `encoder_segments`, `encoder_positions`: int32 [B, S]
        - `tokens`, `targets`, `segments`, `positions`: int32 [B, T]
        - `weights`, float32 [B, T]: loss weight of each target

    Raises:
        RequestError: If the tokenizer has too few sentinels.
    """
    width = packed.tokens.shape[1]
    up_BL = uniform(packed.rows, width, seed, 3)
    gaps_BL, cuts_BL = random_bits(packed.rows, width, seed, 4), random_bits(packed.rows, width, seed, 5)
    sentinels = np.array(words.tokenizer.sentinel_ids, np.int32)
    out = _Rows(len(packed.rows), encoder, decoder, words.pad_id)
    bos, eos = words.tokenizer.bos_id, words.tokenizer.eos_id
    for b, segment, first, last in _documents(packed):
        tokens = packed.tokens[b, first:last]
        inner = slice(int(tokens[0] == bos), len(tokens) - int(tokens[-1] == eos))
        n = inner.stop - inner.start
        dropped, starts = np.zeros(len(tokens), bool), np.zeros(len(tokens), bool)
        if n > 1:
            here = slice(first, first + n)
            chosen = choose_spans(n, rate, span, up_BL[b, first], gaps_BL[b, here], cuts_BL[b, here])
            dropped[inner], starts[inner] = chosen
        count = int(starts.sum())
        if count > len(sentinels):
            raise RequestError(
                f"span corruption needs {count} sentinels and the tokenizer has {len(sentinels)}; "
                "set tokenizer.sentinels, or a shorter train.seq_len"
            )
        read = tokens.copy()
        read[starts] = sentinels[:count]
        stays = ~dropped | starts
        fits = out.read(b, segment, read[stays])
        count = int(starts[stays][:fits].sum())
        if count:
            number = np.cumsum(starts)[dropped] - 1  # span index of each dropped token
            at = np.flatnonzero(starts[dropped])
            written = np.insert(tokens[dropped], at, sentinels[: len(at)])
            keeps = np.insert(number, at, np.arange(len(at))) < count
            out.write(b, segment, np.append(written[keeps], eos))
    return out.batch


def prefix(packed: Packed, words: Vocabulary, *, seed: int = 0) -> Batch:
    """Apply prefix language modeling (Raffel et al., 2019, arXiv:1910.10683).

    The encoder reads the beginning of each document, and the decoder predicts the rest. The position at which a
    document is divided is sampled uniformly. Encoder and decoder rows have as many tokens as the packed rows.

    Returns:
        Arrays with the same names as in the result of `corrupted`, int32 or float32 [B, T].
    """
    width = packed.tokens.shape[1]
    where_BT = uniform(packed.rows, width, seed, 6)
    out = _Rows(len(packed.rows), width, width, words.pad_id)
    for b, segment, first, last in _documents(packed):
        if last - first < 2:
            continue
        cut = first + 1 + int(where_BT[b, first] * (last - first - 1))
        out.read(b, segment, packed.tokens[b, first:cut])
        out.write(b, segment, packed.tokens[b, cut:last])
    return out.batch


def _documents(packed: Packed) -> Iterator[tuple[int, int, int, int]]:
    """Yield (row, segment, first, last) of every document: its tokens are tokens[row, first:last]."""
    for b, segments in enumerate(packed.segments):
        edges = np.flatnonzero(np.diff(segments, prepend=-1, append=-1))
        for first, last in itertools.pairwise(edges):
            if segments[first]:
                yield b, int(segments[first]), int(first), int(last)


class _Rows:
    """Build encoder rows and decoder rows, to which documents are appended one by one."""

    def __init__(self, B: int, S: int, T: int, pad: int):
        self.pad = pad

        def zeros(width: int) -> np.ndarray:
            return np.zeros((B, width), np.int32)

        self.batch: Batch = {f"encoder_{name}": zeros(S) for name in ("tokens", "segments", "positions")}
        self.batch |= {name: zeros(T) for name in ("tokens", "targets", "segments", "positions")}
        self.batch["weights"] = np.zeros((B, T), np.float32)
        for name in ("encoder_tokens", "tokens", "targets"):
            self.batch[name][:] = pad
        self._read, self._written = np.zeros(B, int), np.zeros(B, int)

    def read(self, b: int, segment: int, tokens: np.ndarray) -> int:
        """Append tokens of a document to encoder row b, and return the number of tokens that fit."""
        at = self._read[b]
        n = min(len(tokens), self.batch["encoder_tokens"].shape[1] - at)
        here = (b, slice(at, at + n))
        self.batch["encoder_tokens"][here] = tokens[:n]
        self.batch["encoder_segments"][here] = segment
        self.batch["encoder_positions"][here] = np.arange(n)
        self._read[b] += n
        return n

    def write(self, b: int, segment: int, targets: np.ndarray) -> None:
        """Append targets of a document to decoder row b. Targets that do not fit are dropped."""
        at = self._written[b]
        n = min(len(targets), self.batch["tokens"].shape[1] - at)
        here = (b, slice(at, at + n))
        self.batch["tokens"][here] = np.append(self.pad, targets[:-1])[:n]
        self.batch["targets"][here] = targets[:n]
        self.batch["segments"][here] = segment
        self.batch["positions"][here] = np.arange(n)
        self.batch["weights"][here] = 1
        self._written[b] += n
