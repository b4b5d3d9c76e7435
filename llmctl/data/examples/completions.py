"""Build rows of prompts and completions: one example per row, padded to T tokens.

Shapes: B rows, T tokens per row, N examples.
"""

from __future__ import annotations

import numpy as np

from llmctl.data.corpus import tokenize
from llmctl.data.examples.labelled import ExampleRows, padded
from llmctl.data.pretraining.packing import Batch
from llmctl.data.splits import Examples
from llmctl.data.tokenizers.base import Tokenizer


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
