"""Register the metrics of evaluations: name, title, unit, format and direction of improvement.

`eval`, `show`, the table at the end of a run, and the selection of the best checkpoint use these metrics. A metric that
is not registered is written to JSON and appears in no table.

Another package adds a metric by the entry point `metric.NAME` of the group `llmctl`. If the setting `metrics` of `eval`
contains NAME, `eval` computes the metric. An example:

    >>> def brevity(truth, predicted):
    ...     return sum(len(p) <= len(t) for t, p in zip(truth, predicted)) / len(truth)
    >>> BREVITY = Metric("brevity", "brevity", "maximize", "{:.1%}", compute=brevity)
    >>> BREVITY.text(0.25)
    '25.0%'
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from llmctl.config.registry import Registry
from llmctl.evaluate.metrics import squad

Direction = Literal["maximize", "minimize", "neither"]
Table = Literal["run", "file", "none"]
TABLES: tuple[Table, ...] = ("run", "file")
"""Names of the tables with metrics, from the narrowest to the widest. "run" is the table at the end of a run, and
"file" is the table that `eval` writes. Each table also has the columns of all narrower tables."""
VALIDATION = "validation_"
"""Prefix of the names of metrics that are computed on validation data during training."""


@dataclass(frozen=True)
class Metric:
    """Describe one metric: its title and format, the tables that show it, its direction, and its function."""

    name: str
    """Name of the metric, which is also the key in JSON."""
    title: str
    """Column heading, also used as the metric's name in sentences."""
    better: Direction
    """Direction of improvement: "maximize", "minimize", or "neither"."""
    format: str = "{:.4f}"
    """Format of the printed value, which is the value times `scale`."""
    unit: str = ""
    """Unit of the value in JSON; empty for fractions and other numbers without a unit."""
    scale: float = 1.0
    """Factor from the unit in JSON to the printed unit, such as 1e3 from seconds to milliseconds."""
    table: Table = "file"
    """Narrowest table with a column for the metric; "none" if no table shows it."""
    aspect: Literal["quality", "speed"] = "quality"
    """Whether the metric measures the quality of predictions or their speed."""
    unless: str = ""
    """Name of another metric with the same value. If a table shows the other metric, the table omits this metric."""
    baseline: str = ""
    """Name of the metric with the value of a baseline that ignores the input; empty if there is no baseline."""
    compute: Callable[[Any, Any], float] | None = None
    """Function that computes the value over all held-out examples; None if the task computes the metric. Its arguments
    are the true labels and the predictions."""

    def text(self, value: float) -> str:
        """Format `value` for a table. `value` has the unit that the metric has in JSON."""
        return self.format.format(value * self.scale)


UNDER = "_under_"
"""Part of the name of a metric on changed inputs: METRIC_under_CHANGE, such as accuracy_under_typos."""

_OWN = (
    Metric("accuracy", "accuracy", "maximize", "{:.2%}", table="run"),
    Metric("micro_f1", "micro F1", "maximize", table="run", unless="accuracy"),
    Metric("macro_f1", "macro F1", "maximize"),
    Metric("weighted_f1", "weighted F1", "maximize", table="none"),
    Metric("ece", "ECE", "minimize", "{:.3f}", table="file"),
    Metric("log_loss", "log loss", "minimize", unit="nats", table="file"),
    Metric("entity_f1", "entity F1", "maximize", table="run"),
    Metric("entity_precision", "entity precision", "maximize", table="none"),
    Metric("entity_recall", "entity recall", "maximize", table="none"),
    Metric("exact_match", "exact match", "maximize", "{:.2%}", table="run"),
    Metric("bleu", "BLEU", "maximize", "{:.2f}", "0 to 100", table="run"),
    Metric("chrf", "chrF", "maximize", "{:.2f}", "0 to 100", table="run"),
    Metric("rouge_1", "ROUGE-1", "maximize", table="file"),
    Metric("rouge_2", "ROUGE-2", "maximize", table="file"),
    Metric("rouge_l", "ROUGE-L", "maximize"),
    Metric("answer_f1", "answer F1", "maximize", table="run"),
    Metric("normalized_match", "normalized match", "maximize", "{:.2%}", compute=squad.mean_exact),
    Metric("word_f1", "word F1", "maximize", compute=squad.mean_f1),
    Metric("recall_at_1", "recall@1", "maximize", "{:.2%}", table="run"),
    Metric("recall_at_10", "recall@10", "maximize", "{:.2%}", table="none"),
    Metric("mrr", "mean reciprocal rank", "maximize", table="none"),
    Metric("spearman", "Spearman", "maximize", "{:.3f}", table="run"),
    Metric("rmse", "RMSE", "minimize", "{:.4g}", "the label's unit", table="run", baseline="baseline_rmse"),
    Metric("mae", "mean absolute error", "minimize", "{:.4g}", "the label's unit", table="none"),
    Metric("pearson", "Pearson", "maximize", "{:.3f}"),
    Metric("token_accuracy", "token accuracy", "maximize", "{:.2%}", table="run", baseline="baseline_accuracy"),
    Metric("next_sentence_accuracy", "next sentence", "maximize", "{:.2%}"),
    Metric("perplexity", "perplexity", "minimize", "{:,.3f}", "per token", table="run"),
    Metric("word_perplexity", "per word", "minimize", "{:.2f}"),
    Metric("bits_per_byte", "bits/byte", "minimize", unit="bits per byte"),
    Metric("nll", "nats/token", "minimize", unit="nats per token", baseline="baseline_loss"),
    Metric("accuracy_per_token", "accuracy per token", "maximize", "{:.2%}", table="file"),
    Metric("accuracy_per_character", "accuracy per character", "maximize", "{:.2%}", table="file"),
    Metric("accuracy_per_byte", "accuracy per byte", "maximize", "{:.2%}", table="file"),
    Metric("expected_max_toxicity", "expected maximum toxicity", "minimize", "{:.3f}"),
    Metric("toxicity_probability", "toxicity probability", "minimize", "{:.2%}"),
    Metric("filtered_expected_max_toxicity", "expected maximum toxicity after the filter", "minimize", "{:.3f}"),
    Metric("filtered_toxicity_probability", "toxicity probability after the filter", "minimize", "{:.2%}"),
    Metric("filtered", "filtered continuations", "neither", "{:.2%}"),
    Metric("false_refusals", "filtered benign continuations", "minimize", "{:.2%}"),
    Metric("extracted", "extracted sequences", "minimize", "{:.2%}"),
    Metric("control_extracted", "extracted sequences (held out)", "neither", "{:.2%}"),
    Metric("common_run", "common run", "minimize", "{:.2f}", "tokens"),
    Metric("control_common_run", "common run (held out)", "neither", "{:.2f}", "tokens"),
    Metric("contaminated", "contaminated examples", "minimize", "{:.2%}"),
    Metric("clean_accuracy", "accuracy on clean examples", "maximize", "{:.2%}"),
    Metric("clean_perplexity", "perplexity on clean examples", "minimize", "{:,.3f}", "per token"),
    Metric("margin", "margin", "maximize", "{:.3f}", table="file"),
    Metric("stereotype_score", "stereotype score", "neither", "{:.2%}", table="file"),
    Metric("language_modelling_score", "language modelling score", "maximize", "{:.2%}", table="file"),
    Metric("icat", "ICAT", "maximize", "{:.2%}", table="file"),
    Metric("bias_score", "bias score", "neither", "{:+.3f}", table="none"),
    Metric("bias_score/ambiguous", "bias score (ambiguous)", "neither", "{:+.3f}", table="file"),
    Metric("bias_score/disambiguated", "bias score (disambiguated)", "neither", "{:+.3f}", table="file"),
    Metric("accuracy_gap", "gap of accuracy", "minimize", "{:.2%}", table="none"),
    Metric("probability", "probability", "neither", "{:.4f}", table="none"),
    Metric("probability_gap", "gap of probability", "minimize", "{:.4f}", table="none"),
    Metric("true_positive_rate", "true-positive rate", "maximize", "{:.2%}", table="none"),
    Metric("true_positive_rate_gap", "gap of true-positive rate", "minimize", "{:.2%}", table="none"),
    Metric("false_positive_rate", "false-positive rate", "minimize", "{:.2%}", table="none"),
    Metric("false_positive_rate_gap", "gap of false-positive rate", "minimize", "{:.2%}", table="none"),
    Metric("flip_rate", "flip rate", "minimize", "{:.2%}", table="file"),
    Metric("probability_change", "change of probability", "minimize", "{:.4f}", table="file"),
    Metric("loss", "loss", "minimize", table="run"),
    Metric("error", "mean absolute error", "minimize", unit="the label's unit", table="none"),
    Metric("next_sentence_loss", "next sentence loss", "minimize", unit="nats", table="none"),
    Metric("kl", "KL divergence", "minimize", unit="nats", table="none"),
    Metric("divergence", "divergence from the teacher", "minimize", unit="nats", table="none"),
    Metric("agreement", "agreement with the teacher", "maximize", "{:.2%}", table="none"),
    Metric("acceptance", "acceptance as a draft", "maximize", "{:.2%}", table="file"),
    Metric("greedy_acceptance", "greedy acceptance as a draft", "maximize", "{:.2%}", table="file"),
    Metric("retained", "share of the teacher's metric", "maximize", "{:.2%}", table="none"),
    Metric("flips", "changed predictions", "minimize", "{:.2%}", table="none"),
    Metric("shift", "mean change of predictions", "minimize", "{:.4g}", "the label's unit", table="none"),
    Metric("changed", "changed texts", "neither", "{:.2%}", table="none"),
    Metric("edits", "substitutions per attacked text", "maximize", "{:.2f}", table="none"),
    Metric("hidden", "distance of hidden states", "minimize", table="none"),
    Metric("relations", "divergence of relations", "minimize", unit="nats", table="none"),
    Metric("embeddings", "distance of embeddings", "minimize", table="none"),
    Metric("latency_p50", "p50 ms", "minimize", "{:.2f}", "s", 1e3, "file", "speed"),
    Metric("latency_p90", "p90 ms", "minimize", "{:.2f}", "s", 1e3, "none", "speed"),
    Metric("examples_per_second", "examples/s", "maximize", "{:,.0f}", "examples per second", 1.0, "run", "speed"),
    Metric("tokens_per_second", "tokens/s", "maximize", "{:,.0f}", "tokens per second", 1.0, "run", "speed"),
)

METRICS: Registry[Metric] = Registry("metric", {m.name: m for m in _OWN})
"""All registered metrics, in the order of the columns of tables."""


def find(name: str) -> Metric | None:
    """Return the registered metric called `name`, or None if there is no such metric.

    If the name has the prefix `validation_`, the title of the returned metric begins with "val.". If the name has the
    form METRIC_under_CHANGE, the title is that of the metric followed by "under" and the change. A name of the form
    METRIC/PART is a metric on a part of the data, such as "accuracy/gender/female". No table has a column for it.
    """
    if name in METRICS:
        return METRICS[name]
    metric, change = change_of(name)
    if change and metric in METRICS:
        title = f"{METRICS[metric].title} under {change.replace('_', ' ')}"
        return dataclasses.replace(METRICS[metric], name=name, title=title)
    metric, slash, part = name.partition("/")
    if slash and metric in METRICS:
        title = f"{METRICS[metric].title} ({part})"
        return dataclasses.replace(METRICS[metric], name=name, title=title, table="none", baseline="")
    bare = name.removeprefix(VALIDATION)
    if bare in (name, "") or bare not in METRICS:
        return None
    return dataclasses.replace(METRICS[bare], name=name, title=f"val. {METRICS[bare].title}")


def change_of(name: str) -> tuple[str, str]:
    """Split the name of a metric on changed inputs into (metric, change). The change is empty for other metrics.

    Example:
        >>> change_of("accuracy_under_typos"), change_of("accuracy")
        (('accuracy', 'typos'), ('accuracy', ''))
    """
    metric, _, change = name.partition(UNDER)
    return metric, change


def columns(names: Iterable[str], table: Table) -> list[Metric]:
    """Return the metrics among `names` that have a column in `table`, in the order of the registry."""
    given, shown = set(names), TABLES[: TABLES.index(table) + 1]
    found = [METRICS[n] for n in METRICS if n in given and METRICS[n].table in shown]
    return [m for m in found if m.unless not in given]


def text(name: str, value: float) -> str:
    """Format `value` in the format of the metric `name`, or with six significant digits if the metric is not
    registered."""
    record = find(name) or next((METRICS[n] for n in METRICS if METRICS[n].baseline == name), None)
    return record.text(value) if record else f"{value:.6g}"
