"""Measure a yardstick on the examples of an evaluation: logistic regression on TF-IDF features (scikit-learn).

The yardstick is trained on the train split and measured like an artifact. A classifier that is less accurate than the
yardstick is not worth its cost. The terms are words and pairs of words, or 1 to 3 characters.

    yardstick.check(config, tasks)
    scored = yardstick.measure(config, splits, before)

Shapes: N examples, C classes.
"""

from __future__ import annotations

import hashlib
import importlib.util
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from llmctl.config.errors import RequestError
from llmctl.data.splits import Examples, Splits
from llmctl.evaluate import runner, stored
from llmctl.evaluate.report import YARDSTICK
from llmctl.evaluate.settings import MeasureConfig
from llmctl.evaluate.setup import Measured
from llmctl.evaluate.stored import Scored, Stored
from llmctl.evaluate.tasks import classify
from llmctl.evaluate.tasks.base import Task

TERMS: dict[str, dict[str, Any]] = {
    "words": {"ngram_range": (1, 2)},
    "characters": {"analyzer": "char", "ngram_range": (1, 3)},
}
"""Options of scikit-learn's TfidfVectorizer, by value of the setting `yardstick`."""
INVERSE_PENALTY = 30.0
"""Inverse strength of the L2 penalty. TF-IDF vectors have length 1, so weak penalties are best (Wang and Manning,
2012)."""
RARE_FROM = 1000
"""Minimum number of training texts. With at least this number, terms that occur in only one text are ignored."""


class TfidfClassifier:
    """Classify texts by logistic regression on TF-IDF features, one set of features per text column.

    All trained numbers are rounded to float32, the dtype of the artifacts.
    """

    def __init__(self, terms: str, examples: Examples) -> None:
        """Fit the TF-IDF features and the logistic regression to the examples.

        Raises:
            RequestError: If the texts have no terms, or the labels have fewer than two classes.
        """
        from scipy.sparse import hstack
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression

        self.columns = [c for c in ("text", "pair") if c in examples.columns]
        self.classes = len(examples.classes)
        lowest = 2 if len(examples) >= RARE_FROM else 1
        self.vectorizers = [TfidfVectorizer(min_df=lowest, sublinear_tf=True, **TERMS[terms]) for _ in self.columns]
        try:
            pairs = zip(self.vectorizers, self.columns, strict=True)
            features = hstack([v.fit_transform(examples.texts(c)) for v, c in pairs], format="csr")
            self.regression = LogisticRegression(C=INVERSE_PENALTY, max_iter=300).fit(features, examples.labels)
        except ValueError as e:
            raise RequestError(f"yardstick: cannot be trained on the train split: {e}") from None
        for vectorizer in self.vectorizers:
            vectorizer.idf_ = vectorizer.idf_.astype(np.float32)
        for name in ("coef_", "intercept_"):
            setattr(self.regression, name, getattr(self.regression, name).astype(np.float32))

    def _features(self, texts: Sequence[Sequence[str]]) -> Any:
        from scipy.sparse import hstack

        return hstack([v.transform(own) for v, own in zip(self.vectorizers, texts, strict=True)], format="csr")

    def logits(self, texts: Sequence[Sequence[str]]) -> np.ndarray:
        """Return the logits of texts, float64 [N, C]. `texts` has one sequence [N] per column in `columns`."""
        found = self.regression.decision_function(self._features(texts))
        logits_NC = np.full((len(found), self.classes), -np.inf)  # a class without training examples is impossible
        logits_NC[:, self.regression.classes_] = found if found.ndim == 2 else np.stack([0 * found, found], axis=1)
        return logits_NC

    @property
    def arrays(self) -> list[np.ndarray]:
        """Return all trained numbers: coefficients, intercepts, and the inverse document frequency of each term."""
        return [self.regression.coef_, self.regression.intercept_, *(v.idf_ for v in self.vectorizers)]


def check(config: MeasureConfig, tasks: Iterable[Task]) -> None:
    """Check that the yardstick can be measured.

    Args:
        config: Settings of the evaluation.
        tasks: Tasks on which the artifacts are measured with the data of the evaluation.

    Raises:
        RequestError: If no artifact is a classifier, if the evaluation reads the train split, or if scikit-learn is not
            installed.
    """
    if not any(isinstance(task, classify.Classify) and task.label_type == "class" for task in tasks):
        raise RequestError("yardstick: classifies texts, and no artifact is measured on the task classify")
    if config.split == "train":
        raise RequestError("yardstick: is trained on the train split; measure on another split")
    if importlib.util.find_spec("sklearn") is None:
        raise RequestError("yardstick: needs scikit-learn: pip install 'llmctl[demo]'")


def measure(config: MeasureConfig, data: Splits, held: Examples, before: Stored) -> Scored:
    """Train the yardstick on the train split, and measure it on held-out examples.

    Args:
        config: Settings of the evaluation.
        data: The splits of the data.
        held: Held-out examples.
        before: Earlier results. If one of them is the same measurement, it is returned.

    Returns:
        A result with the fields of an artifact's result. Its bytes are those of the trained numbers in float32. They do
        not include the terms, as an artifact's bytes do not include the tokenizer. Its times include the computation of
        features from texts.
    """
    from sklearn import __version__ as version

    train = data["train"]
    parts = [(e.digest, e.columns, e.classes, np.asarray(e.labels).tolist()) for e in (train, held)]
    about = [config.yardstick, TERMS[config.yardstick], INVERSE_PENALTY, version, config.split, list(config.metrics)]
    definition = stored.digest(YARDSTICK, *about, *parts)
    content = hashlib.sha256(definition.encode()).hexdigest()
    timing = {"timed_on": "1 x cpu", "timed_batch": config.batch_size, "timed_rounds": config.repeats}
    timing = timing if config.speed else {}
    if earlier := before.find(content, definition, timing, values=True):
        return earlier
    model = TfidfClassifier(config.yardstick, train)
    texts = [list(held.texts(c)) for c in model.columns]
    found = classify.scores(held, held.classes, np.asarray(held.labels), model.logits(texts))
    numbers = np.concatenate([a.ravel() for a in model.arrays])
    some = [(own * -(-config.batch_size // len(own)))[: config.batch_size] for own in texts]
    first = [own[:1] for own in texts]
    terms = "words and pairs of words" if config.yardstick == "words" else "1 to 3 characters"
    protocol = f"{config.split} split, {len(held)} examples, complete texts, logistic regression on TF-IDF of {terms}"
    measured = Measured(
        classify.TASK.title,
        f"{protocol}, trained on {len(train)} examples, timed from text",
        found.metrics,
        lambda: model.logits(first),
        lambda: model.logits(some),
        {"examples_per_second": config.batch_size},
        found.answers,
        values=found.values,
    )
    result = {
        "artifact": YARDSTICK, "digest": content, "content": content, "stage": YARDSTICK, "family": "tf-idf",
        "parameters": numbers.size, "weight_bytes": numbers.nbytes, "bytes": len(zlib.compress(numbers.tobytes())),
        "sparsity": float(np.mean(numbers == 0)), "bits": 32.0, "task": measured.task, "protocol": measured.protocol,
        "metrics": measured.metrics | runner.further(config.metrics, measured),
        "definition": definition, "record": classify.TASK.name, **timing,
    }  # fmt: skip
    if config.speed:
        runner.add_times([(measured, result)], config)
    records = [{"artifact": YARDSTICK, "task": result["record"], **record} for record in found.records or ()]
    return Scored(result, records, found.values)
