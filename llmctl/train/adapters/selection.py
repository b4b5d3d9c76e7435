"""Select the arrays that finetuning trains, their learning rates, and the steps at which their training starts.

    fields = selection.job_fields(config, METHODS[config.method], model, params)

Each array has a level, which counts layers from the output to the input:

- level 0: arrays after the layers (final norms, output projection, task head)
- level 1: the last layer of the encoder or decoder
- level 2: the second to last layer, and so on
- highest level: the embeddings

Learning rates can decay with the level, and layers can be unfrozen one after another. Both methods are from ULMFiT
(Howard and Ruder, 2018, arXiv:1801.06146). The decay factor applies per layer, as in ELECTRA (Clark et al., 2020,
arXiv:2003.10555).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from llmctl.config.errors import RequestError
from llmctl.config.settings import portion
from llmctl.train.adapters.method import Method, Params

if TYPE_CHECKING:
    from llmctl.model.config import ModelConfig

LEVEL_0 = np.asarray(0)


def job_fields(config: Any, method: Method, model: ModelConfig, params: Params) -> dict[str, Any]:
    """Return which arrays are trained, and at which learning rates, as fields of a training job.

    The fields are `trains`, `rate` and `frozen_layers` of `llmctl.train.job.Job`. Their values depend on the section
    `trained` of the settings, and on the finetuning method.

    Args:
      config: config of the stage `finetune`.
      method: the finetuning method.
      model: config of the model.
      params: parameters of the model, including the method's adapters. Abstract arrays suffice.

    Raises:
      RequestError: If a setting matches no parameter, or has no effect with this method and task.
    """
    settings, levels = config.trained, _levels(model, params)
    own = method.trains(config, model, params)
    _check(config, method, model, {name: levels[name] for name in levels if own(name)}, levels)
    _check_modules(config, levels)

    def trains(name: str) -> bool:
        from llmctl.model import weights

        found = weights.parse(name)
        chosen = not settings.patterns or found.task_head or any(weights.matches(name, p) for p in settings.patterns)
        return own(name) and chosen and not (settings.last_layers and found.below)

    def rate(name: str) -> Any:
        from llmctl.model import weights

        factor: Any = method.rate(config, name)
        if settings.layer_decay < 1:
            factor = factor * (settings.layer_decay ** levels.get(name, LEVEL_0)).astype("float32")
        return factor * settings.head_rate if weights.parse(name).task_head else factor

    if not any(trains(name) for name in levels) and not method.trains_extra(config):
        raise RequestError("trained: nothing is left to train; leave out trained.last_layers or trained.patterns")
    return {"trains": trains, "rate": rate, "frozen_layers": config.freeze_layers}


def during(config: Any, method: Method, model: ModelConfig, params: Params, steps: int) -> dict[str, Any]:
    """Return the fields of a training job that depend on the number of `steps`, by name (see `llmctl.train.job.Job`).

    The result contains every field that the finetuning method sets. If layers start later or stay frozen, the result
    also contains the field `starts`: a function that returns the step at which the training of an array begins.

    Raises:
      RequestError: If `trained.unfreeze_every` leaves layers frozen to the end, or is rounded to 0 steps.
    """
    from llmctl.train.job import NEVER

    settings, fields = config.trained, method.during(config, params, steps)
    if not (settings.last_layers or settings.unfreeze_every):
        return fields
    levels, depth = _levels(model, params), _depth(model)
    last = settings.last_layers or (depth - config.freeze_layers if config.freeze_layers else depth + 1)
    every = portion(settings.unfreeze_every, steps) if settings.unfreeze_every else 0
    if settings.unfreeze_every and not every:
        raise RequestError(
            f"trained.unfreeze_every = {settings.unfreeze_every:g}: rounds to 0 of {steps:,} steps; choose a larger "
            "one, or leave it out to train all layers from the start"
        )
    first = 0 if "head" in params else 1  # without a head, the last layer is trained first
    trains = job_fields(config, method, model, params)["trains"]
    top = max((int(level.max()) for name, level in levels.items() if trains(name)), default=0)
    if settings.unfreeze_every and (begin := every * (min(top, last) - first)) >= steps:
        raise RequestError(
            f"trained.unfreeze_every = {settings.unfreeze_every:g}: the first layer would be trained from step "
            f"{begin:,} on, and the run has {steps:,} steps; choose a smaller one, or set trained.last_layers"
        )

    def starts(name: str) -> Any:
        level = levels.get(name, LEVEL_0)
        return np.where(level > last, NEVER, every * np.maximum(level - first, 0)).astype("int32")

    return {**fields, "starts": starts}


def _depth(model: ModelConfig) -> int:
    """Return the number of layers of the encoder or of the decoder, whichever is larger."""
    return max(model.layers, model.encoder_layers)


def _levels(model: ModelConfig, params: Params) -> dict[str, Any]:
    """Return {name of an array: level}. A level is a number, or an array [L, 1, ...] for L stacked layers.

    Levels count layers from the output to the input:

    - 0: heads and final norms
    - 1: the last layer of the encoder or decoder
    - 2: the second to last layer, and so on
    - number of layers + 1: the embeddings
    """
    from llmctl.model import weights

    found: dict[str, Any] = {}
    for name, a in weights.arrays(params).items():
        parsed = weights.parse(name)
        if parsed.stacked:
            found[name] = np.arange(a.shape[0], 0, -1).reshape(-1, *[1] * (a.ndim - 1))
        else:
            found[name] = np.asarray(_depth(model) + 1 if parsed.below else 0)
    return found


def _check(config: Any, method: Method, model: ModelConfig, trained: dict[str, Any], every: dict[str, Any]) -> None:
    """Check that every setting in the section `trained` has an effect.

    Args:
      config: config of the stage `finetune`.
      method: the finetuning method.
      model: config of the model.
      trained: levels (see `_levels`) of the arrays that the method trains, by name.
      every: levels of all arrays, by name.

    Raises:
      RequestError: If a setting matches no parameter, or has no effect.
    """
    from llmctl.model import weights

    settings, depth = config.trained, _depth(model)
    if config.freeze_layers > depth:
        raise RequestError(f"freeze_layers: {config.freeze_layers} of {depth} layers")
    if settings.last_layers > depth:
        raise RequestError(f"trained.last_layers: {settings.last_layers} of {depth} layers")
    if settings.last_layers and not any((level > settings.last_layers).any() for level in trained.values()):
        raise RequestError(
            f"trained.last_layers = {settings.last_layers}: method {method.name!r} trains nothing that it freezes"
        )
    if settings.patterns and not method.changes_base:
        raise RequestError(f"trained.patterns: not for method {method.name!r}, say method = 'full'")
    for pattern in settings.patterns:
        if not any(weights.matches(name, pattern) for name in every):
            raise RequestError(f"trained.patterns: no parameter matches {pattern!r}; names are as {_example(every)}")
    layered = any(level.any() for level in trained.values())
    for field, given in (("layer_decay", settings.layer_decay < 1), ("unfreeze_every", settings.unfreeze_every > 0)):
        if given and not layered:
            raise RequestError(f"trained.{field}: method {method.name!r} trains no layer")
    if settings.head_rate != 1 and not any(weights.parse(name).task_head for name in trained):
        raise RequestError(f"trained.head_rate: task {config.task!r} has no head of its own")


def _check_modules(config: Any, levels: dict[str, Any]) -> None:
    """Check that no module in `lora.targets` or `lora.modules_to_save` is completely frozen.

    Raises:
      RequestError: If `freeze_layers` or `trained.last_layers` freezes all parameters of a module.
    """
    from llmctl.model import weights

    last, first = config.trained.last_layers, config.freeze_layers
    setting = "trained.last_layers" if last else "freeze_layers"

    def frozen(name: str) -> bool:
        found = weights.parse(name)
        if last:
            return found.below
        return found.embeds or (found.stacked and len(levels[name]) <= first)

    for field in ("targets", "modules_to_save") if last or first else ():
        for module in getattr(config.lora, field):
            names = [name for name in levels if weights.parse(name).belongs(module)]
            if names and all(map(frozen, names)):
                raise RequestError(f"lora.{field}: {setting} freezes all of {module}; leave out one of the two")


def _example(names: dict[str, Any]) -> str:
    """Return the name of one parameter of a layer, as an example in an error message."""
    from llmctl.model import weights

    return next((name for name in names if weights.is_stacked(name)), next(iter(names)))
