r"""Read the choices and the answer of a multiple-choice question, in the formats of common data sets.

Example:
    >>> read(["red", "blue"], "blue")
    (('red', 'blue'), 1)
    >>> read({"text": ["red", "blue"], "label": ["A", "B"]}, "A")  # the format of ARC and CommonsenseQA
    (('red', 'blue'), 0)
    >>> read("A. red\nB. blue", "B. blue")  # one text with a letter per choice
    (('red', 'blue'), 1)
"""

from __future__ import annotations

import re
from typing import Any

from llmctl.config.errors import RequestError

LETTER = re.compile(r"\s*[A-Z][.)]\s")
"""Regular expression for the letter at the beginning of a choice, such as "A. "."""


def holds_choices(value: Any) -> bool:
    """Return whether a value has the format of choices: a list, a dict or text that begins with a letter such as `A. `.

    If a column `choices` has other values, it does not contain the choices of a question.
    """
    return isinstance(value, (list, dict)) or (isinstance(value, str) and LETTER.match(value) is not None)


def read(choices: Any, answer: Any) -> tuple[tuple[str, ...], int]:
    """Return the texts of the choices, and the index of the correct choice.

    Args:
        choices: List of texts, {"text": texts, "label": names of the choices}, or one text with a line "A. …" for each
            choice.
        answer: The correct choice: the index from 0, the text, or the name. Default names are the letters A, B, ….

    Raises:
        RequestError: If there are fewer than two different choices, or the answer is none of the choices.
    """
    texts, names = texts_of(choices)
    if isinstance(choices, str) and isinstance(answer, str) and LETTER.match(answer):
        answer = answer.strip()[0]
    letters = [chr(ord("A") + k) for k in range(len(texts))]
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        if names is not None and isinstance(answer, int):
            answer = str(answer)
        elif names is None and answer in range(len(texts)):
            return texts, int(answer)
    if isinstance(answer, str):
        found = [[str(n) for n in names]] if names is not None else [list(texts), letters]
        found += [list(texts)] if names is not None else [[str(k) for k in range(len(texts))]]
        for known in found:
            if known.count(answer) == 1:
                return texts, known.index(answer)
    known = (
        ", ".join(map(str, names)) if names is not None else f"0 to {len(texts) - 1}, A to {letters[-1]}, or a choice"
    )
    raise RequestError(f"the answer {answer!r} is none of the choices ({known})")


def texts_of(choices: Any) -> tuple[tuple[str, ...], list[Any] | None]:
    """Return the texts of the choices, and their names if `choices` has names.

    Args:
        choices: List of texts, {"text": texts, "label": names of the choices}, or one text with a line "A. …" for each
            choice.

    Raises:
        RequestError: If there are fewer than two different texts, or if the numbers of names and texts differ.
    """
    texts, names = choices, None
    if isinstance(choices, str) and LETTER.match(choices):
        texts = [part[2:].strip() for part in re.split(r"\s*\n(?=[A-Z][.)]\s)", choices.strip())]
    if isinstance(choices, dict):
        texts, names = choices.get("text"), choices.get("label")
    if not isinstance(texts, (list, tuple)) or not all(isinstance(t, str) and t.strip() for t in texts):
        raise RequestError('choices must be a list of texts, or {"text": [...], "label": [...]}')
    if len(texts) < 2 or len({*texts}) < len(texts):
        raise RequestError(f"needs at least two different choices, has {len(texts)}")
    if names is not None and (not isinstance(names, list) or len(names) != len(texts)):
        raise RequestError("choices must have one label per text")
    return tuple(texts), names
