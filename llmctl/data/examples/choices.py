"""Build rows for multiple-choice questions: a prompt and several choices, of which one is correct.

Shapes: B rows, T tokens per row, K largest number of choices per question.
"""

from __future__ import annotations

import numpy as np

from llmctl.config.errors import RequestError
from llmctl.data.config import Truncate
from llmctl.data.corpus import tokenize
from llmctl.data.examples.completions import completion_batch, sequence_batch
from llmctl.data.examples.labelled import ExampleRows, padded, templated
from llmctl.data.pretraining.packing import Batch
from llmctl.data.splits import Examples
from llmctl.data.tokenizers.base import Tokenizer

NOTHING = np.zeros(0, np.int32)


def prefix(k: int) -> str:
    """Return the prefix of array names for choice k. The prefix for the first choice is empty."""
    return f"choice{k}_" if k else ""


class ChoiceRows(ExampleRows):
    """Build one row per multiple-choice question, with the model inputs for the prompt and each choice.

    The inputs depend on the architecture. Decoders read the prompt and a choice as one text without `eos` at its end.
    Encoder-decoders read the prompt with the encoder, and a choice with the decoder. Encoders read the prompt and a
    choice as a pair of texts.

    A batch also has `label`, the index of the correct choice, and `choices`, the number of choices, int32 [B] each. If
    a question has fewer than K choices, empty choices are added. The tokens of empty choices have weight 0 in the loss.
    """

    def __init__(
        self,
        examples: Examples,
        tokenizer: Tokenizer,
        seq_len: int,
        architecture: str,
        *,
        truncate: Truncate = "tail",
        target_len: int = 0,
        seed: int = 0,
        shuffle: bool = True,
    ):
        """Tokenize all prompts and choices.

        Args:
            examples: Examples with prompts, choices and answers.
            tokenizer: Tokenizer of the model.
            seq_len: Number of tokens per row, T.
            architecture: Architecture of the model: decoder, encoder or encoder_decoder.
            truncate: Part of a long prompt to remove; used only for encoders.
            target_len: Number of decoder tokens per choice in an encoder-decoder; 0 uses `seq_len`.
            seed: Seed of the shuffle.
            shuffle: Whether to shuffle in every epoch.

        Raises:
            RequestError: If the examples have no prompts. If a choice does not fit into a row. If a prompt is empty and
                the tokenizer adds no `bos`.
        """
        super().__init__(len(examples), seed, shuffle)
        self._tokenizer, self._seq_len, self._architecture = tokenizer, seq_len, architecture
        self._truncate: Truncate = truncate
        self._decoder_len = target_len or seq_len
        self._prompts = tokenize(examples.texts("prompt"), tokenizer)
        rows = [examples.source[int(i)] for i in examples.index]
        wrong = next((i for i, row in enumerate(rows) if not isinstance(row["choices"], tuple)), None)
        if wrong is not None:
            where = examples.source.where(int(examples.index[wrong]))
            raise RequestError(f"{where}: choices must be a list of texts")
        self._count_N = np.array([len(row["choices"]) for row in rows], np.int32)
        self._first_N = np.cumsum(self._count_N) - self._count_N
        self._choices = tokenize((choice for row in rows for choice in row["choices"]), tokenizer)
        self.answers_N = np.array([row["answer"] for row in rows], np.int32)
        """Index of the correct choice of each example, int32 [N]."""
        if architecture == "decoder" and not tokenizer.add_bos:
            bare = next((i for i in range(len(examples)) if not len(self._prompts[i])), None)
            if bare is not None:  # its first token would follow nothing, so it could not be scored
                raise RequestError(f"{examples.source.where(int(examples.index[bare]))}: the prompt is empty")
        room = self._decoder_len - 1 if architecture == "encoder_decoder" else seq_len - tokenizer.add_bos
        if (
            architecture != "encoder"
            and (longest := max(len(self._choices[k]) for k in range(len(self._choices)))) > room
        ):
            raise RequestError(
                f"the longest choice has {longest:,} tokens, and a row has room for {room:,}; raise train.seq_len or "
                "data.target_len (in eval seq_len), or leave such questions out with data.filter"
            )
        self.max_choices = int(self._count_N.max(initial=2))
        """Largest number of choices of any question, K; at least 2."""

    @property
    def begin(self) -> list[int]:
        """Return the token ids that precede every prompt."""
        return list(self._tokenizer.begin)

    @property
    def truncated(self) -> int:
        """Return the number of prompts whose beginning is removed, because they are too long for a decoder's row."""
        return sum(len(self._prompt(i)) < len(self._prompts[i]) for i in range(len(self._count_N)))

    def queries(self, i: int) -> list[tuple[list[int], list[int]]]:
        """Return (token ids of the prompt, token ids of a choice) for each choice of question i, for decoders."""
        prompt = self._prompt(i).tolist()
        return [(prompt, self._choice(i, k).tolist()) for k in range(int(self._count_N[i]))]

    def _build(self, example_B: np.ndarray) -> Batch:
        batch = {"label": self.answers_N[example_B], "choices": self._count_N[example_B]}
        for k in range(self.max_choices):
            pairs = [(self._prompt(i), self._choice(i, k)) for i in map(int, example_B)]
            batch |= {prefix(k) + name: a for name, a in self._rows(pairs).items()}
        return batch

    def _choice(self, i: int, k: int) -> np.ndarray:
        return self._choices[int(self._first_N[i]) + k] if k < self._count_N[i] else NOTHING

    def _prompt(self, i: int) -> np.ndarray:
        """Return the token ids of the prompt of question i.

        For decoders, a long prompt is truncated at its beginning, so that prompt and longest choice fit into a row. All
        choices then have the same prompt.
        """
        prompt = self._prompts[i]
        if self._architecture != "decoder":
            return prompt
        longest = max(len(self._choice(i, k)) for k in range(int(self._count_N[i])))
        room = max(self._seq_len + 1 - self._tokenizer.add_bos - longest, 0)
        return prompt[max(len(prompt) - room, 0) :]

    def _rows(self, pairs: list[tuple[np.ndarray, np.ndarray]]) -> Batch:
        if self._architecture == "decoder":
            return completion_batch(pairs, self._tokenizer, self._seq_len, predict_eos=False)
        if self._architecture == "encoder_decoder":
            return sequence_batch(pairs, self._tokenizer, self._seq_len, self._decoder_len, predict_eos=False)
        rows, types_BT = [], np.zeros((len(pairs), self._seq_len), np.int32)
        for b, (prompt, choice) in enumerate(pairs):
            row, types = templated(self._tokenizer.template, prompt, choice, self._seq_len, self._truncate)
            rows.append(row)
            types_BT[b, : len(types)] = types
        return padded(rows, self._seq_len, self._tokenizer.pad_id) | {"types": types_BT}


class SingleChoiceRows(ChoiceRows):
    """Build one row per choice of each question, in the order of the questions.

    A row has the model inputs for a prompt and one choice. The array `question`, int32 [B], has the index of each row's
    question.
    """

    def __init__(self, examples: Examples, tokenizer: Tokenizer, seq_len: int, architecture: str, truncate: Truncate):
        """Tokenize all prompts and choices; see `ChoiceRows` for the arguments and errors."""
        super().__init__(examples, tokenizer, seq_len, architecture, truncate=truncate)
        self._question_R = np.repeat(np.arange(len(examples), dtype=np.int32), self._count_N)
        ExampleRows.__init__(self, len(self._question_R), seed=0, shuffle=False)

    def _build(self, example_B: np.ndarray) -> Batch:
        question_B = self._question_R[example_B]
        choice_B = example_B - self._first_N[question_B]
        pairs = zip(map(int, question_B), map(int, choice_B), strict=True)
        return self._rows([(self._prompt(i), self._choice(i, k)) for i, k in pairs]) | {"question": question_B}
