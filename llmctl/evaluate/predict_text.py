"""Generate one answer per new row: the completion of a prompt, or the assistant's next message in a conversation.

Example:
    model = TextPredictor(artifact.load(Path("runs/demo/pretrain")))
    model.answers([model.read({"prompt": "This film"}, "row 1")])
    [{'answer': ' is a joy.', 'ended': 'end'}]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmctl.artifacts import artifact
from llmctl.artifacts.artifact import Artifact
from llmctl.config.errors import RequestError
from llmctl.config.limits import check_memory
from llmctl.data import chats
from llmctl.data.source import Row
from llmctl.data.tokenizers import loading as tokenizers
from llmctl.evaluate.setup import ROW, prediction_length
from llmctl.evaluate.tasks.registry import of
from llmctl.evaluate.tasks.settings import GenerationConfig
from llmctl.evaluate.written_answers import Writer
from llmctl.model.generate.chat_template import Template
from llmctl.model.generate.continuations import Continuation, end_ids


class TextPredictor:
    """Generate answers to rows with a decoder or an encoder-decoder, greedily or by beam search.

    If the length of answers or the number of beams is not given, the value of finetuning is used.
    """

    window = 4
    """Number of batches that are predicted together. The number is small, because the answers are written only when all
    these batches are done."""

    def __init__(
        self,
        found: Artifact,
        batch_size: int = 32,
        seq_len: int = 0,
        dtype: str = "float32",
        max_new: int = 0,
        beams: int = 0,
    ) -> None:
        """Load the tokenizer, and prepare the parameters for generation on one device.

        Args:
            found: The artifact.
            batch_size: Number of rows per batch.
            seq_len: Maximum number of tokens per prompt; 0 uses the value of training (see `prediction_length`).
            dtype: Dtype of the computation.
            max_new: Maximum number of tokens per answer; 0 uses the setting of finetuning.
            beams: Number of beams; 0 uses the setting of finetuning.

        Raises:
            RequestError: If the model does not complete prompts, or if prompts and answers exceed its maximum sequence
                length.
        """
        manifest, model, path = found.manifest, found.model, found.path
        self.task = of(manifest)
        if model.architecture == "encoder":
            raise RequestError(f"{path}: fills masks, which `llmctl generate` does; predict needs a task head")
        length = prediction_length(manifest, seq_len, path)
        check_memory(batch_size * length * ROW, f"--batch-size {batch_size}: its rows", "take a smaller one")
        tuned = artifact.generation_settings(manifest)
        given = {name: value for name, value in (("max_new", max_new), ("beams", beams)) if value}
        self._tokenizer = tokenizers.load(found.tokenizer_dir)
        self._writer = Writer(
            model,
            self._tokenizer,
            GenerationConfig.of(tuned | given),
            seq_len=length,
            batch_size=batch_size,
            dtype=dtype,
            ends=end_ids(found.tokenizer_dir, self._tokenizer),
        )
        text = self._tokenizer.chat_template if model.architecture == "decoder" else None
        self._template = Template(text, self._tokenizer) if text or self.task.reads_conversations else None
        self._writer.hold(found.params)

    def read(self, row: Row, where: str) -> Continuation:
        """Return the prompt of a row as tokens.

        A row has a prompt in the column `prompt` or `text`, or a conversation in the column `messages`. The column
        `tools` has the tools of a conversation.

        Raises:
            RequestError: If the row has no prompt and no conversation, or if the chat template refuses the
                conversation.
        """
        try:
            prompt = row.get("prompt") or row.get("text", "")
            if "messages" in row:
                messages = chats.read(row["messages"], answered=False)
            elif not prompt.strip():
                raise RequestError(f"no {'messages, prompt' if self._template else 'prompt'} or text")
            elif self.task.reads_conversations:
                messages = [{"role": "user", "content": prompt}]
            else:
                return self._writer.rows([prompt])[0]
            return Continuation("", self._conversation(messages, chats.read_tools(row.get("tools"))))
        except RequestError as e:
            raise RequestError(f"{where}: {e}") from None

    def answers(self, rows: Sequence[Continuation], every: bool = False) -> list[dict[str, Any]]:
        """Return the answer to each row as JSON data.

        The key "ended" is "end" if the model ended the answer. If the answer has the maximum number of tokens, "ended"
        is "length". The argument `every` is not used.
        """
        self._writer.fill(rows)
        return [{"answer": row.text, "ended": row.ended} for row in rows]

    @property
    def remarks(self) -> list[str]:
        """Return log lines about truncated prompts; empty if there are none."""
        cut, room = self._writer.cut, self._writer.room
        return [f"{cut:,} prompts were longer than {room:,} tokens and were cut"] if cut else []

    def _conversation(self, messages: list[chats.Message], tools: list[Any] | None) -> list[int]:
        """Return the tokens of a conversation up to the next answer.

        If the conversation is too long, its first exchanges are removed, as in training. An exchange is a user's
        message and all messages before the user's next message.
        """
        if self._template is None:
            raise RequestError("the tokenizer has no chat template, so the model knows no conversations")
        ids = self._template.prompt(messages, tools)
        if len(ids) <= self._writer.room:
            return ids
        system = next((i for i, m in enumerate(messages) if m["role"] != "system"), len(messages))
        for first in [i for i, m in enumerate(messages) if m["role"] == "user" and i > system]:
            ids = self._template.prompt([*messages[:system], *messages[first:]], tools)
            if len(ids) <= self._writer.room:
                self._writer.cut += 1
                return ids
        raise RequestError(f"the last exchange has {len(ids)} tokens, and a prompt at most {self._writer.room}")
