"""Attack a classifier by substituting words by synonyms: the most important words first, or random words.

The search follows TextFooler (Jin et al., 2020, arXiv:1907.11932). The importance of a word is the drop of the true
class's probability when the word is removed. Words are replaced in the order of importance, by the first synonym that
changes the prediction. If no synonym changes the prediction, the synonym that lowers the true class's probability most
is used. A word is kept if no synonym lowers this probability. TextFooler takes candidates from word embeddings, and
filters them by part of speech and by the similarity of sentence embeddings. Here, the candidates of a word are its
synonyms in a list, the closest first (see `llmctl.evaluate.robustness.synonyms`).

Shapes: N texts, M rows to predict, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from llmctl.data.source import Row
from llmctl.evaluate.robustness.outcome import Outcome, budget
from llmctl.evaluate.robustness.perturbations import WORD, cased

UNCHANGED = 1e-6
"""Words whose importance has at most this magnitude are not substituted."""
Predict = Callable[[Sequence[Row]], np.ndarray]
"""Function from M rows with texts to the probabilities of the classes [M, C]."""


@dataclass(frozen=True)
class Place:
    """Describe one word with synonyms, and its range of characters in a column of a row."""

    column: str
    first: int
    last: int
    """Index of the word's last character + 1."""
    synonyms: tuple[str, ...]


@dataclass
class Text:
    """Store a row, its words that have synonyms, and the substitutions so far."""

    row: Row
    places: list[Place]
    words: int
    """Number of words of the row."""
    chosen: dict[int, str] = field(default_factory=dict)
    """Map from the index of a word in `places` to its substitute."""

    def changed(self, more: Mapping[int, str] | None = None) -> Row:
        """Return the row with the substitutions so far, and with further substitutions `more`.

        An empty substitute removes the word and a space before it.
        """
        chosen = self.chosen | dict(more or {})
        row = dict(self.row)
        for k in sorted(chosen, key=lambda k: -self.places[k].first):
            place, word = self.places[k], chosen[k]
            before, after = row[place.column][: place.first], row[place.column][place.last :]
            row[place.column] = (before if word else before.removesuffix(" ")) + word + after
        return row


def text_of(row: Row, columns: Sequence[str], synonyms: Mapping[str, Sequence[str]]) -> Text:
    """Return a row with its words that have synonyms.

    Example:
        >>> text_of({"text": "A Big dog"}, ("text",), {"big": ["large"]}).changed({0: "Large"})
        {'text': 'A Large dog'}
    """
    places, words = [], 0
    for column in (column for column in columns if column in row):
        for match in WORD.finditer(row[column]):
            word, words = match.group(), words + 1
            if others := synonyms.get(word.lower()):
                places.append(Place(column, *match.span(), tuple(cased(other, word) for other in others)))
    return Text(row, places, words)


class WordAttack:
    """Attack the texts of a classifier by substituting words. Each step predicts the changed rows of all texts in one
    call."""

    def __init__(
        self, texts: Sequence[Text], label_N: np.ndarray, predict: Predict, fraction: float, seed: int
    ) -> None:
        """Prepare attacks.

        Args:
            texts: The texts, without substitutions.
            label_N: True classes.
            predict: Function that predicts.
            fraction: Maximum number of substitutions, as a fraction of the words.
            seed: Seed of random substitutions.
        """
        self._texts, self._label_N, self._predict, self._seed = texts, label_N, predict, seed
        budgets = [min(budget(fraction, text.words), len(text.places)) for text in texts]
        self.budget_N = np.array(budgets, np.int64)

    def textfooler(self, right_N: np.ndarray) -> tuple[Outcome, list[Row]]:
        """Substitute words in the order of their importance.

        Returns:
            The outcome, and the rows after the attack.
        """
        outcome, texts = Outcome.before(right_N, self.budget_N), self._fresh()
        rows = [int(i) for i in outcome.active()]
        orders = dict(zip(rows, self._important(rows), strict=True))
        sure = dict(zip(rows, self._true(rows, [texts[i].row for i in rows]), strict=True)) if rows else {}
        for step in range(max((len(order) for order in orders.values()), default=0)):
            outcome.give_up(np.array([i for i in outcome.active() if step >= len(orders[i])], np.int64))
            if not len(rows := [int(i) for i in outcome.active()]):
                break
            owners = [(i, orders[i][step], word) for i in rows for word in texts[i].places[orders[i][step]].synonyms]
            p_MC = self._predict([texts[i].changed({place: word}) for i, place, word in owners])
            first = 0
            for i in rows:
                mine = owners[first : first + len(texts[i].places[orders[i][step]].synonyms)]
                p_KC, first = p_MC[first : first + len(mine)], first + len(mine)
                wrong = np.flatnonzero(p_KC.argmax(-1) != self._label_N[i])
                true_K = p_KC[:, self._label_N[i]]
                best = int(wrong[0]) if len(wrong) else int(true_K.argmin())
                if not len(wrong) and true_K[best] >= sure[i]:
                    continue
                texts[i].chosen[mine[best][1]] = mine[best][2]
                sure[i] = true_K[best]
                outcome.edits_N[i] += 1
                outcome.right_N[i] = not len(wrong)
        return outcome, [text.changed() for text in texts]

    def random(self, right_N: np.ndarray) -> tuple[Outcome, list[Row]]:
        """Substitute random words by random synonyms, until predictions are wrong or budgets are used up.

        Returns:
            The outcome, and the rows after the attack. Each text has its own random numbers.
        """
        outcome, texts = Outcome.before(right_N, self.budget_N), self._fresh()
        generators = [np.random.default_rng((self._seed, i)) for i in range(len(texts))]
        orders = [rng.permutation(len(text.places)) for rng, text in zip(generators, texts, strict=True)]
        while len(rows := [int(i) for i in outcome.active()]):
            for i in rows:
                place = int(orders[i][outcome.edits_N[i]])
                texts[i].chosen[place] = str(generators[i].choice(texts[i].places[place].synonyms))
                outcome.edits_N[i] += 1
            p_MC = self._predict([texts[i].changed() for i in rows])
            outcome.right_N[rows] = p_MC.argmax(-1) == self._label_N[rows]
        return outcome, [text.changed() for text in texts]

    def _fresh(self) -> list[Text]:
        return [Text(text.row, text.places, text.words) for text in self._texts]

    def _true(self, rows: Sequence[int], texts: Sequence[Row]) -> np.ndarray:
        """Return the probability of the true class of each text."""
        return self._predict(texts)[np.arange(len(rows)), self._label_N[list(rows)]]

    def _important(self, rows: Sequence[int]) -> list[list[int]]:
        """Return, for each text, indices into `places`, the most important word first.

        The importance is the drop of the true class's probability. If the prediction changes, the rise of the new
        class's probability is added. Words whose removal changes nothing, such as words that truncation removes, are
        omitted.
        """
        texts = [self._texts[i] for i in rows]
        p_NC = self._predict([text.row for text in texts]) if texts else np.zeros((0, 1))
        queries = [text.changed({k: ""}) for text in texts for k in range(len(text.places))]
        p_MC = self._predict(queries) if queries else np.zeros((0, 1))
        found, at = [], 0
        for i, text, before_C in zip(rows, texts, p_NC, strict=True):
            after_KC, at = p_MC[at : at + len(text.places)], at + len(text.places)
            label, new_K = self._label_N[i], after_KC.argmax(-1)
            score_K = before_C[label] - after_KC[:, label]
            score_K = score_K + (new_K != label) * (after_KC[np.arange(len(new_K)), new_K] - before_C[new_K])
            found.append([int(k) for k in np.argsort(-score_K, kind="stable") if abs(score_K[k]) > UNCHANGED])
        return found
