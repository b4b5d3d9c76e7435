"""Measure the accuracy of a classifier under attack and, for comparison, under random substitutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from llmctl.artifacts.artifact import Artifact
from llmctl.data.source import Row
from llmctl.data.tokenizers import loading as tokenizers
from llmctl.evaluate.metrics.base import UNDER
from llmctl.evaluate.predict import Predictor
from llmctl.evaluate.robustness import summary, synonyms
from llmctl.evaluate.robustness.outcome import Outcome
from llmctl.evaluate.robustness.settings import AttackConfig
from llmctl.evaluate.robustness.token_attack import TokenAttack
from llmctl.evaluate.robustness.word_attack import WordAttack, text_of
from llmctl.evaluate.setup import Held, Measured, Setup
from llmctl.evaluate.tasks.registry import of

Attacked = tuple[str, Outcome, Sequence[Row]]
"""Name of an attack, its outcome, and the texts after the attack."""


def measure(artifact: Artifact, held: Held, setup: Setup, settings: AttackConfig) -> Measured:
    """Attack a sample of the examples, and measure the accuracy and the mean number of substitutions.

    Examples that the classifier gets wrong are not attacked.
    """
    task, held = of(artifact.manifest), held.sample(settings.examples)
    task.check_examples(artifact, held.examples)
    step = task.scorer(artifact.model, setup.dtype)
    rows, scores = task.scored(artifact, held.examples, setup, task.measuring_step(artifact.model, setup.dtype))
    label_N, right_N = scores.values["label"], np.asarray(scores.values["accuracy"], bool)
    values: dict[str, np.ndarray] = {"accuracy": right_N}
    written: list[dict[str, Any]] = []
    attacks: list[Attacked] = []
    if "hotflip" in settings.methods:
        attacks += _on_tokens(TokenAttack(artifact, task, rows, label_N, setup, settings), step, artifact, right_N)
    if "textfooler" in settings.methods:
        known = synonyms.read(settings.synonyms)
        texts = [text_of(row, task.perturbs, known) for row in held.examples]
        predictor = Predictor(
            artifact, setup.batch_size, setup.seq_len, setup.dtype, truncate=setup.truncate, mesh=setup.mesh
        )
        attack = WordAttack(
            texts, label_N, lambda queries: np.stack(predictor.predictions(queries)), settings.budget, settings.seed
        )
        attacks += [("textfooler", *attack.textfooler(right_N)), ("random_words", *attack.random(right_N))]
    labels = artifact.manifest.labels
    for name, outcome, after in attacks:
        values[f"accuracy{UNDER}{name}"] = outcome.right_N
        values[f"edits{UNDER}{name}"] = np.stack([outcome.edits_N, right_N], axis=1)
        for i in np.flatnonzero(right_N & ~outcome.right_N)[: settings.records]:
            row = held.examples.source.where(int(held.examples.index[i]))
            about = {"row": row, "attack": name, "edits": int(outcome.edits_N[i]), "label": labels[int(label_N[i])]}
            written.append(about | {column: after[i][column] for column in task.perturbs if column in after[i]})
    protocol = f"{task.protocol(artifact, held, setup, rows, scores.metrics)}, {_budget(settings)}"
    return Measured("attack", protocol, summary.with_intervals(values, settings.seed), written=written, values=values)


def _on_tokens(attack: TokenAttack, step: Any, artifact: Artifact, right_N: np.ndarray) -> list[Attacked]:
    """Attack a classifier by HotFlip and, for comparison, by random tokens."""
    tokenizer = tokenizers.load(artifact.tokenizer_dir)
    found: list[Attacked] = []
    for name, propose in (("hotflip", attack.hotflip()), ("random_tokens", attack.random())):
        outcome, tokens_NT = attack.run(propose, step, right_N)
        found.append((name, outcome, [{"text": tokenizer.decode(row.tolist())} for row in tokens_NT]))
    return found


def _budget(settings: AttackConfig) -> str:
    """Return a description of the budget: fraction of tokens or words, similarity and seed."""
    units = {"hotflip": "tokens", "textfooler": "words"}
    of_units = " and ".join(units[method] for method in settings.methods)
    similar = f", similarity {settings.similarity:g}" if settings.similarity and "hotflip" in settings.methods else ""
    return f"at most {settings.budget:.0%} of the {of_units} substituted{similar}, seed {settings.seed}"
