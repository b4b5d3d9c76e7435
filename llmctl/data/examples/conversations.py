"""Build rows of conversations for decoders: one conversation per row, with loss on the assistant's tokens only.

Shapes: B rows, T tokens per row, N tokens of a conversation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from llmctl.config.errors import RequestError
from llmctl.data.chats import Message
from llmctl.data.examples.labelled import ExampleRows
from llmctl.data.pretraining.packing import Batch
from llmctl.data.splits import Examples

Encode = Callable[[list[Message], list[Any] | None], tuple[list[int], np.ndarray, int]]
"""Function that encodes a conversation. Its arguments are the messages and the tools. It returns the token ids [N], a
mask bool [N] of the assistant's tokens, and the number of lost answers. An answer of the assistant is lost if its
tokens cannot be found in the rendered conversation."""


class ConversationRows(ExampleRows):
    """Build language-model rows of conversations.

    A batch has the arrays `tokens`, `targets`, `weights`, `segments` (1 at tokens, 0 at padding) and `positions`,
    [B, T] each.

    Messages after the assistant's last message are omitted. If a conversation is too long, its first exchanges are
    removed. An exchange is a user's message and all messages before the user's next message. System messages at the
    beginning stay. If the last exchange alone is too long, its end is truncated.

    A conversation without any loss is dropped. This happens if no token of the assistant is left, or if all answers
    have the weight 0.
    """

    def __init__(
        self,
        examples: Examples,
        encode: Encode,
        pad_id: int,
        seq_len: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
    ):
        """Encode all conversations.

        Args:
            examples: Examples with the columns of conversations.
            encode: Function that applies the tokenizer's chat template.
            pad_id: Padding token.
            seq_len: Tokens per row, T.
            seed: Seed of the shuffle.
            shuffle: Whether to shuffle in every epoch.

        Raises:
            RequestError: If the template rejects a conversation, or if all conversations are dropped.
        """
        if "messages" not in examples.columns:
            raise RequestError("the data holds no conversations; map a column of messages in data.columns")
        self._encode, self._pad, self._seq_len = encode, pad_id, seq_len
        self.shortened = self.cut = self.dropped = self.missed = self.unweighted = 0
        ids, counted, lengths = [], [], [0]
        for i in range(len(examples)):
            row = examples[i]
            try:
                found = self._truncated(row["messages"], row.get("tools"))
            except RequestError as e:
                raise RequestError(f"{examples.source.where(int(examples.index[i]))}: {e}") from None
            if found is None:
                learned = any(m["role"] == "assistant" and m.get("weight") != 0 for m in row["messages"])
                self.dropped += learned
                self.unweighted += not learned
                continue
            ids.append(np.array(found[0], np.int32))
            counted.append(found[1])
            lengths.append(len(found[0]))
        if not ids and self.unweighted == len(examples):
            raise RequestError(
                f"all answers of the {len(examples)} conversations have the weight 0; nothing is learned"
            )
        if not ids:
            raise RequestError(
                f"none of the {len(examples)} conversations has an answer within {seq_len} tokens; train.seq_len is "
                "too short for them"
            )
        self._ids, self._counted, self._starts = np.concatenate(ids), np.concatenate(counted), np.cumsum(lengths)
        super().__init__(len(ids), seed, shuffle)

    @property
    def log_lines(self) -> list[str]:
        """Return log lines with the numbers of truncated conversations, dropped conversations, and answers without
        loss."""
        reasons = {
            "lose their first exchanges": self.shortened,
            "lose the end of the last answer": self.cut,
            "have no answer within the length and are dropped": self.dropped,
        }
        found = [f"{count:,} {what}" for what, count in reasons.items() if count]
        lines = [f"conversations longer than {self._seq_len} tokens: {', '.join(found)}"] if found else []
        if self.unweighted:
            lines.append(f"{self.unweighted:,} conversations whose answers all have the weight 0 are dropped")
        if self.missed:
            lines.append(
                f"{self.missed:,} answers are context only, because the chat template renders them differently once "
                "the conversation goes on"
            )
        return lines

    def _truncated(self, messages: list[Message], tools: list[Any] | None) -> tuple[list[int], np.ndarray] | None:
        """Shorten a conversation to the row length, and encode it.

        Returns:
            Token ids [N] and the mask [N] of the assistant's tokens. None if the mask has no true entry.
        """
        room = self._seq_len + 1  # the last token is only a target, not an input
        messages = messages[: max(i for i, m in enumerate(messages) if m["role"] == "assistant") + 1]
        ids, counted_N, missed = self._encode(messages, tools)
        if len(ids) > room:
            system = next(i for i, m in enumerate(messages) if m["role"] != "system")
            for first in [i for i, m in enumerate(messages) if m["role"] == "user" and i > system]:
                ids, counted_N, missed = self._encode([*messages[:system], *messages[first:]], tools)
                if len(ids) <= room:
                    break
            self.shortened += len(ids) <= room
        self.missed += missed
        # The first token is never predicted.
        if not counted_N[1:room].any():
            return None
        self.cut += len(ids) > room
        return ids[:room], counted_N[:room]

    def _build(self, example_B: np.ndarray) -> Batch:
        shape = (len(example_B), self._seq_len)
        tokens_BT, targets_BT = (np.full(shape, self._pad, np.int32) for _ in range(2))
        segments_BT, weights_BT = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        for b, example in enumerate(map(int, example_B)):
            here = slice(self._starts[example], self._starts[example + 1])
            ids_N = self._ids[here]
            n = len(ids_N) - 1
            tokens_BT[b, :n], targets_BT[b, :n] = ids_N[:-1], ids_N[1:]
            weights_BT[b, :n] = self._counted[here][1:]
            segments_BT[b, :n] = 1
        positions_BT = np.arange(self._seq_len, dtype=np.int32) * segments_BT
        return {"tokens": tokens_BT, "targets": targets_BT, "weights": weights_BT, "segments": segments_BT,
                "positions": positions_BT}  # fmt: skip
