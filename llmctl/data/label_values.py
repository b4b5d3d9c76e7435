"""Read labels: detect missing labels, and map different spellings of a class to one name.

A class is a text, an integer, a boolean or an integral float. Files may store the same class in several ways, such as
`1`, `1.0`, "1" and "1.0", or `true` and "True".

Example:
    >>> one_spelling(["pos", "neg"]), one_spelling(["0.0", "1.0", "1"])
    ({'pos': 'pos', 'neg': 'neg'}, {'0.0': '0', '1.0': '1', '1': '1'})
    >>> one_spelling(["1", "True"], known=["1.0", "true"])
    {'1': '1.0', 'True': 'true'}
"""

from __future__ import annotations

import decimal
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable
from typing import Any

import numpy as np

from llmctl.config.base import hint
from llmctl.config.errors import RequestError
from llmctl.config.text_input import check_unicode
from llmctl.data.config import DataConfig

Label = str | float | tuple[str, ...]
"""Label of a row: a class, a number, or a set of classes."""

NO_CLASS = ("-1", "-100")
"""Class numbers that mean "no label": -1 in data sets of Hugging Face and TFDS, -100 in the losses of PyTorch."""
_WHOLE = re.compile(r"([+-]?)(0|[1-9]\d*)(?:\.0*)?", re.ASCII)
_DROP = 'data.unlabeled = "drop" drops such rows'
_LARGEST = float(np.finfo(np.float32).max)


class Unlabeled(RequestError):
    """Report that a cell has no label. If `data.unlabeled` is "drop", the row is dropped."""


def plain(value: Any) -> str:
    """Convert a label to text. Equal values give equal text. 1, 1.0 and "1" give "1". True and "true" give "true"."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (float, decimal.Decimal)) and math.isfinite(value) and value == int(value):
        return str(int(value))
    return str(value)


def canonical(label: str) -> str:
    """Return the canonical spelling of a class: "1" for "1.0", "true" for "True", else stripped NFC text.

    Numbers with leading zeros or fractions keep their spelling, because they may be codes or versions.
    """
    text = unicodedata.normalize("NFC", label.strip())
    if whole := _WHOLE.fullmatch(text):
        return "-" * (whole[1] == "-" and whole[2] != "0") + whole[2]
    return text.lower() if text.lower() in ("true", "false") else text


def one_spelling(found: Iterable[str], known: Iterable[str] = ()) -> dict[str, str]:
    """Choose one spelling per class, and return {label as spelled in the data: class name}.

    Labels such as "1" and "1.0" are one class, because `canonical` returns the same text for both.

    The name of each class is chosen in this order:
    - If a class is in `known`, its name is the spelling in `known`.
    - If every class outside `known` has only one spelling in the data, these spellings are the names.
    - Otherwise, all classes outside `known` get their canonical spelling.

    Args:
        found: Labels as spelled in the data.
        known: Class names that the config or the data declares.
    """
    names = list(known)
    count = Counter(map(canonical, names))
    named = {canonical(n): n for n in names if count[canonical(n)] == 1} | {n: n for n in names}
    classes = {label: named.get(label) or named.get(canonical(label), "") for label in found}
    rest = [label for label, name in classes.items() if not name]
    several = len({canonical(label) for label in rest}) < len(rest)
    return {label: name or (canonical(label) if several else label) for label, name in classes.items()}


def check_kinds(title: str, classes: Collection[str]) -> None:
    """Check that the classes do not include both booleans (true, false) and numbers (1, 0).

    Args:
        title: Name of the data, for the error message.
        classes: Classes in the data.

    Raises:
        RequestError: If the classes include both. It is then unknown whether true and 1 are the same class.
    """
    kinds = [sorted(c for c in classes if canonical(c) in pair) for pair in (("false", "true"), ("0", "1"))]
    if all(kinds):
        raise RequestError(
            f"{title}: the labels are both truth values ({', '.join(kinds[0])}) and numbers ({', '.join(kinds[1])}); "
            "write them alike, or list all as different classes in data.classes"
        )


def no_class(classes: Collection[str]) -> str:
    """Return the class in the data that probably means "no label", or an empty string.

    This class is -1 or -100. The class is returned only if 0 is also a class and no other class is negative. Otherwise
    negative numbers are probably ordinary classes, as in the classes -1 and 1, or -2 to 2.
    """
    named = {canonical(c): c for c in classes}
    if not all(_WHOLE.fullmatch(c) for c in named) or "0" not in named:
        return ""
    negative = [c for c in named if c.startswith("-")]
    return named[negative[0]] if len(negative) == 1 and negative[0] in NO_CLASS else ""


def no_class_error(label: str, where: str) -> RequestError:
    """Return the error for a class number that may mean "no label"."""
    return RequestError(
        f"{where}: label {label!r} stands for no label in many data sets; {_DROP}, and data.classes with {label!r} "
        "makes it a class"
    )


def matching_name(label: str, names: Collection[str]) -> str | None:
    """Return the element of `names` that is another spelling of `label`, such as "1" for "1.0". If there is none,
    return None.
    """
    name = one_spelling([label], names)[label]
    return name if name in names else None


class Labels:
    """Convert the cells of a label column to labels, by the settings of a data config.

    Error messages do not contain the location of the row. The caller adds the location.
    """

    def __init__(self, cfg: DataConfig, column: str):
        """Store the settings.

        Args:
            cfg: Settings of the data, whose `label_type` is the type of the labels.
            column: Name of the column in the source, for messages.
        """
        self._cfg, self._column = cfg, column
        self._known: dict[str, str | None] = {}

    def label(self, value: Any) -> Label:
        """Convert a cell to a label: a class, a number, or a set of classes, as `data.label_type` requires.

        Raises:
            Unlabeled: If the cell has no label.
            RequestError: If the value is no label of this type.
        """
        if self._cfg.label_type == "number":
            return self._number(value)
        return self._set(value) if self._cfg.label_type == "set" else self.of_class(value)

    def of_class(self, value: Any) -> str:
        """Convert a value to a class name. If `data.classes` lists the class, return the spelling in that list.

        Raises:
            Unlabeled: If the value means "no label".
            RequestError: If the value is no class, or if `data.classes` does not list it.
        """
        value = _scalar(value)
        if _is_empty(value):
            raise Unlabeled(f"the label is empty ({self._shown(value)}); {_DROP}")
        listed = self._cfg.classes
        if not isinstance(value, (str, bool, int, float, decimal.Decimal)):
            raise RequestError(f"label {_short(value)} is no class but {_kind(value)} in {self._in}; {_advice(value)}")
        label = plain(value)
        if not label.isascii():
            check_unicode(label, f"label {_short(label)} in {self._in}")
        if label not in self._known:
            self._known[label] = matching_name(label, listed)
        name = self._known[label]
        if name is None and self._cfg.unlabeled == "drop" and canonical(label) in NO_CLASS:
            raise Unlabeled(f"label {label!r} stands for no label")
        if listed and name is None:
            raise RequestError(
                f"label {label!r} is not among data.classes ({', '.join(listed)}){hint(label, list(listed))}"
            )
        if not isinstance(value, (str, int)) and name is None and not _WHOLE.fullmatch(label):
            raise RequestError(f"label {value} is no class but a number in {self._in}; {_advice(value)}")
        return name or label

    def _set(self, value: Any) -> tuple[str, ...]:
        value = _scalar(value)
        if isinstance(value, str) and self._cfg.label_separator:
            value = [part for given in value.split(self._cfg.label_separator) if (part := given.strip())]
        if not isinstance(value, list):
            advice = "set data.label_separator" if isinstance(value, str) else "[] is the empty set"
            error = Unlabeled if not isinstance(value, str) and _is_empty(value) else RequestError
            raise error(f"label {_short(value)} is no list of labels; {advice}")
        numbers = [v for v in value if not isinstance(v, str)]
        if (len(numbers) > 2 and all(v in (0, 1) for v in numbers)) or any(isinstance(v, bool) for v in numbers):
            raise RequestError(
                f"label {_short(value)} in {self._in} holds zeros and ones for all classes; list the labels that apply"
            )
        return tuple(dict.fromkeys(self.of_class(v) for v in value))

    def _number(self, value: Any) -> float:
        value = _scalar(value)
        if _is_empty(value):
            raise Unlabeled(f"the label is empty ({self._shown(value)}); {_DROP}")
        try:
            # float() also reads bytes, and the underscores of Python's own numbers.
            fine = isinstance(value, (bool, int, float, decimal.Decimal, str)) and "_" not in str(value)
            number = float(value) if fine else math.inf
        except (ValueError, OverflowError):
            number = math.inf
        if math.isnan(number):
            raise Unlabeled(f"label {_short(value)} is not a number; {_DROP}")
        if not abs(number) <= _LARGEST:  # the labels are float32
            reason = "is beyond the numbers of float32" if math.isfinite(number) else "is not a number"
            raise RequestError(f"label {_short(value)} {reason} (column {self._column!r})")
        return number

    @property
    def _in(self) -> str:
        return f"column {self._column!r}"

    def _shown(self, value: Any) -> str:
        return f"{self._in} holds {'null' if value is None else _short(value)}"


def _scalar(value: Any) -> Any:
    """Convert a NumPy scalar or array to Python numbers or lists."""
    return value.tolist() if isinstance(value, (np.generic, np.ndarray)) else value


def _is_empty(value: Any) -> bool:
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, (float, decimal.Decimal)) and math.isnan(value))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _kind(value: Any) -> str:
    kinds = {list: "a list", dict: "an object", bytes: "bytes"}
    return kinds.get(type(value), type(value).__name__)


def _advice(value: Any) -> str:
    if isinstance(value, list):
        return 'data.label_type = "set" reads lists of labels'
    if isinstance(value, (float, decimal.Decimal)):
        return 'data.label_type = "number" reads numbers, and data.classes may list them as classes'
    return "write the name of the class, as text or as an integer"
