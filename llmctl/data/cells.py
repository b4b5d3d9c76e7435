"""Check and convert cells with structured values: tagged words, answers, choices and conversations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from llmctl.config.errors import RequestError
from llmctl.data import chats, multiple_choice
from llmctl.data.label_values import Unlabeled
from llmctl.data.source import Row

CHATS = (
    'chats, which task = "chat" reads; for another task write each exchange as two text columns, prompt and completion'
)
"""Description of a cell that contains a conversation, for error messages."""


class CellReader:
    """Check and convert cells of one source.

    Each method gets a row {canonical column: cell} and the row's location for error messages, and returns the converted
    values. Canonical columns are the names that llmctl gives to columns, such as `text` and `label`.
    """

    def __init__(self, names: Mapping[str, str], clean: Callable[[str], str]) -> None:
        """Store the column names of the source.

        Args:
            names: Column names of the source, as {canonical column: column of the source}.
            clean: Function that is applied to every text, such as the replacements of `data.replace`.
        """
        self._names, self._clean = names, clean

    def words(self, row: Row, where: str) -> Row:
        """Return {"tokens": list of words}, after checking that there is one tag per word.

        Raises:
            Unlabeled: If the row has no tags.
            RequestError: If the words are no list of texts, or if the numbers of words and tags differ.
        """
        words, tags = row["tokens"], row.get("tags")
        if not isinstance(words, list) or not all(isinstance(w, str) for w in words):
            raise RequestError(f"{where}: column {self._names['tokens']!r} is no list of words")
        cleaned: Row = {"tokens": [self._clean(w) for w in words]}
        if "tags" not in row:
            return cleaned
        if tags is None:
            raise Unlabeled(f"{where}: column {self._names['tags']!r} must hold one label a word (null)")
        if not isinstance(tags, list) or len(tags) != len(words):
            count = f"{len(tags)} for {len(words)} words" if isinstance(tags, list) else "no list"
            raise RequestError(f"{where}: column {self._names['tags']!r} must hold one label a word ({count})")
        return cleaned

    def answers(self, row: Row, where: str) -> list[tuple[str, int]]:
        """Return the accepted answers as pairs (text, index of the answer's first character in the context).

        Raises:
            RequestError: If the cell has another format, or if the context does not contain an answer at the given
                index.
        """
        given: Any = row["answers"] or {"text": [], "answer_start": []}
        try:
            answers = [(str(t), int(s)) for t, s in zip(given["text"], given["answer_start"], strict=True)]
        except (KeyError, TypeError, ValueError):
            raise RequestError(
                f"{where}: column {self._names['answers']!r} must read "
                '{"text": [...], "answer_start": [...]}, as many of each'
            ) from None
        context = row.get("context", "")
        for text, start in answers:
            if not text.strip() or start < 0 or context[start : start + len(text)] != text:
                raise RequestError(f"{where}: the answer {text!r} does not stand at character {start} of the context")
        return answers

    def question(self, row: Row, where: str) -> Row:
        """Return {"choices": texts, "answer": index of the correct choice}.

        Raises:
            Unlabeled: If the answer is empty.
            RequestError: If the choices have another format, or if the answer is not one of the choices.
        """
        if row["answer"] in (None, "") or row["answer"] != row["answer"]:  # some files write an empty cell as NaN
            raise Unlabeled(f"{where}: the answer is empty (column {self._names['answer']!r})")
        try:
            choices, answer = multiple_choice.read(row["choices"], row["answer"])
        except RequestError as e:
            raise RequestError(f"{where}: {e}") from None
        return {"choices": tuple(map(self._clean, choices)), "answer": answer}

    def conversation(self, row: Row, where: str) -> Row:
        """Return {"messages": …, "tools": …} in the format of `llmctl.data.chats`.

        Raises:
            RequestError: If a cell has another format.
        """
        column = "messages"
        try:
            messages = chats.read(row["messages"], self._clean)
            column = "tools"
            return {"messages": messages, "tools": chats.read_tools(row.get("tools"))}
        except RequestError as e:
            raise RequestError(f"{where}: column {self._names[column]!r} {e}") from None
        except RecursionError:
            raise RequestError(f"{where}: column {self._names[column]!r} is nested too deeply") from None
