"""Generate continuations of prompts: stream the text, truncate it at stop strings, and measure the throughput."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from llmctl.config.errors import RequestError
from llmctl.config.text_input import parse_json
from llmctl.data.tokenizers.base import Tokenizer
from llmctl.model.generate.beam import BeamSearch
from llmctl.model.generate.chat_cache import Session
from llmctl.model.generate.decode import Decoder
from llmctl.model.generate.padded_prompts import NOTHING
from llmctl.model.generate.sampling import Sampling
from llmctl.model.generate.speculative import SpeculativeDecoder

GENERATION = "generation_config.json"
"""Name of the file in a tokenizer folder that lists end tokens, in addition to the tokenizer's own end token."""
INCOMPLETE = "\ufffd"
"""Character to which an incomplete UTF-8 sequence is decoded."""


@dataclass
class Continuation:
    """Store one prompt and its continuation so far."""

    prompt: str
    prompt_ids: list[int]
    """Token ids that the new text continues; empty if an encoder reads the prompt."""
    stops: Sequence[str] = ()
    ids: list[int] = field(default_factory=list)
    text: str = ""
    """Generated text that later tokens cannot change. An incomplete character at the end, or the possible beginning of
    a stop string, is not included."""
    source_ids: list[int] = field(default_factory=list)
    """Token ids of the prompt for the encoder of an encoder-decoder."""
    score: float | None = None
    """Score of the answer, if it comes from a beam search."""
    ended: str = ""
    """Reason why the continuation ended: "end" (an end token), "stop" (a stop string) or "length"; empty before the
    end."""

    def add(self, ids: Sequence[int], decode: Callable[[Sequence[int]], str], end_ids: Sequence[int]) -> str:
        """Append new tokens, and return the text that is added to `self.text`.

        The token id NOTHING, which generation returns after the end of a row, is not appended.
        """
        if self.ended:
            return ""
        self.ids += [i for i in ids if i != NOTHING]
        if self.ids and self.ids[-1] in end_ids:
            self.ended = "end"
        # Decode together with the prompt, because a first word decoded alone loses the space before it.
        whole = decode([*self.prompt_ids, *self.ids])[len(decode(self.prompt_ids)) :]
        found = [at for stop in self.stops if (at := whole.find(stop)) >= 0]
        if found:
            self.ended, whole = "stop", whole[: min(found)]
        return self._set_text(whole if self.ended else whole[: len(whole) - self._unfinished_length(whole)])

    def finish(self, decode: Callable[[Sequence[int]], str]) -> str:
        """End the continuation at the maximum number of tokens, and return the rest of its text.

        If the continuation has already ended, return an empty string.
        """
        if self.ended:
            return ""
        self.ended = "length"
        return self._set_text(decode([*self.prompt_ids, *self.ids])[len(decode(self.prompt_ids)) :])

    def _set_text(self, text: str) -> str:
        new, self.text = text[len(self.text) :], text
        return new

    def _unfinished_length(self, text: str) -> int:
        """Return the number of characters at the end of `text` that may still change or may begin a stop string."""
        unfinished = len(text) - len(text.rstrip(INCOMPLETE))
        begun = [n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
        return max([unfinished, *begun])


def end_ids(folder: Path, tokenizer: Tokenizer) -> list[int]:
    """Return the ids of the end tokens: the tokenizer's own end token, and the end tokens in generation_config.json.

    Args:
        folder: Folder of the tokenizer, which may contain generation_config.json.
        tokenizer: The tokenizer.

    Raises:
        RequestError: If generation_config.json is damaged, or contains an id of more than 31 bits.
    """
    file = folder / GENERATION
    try:
        said = parse_json(file.read_bytes()).get("eos_token_id") if file.is_file() else None
    except (OSError, ValueError, AttributeError) as e:
        raise RequestError(f"{file}: damaged ({e})") from None
    more = [i for i in (said if isinstance(said, list) else [said]) if isinstance(i, int)]
    if odd := [i for i in more if i >= 2**31]:
        raise RequestError(f"{file}: eos_token_id {odd[0]} is no token")
    return sorted({tokenizer.eos_id, *more})


@dataclass
class Speed:
    """Count new tokens and their wall time in seconds. Chunks during which programs are compiled are not timed."""

    tokens: int = 0
    timed_tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float | None:
        """Return the throughput over all rows, or None if every row ended before the first timed chunk."""
        return self.timed_tokens / self.seconds if self.seconds else None


def begin(
    tokenizer: Tokenizer, prompts: Sequence[str], stops: Sequence[str] = (), *, encoded: bool = False
) -> list[Continuation]:
    """Return one empty `Continuation` per prompt.

    Args:
        tokenizer: Tokenizer of the model.
        prompts: Texts to continue.
        stops: Strings that end a continuation; empty strings are ignored.
        encoded: Whether an encoder reads the prompts. If so, the tokenizer's special tokens are added to each prompt.

    Raises:
        RequestError: If a prompt is empty and the tokenizer has no begin-of-sequence token.
    """
    stops = [s for s in stops if s]
    if encoded:
        return [
            Continuation(p, [], stops, source_ids=tokenizer.template.row(tokenizer.encode(p)).tolist()) for p in prompts
        ]
    rows = [Continuation(p, tokenizer.prompt(p), stops) for p in prompts]
    if not all(row.prompt_ids for row in rows):
        raise RequestError("a prompt is empty, and this tokenizer has no token to begin with; say something")
    return rows


def continue_rows(
    decoder: Decoder | SpeculativeDecoder | Session,
    tokenizer: Tokenizer,
    rows: Sequence[Continuation],
    max_new: int,
    *,
    sampling: Sampling | None = None,
    seed: int = 0,
    first: int = 0,
    chunk: int = 16,
    speed: Speed | None = None,
    ends: Sequence[int] = (),
) -> Iterator[list[str]]:
    """Generate text for a batch of continuations (rows), and yield the new text of each row after every chunk.

    Text that later tokens may change is yielded later (see `Continuation.text`).

    Args:
        decoder: Decoder, with or without a draft, or Session for a single row.
        tokenizer: Tokenizer of the model.
        rows: Continuations from `begin`; they are updated.
        max_new: Maximum number of new tokens.
        sampling: Sampling rules; greedy if None.
        seed: Seed of the sampling.
        first: Index of the first row among all rows with the same seed.
        chunk: Number of tokens between two yields.
        speed: Counter to update.
        ends: End tokens, at which a row ends; the tokenizer's end-of-sequence token if empty.

    Raises:
        RequestError: If a prompt is too long for a continuation.
    """
    speed, ends = speed or Speed(), ends or [tokenizer.eos_id]
    stopped_B = np.zeros(len(rows), bool)
    chunks = decoder.generate(
        _prompts(rows),
        min(max_new, _max_new(decoder, rows)),
        ends=ends,
        sampling=sampling,
        seed=seed,
        first=first,
        chunk=chunk,
        stopped_B=stopped_B,
    )
    begun = time.perf_counter()
    for n, out_BN in enumerate(chunks):
        made = int((out_BN != NOTHING).sum())
        speed.tokens += made
        if n > 1:  # chunk 0 is the token of the prefill; chunk 1 includes the compilation
            speed.timed_tokens += made
            speed.seconds += time.perf_counter() - begun
        new = [row.add(ids.tolist(), tokenizer.decode, ends) for row, ids in zip(rows, out_BN, strict=True)]
        stopped_B[:] = [bool(row.ended) for row in rows]
        yield new
        begun = time.perf_counter()
    yield [row.finish(tokenizer.decode) for row in rows]


def search_rows(
    search: BeamSearch,
    tokenizer: Tokenizer,
    rows: Sequence[Continuation],
    max_new: int,
    *,
    speed: Speed | None = None,
    ends: Sequence[int] = (),
) -> None:
    """Run beam search for a batch of continuations, and store the best answer and its score in each continuation.

    If the text contains a stop string, the text is truncated there.

    Raises:
        RequestError: If a prompt is too long for a continuation.
    """
    speed, ends = speed or Speed(), ends or [tokenizer.eos_id]
    begun, timed = time.perf_counter(), speed.tokens > 0  # the first batch includes the compilation
    tokens_BWN, scores_BW = search(_prompts(rows), min(max_new, _max_new(search.decoder, rows)), ends)
    for row, ids, score in zip(rows, tokens_BWN[:, 0], scores_BW[:, 0], strict=True):
        row.score = float(score)
        row.add(ids.tolist(), tokenizer.decode, ends)
        row.finish(tokenizer.decode)
    made = sum(len(row.ids) for row in rows)
    speed.tokens += made
    if timed:
        speed.timed_tokens += made
        speed.seconds += time.perf_counter() - begun


def _prompts(rows: Sequence[Continuation]) -> list[list[int]]:
    return [r.source_ids or r.prompt_ids for r in rows]


def _max_new(decoder: Decoder | SpeculativeDecoder | Session, rows: Sequence[Continuation]) -> int:
    """Return the number of new tokens that fit into the model's maximum sequence length after the longest prompt.

    In an encoder-decoder, only a start token comes before the new tokens, because the encoder reads the prompt.

    Raises:
        RequestError: If not even one token fits.
    """
    longest, most = max(map(len, _prompts(rows))), decoder.model.max_seq_len
    reads = decoder.model.encoder_layers > 0
    room = most - (1 if reads and longest <= most else longest)
    if room < 1:
        raise RequestError(f"a prompt fills the model's longest sequence ({most} tokens)")
    return room
