"""Metrics on resamples against the metrics' own functions on repeated examples."""

import numpy as np
import pytest

from llmctl.evaluate.metrics import classification, generation, regression
from llmctl.evaluate.metrics import resampling as R
from llmctl.evaluate.tasks import multilabel

N = 40


@pytest.fixture(scope="module")
def counts():
    found = np.concatenate(list(R.resamples(N, 30, seed=3)))
    assert found.shape == (30, N) and (found.sum(1) == N).all()
    return found


def on_each(counts_RN, score):
    """The metric of each resample, whose examples are repeated."""
    return [score(np.repeat(np.arange(N), count_N.astype(int))) for count_N in counts_RN]


def test_classes(counts):
    rng = np.random.default_rng(0)
    label, prediction = rng.choice(5, (2, N), p=[0.5, 0.3, 0.15, 0.03, 0.02])
    found = R.estimators({"label": label, "prediction": prediction, "accuracy": label == prediction})

    def scored(i):
        return classification.scores(classification.confusion_matrix(label[i], prediction[i], 5), list("abcde"))

    for name in ("accuracy", "macro_f1", "weighted_f1"):
        np.testing.assert_allclose(found[name](counts), on_each(counts, lambda i, n=name: scored(i)[n]), rtol=1e-12)


def test_sets_of_classes(counts):
    label, prediction = np.random.default_rng(1).random((2, N, 3)) < 0.3
    both, hits = (label.astype(int) + prediction).sum(1), (label & prediction).sum(1)
    found = R.estimators({"label": label, "prediction": prediction, "micro_f1": np.stack([2 * hits, both], axis=1)})
    for name in ("micro_f1", "macro_f1"):
        wanted = on_each(counts, lambda i, n=name: multilabel.scores(label[i], prediction[i], ["a", "b", "c"])[n])
        np.testing.assert_allclose(found[name](counts), wanted, rtol=1e-12)


@pytest.mark.parametrize("name", ["rmse", "mae", "pearson", "spearman"])
def test_numbers_with_ties(counts, name):
    label, prediction = np.random.default_rng(2).integers(0, 8, (2, N)) / 4 + 1000
    found = R.estimators({"label": label, "prediction": prediction})[name](counts)
    wanted = on_each(counts, lambda i: regression.scores(label[i], prediction[i])[name])
    np.testing.assert_allclose(found, wanted, rtol=1e-9)


def test_perplexity_is_weighted_by_tokens():
    values = {"document_nll": np.array([3.0, 1.0]), "document_tokens": np.array([1, 3]), "document_bytes": [4, 4]}
    found = R.estimators(values)
    counts = np.array([[1.0, 1.0], [0.0, 2.0]])
    np.testing.assert_allclose(found["perplexity"](counts), np.exp([1.0, 1 / 3]))
    np.testing.assert_allclose(found["bits_per_byte"](counts), np.array([0.5, 0.25]) / np.log(2))
    assert "word_perplexity" not in found


def test_generated_texts_against_sacrebleu_and_rouge(counts):
    rng = np.random.default_rng(4)
    words = np.array(["a", "cat", "sat", "on", "the", "mat", "dog", "ran", "off", "quickly"])
    references = [" ".join(rng.choice(words, rng.integers(1, 12))) for _ in range(N)]
    predictions = [r if n % 3 == 0 else " ".join(rng.choice(words, n % 7)) for n, r in enumerate(references)]
    found = R.estimators(generation.values(references, predictions))
    # Few examples of short texts: without equal 4-grams, BLEU is smoothed.
    few = np.zeros((1, N))
    few[0, [1, 4, 5]] = 1
    for counts_RN in (counts[:4], few):
        scored = on_each(
            counts_RN, lambda i: generation.scores([references[n] for n in i], [predictions[n] for n in i])
        )
        for name in ("bleu", "chrf", "rouge_1", "rouge_l", "exact_match"):
            np.testing.assert_allclose(found[name](counts_RN), [s[name] for s in scored], rtol=1e-9)


def test_chunks_do_not_change_the_resamples(monkeypatch):
    whole = np.concatenate(list(R.resamples(7, 20, seed=-1)))
    monkeypatch.setattr(R, "CHUNK", 21)
    np.testing.assert_array_equal(np.concatenate(list(R.resamples(7, 20, seed=-1))), whole)
