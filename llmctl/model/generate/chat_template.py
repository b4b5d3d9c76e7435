"""Render conversations with a tokenizer's chat template, encode them, and find the tokens that the assistant writes.

A template is a program that comes with a model. The template runs in a sandbox without side effects and with a limit of
steps (`llmctl/data/template_sandbox.py`). Text in a message never becomes a special token, even if the text spells a
special token.

Training needs the positions of the assistant's tokens. Some templates mark these tokens with `{% generation %}`.
Otherwise, two texts are rendered for each answer: the conversation before the answer, and the conversation including
the answer. The answer is the part of the second text that follows the first text. This method requires that the
complete conversation begins with both texts. The answer includes its end token.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np

from llmctl.config.errors import RequestError
from llmctl.config.text_input import check_unicode
from llmctl.data.tokenizers.base import ESCAPE, Tokenizer
from llmctl.model.generate import generation_block

Message = dict[str, Any]
"""Chat message {"role": name, "content": text}, with further keys for templates.

The role is "system", "user", "assistant" or "tool".
"""

DAY = datetime.datetime(2024, 7, 26)
"""Date that templates get in training and evaluation, so that results do not depend on the day."""
END = "<|im_end|>"
"""Token that ends a message in ChatML."""
CHATML = """\
{%- set end = '<|im_end|>' %}
{%- if tools %}
    {%- set about = namespace(text='') %}
    {%- if messages and messages[0]['role'] == 'system' %}
        {%- set about.text = messages[0]['content'] + '\\n\\n' %}
    {%- endif %}
    {%- set about.text = about.text + '# Tools\\n\\nCall one as <tool_call>{"name": …, "arguments": …}</tool_call>:' %}
    {%- for tool in tools %}
        {%- set about.text = about.text + '\\n' + (tool | tojson) %}
    {%- endfor %}
    {{- '<|im_start|>system\\n' + about.text + end + '\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message['role'] == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
            {{- message['content'] or '' }}
            {%- for call in message['tool_calls'] or [] %}
                {{- '\\n' if message['content'] or not loop.first else '' }}
                {{- '<tool_call>' + ((call['function'] or call) | tojson) + '</tool_call>' }}
            {%- endfor %}
            {{- end }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- elif not (tools and loop.first and message['role'] == 'system') %}
        {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + end + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
"""Chat template of the ChatML format, with the assistant's text in `{% generation %}` blocks."""


class Marked(NamedTuple):
    """Store the tokens of a conversation, and a mask of the tokens that the assistant writes."""

    ids: list[int]
    """Token ids [N]."""
    counted_N: np.ndarray
    """Mask of the tokens that the assistant writes, bool [N] (see `Template.conversation`)."""
    missed: int
    """Number of answers whose tokens could not be found. The template renders such an answer differently when later
    messages follow."""


class Template:
    """Render and encode conversations with a chat template. The template is compiled once.

    The same messages always give the same text, unless the template asks for the current date.

    Example:
        >>> from llmctl.data.tokenizers.byte_tokenizer import ByteTokenizer
        >>> words = ByteTokenizer.new()
        >>> talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
        >>> template = Template("{% for m in messages %}{{ m.role }}: {{ m.content }}\\n{% endfor %}", words)
        >>> template.render(talk)
        'user: Hi\\nassistant: Hello\\n'
    """

    def __init__(self, text: str | None, tokenizer: Tokenizer) -> None:
        """Compile the template.

        Args:
            text: Text of the Jinja template; None if the tokenizer has none.
            tokenizer: Tokenizer that encodes the rendered text.

        Raises:
            RequestError: If the text is not a valid template, or is None.
        """
        from jinja2 import TemplateError

        from llmctl.data.template_sandbox import Sandbox

        if text is None:
            raise RequestError("the tokenizer has no chat template, so the model knows no conversations")
        self.tokenizer = tokenizer
        self.marks_answers = bool(re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", text))
        """Whether the template marks the assistant's text by `{% generation %}`."""
        self._day: datetime.datetime | None = None
        self._sandbox = Sandbox(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", generation_block.GenerationBlock],
        )
        # no HTML escapes
        self._sandbox.add_filter("tojson", lambda x, **options: json.dumps(x, ensure_ascii=False, **options))
        self._sandbox.globals |= {"raise_exception": _refuse, "strftime_now": self._now}
        try:
            self._compiled = self._sandbox.from_string(text)
        except (TemplateError, RecursionError, MemoryError, SyntaxError, ValueError) as e:
            raise RequestError(f"the chat template is damaged ({type(e).__name__}: {e})") from None

    def render(self, messages: Sequence[Message], tools: list[Any] | None = None, prompt: bool = True) -> str:
        """Render the conversation as text.

        Args:
            messages: Messages so far.
            tools: Descriptions of the tools that the assistant may call.
            prompt: Whether to end with the start of the assistant's answer.

        Raises:
            RequestError: If the template fails, or exceeds the limits of `template_sandbox`. If the template rejects
                the messages, for example because roles do not alternate.
        """
        return generation_block.spans(self._rendered(messages, tools, prompt))[0]

    def prompt(self, messages: Sequence[Message], tools: list[Any] | None = None) -> list[int]:
        """Return the token ids of the conversation, up to the start of the assistant's answer.

        Only the template can produce special tokens. If a message spells a special token, the spelling is encoded as
        text.

        Args:
            messages: Messages so far.
            tools: Descriptions of the tools that the assistant may call.

        Raises:
            RequestError: If the template fails or rejects the messages, or if the rendered text is empty.
        """
        text = self.render(self._escaped(list(messages)), self._escaped(tools))
        ids = self.tokenizer.encode_with_special(check_unicode(text, "the text of the chat template"))
        if not ids:
            raise RequestError("the chat template gives no text for these messages")
        return [*self.tokenizer.prefix, *ids]

    def conversation(self, messages: Sequence[Message], tools: list[Any] | None = None) -> Marked:
        """Return the token ids of a complete conversation, and a mask of the tokens that the assistant writes.

        The mask is true for tokens that contain a character of an answer, and for the answer's end token. The mask is
        false for the header before the answer, and for white space after the end token. The mask is also false for
        messages with the entry "weight": 0. If the template marks answers without their end tokens, the end token is
        the special token right after an answer. The template gets the date `DAY`.

        Raises:
            RequestError: If the template fails or rejects the messages. If the answers cannot be found in the text. If
                it is unclear which answer has the weight 0. The reason is then that the template does not render one
                `{% generation %}` block per answer.
        """
        self._day = DAY
        try:
            text, spans, missed = self._answers(self._escaped(list(messages)), self._escaped(tools))
        finally:
            self._day = None
        ids, places = self.tokenizer.offsets_with_special(check_unicode(text, "the text of the chat template"))
        first_N, last_N = np.array(places, np.int64).reshape(-1, 2).T
        counted_N = np.zeros(len(ids), bool)
        for first, last in spans:
            # A token without characters, such as the space before a first word, belongs to the text that it begins.
            counted_N |= (first_N < last) & ((last_N > first) | ((last_N == first_N) & (first_N == first)))
        prefix = self.tokenizer.prefix
        return Marked([*prefix, *ids], np.concatenate([np.zeros(len(prefix), bool), counted_N]), missed)

    def end_ids(self) -> list[int]:
        """Return a list with the id of the special token that ends the assistant's answers.

        The list is empty if answers do not end with a special token, or if the template fails.
        """
        talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
        try:
            found = self.conversation(talk)
        except RequestError:
            return []
        special = set(self.tokenizer.special_ids.values())
        for i in (i for i, counts in zip(found.ids[::-1], found.counted_N[::-1], strict=True) if counts):
            if i in special:
                return [i]
            if self.tokenizer.decode([i]).strip():  # a special token before the last word, such as that of a thought
                break
        return []

    def _answers(self, messages: list[Message], tools: list[Any] | None) -> tuple[str, list[tuple[int, int]], int]:
        """Render a conversation, and find the assistant's answers in the text.

        Returns:
            The text, the ranges [first, last) of characters of the answers, and the number of answers not found.
        """
        text, spans = generation_block.spans(self._rendered(messages, tools, False))
        places = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        counts = [messages[i].get("weight") != 0 for i in places]
        if self.marks_answers:
            spans = self._with_ends(text, spans)
            if not all(counts):
                if len(spans) != len(places):
                    raise RequestError(
                        f"the chat template marks {len(spans)} texts of {len(places)} answers, so it cannot be told "
                        "which of them a message with weight 0 leaves out"
                    )
                spans = [span for span, count in zip(spans, counts, strict=True) if count]
            return text, spans, 0
        learned: list[tuple[int, int]] = []
        for i, count in zip(places, counts, strict=True):
            before = self.render(messages[:i], tools) if i else ""
            after = text if i == len(messages) - 1 else self.render(messages[: i + 1], tools, False)
            if i and len(before) < len(after) and text.startswith(after) and after.startswith(before):
                spans.append((len(before), len(before) + self._answer_length(after[len(before) :])))
                learned += spans[-1:] * count
        if places and not spans:
            raise RequestError(
                "the chat template renders what is before an answer differently for generation, so it cannot be told "
                "what the assistant writes; use a template that marks it with {% generation %}"
            )
        return text, learned, sum(counts) - len(learned)

    def _with_ends(self, text: str, spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Extend or shorten the marked ranges of characters, so that each answer ends with an end token.

        White space after an end token is removed from the range. Some templates mark answers without their end tokens.
        For these templates, the end token is the special token right after the last answer. The ranges of all answers
        that this token follows are extended by the token.
        """
        spans = [(first, first + self._answer_length(text[first:last])) for first, last in spans]
        if not spans or self._ends_with_special(text[slice(*spans[-1])]):
            return spans
        after = self.tokenizer.split_special(text[spans[-1][1] :])
        end = after[1] if len(after) > 1 and not after[0] else ""
        return [(first, last + len(end) * text.startswith(end, last)) for first, last in spans]

    def _ends_with_special(self, answer: str) -> bool:
        """Return True if a text ends with a special token."""
        parts = self.tokenizer.split_special(answer)
        return len(parts) > 1 and not parts[-1]

    def _answer_length(self, answer: str) -> int:
        """Return the length of an answer in characters, not counting white space after a special token at the end."""
        parts = self.tokenizer.split_special(answer)
        return len(answer) - (len(parts[-1]) if len(parts) > 1 and not parts[-1].strip() else 0)

    def _rendered(self, messages: Sequence[Message], tools: list[Any] | None, prompt: bool) -> str:
        given = {"messages": list(messages), "add_generation_prompt": prompt, "tools": tools, "documents": None}
        try:
            return self._sandbox.render(self._compiled, given | self.tokenizer.special_spellings)
        except RequestError:
            raise
        except Exception as e:  # a template is third-party code and may raise anything
            raise RequestError(f"the chat template fails on these messages ({type(e).__name__}: {e})") from None

    def _escaped(self, value: Any) -> Any:
        """Return a copy of the messages or tools in which no text spells a special token.

        The character `ESCAPE` is inserted into such spellings. The two characters that mark `{% generation %}` blocks
        in rendered text are replaced by U+FFFD.
        """
        own = self.tokenizer.special_ids
        firsts = {spelling[:1] for spelling in own}

        def text(said: str) -> str:
            said = said.replace(generation_block.BEGIN, "\ufffd").replace(generation_block.END, "\ufffd")
            # Vocabularies have hundreds of special tokens, and most texts have none of their first characters.
            for spelling in own if any(first in said for first in firsts) else ():
                said = said.replace(spelling, spelling[:1] + ESCAPE + spelling[1:])
            return said

        def inner(value: Any) -> Any:
            if isinstance(value, str):
                return text(value)
            if isinstance(value, dict):
                return {text(k): inner(v) for k, v in value.items()}
            return [inner(v) for v in value] if isinstance(value, list) else value

        return inner(value)

    def _now(self, pattern: str) -> str:
        if re.search(r"%[^a-zA-Z%]*\d", pattern):  # some systems pad a field to any width
            raise RequestError("the chat template asks for a date with a width")
        return (self._day or datetime.datetime.now()).strftime(pattern)


def chatml(tokenizer: Tokenizer) -> str:
    """Return the ChatML template for a tokenizer.

    If the tokenizer has no token `<|im_end|>`, each message ends with the end-of-sequence token.
    """
    return CHATML if END in tokenizer.special_ids else CHATML.replace(f"'{END}'", "eos_token")


def _refuse(reason: str) -> NoReturn:
    raise RequestError(f"the chat template refuses these messages: {reason}")
