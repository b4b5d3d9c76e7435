"""Render conversations with a tokenizer's chat template, encode them, and stream the model's answers.

A template is a program that is part of an artifact. It runs in a sandbox without side effects and with a limit of steps
(`generate/template_sandbox.py`). Text in a message never becomes a special token, whatever its spelling.

The template renders the complete conversation for every answer, because earlier messages may render differently from
the cached tokens. The longest common prefix with the cached tokens is not computed again (`generate/chat_cache.py`).
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from llmctl.config.containment import regular
from llmctl.config.errors import RequestError
from llmctl.config.text_input import check_unicode, parse_json
from llmctl.data.tokenizers.base import SPOILED, Tokenizer
from llmctl.model.generate.chat_cache import Session
from llmctl.model.generate.continuations import Continuation, Speed, continue_rows
from llmctl.model.generate.decode import Decoder
from llmctl.model.generate.sampling import Sampling

Message = dict[str, str]
"""Chat message {"role": "system", "user" or "assistant", "content": text}."""


def read_messages(file: Path) -> list[Message]:
    """Read the messages of a JSON file, which contains a list or an object with the list "messages".

    Raises:
        RequestError: If the file is missing or has another format.
    """
    try:
        content = parse_json(regular(file).read_bytes())
    except FileNotFoundError:
        raise RequestError(f"--file {file}: no such file") from None
    except (OSError, ValueError) as e:
        raise RequestError(f"--file {file}: not readable JSON ({e})") from None
    found = content.get("messages") if isinstance(content, dict) else content
    good = isinstance(found, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in found
    )
    if not good or not found:
        raise RequestError(f'--file {file}: must be a list of messages, each with a text "role" and "content"')
    return found


class Template:
    """Compile a chat template once.

    Its output depends only on the messages, and on the date if the template reads it.
    """

    def __init__(self, text: str | None, tokenizer: Tokenizer) -> None:
        """Compile the template.

        Args:
            text: Source of the Jinja template; None if the tokenizer has none.
            tokenizer: Tokenizer that encodes the rendered text.

        Raises:
            RequestError: If the text is not a valid template, or is None.
        """
        from jinja2 import TemplateError

        from llmctl.model.generate.generation_block import GenerationBlock
        from llmctl.model.generate.template_sandbox import Sandbox

        if text is None:
            raise RequestError("the tokenizer has no chat template, so the model knows no conversations")
        self.tokenizer = tokenizer
        self._sandbox = Sandbox(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", GenerationBlock]
        )
        # no HTML escapes
        self._sandbox.add_filter("tojson", lambda x, **options: json.dumps(x, ensure_ascii=False, **options))
        self._sandbox.globals |= {
            "raise_exception": _refuse,
            "strftime_now": lambda f: datetime.datetime.now().strftime(f),
        }
        try:
            self._compiled = self._sandbox.from_string(text)
        except (TemplateError, RecursionError, MemoryError, SyntaxError, ValueError) as e:
            raise RequestError(f"the chat template is damaged ({type(e).__name__}: {e})") from None

    def render(self, messages: Sequence[Message]) -> str:
        """Render the conversation as text, up to the start of the assistant's answer.

        Raises:
            RequestError: If the template rejects the messages (for example roles that do not alternate), fails, or
                exceeds the limits of `template_sandbox`.
        """
        try:
            given = {"messages": list(messages), "add_generation_prompt": True, "tools": None, "documents": None}
            return self._sandbox.render(self._compiled, given | self.tokenizer.spelled)
        except RequestError:
            raise
        except Exception as e:  # a template is third-party code and may raise anything
            raise RequestError(f"the chat template fails on these messages ({type(e).__name__}: {e})") from None

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Return the token ids of the conversation.

        Only the template can produce special tokens. If a message spells one, it is encoded as text.

        Raises:
            RequestError: If `render` raises it, or if the rendered text is empty.
        """
        own = self.tokenizer.special_ids

        def harmless(text: str) -> str:
            for spelling in own:
                text = text.replace(spelling, spelling[:1] + SPOILED + spelling[1:])
            return text

        text = self.render([{**m, "content": harmless(m["content"])} for m in messages])
        ids = self.tokenizer.encode_spelled(check_unicode(text, "the text of the chat template"))
        if not ids:
            raise RequestError("the chat template gives no text for these messages")
        return ids


def _refuse(reason: str) -> NoReturn:
    raise RequestError(f"the chat template refuses these messages: {reason}")


def _now(pattern: str) -> str:
    if re.search(r"%[^a-zA-Z%]*\d", pattern):  # some systems pad a field to any width
        raise RequestError("the chat template asks for a date with a width")
    return datetime.datetime.now().strftime(pattern)


class Conversation:
    """Store a conversation with a model: the messages so far, and the session that generates answers."""

    def __init__(self, template: Template, decoder: Decoder, end_ids: Sequence[int]) -> None:
        self.template, self.session, self.end_ids = template, Session(decoder), end_ids
        self.messages: list[Message] = []
        self.speed = Speed()

    def answer(
        self, max_new: int, *, sampling: Sampling | None = None, seed: int = 0, stops: Sequence[str] = ()
    ) -> Iterator[str]:
        """Generate the assistant's answer in pieces of text, and append it to the messages at the end.

        Args:
            max_new: Maximum number of new tokens.
            sampling: Sampling rules; greedy if None.
            seed: Seed of the sampling.
            stops: Strings that end the answer; they are not part of it.

        Yields:
            The next piece of text.

        Raises:
            RequestError: If the conversation is too long for another answer.
        """
        tokenizer = self.template.tokenizer
        row = Continuation("", self.template.prompt(self.messages), [s for s in stops if s])
        options: dict[str, Any] = {"sampling": sampling, "seed": seed, "speed": self.speed, "ends": self.end_ids}
        for new in continue_rows(self.session, tokenizer, [row], max_new, **options):
            yield new[0]
        self.messages.append({"role": "assistant", "content": row.text})
