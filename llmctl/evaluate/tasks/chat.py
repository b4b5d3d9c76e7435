"""Train on conversations in the format of a chat template: predict each token of the assistant from all earlier
tokens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llmctl.artifacts.artifact import Artifact
from llmctl.config import containment
from llmctl.config.errors import RequestError
from llmctl.config.text_input import parse_json
from llmctl.data.examples.conversations import ConversationRows
from llmctl.data.splits import Examples
from llmctl.data.tokenizers import loading as tokenizers
from llmctl.data.tokenizers.base import Tokenizer
from llmctl.distributed import processes
from llmctl.evaluate.setup import Held, Measured, Setup
from llmctl.evaluate.tasks.language import Language, scored, timed
from llmctl.evaluate.tasks.registry import TASKS
from llmctl.evaluate.tasks.rows import RowSettings
from llmctl.evaluate.tasks.settings import CHATML, ChatConfig
from llmctl.model.config import ModelConfig
from llmctl.model.generate import chat_template
from llmctl.model.generate.chat_template import Template
from llmctl.model.generate.continuations import GENERATION, end_ids


class Chat(Language):
    """Train with cross-entropy on the assistant's tokens in conversations of several turns; measure perplexity."""

    name = "chat"
    title = "conversations"
    architectures = ("decoder",)
    columns = ("messages",)
    reads_conversations = True
    section = "chat"

    def check_model(self, model: ModelConfig, where: str) -> None:
        """Check that the task supports a model.

        Raises:
            RequestError: If the model is not a decoder with the language-model head.
        """
        if model.head_kind.vocabulary and model.architecture != "decoder":
            raise RequestError(f"{where}: task 'chat' needs a decoder, this model is an {model.architecture}")
        super().check_model(model, where)

    def tokenizer_dir(self, folder: Path, settings: ChatConfig, work: Path) -> Path:
        """Return the folder of the finetuned model's tokenizer.

        The folder contains the chat template and the end tokens, at which generation stops.

        Raises:
            RequestError: If there is no chat template, or if it is damaged.
        """
        words = tokenizers.load(folder)
        text = settings.source() or (chat_template.chatml(words) if settings.template else words.chat_template)
        if text is None:
            raise RequestError(f'{folder}: has no chat template; say chat.template = "chatml", or name a file with one')
        if settings.template == CHATML and "eos_token" in text and "eos_token" not in words.special_spellings:
            raise RequestError(f"{folder}: has no end token that a template can name; name a file in chat.template")
        ends = sorted({*end_ids(folder, words), *Template(text, words).end_ids()})
        if text == words.chat_template and ends == end_ids(folder, words):
            return folder
        with processes.process_0_first():
            if processes.first():
                shutil.rmtree(work, ignore_errors=True)
                containment.copy(folder, work)
                (work / "chat_template.jinja").write_text(text, encoding="utf-8")
                file = work / GENERATION
                stored = parse_json(file.read_bytes()) if file.is_file() else {}
                file.write_text(json.dumps({**stored, "eos_token_id": ends}, indent=1) + "\n", encoding="utf-8")
        return work

    def rows(
        self, model: ModelConfig, examples: Examples, tokenizer: Tokenizer, settings: RowSettings
    ) -> ConversationRows:
        """Return one conversation per row.

        Raises:
            RequestError: If the tokenizer has no chat template, or if the template rejects a conversation.
        """
        encode = Template(tokenizer.chat_template, tokenizer).conversation
        return ConversationRows(examples, encode, tokenizer.pad_id, settings.seq_len, **settings.order)

    def reading_rows(self, model: ModelConfig, examples: Examples, tokenizer: Tokenizer, settings: RowSettings) -> Any:
        """Return rows for calibration: conversations as in training if the data has conversations, otherwise texts."""
        task = self if "messages" in examples.columns else TASKS["causal"]
        return task.rows(model, examples, tokenizer, settings)

    def scorer(self, model: ModelConfig, dtype: str) -> Any:
        """Return a compiled function that computes metrics summed over the assistant's tokens.

        Its arguments are the parameters and a batch.
        """
        loss = self.loss_of(model, dtype=dtype)
        return jax.jit(lambda params, batch: loss(params, batch)[1])

    def evaluate(self, artifact: Artifact, held: Held, setup: Setup) -> Measured:
        """Measure the perplexity of the assistant's tokens, including the token that ends each answer."""
        tokenizer = tokenizers.load(artifact.tokenizer_dir)
        rows = self.rows(artifact.model, held.examples, tokenizer, RowSettings(setup.seq_len))
        step, metrics = scored(self, artifact, rows, setup)
        metrics["perplexity"] = float(np.exp(min(metrics["nll"], 700.0)))
        left = f"{len(rows)} of {len(held.examples)} conversations"
        protocol = f"{held.split} split, {left} ({rows.shortened} without their first exchanges, {rows.cut} without "
        protocol += f"their end), context {setup.seq_len}, every token of the assistant and the end of every answer "
        return timed(self, f"{protocol}once, given all before it, {setup.dtype}", metrics, artifact, rows, step, setup)


TASK = Chat()
