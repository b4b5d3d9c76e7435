"""Text from a language model: prompts in, continuations out as they are made, cut at stop strings, and counted."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from llmctl.config.errors import RequestError
from llmctl.data.tokenizers.base import Tokenizer
from llmctl.model.generate.beam import BeamSearch
from llmctl.model.generate.chat_cache import Session
from llmctl.model.generate.decode import NOTHING, Decoder
from llmctl.model.generate.sampling import Sampling

INCOMPLETE = "\ufffd"
"""What an unfinished character decodes to."""


@dataclass
class Continuation:
    """One prompt and what follows it, as far as it is known."""

    prompt: str
    prompt_ids: list[int]
    """What the new text goes on from; empty where an encoder has read the prompt."""
    stops: Sequence[str] = ()
    ids: list[int] = field(default_factory=list)
    text: str = ""
    """What is certain: no unfinished character, nothing that may still turn out to be a stop string."""
    source_ids: list[int] = field(default_factory=list)
    """The prompt as an encoder-decoder's encoder reads it."""
    score: float | None = None
    """Of a beam search's answer."""
    ended: str = ""
    """Why it ended: "end" (an end token), "stop" (a stop string), "length"; empty while it goes on."""

    def add(self, ids: Sequence[int], decode: Callable[[Sequence[int]], str], end_ids: Sequence[int]) -> str:
        """Takes new tokens (NOTHING is none) and returns the text that has become certain."""
        if self.ended:
            return ""
        self.ids += [i for i in ids if i != NOTHING]
        if self.ids and self.ids[-1] in end_ids:
            self.ended = "end"
        # Decoded with the prompt: alone, a first word would lose the space before it.
        whole = decode([*self.prompt_ids, *self.ids])[len(decode(self.prompt_ids)) :]
        found = [at for stop in self.stops if (at := whole.find(stop)) >= 0]
        if found:
            self.ended, whole = "stop", whole[: min(found)]
        return self._settle(whole if self.ended else whole[: len(whole) - self._doubtful(whole)])

    def finish(self, decode: Callable[[Sequence[int]], str]) -> str:
        """The length is reached: what was held back is certain now."""
        if self.ended:
            return ""
        self.ended = "length"
        return self._settle(decode([*self.prompt_ids, *self.ids])[len(decode(self.prompt_ids)) :])

    def _settle(self, text: str) -> str:
        new, self.text = text[len(self.text) :], text
        return new

    def _doubtful(self, text: str) -> int:
        """Length of the end of `text` that may change or be the beginning of a stop string."""
        unfinished = len(text) - len(text.rstrip(INCOMPLETE))
        begun = [n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
        return max([unfinished, *begun])


@dataclass
class Speed:
    """New tokens and the time they took; the chunk in which the loop compiles is not timed."""

    tokens: int = 0
    timed_tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float | None:
        """Over all rows; None when all was over before the first timed chunk."""
        return self.timed_tokens / self.seconds if self.seconds else None


def begin(
    tokenizer: Tokenizer, prompts: Sequence[str], stops: Sequence[str] = (), *, encoded: bool = False
) -> list[Continuation]:
    """A continuation a prompt, nothing generated yet. Raises RequestError for an empty prompt.

    `encoded`: for an encoder-decoder, whose encoder reads prompts as documents, with the end of sequence.
    """
    stops = [s for s in stops if s]
    if encoded:
        return [Continuation(p, [], stops, source_ids=[*tokenizer.prompt(p), tokenizer.eos_id]) for p in prompts]
    rows = [Continuation(p, tokenizer.prompt(p), stops) for p in prompts]
    if not all(row.prompt_ids for row in rows):
        raise RequestError("a prompt is empty, and this tokenizer has no token to begin with; say something")
    return rows


def continue_rows(
    decoder: Decoder | Session,
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
    """Continues a batch in place; yields the text of each row that has become certain, chunk by chunk.

    Rows end with a token of `ends`, by default the tokenizer's end of sequence. Each draws by its number, of which
    `first` is the first here: batches with one seed count on.

    Raises RequestError where a prompt leaves no room for a continuation.
    """
    speed, ends = speed or Speed(), ends or [tokenizer.eos_id]
    stopped_B = np.zeros(len(rows), bool)
    chunks = decoder.generate(
        _prompts(rows),
        min(max_new, _room(decoder, rows)),
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
        if n > 1:  # 0 is the prefill's token, in 1 the loop compiles
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
    """Gives every row the best answer of a beam search, whole, with its score; a stop string cuts it afterwards.

    Raises RequestError where a prompt leaves no room for a continuation.
    """
    speed, ends = speed or Speed(), ends or [tokenizer.eos_id]
    begun, timed = time.perf_counter(), speed.tokens > 0  # the first batch compiles
    tokens_BWN, scores_BW = search(_prompts(rows), min(max_new, _room(search.decoder, rows)), ends)
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


def _room(decoder: Decoder | Session, rows: Sequence[Continuation]) -> int:
    """New tokens that fit beside the longest prompt. Raises RequestError where none does."""
    longest, most = max(map(len, _prompts(rows))), decoder.model.max_seq_len
    reads = decoder.model.encoder_layers > 0
    room = most - (1 if reads and longest <= most else longest)
    if room < 1:
        raise RequestError(f"a prompt fills the model's longest sequence ({most} tokens)")
    return room
