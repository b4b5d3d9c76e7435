"""Choose the tokens that a corpus needs, and remove all other rows of the embedding table and the output projection.

First, the tokens in the texts of all splits are counted. The setting `vocabulary` then selects the kept tokens:

- "unused": the tokens that occur in any text. All texts are then tokenized as before.
- A number: this number of the most frequent tokens. A text with a removed token is then split into other tokens.
  Decoding these tokens must give the same text as before.

Finally, all texts are tokenized again to check the new tokenizer.

Shapes: V tokens in the vocabulary before pruning.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmctl.artifacts.artifact import Artifact
from llmctl.compress.calibration.measurements import Measurements
from llmctl.compress.structured_pruning.settings import StructuredSettings
from llmctl.compress.structured_pruning.shrink import take_everywhere
from llmctl.config.errors import RequestError
from llmctl.convert import tokenizer_subset
from llmctl.data import columns, splits
from llmctl.data.config import DataConfig
from llmctl.data.corpus import CHUNK
from llmctl.data.tokenizers import loading, vocabulary_subset
from llmctl.data.tokenizers.base import Tokenizer
from llmctl.data.tokenizers.vocabulary_subset import Vocabulary
from llmctl.distributed import processes
from llmctl.evaluate.tasks.registry import of
from llmctl.model import functional, weights
from llmctl.model.config import ModelConfig
from llmctl.model.generate.chat_template import Template

Params = dict[str, Any]
Encode = Callable[[Tokenizer, list[Any]], list[list[int]]]
"""Function that tokenizes texts or conversations. Its arguments are the tokenizer, and the texts or conversations.
It returns the token ids of each text or conversation."""
MESSAGES = [{"role": role, "content": "a"} for role in ("system", "user", "assistant", "user")]
"""Example conversation that is formatted by the tokenizer's chat template. The tokens of the formatted conversation are
never removed.
"""


@dataclass(frozen=True)
class Kept:
    """Store the ids of the kept tokens, and the new tokenizer."""

    ids: np.ndarray
    """Ids that the kept tokens had before pruning, ascending. The token `ids[n]` gets the new id n."""
    folder: Path
    """Folder of the new tokenizer."""
    about: dict[str, Any]
    """JSON data: the numbers of tokens in the vocabulary and in the corpus, before and after pruning."""


def choose(
    config: StructuredSettings, base: Artifact, work: Path, saved: Measurements, say: Callable[[str], None]
) -> Kept:
    """Count the tokens of the data, choose the tokens to keep, and write the new tokenizer.

    Args:
      config: settings of the stage.
      base: artifact that is compressed.
      work: folder of the stage, in which the new tokenizer is written.
      saved: counts of an interrupted run.
      say: function that prints a line.

    Raises:
      RequestError: If the new tokenizer would change texts. If no token would be removed. If the number of tokens to
          keep is too small.
    """
    if base.tokenizer_dir is None:
        raise RequestError(f"{base.path}: has no tokenizer, so no tokens can be removed from its vocabulary")
    old = loading.load(base.tokenizer_dir)
    vocabulary = vocabulary_subset.of(old)
    _check_number(config.vocabulary, vocabulary, base)
    corpus, encode = _corpus(config, base)
    counted = saved.get("vocabulary", lambda: _count(old, vocabulary, corpus(), encode))
    counts_V, fixed = counted["counts"], vocabulary.fixed | set(counted["needed"].tolist())
    if config.vocabulary == "unused":
        ids = _used(vocabulary, counts_V, fixed)
    else:
        ids = _most_frequent(vocabulary, counts_V, fixed, int(config.vocabulary))
    if len(ids) == base.model.vocab_size:
        raise RequestError(f"vocabulary: the data uses all {len(ids):,} tokens; nothing to remove")
    folder = work / "tokenizer"
    with processes.process_0_first():
        if processes.first():
            tokenizer_subset.write(base.tokenizer_dir, ids, base.model.vocab_size, folder)
    new = loading.load(folder)
    after = _checked(old, new, ids, corpus(), encode, exact=config.vocabulary == "unused")
    before = int(counts_V.sum())
    about = {"before": base.model.vocab_size, "after": len(ids), "tokens_before": before, "tokens_after": after}
    about["used"] = int((counts_V > 0).sum())
    say(f"vocabulary: {about['before']:,} → {len(ids):,} tokens; the data has {before:,} → {after:,} of them")
    return Kept(np.array(ids), folder, about)


def rows_after(config: StructuredSettings, cfg: ModelConfig) -> int:
    """Return the vocabulary size after pruning if it is known before the data is read, otherwise the present size.

    Raises:
      RequestError: If the number of tokens to keep is not less than the vocabulary size.
    """
    if not isinstance(config.vocabulary, int):
        return cfg.vocab_size
    if config.vocabulary >= cfg.vocab_size:
        raise RequestError(f"vocabulary: {config.vocabulary:,} to keep, but the artifact has {cfg.vocab_size:,} tokens")
    return config.vocabulary


def cut(cfg: ModelConfig, params: Params, kept: np.ndarray) -> tuple[ModelConfig, Params]:
    """Return the config and the parameters with only the tokens `kept`. All arrays with a vocabulary axis become
    smaller."""
    target = ModelConfig.model_validate({**cfg.model_dump(), "preset": "", "vocab_size": len(kept)})
    flat = weights.flatten(params)
    take_everywhere(flat, axes(cfg), kept)
    return target, weights.unflatten(flat)


def axes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return {path of a weight: axes as long as the vocabulary, as negative indices}.

    >>> axes(ModelConfig(preset="llama-tiny"))
    {'embed/tokens': (-2,)}
    """
    larger = cfg.model_copy(update={"vocab_size": cfg.vocab_size + 1, "preset": ""})
    one, other = (weights.flatten(functional.abstract(c)) for c in (cfg, larger))
    found = {p: tuple(i - a.ndim for i in range(a.ndim) if a.shape[i] != other[p].shape[i]) for p, a in one.items()}
    return {path: own for path, own in found.items() if own}


def _check_number(asked: str | int, vocabulary: Vocabulary, base: Artifact) -> None:
    """Check the requested number of tokens before the data is read.

    Raises:
      RequestError: If the number is too large, or too small for the tokens that always stay.
    """
    if isinstance(asked, int) and asked >= len(vocabulary.tokens):
        raise RequestError(f"vocabulary: {asked:,} to keep, but {base.path} has {len(vocabulary.tokens):,} tokens")
    if isinstance(asked, int) and asked < len(vocabulary.fixed):
        raise RequestError(
            f"vocabulary: {asked:,} to keep, but the special tokens and bytes alone are {len(vocabulary.fixed):,}"
        )


def _corpus(config: StructuredSettings, base: Artifact) -> tuple[Callable[[], Iterator[Any]], Encode]:
    """Return two functions: the first iterates over all texts or conversations of the data; the second encodes them."""
    talks = of(base.manifest).reads_conversations and columns.holds_conversations(config.data)

    def conversations(tokenizer: Tokenizer, given: list[Any]) -> list[list[int]]:
        template = Template(tokenizer.chat_template, tokenizer)
        return [tokenizer.encode_with_special(template.render(m, tools, prompt=False)) for m, tools in given]

    encode = conversations if talks else lambda tokenizer, given: tokenizer.encode_batch(given)
    return _texts(config.data, talks), encode


def _texts(data: DataConfig, talks: bool) -> Callable[[], Iterator[Any]]:
    """Return a function that iterates over all texts of the data, or over its conversations if `talks` is true."""
    asks = any("choices" in view.columns for view in columns.views(data, conversations=talks))
    found = splits.load(data, labels=asks, conversations=talks)  # choices are read with the labels
    every = [e for e in found.examples.values() if len(e)]

    def texts() -> Iterator[Any]:
        for row in itertools.chain.from_iterable(every):
            if talks:
                yield row["messages"], row.get("tools")
                continue
            yield from (row[name] for name in sorted(row) if isinstance(row[name], str))
            if isinstance(choices := row.get("choices"), tuple):
                yield from choices
            # Words that have one label each. They are joined in the column text if the data has no such column.
            if "tokens" in row and (joined := " ".join(row["tokens"])) != row.get("text"):
                yield joined

    return texts


def _count(
    tokenizer: Tokenizer, vocabulary: Vocabulary, corpus: Iterator[Any], encode: Encode
) -> dict[str, np.ndarray]:
    """Count the tokens of the texts, and collect the tokens that must stay even if no text contains them.

    Returns:
      {"counts": count of each token, [V]; "needed": ids of the tokens that must stay, ascending}.
    """
    counts_V, needed = np.zeros(tokenizer.vocab_size, np.int64), _of_template(tokenizer)
    for chunk in _chunks(corpus):
        for given, ids in zip(chunk, encode(tokenizer, chunk), strict=True):
            counts_V += np.bincount(np.asarray(ids, np.int64), minlength=len(counts_V))
            if tokenizer.unk_id in ids and isinstance(given, str):
                needed |= vocabulary.on_the_way(given)
    return {"counts": counts_V, "needed": np.array(sorted(needed), np.int64)}


def _of_template(tokenizer: Tokenizer) -> set[int]:
    """Return the ids of the tokens that the tokenizer's chat template adds to a conversation."""
    if tokenizer.chat_template is None:
        return set()
    for messages in (MESSAGES, MESSAGES[1:]):  # some templates have no system message
        try:
            return set(tokenizer.encode_with_special(Template(tokenizer.chat_template, tokenizer).render(messages)))
        except RequestError:
            continue
    return set()


def _used(vocabulary: Vocabulary, counts_V: np.ndarray, fixed: set[int]) -> list[int]:
    """Return the ids of all tokens that the tokenizer needs to encode the texts of the data."""
    used = {*np.flatnonzero(counts_V).tolist(), *fixed}
    return sorted(set[int]().union(*(vocabulary.needed(i) for i in used)))


def _most_frequent(vocabulary: Vocabulary, counts_V: np.ndarray, fixed: set[int], number: int) -> list[int]:
    """Return the ids of `number` tokens: tokens that always stay, all characters, and the most frequent tokens.

    A token is added together with the tokens from which it is merged. If adding all these tokens would exceed `number`,
    a less frequent token that needs fewer tokens is added instead.

    Raises:
      RequestError: If more than `number` tokens always stay or are characters of the texts.
    """
    used = np.flatnonzero(counts_V).tolist()
    kept = set[int]().union(*(vocabulary.needed(i) for i in fixed)) | vocabulary.characters(used)
    if len(kept) > number:
        raise RequestError(
            f"vocabulary: {number:,} to keep, but special tokens, bytes and the characters of the data are "
            f"{len(kept):,}"
        )
    order = [int(i) for i in np.argsort(-counts_V, kind="stable") if int(i) in vocabulary.tokens]
    while len(kept) < number:
        for i in order:
            more = vocabulary.needed(i) - kept if i not in kept else set[int]()
            if len(kept) + len(more) <= number:
                kept |= more
    return sorted(kept)


def _checked(
    old: Tokenizer, new: Tokenizer, kept: list[int], corpus: Iterable[Any], encode: Encode, *, exact: bool
) -> int:
    """Return the number of tokens into which the new tokenizer splits the texts, and check each text.

    Raises:
      RequestError: If `exact` is true and a text has other tokens than before. Also if a text changes by encoding and
          decoding.
    """
    at_V, total = np.full(old.vocab_size, -1), 0
    at_V[kept] = np.arange(len(kept))
    for chunk in _chunks(corpus):
        for before, after in zip(encode(old, chunk), encode(new, chunk), strict=True):
            total += len(after)
            same = at_V[np.asarray(before, np.int64)].tolist() == after
            if not same and (exact or old.decode(before) != new.decode(after)):
                raise RequestError(
                    "vocabulary: without the removed tokens the tokenizer reads "
                    f"{old.decode(before)[:60]!r} otherwise; keep more tokens"
                )
    return total


def _chunks(corpus: Iterable[Any]) -> Iterator[list[Any]]:
    """Split texts into lists, each for one call of the tokenizer."""
    waiting = iter(corpus)
    while chunk := list(itertools.islice(waiting, CHUNK)):
        yield chunk
