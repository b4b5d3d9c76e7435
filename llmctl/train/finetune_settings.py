"""Check that the settings of finetuning do not contradict each other.

The module does not import JAX, so that settings can be checked early.
"""

from __future__ import annotations

from typing import Any

from llmctl.train import sparsify_settings
from llmctl.train.adapters.registry import METHODS, stray

WRITTEN = ("bleu", "chrf", "rouge_1", "rouge_2", "rouge_l", "exact_match")
"""Names of the metrics that compare generated answers with the completions of validation examples."""


def check(config: Any) -> None:
    """Check that the settings of finetuning do not contradict each other.

    Args:
      config: config of the stage `finetune`.

    Raises:
      ValueError: If two settings contradict each other.
    """
    if error := stray(config.method, config.model_fields_set):
        raise ValueError(error)
    if config.store == "adapter" and METHODS[config.method].changes_base:
        raise ValueError(f"store: method {config.method!r} trains the base itself, so there is no adapter to store")
    if config.store == "adapter" and "merge" in config.model_fields_set and config.merge:
        raise ValueError("store = 'adapter' and merge = true exclude each other: leave one of them out")
    for section, task in (("chat", "chat"), ("generation", "seq2seq"), ("preference", "preference")):
        if section in config.model_fields_set and config.task != task:
            raise ValueError(f"{section}: not for task {config.task!r}, say task = {task!r}")
    if config.task == "seq2seq" and not config.generation.examples and config.train.best_by in WRITTEN:
        raise ValueError(f"train.best_by: {config.train.best_by} needs generated answers, and generation.examples is 0")
    if config.seed + config.seeds > 2**63:
        raise ValueError(f"seeds: the last of {config.seeds} seeds from {config.seed} on is above 2 ** 63 - 1")
    if config.freeze_layers and config.trained.last_layers:
        raise ValueError("freeze_layers and trained.last_layers exclude each other: leave one of them out")
    if config.optim.spike and config.trained.unfreeze_every:
        raise ValueError(
            "optim.spike: not with trained.unfreeze_every, because each unfrozen layer raises the gradient norm "
            "and its steps would be skipped; leave one of them out"
        )
    sparsify_settings.check(config)
    _check_sparsify(config)
    _check_fake_quantize(config)


def _check_fake_quantize(config: Any) -> None:
    """Raise ValueError if a matrix to round is not trained, or is not read by the loss."""
    if not config.fake_quantize.active:
        return
    if not METHODS[config.method].changes_base:
        raise ValueError(
            f"fake_quantize: not for method {config.method!r}, which freezes the matrices; use method = 'full', or "
            "the stage quantize"
        )
    if config.calibrate:
        raise ValueError("calibrate: not with fake_quantize, because quantizing the result changes probabilities")
    if config.regularize.mixout:
        raise ValueError(
            "regularize.mixout: not with fake_quantize, because it mixes in the parent's weights, which are not rounded"
        )


def _check_sparsify(config: Any) -> None:
    """Raise ValueError if weights to prune are not trained, or are not read by the loss."""
    if not config.sparsify.active:
        return
    if not METHODS[config.method].changes_base:
        raise ValueError(
            f"sparsify: not for method {config.method!r}, which freezes the matrices; use method = 'full', or the "
            "stage prune"
        )
    frozen = {
        "freeze_layers": config.freeze_layers,
        **{f"trained.{k}": getattr(config.trained, k) for k in ("patterns", "last_layers", "unfreeze_every")},
    }
    if given := [name for name, value in frozen.items() if value]:
        raise ValueError(f"{given[0]}: not with sparsify, which needs all matrices to be trained in every step")
    if config.regularize.mixout:
        raise ValueError(
            "regularize.mixout: not with sparsify, because it mixes in the parent's weights, which are not zero"
        )
