"""Map the labels of the data to class names and class indices."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import cast

import numpy as np

from llmctl.config.errors import RequestError
from llmctl.data import label_values
from llmctl.data.config import DataConfig
from llmctl.data.dedup import Scan


def of_rows(
    cfg: DataConfig, scans: Sequence[Scan], names: list[str], where: Callable[[int], str]
) -> tuple[tuple[str, ...], dict[str, str], np.ndarray | None]:
    """Return (class names, {label as spelled in the data: class name}, labels of the N rows).

    The labels are class indices (int32 [N]) or numbers (float32 [N]). If labels are sets of classes, they are zeros and
    ones (uint8 [N, C]). The labels are None if the rows have no labels, or if each word has a label.

    Args:
        cfg: Settings of the data.
        scans: Labels of all rows, in order.
        names: Class names that the data declares.
        where: Function that returns the location of row i of the N rows, for error messages.

    Raises:
        RequestError: If both rows and words have labels. If `data.classes` and the labels do not fit.
    """
    labels = [label for f in scans for label in f.labels]
    tags = {tag: at for f in reversed(scans) for tag, at in f.tags.items()}
    if labels and tags:
        raise RequestError(f"{cfg.titles}: has a label a row and a tag a word; choose one kind with data.columns")
    if tags and cfg.label_type == "set":
        raise RequestError(f'{cfg.titles}: has a tag a word; data.label_type = "set" is for the labels of a row')
    classes, class_of, labels_N = (), {}, None
    if cfg.label_type == "number" and labels:
        labels_N = np.array(labels, np.float32)
    elif labels or tags:
        sets = cast(list[tuple[str, ...]], labels) if cfg.label_type == "set" else []
        flat = [c for row in sets for c in row] if sets else cast(list[str], labels or list(tags))
        classes, class_of = _classes(cfg, set(flat), names)
        if not cfg.classes and (odd := label_values.no_class(set(classes) - set(names))):
            k = next(k for k, c in enumerate(flat) if class_of[c] == odd)
            row = int(np.repeat(np.arange(len(sets)), list(map(len, sets)))[k]) if sets else k
            raise label_values.no_class_error(odd, tags[flat[k]] if tags else where(row))
        labels_N = None if tags else _indices(classes, [class_of[c] for c in flat], list(map(len, sets)))
    return classes, class_of, labels_N


def _classes(cfg: DataConfig, found: set[str], names: list[str]) -> tuple[tuple[str, ...], dict[str, str]]:
    """Return the class names, and a dict {label as spelled in the data: class name}.

    Classes have the order of `data.classes`. If `data.classes` is empty, the classes in `names` come first, in the
    order of `names`. All other classes follow in sorted order.

    Args:
        cfg: Settings of the data.
        found: Labels as spelled in the data.
        names: Class names that the data declares.
    """
    class_of = label_values.one_spelling(sorted(found), cfg.classes or names)
    found = set(class_of.values())
    if len(cfg.classes or found) > 1000 and cfg.label_type != "set":
        many = len(cfg.classes or found)
        raise RequestError(f'{cfg.titles}: {many} different labels; numbers? (data.label_type = "number")')
    if cfg.classes:
        return tuple(cfg.classes), class_of
    numeric = all(re.fullmatch(r"-?\d+", c) for c in found)
    place = {c: k for k, c in enumerate(dict.fromkeys(names))}
    if names and (bare := sorted(c for c in found - place.keys() if re.fullmatch(r"-?\d+", c))):
        raise RequestError(
            f"{cfg.titles}: one source declares class names ({', '.join(place)}), another has the labels "
            f"{', '.join(bare)}; list the names, or the numbers for all sources, in data.classes"
        )
    label_values.check_kinds(cfg.titles, found - place.keys())
    first = sorted(found & place.keys(), key=place.__getitem__)
    rest = sorted(found - place.keys(), key=(lambda c: (int(c), c)) if numeric else None)
    return (*first, *rest), class_of


def _indices(classes: tuple[str, ...], labels: list[str], sizes: list[int]) -> np.ndarray:
    """Return the class index of each label, int32 [N]. For sets of labels, return zeros and ones, uint8 [N, C].

    Args:
        classes: Class names.
        labels: Class name of each row; for sets, the names of all rows concatenated.
        sizes: Number of labels of each row; empty if every row has exactly one label.
    """
    number = {c: k for k, c in enumerate(classes)}
    found = np.array([number[c] for c in labels], np.int32)
    if not sizes:
        return found
    hot_NC = np.zeros((len(sizes), len(classes)), np.uint8)
    hot_NC[np.repeat(np.arange(len(sizes)), sizes), found] = 1
    return hot_NC
