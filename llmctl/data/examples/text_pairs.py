"""Build rows of two texts that have the same meaning or a similarity score, for training text embeddings.

Shapes: B rows, T tokens per row.
"""

from __future__ import annotations

import numpy as np

from llmctl.config.errors import RequestError
from llmctl.data.config import Truncate
from llmctl.data.corpus import tokenize
from llmctl.data.examples.labelled import ExampleRows, padded, templated
from llmctl.data.pretraining.packing import Batch
from llmctl.data.splits import Examples
from llmctl.data.tokenizers.base import Tokenizer


class TwoTextRows(ExampleRows):
    """Build rows of two texts. The model reads the texts separately.

    A batch has the arrays `tokens`, `segments` (1 at tokens, 0 at padding) and `positions` for the first text. The
    arrays for the second text are `pair_tokens`, `pair_segments` and `pair_positions`. All these arrays are int32
    [B, T]. Each text is followed by `eos` and padding. If the tokenizer adds `bos`, `bos` comes before the text. If a
    text is too long, its end (`truncate` = "tail") or its middle ("head_tail") is removed. If the labels are numbers,
    the batch also has the similarity score `label`, float32 [B].
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
    ):
        """Tokenize both texts of each example.

        Raises:
            RequestError: If the examples have no text or no pair. If a text is empty. If labels are classes.
        """
        if examples.classes:
            raise RequestError(
                'embeddings learn from pairs of texts, or from scores of pairs: set data.label_type = "number", or '
                'leave the label out with data.columns = {text = "...", pair = "..."}'
            )
        super().__init__(len(examples), seed, shuffle)
        self._tokenizer, self._seq_len = tokenizer, seq_len
        self._truncate: Truncate = truncate
        self._labels_N = examples.labels
        texts = {"": list(examples.texts()), "pair_": list(examples.texts("pair"))}
        for i, both in enumerate(zip(*texts.values(), strict=True)):
            if not all(text.strip() for text in both):
                where = examples.source.where(int(examples.index[i]))
                raise RequestError(f"{where}: embeddings need two texts per row, and one is empty")
        self._texts = {name: tokenize(given, tokenizer) for name, given in texts.items()}

    def _build(self, example_B: np.ndarray) -> Batch:
        template = self._tokenizer.template
        batch: Batch = {}
        for name, corpus in self._texts.items():
            rows = [templated(template, corpus[int(i)], None, self._seq_len, self._truncate)[0] for i in example_B]
            batch |= padded(rows, self._seq_len, self._tokenizer.pad_id, name)
        return batch if self._labels_N is None else batch | {"label": self._labels_N[example_B]}
