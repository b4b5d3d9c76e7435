"""Build rows of preferences: a prompt with a chosen and a rejected completion.

Shapes: B rows, T tokens per row.
"""

from __future__ import annotations

import numpy as np

from llmctl.data.corpus import tokenize
from llmctl.data.examples.completions import SequencePairRows, completion_batch
from llmctl.data.examples.labelled import ExampleRows
from llmctl.data.pretraining.packing import Batch
from llmctl.data.splits import Examples
from llmctl.data.tokenizers.base import Tokenizer

REJECTED = "pair_"
"""Prefix of the names of arrays with rejected completions. Arrays with chosen completions have no prefix."""


class PreferenceRows(ExampleRows):
    """Build rows for decoders. Each row has the chosen and the rejected completion of one example, with the prompt.

    The arrays of each completion are as in `CompletionRows`. For the rejected completion, their names begin with
    `REJECTED`. Both completions have the same prompt. If the prompt with the longer completion is too long, the
    beginning of the prompt is removed.
    """

    def __init__(self, examples: Examples, tokenizer: Tokenizer, seq_len: int, *, seed: int = 0, shuffle: bool = True):
        """Tokenize prompts and completions.

        Raises:
            RequestError: If the examples have no column prompt, chosen or rejected.
        """
        super().__init__(len(examples), seed, shuffle)
        self._tokenizer, self._seq_len = tokenizer, seq_len
        texts = (tokenize(examples.texts(column), tokenizer) for column in ("prompt", "chosen", "rejected"))
        self._prompts, self._chosen, self._rejected = texts

    def _build(self, example_B: np.ndarray) -> Batch:
        chosen, rejected = [], []
        for i in map(int, example_B):
            longer = max(len(self._chosen[i]), len(self._rejected[i])) + 1
            room = max(self._seq_len + 1 - len(self._tokenizer.begin) - longer, 0)
            prompt = self._prompts[i]
            prompt = prompt[max(len(prompt) - room, 0) :]
            chosen.append((prompt, self._chosen[i]))
            rejected.append((prompt, self._rejected[i]))
        other = completion_batch(rejected, self._tokenizer, self._seq_len)
        return completion_batch(chosen, self._tokenizer, self._seq_len) | {REJECTED + k: a for k, a in other.items()}


class PreferencePairRows(ExampleRows):
    """Build rows for encoder-decoders. Each row has the chosen and the rejected completion of one example.

    The arrays of each completion are as in `SequencePairRows`. For the rejected completion, their names begin with
    `REJECTED`.
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
    ):
        """Tokenize prompts and completions.

        Raises:
            RequestError: If the examples have no column prompt, chosen or rejected.
        """
        super().__init__(len(examples), seed, shuffle)
        self._chosen, self._rejected = (
            SequencePairRows(examples, tokenizer, seq_len, shuffle=False, target_len=target_len, column=column)
            for column in ("chosen", "rejected")
        )

    def _build(self, example_B: np.ndarray) -> Batch:
        other = self._rejected.batch(example_B)
        return self._chosen.batch(example_B) | {REJECTED + k: a for k, a in other.items()}
