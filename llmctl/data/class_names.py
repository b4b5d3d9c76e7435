"""Read the class names that a data set declares for columns of class numbers.

Hugging Face `datasets` stores a `ClassLabel` as a number. The class names are in dataset_info.json, and in the metadata
of the Arrow schema, which Parquet files also store.

Example:
  >>> of_features({"label": {"names": ["neg", "pos"], "_type": "ClassLabel"}, "text": {"_type": "Value"}})
  {'label': ('neg', 'pos')}
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llmctl.config.text_input import parse_json

Names = Mapping[str, tuple[str, ...]]
"""Class names by column, in the order of the class numbers."""


def of_features(features: Any) -> dict[str, tuple[str, ...]]:
    """Return {column: class names} for the columns of class numbers in a Hugging Face data set.

    Columns of lists of class numbers are included.

    Args:
        features: Value of the key "features" in dataset_info.json.

    Raises:
        ValueError or TypeError: If `features` has another format.
    """
    found = {column: _names(feature) for column, feature in dict(features or {}).items()}
    return {column: names for column, names in found.items() if names}


def _names(feature: Any) -> tuple[str, ...]:
    if isinstance(feature, list):  # older releases write a list of one feature for a list
        return _names(feature[0]) if len(feature) == 1 else ()
    if not isinstance(feature, dict):
        return ()
    if feature.get("_type") == "ClassLabel":
        names = feature.get("names") or ()
        if not isinstance(names, (list, tuple)):
            raise TypeError("the names of a class are no list")
        return tuple(map(str, names))
    return _names(feature.get("feature")) if feature.get("_type") in ("Sequence", "List", "LargeList") else ()


def of_schema(metadata: Mapping[bytes, bytes] | None) -> dict[str, tuple[str, ...]]:
    """Return the class names that the metadata of an Arrow schema declares, as {column: class names}.

    The result is empty if the metadata is unreadable or declares no class names.
    """
    try:
        return of_features(parse_json((metadata or {})[b"huggingface"])["info"]["features"])
    except (KeyError, TypeError, ValueError):
        return {}


def of_tfds(features: Any, prefix: str = "") -> dict[str, tuple[str, ...]]:
    """Return {column: class names} for the columns of class numbers in a TFDS data set.

    Columns of lists of class numbers are included. Nested features are columns such as `about/label`.

    Args:
        features: Features of the data set, `builder.info.features`.
        prefix: Prefix of the column names.
    """
    import tensorflow_datasets

    kinds: Any = tensorflow_datasets.features
    found: dict[str, tuple[str, ...]] = {}
    for column, feature in features.items():
        feature = feature.feature if isinstance(feature, kinds.Sequence) else feature
        if isinstance(feature, kinds.FeaturesDict):
            found |= of_tfds(feature, f"{prefix}{column}/")
        elif isinstance(feature, kinds.ClassLabel):
            found[prefix + column] = tuple(feature.names)
    return found


def numbers_hint(classes: Sequence[str], names: Sequence[str]) -> str:
    """Return advice for an error message if a model's classes are numbers, but the data declares names for these
    numbers.

    Otherwise return an empty string.

    Args:
        classes: Class names of the data.
        names: Class names of the model.

    Example:

    >>> numbers_hint(["neg", "pos"], ["0", "1"])
    '; if its numbers are those of the data: data.classes = ["0", "1"]'
    """
    if not names or not all(map(str.isdecimal, names)) or all(map(str.isdecimal, classes)):
        return ""
    return f"; if its numbers are those of the data: data.classes = {json.dumps(list(names))}"
