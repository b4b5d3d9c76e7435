"""Conversations: a tokenizer's chat template, the tokens that it stands for, and answers that stream.

A template is a program that comes with an artifact, so it runs in a sandbox that changes nothing; what people say never
becomes a special token, however it is spelled. Every turn is the whole conversation in the template's words, for they
may write earlier turns otherwise than the model was shown them; as far as it is the very tokens that the model has read
or written, it is not read again (`model/session.py`).
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from llmctl.config.errors import RequestError
from llmctl.data.tokenizers.base import SPOILED, Tokenizer
from llmctl.model.generate.chat_cache import Session
from llmctl.model.generate.continuations import Continuation, Speed, continue_rows
from llmctl.model.generate.decode import Decoder
from llmctl.model.generate.sampling import Sampling

Message = dict[str, str]
"""{"role": "system", "user" or "assistant", "content"}."""


def ends(folder: Path, tokenizer: Tokenizer) -> list[int]:
    """The tokens that end an answer: the tokenizer's, and those of a generation_config.json beside it."""
    file = folder / "generation_config.json"
    try:
        said = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") if file.is_file() else None
    except (ValueError, AttributeError) as e:
        raise RequestError(f"{file}: damaged ({e})") from None
    more = said if isinstance(said, list) else [said]
    return sorted({tokenizer.eos_id, *(i for i in more if isinstance(i, int))})


def read_messages(file: Path) -> list[Message]:
    """The messages of a JSON file: a list, or an object with the list "messages"."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
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
    """A chat template, compiled once. Its messages alone decide what it writes, but for the date where it asks."""

    def __init__(self, text: str | None, tokenizer: Tokenizer) -> None:
        """Raises RequestError for a text that is no template, or none at all."""
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        if text is None:
            raise RequestError("the tokenizer has no chat template, so the model knows no conversations")
        self.tokenizer = tokenizer
        inside = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        inside.filters["tojson"] = lambda x, **options: json.dumps(x, ensure_ascii=False, **options)  # not for HTML
        inside.globals |= {"raise_exception": _refuse, "strftime_now": lambda f: datetime.datetime.now().strftime(f)}
        try:
            self._compiled = inside.from_string(text)
        except TemplateError as e:
            raise RequestError(f"the chat template is damaged ({e})") from None

    def render(self, messages: Sequence[Message]) -> str:
        """The conversation as text, up to where the assistant answers.

        Raises RequestError where the template refuses (roles that do not alternate, say) or fails.
        """
        try:
            return self._compiled.render(
                messages=list(messages), add_generation_prompt=True, tools=None, documents=None,
                **self.tokenizer.spelled,
            )  # fmt: skip
        except RequestError:
            raise
        except Exception as e:  # a template is a program of others: whatever it raises is its fault
            raise RequestError(f"the chat template fails on these messages ({type(e).__name__}: {e})") from None

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids of the conversation. Special tokens are the template's alone: spelled in a message, they are text."""
        own = self.tokenizer.special_ids

        def harmless(text: str) -> str:
            for spelling in own:
                text = text.replace(spelling, spelling[:1] + SPOILED + spelling[1:])
            return text

        return self.tokenizer.encode_spelled(self.render([{**m, "content": harmless(m["content"])} for m in messages]))


def _refuse(reason: str) -> NoReturn:
    raise RequestError(f"the chat template refuses these messages: {reason}")


class Conversation:
    """Messages so far, and a model that answers them."""

    def __init__(self, template: Template, decoder: Decoder, end_ids: Sequence[int]) -> None:
        self.template, self.session, self.end_ids = template, Session(decoder), end_ids
        self.messages: list[Message] = []
        self.speed = Speed()

    def answer(
        self, max_new: int, *, sampling: Sampling | None = None, seed: int = 0, stops: Sequence[str] = ()
    ) -> Iterator[str]:
        """The assistant's answer to the messages, piece by piece; at its end it is one of the messages.

        Raises RequestError where the conversation leaves no room for an answer.
        """
        tokenizer = self.template.tokenizer
        row = Continuation("", self.template.prompt(self.messages), [s for s in stops if s])
        options: dict[str, Any] = {"sampling": sampling, "seed": seed, "speed": self.speed, "ends": self.end_ids}
        for new in continue_rows(self.session, tokenizer, [row], max_new, **options):
            yield new[0]
        self.messages.append({"role": "assistant", "content": row.text})
