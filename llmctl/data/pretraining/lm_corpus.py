"""Build language-model rows for a split of the data, from raw text or from prepared (already tokenized) data."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
from pathlib import Path

import numpy as np

from llmctl.config import checksums
from llmctl.config.errors import RequestError
from llmctl.data import splits
from llmctl.data.config import TEXT_COLUMNS, DataConfig, Packing, TokenizerConfig
from llmctl.data.corpus import Documents, cached
from llmctl.data.pretraining import prepared
from llmctl.data.pretraining.mixing import MixedRows
from llmctl.data.pretraining.next_sentence import PairRows
from llmctl.data.pretraining.objective_rows import Objective
from llmctl.data.pretraining.packing import PackedRows
from llmctl.data.tokenizers import loading as tokenizers
from llmctl.data.tokenizers.base import Tokenizer


class Text:
    """Give access to the text that a data config describes: raw text, which is read at first use, or prepared text.

    Prepared text was tokenized by `llmctl prepare`.
    """

    def __init__(self, cfg: DataConfig, labels: bool = True, conversations: bool = False):
        """Open prepared sources and check their settings.

        Args:
            cfg: Settings of the data.
            labels: Whether to read labels.
            conversations: Whether the rows are conversations.

        Raises:
            RequestError: If prepared and raw sources are mixed. If prepared data is missing. If prepared sources have
                different tokenizers. If the data was prepared with other settings.
        """
        self._cfg, self._labels, self._conversations = cfg, labels, conversations
        kinds = {part.source == "prepared" for part in cfg.parts()}
        if len(kinds) > 1:
            raise RequestError("a mixture is of prepared sources or of raw ones; prepare the others as well")
        self._prepared = [prepared.read(part.path) for part in cfg.parts()] if kinds == {True} else []
        for part, (where, found) in zip(cfg.parts(), self._prepared, strict=False):
            prepared.check_settings(found, part, cfg, str(where))
        if len({found.tokenizer for _, found in self._prepared}) > 1:
            raise RequestError("the sources of the mixture were prepared with different tokenizers")

    @functools.cached_property
    def splits(self) -> splits.Splits:
        """Return the train, validation and test splits of the raw text."""
        return splits.load(self._cfg, labels=self._labels, conversations=self._conversations)

    @property
    def classes(self) -> tuple[str, ...]:
        """Return the class names in the order of class indices; empty for prepared data."""
        return () if self._prepared else self.splits.classes

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the names of the text columns. Data from `llmctl prepare` has only the column `text`."""
        return ("text",) if self._prepared else self.splits.examples["train"].columns

    def with_examples(self, examples: dict[str, splits.Examples]) -> Text:
        """Return a copy of this object whose splits contain the given examples."""
        found = copy.copy(self)
        found.__dict__["splits"] = dataclasses.replace(self.splits, examples=examples)  # a cached property
        return found

    def digest(self, split: str) -> str:
        """Return a hash of the texts of a split, in order.

        Raises:
            RequestError: If the split of raw text is empty.
        """
        if not self._prepared:
            return self.splits[split].digest
        return checksums.of_json([[found.key, split] for _, found in self._prepared])

    def describe(self) -> list[str]:
        """Return a list with one log line: the number of rows in each split. For prepared text, the list is empty."""
        return [] if self._prepared else [self.splits.describe()]

    @property
    def target_len(self) -> int:
        """Return the maximum number of tokens per completion; 0 uses the sequence length."""
        return self._cfg.target_len

    @property
    def epochs(self) -> float:
        """Return the maximum number of epochs: the smallest maximum of all sources, or 0 if no source has a maximum."""
        return min((part.epochs for part in self._cfg.parts() if part.epochs), default=0.0)

    def tokenizer(self, cfg: TokenizerConfig) -> Tokenizer:
        """Return the tokenizer of the prepared text. For raw text, load or train a tokenizer as `cfg` defines.

        Raises:
            RequestError: If the tokenizer cannot be loaded or trained, or if `cfg.path` is not the tokenizer of the
                prepared text.
        """
        if not self._prepared:
            found = self.splits["train"].sample_chars(cfg.sample)
            columns = ("text",) if "text" in found.columns else tuple(c for c in TEXT_COLUMNS if c in found.columns)
            return tokenizers.load_or_train(itertools.chain.from_iterable(map(found.texts, columns)), cfg)
        where, found = self._prepared[0]
        prepared.check_words(where, found)
        own = tokenizers.load(where / "tokenizer", tokenizers.BOS[cfg.bos])
        if cfg.path:
            prepared.check(found, tokenizers.load_or_train((), cfg), str(where))
        return own

    def documents(self, split: str, tokenizer: Tokenizer, cache: Path) -> list[tuple[float, float, Documents]]:
        """Return (weight in the mixture, maximum epochs, tokenized documents) for each source that has text in the
        split.

        Args:
            split: train, validation or test.
            tokenizer: Tokenizer of the model.
            cache: Folder that caches tokenized raw text.

        Raises:
            RequestError: If the split is empty, or was prepared with another tokenizer.
        """
        if not self._prepared:
            parts = self._cfg.sources()
            found = []
            for p, examples in self.splits[split].parts():
                held = cached(cache / f"{split}-{p}", examples.texts(), examples.digest, tokenizer)
                found.append((parts[p].weight, parts[p].epochs, held))
            return found
        found = []
        several = len(self._prepared) > 1
        for part, (where, said) in zip(self._cfg.parts(), self._prepared, strict=True):
            prepared.check(said, tokenizer, str(where))
            inner = said.splits.get(split, [])
            whole = sum(i.weight for i in inner)
            for i in inner:
                # A prepared folder may itself contain a mixture: its weights are scaled to the weight of this source.
                weight = part.weight * i.weight / whole if several else i.weight
                found.append((weight, part.epochs or i.epochs, prepared.Shards(where, i, said.dtype)))
        if not found:
            raise RequestError(f"{self._cfg.title}: nothing was prepared for the {split} split")
        return found

    def rows(
        self,
        split: str,
        tokenizer: Tokenizer,
        seq_len: int,
        cache: Path,
        *,
        seed: int = 0,
        packing: Packing = "segments",
        shuffle: bool = True,
        needed: int = 0,
        objective: Objective | None = None,
    ) -> PackedRows | PairRows | MixedRows:
        """Build the rows of a split.

        Args:
            split: train, validation or test.
            tokenizer: Tokenizer of the model.
            seq_len: Sequence length in tokens.
            cache: Folder that caches tokenized raw text.
            seed: Seed of the shuffle.
            packing: Method of packing documents into rows.
            shuffle: If true, rows are shuffled and mixed by the weights of the sources. If false, every document is
                read once, in order.
            needed: Number of rows that training will read. If the sources have a maximum number of epochs, these epochs
                must have at least this number of rows.
            objective: Training objective; causal language modeling by default.

        Raises:
            RequestError: If the split is empty. If prepared text has another tokenizer. If there are too few tokens for
                a row. If there are too few epochs for `needed` rows.
        """
        found = self.documents(split, tokenizer, cache)

        learns = objective or Objective()

        def packed(documents: Documents) -> PackedRows | PairRows:
            return learns.rows(documents, tokenizer, seq_len, seed=seed, packing=packing, shuffle=shuffle)

        if not shuffle:
            return packed(Joined([d for _, _, d in found]) if len(found) > 1 else found[0][2])
        if len(found) == 1 and not found[0][1]:
            return packed(found[0][2])
        rows = MixedRows([packed(d) for *_, d in found], [w for w, *_ in found], [e for _, e, _ in found], seed)
        if rows.total is not None:
            check_epochs(needed, rows.total)
        return rows


def check_epochs(needed: int, total: int) -> None:
    """Check that the data has enough rows for training, if the epochs of its sources are limited.

    Args:
        needed: Number of rows that training will read.
        total: Number of rows in the allowed epochs of all sources.

    Raises:
        RequestError: If `needed` exceeds `total`.
    """
    if needed > total:
        raise RequestError(
            f"{needed} rows are to be read and the sources' epochs hold {total}: more epochs (0 is endless), "
            "or fewer steps"
        )


class Joined:
    """Concatenate the documents of several sources. This class has the interface of `corpus.Documents`."""

    def __init__(self, parts: list[Documents]):
        self._parts = parts
        self._starts = np.cumsum([0, *(int(p.lengths.sum()) for p in parts)])
        self.lengths = np.concatenate([p.lengths for p in parts])

    @property
    def tokens(self) -> Joined:
        """Return this object. When it is indexed with token positions, it returns token ids."""
        return self

    def __getitem__(self, at_N: np.ndarray) -> np.ndarray:
        """Return the token ids at the positions `at_N`, int32 [N]."""
        part_N = np.searchsorted(self._starts, at_N, "right") - 1
        tokens_N = np.empty(len(at_N), np.int32)
        for p in np.unique(part_N):
            here_N = part_N == p
            tokens_N[here_N] = self._parts[p].tokens[at_N[here_N] - self._starts[p]]
        return tokens_N
