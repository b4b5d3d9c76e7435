"""Compare a distilled student with its teachers on the validation rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from llmctl.evaluate.metrics.base import METRICS
from llmctl.model import functional
from llmctl.train import fake_quantize
from llmctl.train.distill_settings import reads_teacher
from llmctl.train.validation import Validation

if TYPE_CHECKING:
    from llmctl.artifacts.artifact import Artifact
    from llmctl.model.losses import Sums
    from llmctl.train.learner import Learner


def compared(
    config: Any,
    learner: Learner,
    teachers: Sequence[Artifact],
    params: dict[str, Any],
    held_out: Validation,
    stored: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Return metrics that compare the student with its teachers on the validation rows of training.

    NAME is the metric that selects the best parameters. If lower values of this metric are better, NAME is "accuracy".

    - "validation_agreement": fraction of the student's predictions that equal the prediction from the teachers' mean
      output
    - "validation_acceptance": probability that the teacher accepts a token of the student in speculative decoding. This
      metric exists only for decoders with a single teacher, and only without a cache
    - "teacher_NAME": value of the metric NAME for the best teacher
    - "validation_retained": the student's value of NAME, divided by "teacher_NAME"

    Metrics that the task does not define are omitted. If the student was trained for a quantization format, the rounded
    student is compared, as in the other validation metrics.

    Args:
      config: config of the stage `distill`.
      learner: the student.
      teachers: the teachers.
      params: parameters of the student, before rounding.
      held_out: validation of the student.
      stored: metrics of the teachers, if a cache stores them. The validation rows then contain the teachers' outputs,
        and the arrays of `teachers` are not read.
    """
    task, dtype = learner.task, jnp.dtype(config.train.dtype)
    read = teachers if stored is None else ()
    configs = [learner.model, *(t.model for t in read)]
    if config.fake_quantize.active:
        params = jax.jit(partial(fake_quantize.rounded, config.fake_quantize))(params)

    def same(models: dict[str, Any], batch: dict[str, Any]) -> tuple[None, Sums]:
        batch, each = task.model_inputs(batch), zip(configs, models["all"], strict=True)
        networks = [(cfg, own, functional.hidden(cfg, own, batch, dtype=dtype)) for cfg, own in each]
        if stored is not None:
            return None, task.taught_agreement(networks[0], batch, dtype)
        return None, task.agreement(networks[0], networks[1:], batch, dtype)

    found = _validation(config, same, held_out)({"all": [params, *(t.params for t in read)]})
    metrics = {f"validation_{name}": value for name, value in found.items()}
    name, student = metric(learner), held_out(params)
    if name not in student:
        return metrics
    best = (judged(config, learner, teachers, held_out) if stored is None else stored)[name]
    metrics[f"teacher_{name}"] = best
    return metrics | ({"validation_retained": student[name] / best} if best > 0 else {})


def metric(learner: Learner) -> str:
    """Return the name of the metric by which a student is compared with its teachers. Higher values are better."""
    name = learner.task.best(learner.labels)
    return name if METRICS[name].better == "maximize" else "accuracy"


def judged(config: Any, learner: Learner, teachers: Sequence[Artifact], held_out: Validation) -> dict[str, float]:
    """Return {name of the metric: value for the best teacher}. If the task does not define this metric, return {}."""
    task, name, dtype = learner.task, metric(learner), jnp.dtype(config.train.dtype)
    judges = [task.loss_of(t.model, dtype=dtype, labels=learner.labels) for t in teachers]
    each = [_validation(config, judge, held_out)(t.params) for judge, t in zip(judges, teachers, strict=True)]
    return {name: max(found[name] for found in each)} if name in each[0] else {}


def _validation(config: Any, loss: Any, held_out: Validation) -> Validation:
    """Return a Validation that computes the metrics of `loss` on the rows of `held_out`."""
    train = config.train
    return Validation(loss, held_out.rows, train.batch_size, train.eval_batches, held_out.mesh)


def spent(config: Any, teachers: Sequence[Artifact], metrics: Mapping[str, Any], cached: int | None) -> dict[str, Any]:
    """Return {"teacher_tokens": number of tokens that the teachers read for training or generated}.

    Tokens of validation rows do not count. If the number is not known, return {}.

    Args:
      config: config of the stage `distill`.
      teachers: the teachers.
      metrics: metrics of the training: "tokens" that the student was trained on, and "answer_tokens" that the teacher
        generated.
      cached: number of tokens of the training rows in the cache. These tokens are read once for all students.

    >>> from types import SimpleNamespace
    >>> online = SimpleNamespace(mode="teacher_forced", cache="", signals=None)
    >>> spent(online, ["one", "two"], {"tokens": 1000}, None)
    {'teacher_tokens': 2000}
    """
    read = 0 if not reads_teacher(config) else cached if config.cache else metrics.get("tokens")
    return {} if read is None else {"teacher_tokens": metrics.get("answer_tokens", 0) + len(teachers) * read}


def tokens_line(metrics: Mapping[str, Any]) -> str:
    """Format the numbers of tokens as a log line; "" if the tokens of the training were not counted.

    >>> tokens_line({"tokens": 1000, "teacher_tokens": 2000})
    'trained on 1,000 tokens; the teacher read or generated 2,000 tokens'
    """
    parts = [f"trained on {metrics['tokens']:,} tokens"] if "tokens" in metrics else []
    if "teacher_tokens" in metrics:
        parts.append(f"the teacher read or generated {metrics['teacher_tokens']:,} tokens")
    return "; ".join(parts)


def sentence(metrics: dict[str, Any]) -> str:
    """Format the metrics that `compared` returns as a log line; "" if there are no such metrics.

    >>> sentence({"validation_agreement": 0.951, "validation_retained": 0.978, "teacher_accuracy": 0.93})
    "agrees with the teacher on 95.1% of the validation predictions; keeps 97.8% of the teacher's accuracy of 93.0%"
    """
    parts = []
    if "validation_agreement" in metrics:
        parts.append(f"agrees with the teacher on {metrics['validation_agreement']:.1%} of the validation predictions")
    if "validation_acceptance" in metrics:
        parts.append(f"as a draft, the teacher accepts {metrics['validation_acceptance']:.1%} of its sampled tokens")
    if "validation_retained" in metrics:
        name = next(n for n in metrics if n.startswith("teacher_"))
        title = METRICS[name.removeprefix("teacher_")].title
        parts.append(f"keeps {metrics['validation_retained']:.1%} of the teacher's {title} of {metrics[name]:.1%}")
    return "; ".join(parts)
