"""Measure how a classifier's predictions change if its texts name another group (Garg et al., 2019, arXiv:1809.10610).

If a text names exactly one group of an attribute, it has one version per group. One version is the text itself. In each
other version, the terms of another group replace those of the named group. All versions have the same label. The groups
therefore have the same texts. Only the terms can cause a difference between the rates of two groups (Hardt et al.,
2016, arXiv:1610.02413).

Shapes: N examples, G groups, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from llmctl.artifacts.artifact import Artifact
from llmctl.config.base import hint
from llmctl.config.errors import RequestError
from llmctl.data.config import TEXT_COLUMNS
from llmctl.data.source import Row
from llmctl.evaluate.bias import identity_terms
from llmctl.evaluate.bias.identity_terms import Attribute
from llmctl.evaluate.bias.intervals import with_intervals
from llmctl.evaluate.bias.settings import IdentitySwapsConfig
from llmctl.evaluate.predict import Predictor
from llmctl.evaluate.setup import Held, Measured, Setup, label_map


class Versions(NamedTuple):
    """Store the versions of one example for one attribute."""

    example: int
    own: int
    """Index of the group that the example names."""
    rows: list[Row]
    """One version per group; the version of `own` is the example itself."""


def measure(artifact: Artifact, held: Held, setup: Setup, config: IdentitySwapsConfig) -> Measured:
    """Measure flips of predictions, changes of probability, and gaps of rates between groups, per attribute.

    Raises:
        RequestError: If no text names exactly one group of an attribute. If the model has no class `config.positive`.
    """
    attributes, names = identity_terms.read(config.terms), artifact.manifest.labels
    positive = positive_class(config.positive, names)
    rows = list(held.examples)
    label_N = label_map(held.examples.classes, names, str(artifact.path))[held.examples.labels]
    versions = {a.name: of_attribute(a, rows) for a in attributes}
    if not any(versions.values()):
        raise RequestError(f"identity_swaps.terms: no text names exactly one group of the terms in {config.terms}")
    predictor = Predictor(
        artifact, setup.batch_size, setup.seq_len, setup.dtype, truncate=setup.truncate, mesh=setup.mesh
    )
    flat = [row for own in versions.values() for version in own for row in version.rows]
    predicted = iter(predictor.predictions(flat))
    values: dict[str, np.ndarray] = {}
    written: list[dict[str, Any]] = []
    for attribute in attributes:
        own = versions[attribute.name]
        if not own:
            continue
        p_MGC = np.array([[next(predicted) for _ in attribute.groups] for _ in own])
        values |= compared(attribute, own, p_MGC, label_N, positive)
        written += flips(attribute, own, p_MGC, names)
    swaps = [value for name, value in values.items() if name.startswith("flip_rate/")]
    changes = [value for name, value in values.items() if name.startswith("probability_change/")]
    values |= {"flip_rate": np.sum(swaps, 0), "probability_change": np.sum(changes, 0)}
    said = [f"{held.split} split, {len(rows):,} examples"]
    said += [f"{len(versions[a.name]):,} name one group of {a.name}" for a in attributes]
    said += [f"probability of class {names[positive]!r}", f"{setup.seq_len} tokens", setup.dtype]
    return Measured("identity swaps", ", ".join(said), with_intervals(values), written=written, values=values)


def positive_class(name: str, names: Sequence[str]) -> int:
    """Return the index of the class `name`, or of the last class if `name` is empty.

    Raises:
        RequestError: If there is no such class.
    """
    if name and name not in names:
        raise RequestError(f"identity_swaps.positive: the model has no class {name!r}{hint(name, list(names))}")
    return names.index(name) if name else len(names) - 1


def of_attribute(attribute: Attribute, rows: Sequence[Row]) -> list[Versions]:
    """Return the versions of each row that names exactly one group of the attribute.

    If a row has a pair of texts, the terms in both texts are replaced.
    """
    found = []
    for n, row in enumerate(rows):
        texts = {column: row[column] for column in TEXT_COLUMNS if column in row}
        named = attribute.named("\n".join(texts.values()))
        if len(named) != 1:
            continue
        versions = [
            row | {column: attribute.swapped(text, named[0], group) for column, text in texts.items()}
            if group != named[0]
            else row
            for group in attribute.groups
        ]
        found.append(Versions(n, attribute.groups.index(named[0]), versions))
    return found


def compared(
    attribute: Attribute, versions: Sequence[Versions], p_MGC: np.ndarray, label_N: np.ndarray, positive: int
) -> dict[str, np.ndarray]:
    """Return values per example for the metrics of one attribute, as numerators and denominators.

    Two metrics are over all swaps: the flip rate, and the mean absolute change of the probability of the class
    `positive`. Four metrics are per group: the mean of this probability, the accuracy, the true-positive rate and the
    false-positive rate. Each of these four also has a gap: its largest difference between two groups.

    Args:
        attribute: The attribute.
        versions: Versions of the M examples that name one group.
        p_MGC: Probabilities of the classes for each version.
        label_N: True class of all N examples.
        positive: Index of the class whose probability and rates are compared.
    """
    at_M, own_M = (np.array([v[k] for v in versions]) for k in (0, 1))
    M, G, _ = p_MGC.shape
    positive_MG, class_MG = p_MGC[..., positive], p_MGC.argmax(-1)
    before = np.arange(M), own_M
    flips_M = (class_MG != class_MG[before][:, None]).sum(1)
    change_M = np.abs(positive_MG - positive_MG[before][:, None]).sum(1)
    label_M = label_N[at_M]
    chosen_MG, truly_M1 = class_MG == positive, (label_M == positive)[:, None]
    rates: Mapping[str, tuple[np.ndarray, np.ndarray]] = {
        "probability": (positive_MG, np.ones((M, 1))),
        "accuracy": (class_MG == label_M[:, None], np.ones((M, 1))),
        "true_positive_rate": (chosen_MG & truly_M1, truly_M1),
        "false_positive_rate": (chosen_MG & ~truly_M1, ~truly_M1),
    }

    def placed(above: np.ndarray, below: np.ndarray) -> np.ndarray:
        parts = np.zeros((len(label_N), *above.shape[1:], 2))
        parts[at_M] = np.stack(np.broadcast_arrays(above, below), -1)
        return parts

    found = {
        f"flip_rate/{attribute.name}": placed(flips_M, np.full(M, G - 1)),
        f"probability_change/{attribute.name}": placed(change_M, np.full(M, G - 1)),
    }
    for name, (above_MG, below_M1) in rates.items():
        if below_M1.any():
            parts_NG2 = placed(above_MG, below_M1)
            found |= {f"{name}/{attribute.name}/{g}": parts_NG2[:, k] for k, g in enumerate(attribute.groups)}
            found[f"{name}_gap/{attribute.name}"] = parts_NG2
    return found


def flips(
    attribute: Attribute, versions: Sequence[Versions], p_MGC: np.ndarray, names: Sequence[str]
) -> list[dict[str, Any]]:
    """Return one record per swap that changes the prediction, with both texts and both predictions."""
    found = []
    for (_, own, rows), class_G in zip(versions, p_MGC.argmax(-1), strict=True):
        for k in np.flatnonzero(class_G != class_G[own]):
            texts = [{c: row[c] for c in TEXT_COLUMNS if c in row} for row in (rows[own], rows[k])]
            found.append(
                {"attribute": attribute.name, "group": attribute.groups[own], "swapped_group": attribute.groups[k]}
                | texts[0] | {f"swapped_{column}": text for column, text in texts[1].items()}
                | {"prediction": names[class_G[own]], "swapped_prediction": names[class_G[k]]}
            )  # fmt: skip
    return found
