"""Entities, answers and neighbours: scores worked out by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from llmctl.distributed import context_parallel
from llmctl.evaluate.metrics import entities, squad
from llmctl.evaluate.metrics import entity_counts as counted
from llmctl.evaluate.tasks import embed, span
from llmctl.model import chunked_loss


def test_what_begins_and_ends_an_entity():
    def found(tags):
        return sorted(entities.entities(tags.split()))

    assert found("O B-P I-P O B-L") == [("L", 4, 4), ("P", 1, 2)]
    assert found("B-P B-P I-P I-P") == [("P", 0, 0), ("P", 1, 3)]
    assert found("O I-P I-P") == [("P", 1, 2)]  # the lenient reading: I after O begins one
    assert found("B-P I-L I-L") == [("L", 1, 2), ("P", 0, 0)]
    assert found("S-P B-P I-P E-P I-P") == [("P", 0, 0), ("P", 1, 3), ("P", 4, 4)]
    assert found("O O") == found("") == []


def test_entity_scores_by_hand():
    truth = [["B-P", "I-P", "O", "B-L"], ["B-P", "O"], ["B-M", "I-M"]]
    said = [["B-P", "I-P", "O", "B-P"], ["O", "B-P"], ["B-M", "O"]]
    # there: P(0,1) L(3) | P(0) | M(0,1); named: P(0,1) P(3) | P(1) | M(0); right: P(0,1)
    got = entities.scores(truth, said)
    assert got["entity_precision"] == 1 / 4 and got["entity_recall"] == 1 / 4 and got["entity_f1"] == 1 / 4
    assert got["per_entity"]["P"] == {"precision": 1 / 3, "recall": 1 / 2, "f1": 2 / 5, "support": 2}
    assert got["per_entity"]["L"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 1}
    assert got["entities"] == 4
    assert entities.is_scheme(["O", "B-P", "I-P"]) and not entities.is_scheme(["NOUN", "O"])
    assert not entities.is_scheme(["O"]) and not entities.is_scheme(["B", "O"])


def test_bilou_and_bmes_mark_what_iobes_marks():
    """Worked out by hand: L ends as E does, U and W stand alone as S does, M is inside as I is."""

    def found(tags):
        return sorted(entities.entities(tags.split()))

    assert found("B-P L-P U-P I-P") == [("P", 0, 1), ("P", 2, 2), ("P", 3, 3)]
    assert found("O B-P I-P L-P B-P U-L O") == [("L", 5, 5), ("P", 1, 3), ("P", 4, 4)]
    assert found("B-P M-P M-P E-P S-P M-L") == [("L", 5, 5), ("P", 0, 3), ("P", 4, 4)]
    assert found("B-P E-P W-P") == [("P", 0, 1), ("P", 2, 2)]
    assert found("B E S B M E") == [("entity", 0, 1), ("entity", 2, 2), ("entity", 3, 5)]  # words of Chinese
    # there: P(0,1) P(2); named: P(0,1) P(2,3); right: P(0,1)
    got = entities.scores([["B-P", "L-P", "U-P", "O"]], [["B-P", "L-P", "B-P", "L-P"]])
    assert (got["entity_precision"], got["entity_recall"], got["entity_f1"]) == (1 / 2, 1 / 2, 1 / 2)
    for labels in ("B-P I-P L-P U-P O", "B-P M-P E-P S-P O", "B-P M-P E-P W-P O", "B M E S", "B I O"):
        assert entities.is_scheme(labels.split()), labels
    for labels in ("B-P L-P E-P O", "N V A", "B O", "B- O", "B I-P O", "X-P O"):
        assert not entities.is_scheme(labels.split()), labels
    assert np.array_equal(entities.marks(["O", "B-P", "L-P", "U-P", "I-P"])[:, 0], [0, 1, 3, 4, 2])


def test_answers_are_compared_as_squad_compares_them():
    assert squad.normal("  The Cat's an  (old) Hat! ") == "cats old hat"
    assert squad.exact("The cat", ["dog", "cat."]) == 1 and squad.exact("cats", ["cat"]) == 0
    # {big, red, cat} and {red, cat, cat}: 2 in common
    assert squad.f1("a big red cat", ["red cat cat"]) == pytest.approx(2 * 2 / 6)
    assert squad.f1("the red", ["blue", "red fox"]) == pytest.approx(2 / 3)
    assert squad.exact("", []) == squad.f1("", []) == 1 and squad.exact("x", []) == squad.f1("x", []) == 0
    assert squad.f1("the", ["cat"]) == 0


def test_the_best_span_is_legal():
    among = np.array([[1, 0, 1, 1, 1, 0]])
    batch = {"among": among, "first": np.array([[0, 0, 0, 5, 10, 0]]), "last": np.array([[0, 0, 4, 9, 14, 0]])}
    batch = {k: jnp.asarray(v) for k, v in batch.items()}

    def best(start, end, **more):
        logits = jnp.stack([jnp.asarray([start]), jnp.asarray([end])], -1).astype(jnp.float32)
        return [float(a[0]) for a in span.best_span(logits, batch | more)]

    # the largest start (token 4) is after the largest end (token 2): 3 to 4 is the best that is legal
    assert best([1, 9, 0, 2, 3, 9], [1, 9, 5, 0, 4, 9]) == [7, 10, 14, 2]
    assert best([0, 0, 0, 5, 2, 0], [0, 0, 5, 0, 4, 0]) == [9, 5, 14, 0]
    # 2 to 4 would be best and is longer than 200 characters; then 3 to 4 (2 + 4)
    far = jnp.asarray([[0, 0, 4, 209, 214, 0]])
    assert best([0, 0, 5, 2, 0, 0], [0, 0, 0, 0, 4, 0], last=far, first=jnp.asarray([[0, 0, 0, 205, 210, 0]])) == [
        6, 205, 214, 0,
    ]  # fmt: skip


def test_ranks_by_hand():
    texts = np.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    candidates = np.array([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    # similarities: [1, .8, 0], [0, .6, 1], [.6, .96, .8]
    rank = embed.ranks(texts, candidates, np.array([0, 1, 2]))
    assert rank.tolist() == [1, 2, 2]
    got = embed.scores(rank, 3)
    assert got["recall_at_1"] == pytest.approx(1 / 3) and got["mrr"] == pytest.approx(2 / 3) and got["candidates"] == 3
    # what is everywhere the same finds nothing
    assert embed.ranks(np.ones((2, 2)), np.ones((4, 2)), np.array([0, 3])).tolist() == [4, 4]


@pytest.mark.parametrize(
    "labels",
    [
        ["O", "B-P", "I-P", "B-L", "I-L"],
        ["O", "B-X", "I-X", "E-X", "S-X", "I-Y"],
        ["O", "B-X", "I-X", "L-X", "U-X", "I-Y"],
    ],
)
def test_entities_counted_on_devices_are_those_of_words(labels):
    rng = np.random.default_rng(0)
    truth_BT, said_BT = rng.integers(0, len(labels), (2, 64, 12))
    said_BT = np.where(rng.random(said_BT.shape) < 0.7, truth_BT, said_BT)
    weights_BT = (rng.random(truth_BT.shape) < 0.8).astype(np.float32)
    weights_BT[0], weights_BT[1] = 0, 1  # a row that only fills, a row full of words
    expected = entities.scores(
        *(
            [[labels[i] for i in row[w > 0]] for row, w in zip(side, weights_BT, strict=True)]
            for side in (truth_BT, said_BT)
        )
    )
    marks = entities.marks(labels)
    half = [counted.sums(marks, truth_BT[b], said_BT[b], weights_BT[b]) for b in (slice(40), slice(40, None))]
    found = chunked_loss.means({k: half[0][k] + half[1][k] for k in half[0]} | {"weight": 1.0})
    assert 0.2 < expected["entity_f1"] < 0.8
    # devices that share sequences have them in another order
    order_T = context_parallel.order(12, 2)
    moved = counted.sums(
        marks, truth_BT[:, order_T], said_BT[:, order_T], weights_BT[:, order_T], np.tile(order_T, (64, 1))
    )
    assert moved == {k: half[0][k] + half[1][k] for k in half[0]}
    np.testing.assert_allclose(found["entity_f1"], expected["entity_f1"], rtol=1e-6)
    assert entities.marks(["noun", "verb"]) is None
