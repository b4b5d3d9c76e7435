"""Build rows of labeled examples and of prompt-completion pairs: one example per row, padded to T tokens.

Shapes: B rows, T tokens per row, N examples.
"""

from __future__ import annotations

import copy

import numpy as np

from llmctl.config.errors import RequestError
from llmctl.data.config import Truncate
from llmctl.data.corpus import Corpus, tokenize
from llmctl.data.pretraining.packing import Batch
from llmctl.data.shuffle import Balanced, Epochs
from llmctl.data.splits import Examples
from llmctl.data.tokenizers.base import TextTemplate, Tokenizer


class ExampleRows:
    """Define the base class of rows that contain one example each. `rows[i]` exists for any i >= 0, because there is no
    last epoch.

    A subclass defines `_build`, which returns the batch for an array of example indices [B].

    Args:
        count: Number of examples, which is the number of rows per epoch.
        seed: Seed of the shuffle.
        shuffle: Whether to shuffle in every epoch; otherwise rows are in the order of the examples.
    """

    def __init__(self, count: int, seed: int, shuffle: bool):
        self._count = count
        self._epochs: Epochs | Balanced = Epochs(count, seed, shuffle)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: int) -> Batch:
        if i < 0:
            raise IndexError(i)
        return {name: values[0] for name, values in self.batch(np.array([i])).items()}

    def batch(self, rows_B: np.ndarray) -> Batch:
        """Return the rows with the numbers `rows_B` (any >= 0) as arrays [B, ...]: the stacked rows `self[i]`."""
        return self._build(self.examples(rows_B))

    def examples(self, rows_B: np.ndarray) -> np.ndarray:
        """Return the index of the example that each row contains, int64 [B]."""
        return self._epochs(rows_B)

    def _build(self, example_B: np.ndarray) -> Batch:
        raise NotImplementedError


class ClassificationRows(ExampleRows):
    """Build rows of texts with labels.

    A batch has tokens, segments (1 at tokens, 0 at padding) and positions, int32 [B, T]. The array `label` has a class
    int32 [B], a number float32 [B], or a set of classes uint8 [B, C].

    A row is the text with the tokenizer's special tokens around it, followed by padding. By default, `eos` comes after
    the text. If the tokenizer adds `bos`, `bos` comes before the text. If the text is too long, its end (`tail`) or its
    middle (`head_tail`) is removed. The special tokens are never removed.

    If the data has a column "pair", the row continues with the text of this column and another `eos`. The batch then
    also has types [B, T], which are 1 for this second part. If both texts together are too long, the longer text is
    truncated first. Then both texts are truncated equally.
    """

    def __init__(
        self,
        examples: Examples,
        tokenizer: Tokenizer,
        seq_len: int,
        *,
        truncate: Truncate = "tail",
        seed: int = 0,
        shuffle: bool = True,
        corpus: Corpus | None = None,
    ):
        """Tokenize the texts, if `corpus` is not given.

        Args:
            examples: Labeled examples.
            tokenizer: Tokenizer of the model.
            seq_len: Number of tokens per row, T.
            truncate: Part of a long text to remove.
            seed: Seed of the shuffle.
            shuffle: Whether to shuffle in every epoch.
            corpus: Tokenized texts from `corpus.cached`, in the order of `examples`; None tokenizes them.

        Raises:
            RequestError: If the examples have no text or no label.
        """
        if examples.labels is None:
            raise RequestError('the data has no column "label"; map one in data.columns')
        super().__init__(len(examples), seed, shuffle)
        self.classes = examples.classes
        self._labels_N, self._seed = examples.labels, seed
        self._tokenizer, self._seq_len = tokenizer, seq_len
        self._truncate: Truncate = truncate
        self._corpus = tokenize(examples.texts(), tokenizer) if corpus is None else corpus
        if len(self._corpus) != len(examples):
            raise ValueError(f"{len(self._corpus)} tokenized texts for {len(examples)} examples")
        self._pairs = tokenize(examples.texts("pair"), tokenizer) if "pair" in examples.columns else None

    def balanced(self) -> ClassificationRows:
        """Return rows of the same examples, sampled so that every class occurs equally often."""
        found = copy.copy(self)
        found._epochs = Balanced(self._labels_N, self._seed)
        return found

    def _build(self, example_B: np.ndarray) -> Batch:
        template, rows = self._tokenizer.template, []
        types_BT = np.zeros((len(example_B), self._seq_len), np.int32)
        for b, example in enumerate(map(int, example_B)):
            pair = None if self._pairs is None else self._pairs[example]
            row, types = templated(template, self._corpus[example], pair, self._seq_len, self._truncate)
            rows.append(row)
            types_BT[b, : len(types)] = types
        batch = padded(rows, self._seq_len, self._tokenizer.pad_id)
        return batch | ({} if self._pairs is None else {"types": types_BT}) | {"label": self._labels_N[example_B]}


class CompletionRows(ExampleRows):
    """Build decoder rows of a prompt and its completion, with loss only on the completion and its `eos`.

    Prompt and completion are tokenized separately, as in generation. If a row is too long, the beginning of the prompt
    is truncated first, but not `bos`. If this is not enough, the end of the completion is truncated.
    """

    def __init__(self, examples: Examples, tokenizer: Tokenizer, seq_len: int, *, seed: int = 0, shuffle: bool = True):
        """Tokenize prompts and completions.

        Raises:
            RequestError: If the examples have no prompt or no completion.
        """
        super().__init__(len(examples), seed, shuffle)
        self._tokenizer, self._seq_len = tokenizer, seq_len
        self._prompts = tokenize(examples.texts("prompt"), tokenizer)
        self._completions = tokenize(examples.texts("completion"), tokenizer)

    def _build(self, example_B: np.ndarray) -> Batch:
        pairs = [(self._prompts[i], self._completions[i]) for i in map(int, example_B)]
        return completion_batch(pairs, self._tokenizer, self._seq_len)


def completion_batch(
    pairs: list[tuple[np.ndarray, np.ndarray]], tokenizer: Tokenizer, seq_len: int, predict_eos: bool = True
) -> Batch:
    """Build decoder rows [B, T] of tokenized prompts and completions; see `CompletionRows`.

    Args:
        pairs: Token ids of a prompt and its completion, per row.
        tokenizer: Tokenizer of the model.
        seq_len: Number of tokens per row, T.
        predict_eos: Whether to add `eos` to each completion, as a target.
    """
    shape = (len(pairs), seq_len)
    tokens_BT, targets_BT = (np.full(shape, tokenizer.pad_id, np.int32) for _ in range(2))
    segments_BT, weights_BT = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    bos = tokenizer.begin
    for b, (prompt, completion) in enumerate(pairs):
        # The last token is only a target, so a row contains `seq_len` + 1 tokens.
        completion = np.append(completion, tokenizer.eos_id) if predict_eos else completion
        completion = completion[: seq_len - len(bos)]
        room = seq_len + 1 - len(bos) - len(completion)
        prompt = np.concatenate([bos, prompt[max(len(prompt) - room, 0) :]]).astype(np.int32)
        whole = np.concatenate([prompt, completion])
        n = max(len(whole) - 1, 0)
        tokens_BT[b, :n], targets_BT[b, :n] = whole[:-1], whole[1:]
        segments_BT[b, :n] = 1
        weights_BT[b, max(len(prompt) - 1, 0) : n] = 1
    positions_BT = np.arange(seq_len, dtype=np.int32) * segments_BT
    return {"tokens": tokens_BT, "targets": targets_BT, "weights": weights_BT, "segments": segments_BT,
            "positions": positions_BT}  # fmt: skip


class SequencePairRows(ExampleRows):
    """Build encoder-decoder rows: the encoder reads the prompt, and the decoder predicts the completion and `eos`.

    The encoder reads the prompt and `eos`. If the tokenizer adds `bos`, `bos` comes before the prompt. The first input
    of the decoder is the padding token. If a prompt or completion is too long, its end is truncated, but not its `eos`.
    """

    def __init__(
        self,
        examples: Examples,
        tokenizer: Tokenizer,
        seq_len: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        target_len: int = 0,
        full_completions: bool = False,
        predict_eos: bool = True,
        column: str = "completion",
    ):
        """Tokenize prompts and completions.

        Args:
            examples: Examples with prompts and completions.
            tokenizer: Tokenizer of the model.
            seq_len: Number of tokens per row, T.
            seed: Seed of the shuffle.
            shuffle: Whether to shuffle in every epoch.
            target_len: Maximum number of tokens per completion; 0 uses `seq_len`.
            full_completions: Whether completions are never truncated. The longest completion then determines the length
                of decoder rows.
            predict_eos: Whether the loss includes the `eos` after a completion.
            column: Column that contains the completions.

        Raises:
            RequestError: If the examples have no prompt or no completion.
        """
        super().__init__(len(examples), seed, shuffle)
        self._tokenizer, self._seq_len, self._predict_eos = tokenizer, seq_len, predict_eos
        self._prompts = tokenize(examples.texts("prompt"), tokenizer)
        self._completions = tokenize(examples.texts(column), tokenizer)
        self._template = tokenizer.template
        self._room = seq_len - len(self._template.row([]))
        count = range(len(examples))
        self.decoder_len = (
            max((len(self._completions[i]) for i in count), default=0) + 1
            if full_completions
            else target_len or seq_len
        )
        """Number of tokens per decoder row."""
        self.cut = sum(len(self._prompts[i]) > self._room for i in count)
        """Number of prompts that are truncated, because they are too long."""

    def _build(self, example_B: np.ndarray) -> Batch:
        pairs = [(self._prompts[i], self._completions[i]) for i in map(int, example_B)]
        return sequence_batch(pairs, self._tokenizer, self._seq_len, self.decoder_len, self._predict_eos)


def sequence_batch(
    pairs: list[tuple[np.ndarray, np.ndarray]],
    tokenizer: Tokenizer,
    seq_len: int,
    decoder_len: int,
    predict_eos: bool = True,
) -> Batch:
    """Build encoder-decoder rows of tokenized prompts and completions; see `SequencePairRows`.

    Args:
        pairs: Token ids of a prompt and its completion, per row.
        tokenizer: Tokenizer of the model.
        seq_len: Number of tokens per row of the encoder.
        decoder_len: Number of tokens per row of the decoder.
        predict_eos: Whether the loss includes the `eos` after a completion.
    """
    pad, template = tokenizer.pad_id, tokenizer.template
    room = seq_len - len(template.row([]))
    read = [template.row(prompt[:room]) for prompt, _ in pairs]
    told = [np.append(completion[: decoder_len - 1], tokenizer.eos_id).astype(np.int32) for _, completion in pairs]
    batch = padded(told, decoder_len, pad)
    targets_BT, segments_BT = batch["tokens"], batch["segments"]
    before_BT = np.pad(targets_BT, ((0, 0), (1, 0)), constant_values=pad)[:, :-1]
    counted_B1 = segments_BT.sum(1, keepdims=True) - (not predict_eos)
    weights_BT = (np.arange(decoder_len) < counted_B1).astype(np.float32)
    batch |= {"tokens": np.where(segments_BT, before_BT, pad), "targets": targets_BT, "weights": weights_BT}
    return batch | padded(read, seq_len, pad, "encoder_")


def templated(
    template: TextTemplate, text_N: np.ndarray, pair_N: np.ndarray | None, seq_len: int, truncate: Truncate = "tail"
) -> tuple[np.ndarray, np.ndarray]:
    """Add a tokenizer's special tokens to a text or a pair of texts, and truncate the texts to fit `seq_len` tokens.

    Args:
        template: Special tokens around and between the texts.
        text_N: Token ids of the text.
        pair_N: Token ids of the second text, or None.
        seq_len: Maximum number of tokens of the result.
        truncate: Part of a long text to remove: the end ("tail") or the middle ("head_tail").

    Returns:
        Token ids and types, int32 [N] each; types are 1 from the first token of `pair_N` on.
    """
    room = seq_len - len(template.begin) - len(template.end)
    if pair_N is None:
        row = template.row(cut(text_N, room, truncate))
        return row, np.zeros(len(row), np.int32)
    room -= len(template.between)
    kept = min(len(text_N), max(room - len(pair_N), (room + 1) // 2))
    row = template.row(cut(text_N, kept, truncate), cut(pair_N, room - kept, truncate))
    first = len(template.begin) + kept + len(template.between)
    return row, (np.arange(len(row)) >= first).astype(np.int32)


def cut(text_N: np.ndarray, room: int, truncate: Truncate) -> np.ndarray:
    """Truncate a text to at most `room` tokens. `truncate` selects the part to remove: the end ("tail") or the middle
    ("head_tail")."""
    if len(text_N) <= room:
        return text_N
    head = room if truncate == "tail" else room - room // 2
    return np.concatenate([text_N[:head], text_N[len(text_N) - (room - head) :]])


def padded(rows: list[np.ndarray], width: int, pad: int, prefix: str = "") -> Batch:
    """Pad texts on the right, and return the arrays tokens, segments and positions, int32 [B, width].

    Segments are 1 at tokens and 0 at padding. Positions are token indices in the text.

    Args:
        rows: Token ids of each text.
        width: Number of tokens per row.
        pad: Id of the padding token.
        prefix: Prefix of the array names in the result.
    """
    tokens_BT = np.full((len(rows), width), pad, np.int32)
    segments_BT = np.zeros_like(tokens_BT)
    for b, row in enumerate(rows):
        tokens_BT[b, : len(row)] = row
        segments_BT[b, : len(row)] = 1
    found = {"tokens": tokens_BT, "segments": segments_BT, "positions": np.arange(width, dtype=np.int32) * segments_BT}
    return {prefix + name: a for name, a in found.items()}
