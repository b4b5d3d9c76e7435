"""Generate the assistant's answers in a conversation.

For every answer, the chat template renders the complete conversation again. The reason is that some templates change
earlier messages when later messages follow. The keys and values of tokens are cached between answers. Only the tokens
from the first difference on are computed again (`generate/chat_cache.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llmctl.config.containment import regular
from llmctl.config.errors import RequestError
from llmctl.config.text_input import parse_json
from llmctl.data import chats
from llmctl.model.generate.chat_cache import Session
from llmctl.model.generate.chat_template import Message, Template
from llmctl.model.generate.continuations import Continuation, Speed, continue_rows
from llmctl.model.generate.decode import Decoder
from llmctl.model.generate.sampling import Sampling
from llmctl.model.generate.speculative import SpeculativeDecoder


def read_conversation(file: Path) -> tuple[list[Message], list[Any] | None]:
    """Read the messages and the tools from a JSON file.

    The formats are the same as in training (see `llmctl.data.chats`).

    Args:
        file: File with a list of messages or an object. The object has the list "messages" or "conversations", and
            optionally the list "tools".

    Returns:
        (messages, descriptions of the tools or None).

    Raises:
        RequestError: If the file is missing or has another format.
    """
    try:
        content = parse_json(regular(file).read_bytes())
    except FileNotFoundError:
        raise RequestError(f"--file {file}: no such file") from None
    except (OSError, ValueError) as e:
        raise RequestError(f"--file {file}: not readable JSON ({e})") from None
    named = content if isinstance(content, dict) else {"messages": content}
    messages = next((named[name] for name in chats.NAMES if name in named), None)
    if not isinstance(messages, list) or not messages:
        raise RequestError(f'--file {file}: must be a list of messages, each with a text "role" and "content"')
    try:
        return chats.read(messages, answered=False), chats.read_tools(named.get("tools"))
    except RequestError as e:
        raise RequestError(f"--file {file}: {e}") from None
    except RecursionError:
        raise RequestError(f"--file {file}: is nested too deeply") from None


class Conversation:
    """Store a conversation with a model: the messages so far, the chat template and a `chat_cache.Session`.

    The session generates the answers, and caches the keys and values of the conversation.
    """

    def __init__(self, template: Template, decoder: Decoder | SpeculativeDecoder, end_ids: Sequence[int]) -> None:
        """Begin an empty conversation.

        A `Decoder` gets a cache for the keys and values of the conversation. A `SpeculativeDecoder` gets no cache, so
        it reads the complete conversation again for every answer.
        """
        self.template, self.end_ids = template, end_ids
        self.session = Session(decoder) if isinstance(decoder, Decoder) else decoder
        self.messages: list[Message] = []
        self.tools: list[Any] | None = None
        """Descriptions of the tools that the assistant may call."""
        self.speed = Speed()

    def answer(
        self, max_new: int, *, sampling: Sampling | None = None, seed: int = 0, stops: Sequence[str] = ()
    ) -> Iterator[str]:
        """Generate the assistant's answer, yield the text in pieces, and then append the answer to the messages.

        Args:
            max_new: Maximum number of new tokens.
            sampling: Sampling rules; greedy if None.
            seed: Seed of the sampling.
            stops: Strings that end the answer and are not part of the answer.

        Yields:
            The next piece of text.

        Raises:
            RequestError: If the conversation is too long for another answer.
        """
        tokenizer = self.template.tokenizer
        row = Continuation("", self.template.prompt(self.messages, self.tools), [s for s in stops if s])
        options: dict[str, Any] = {"sampling": sampling, "seed": seed, "speed": self.speed, "ends": self.end_ids}
        for new in continue_rows(self.session, tokenizer, [row], max_new, **options):
            yield new[0]
        self.messages.append({"role": "assistant", "content": row.text})
