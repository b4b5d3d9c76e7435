"""Prepare a model for finetuning: keep the head if the head fits the task, otherwise create a new head."""

from __future__ import annotations

from typing import Any

import jax

from llmctl.artifacts.artifact import Artifact
from llmctl.artifacts.manifest_file import listed
from llmctl.config.errors import RequestError
from llmctl.convert import architectures
from llmctl.evaluate.tasks.registry import TASKS, of
from llmctl.model import functional, prefix
from llmctl.model.config import ModelConfig
from llmctl.model.head_kinds import HEAD_KINDS


def _why_new(config: Any, base: Artifact, labels: list[str]) -> str:
    """Return the reason why the task needs a new head. If the task can use the model's head, return ""."""
    task, cfg = TASKS[config.task], base.model
    if HEAD_KINDS[task.head_for(cfg)].vocabulary:
        return ""
    if (parents := of(base.manifest)) is not task:
        return f"the parent's is for task {parents.name}"
    if labels and base.manifest.labels != labels:
        return f"the parent's classes are {listed(base.manifest.labels)}, the data's {listed(labels)}"
    if not HEAD_KINDS[task.head].per_token and config.pooling not in ("", cfg.pooling):
        return f"the parent pools by {cfg.pooling}"
    return ""


def notices(config: Any, base: Artifact, labels: list[str], model: ModelConfig) -> list[str]:
    """Return messages for the user: about a new head, about pooling, and about export formats that do not fit the
    model.

    `model` is the config of the model with the new head.
    """
    exports = architectures.notice(model, base.model)
    pooling = prompt_hint(model) or pooling_hint(config, base, model)
    lines = (notice(config, base, labels), prefix_notice(base.model, model), pooling, exports)
    return [line for line in lines if line]


def notice(config: Any, base: Artifact, labels: list[str]) -> str:
    """Return a message if a new head replaces the trained head of an earlier finetuning, otherwise ""."""
    kind = base.model.head_kind
    why = "" if kind.vocabulary or kind.bare else _why_new(config, base, labels)
    return f"the task's head is new and begins untrained: {why}" if why else ""


def prefix_notice(parent: ModelConfig, model: ModelConfig) -> str:
    """Return a message if the decoder is dropped and has a prefix that was trained (prefix tuning), otherwise "".

    `parent` is the config before finetuning, and `model` is the config of the finetuned model.
    """
    if parent.architecture == model.architecture or not parent.prefix_tokens:
        return ""
    return "the task needs the encoder alone; the decoder is dropped, and its trained prefix with it"


def prompt_hint(model: ModelConfig) -> str:
    """Return a message if texts are pooled at the first vector of a trained prompt, otherwise ""."""
    kind = HEAD_KINDS[model.head]
    if not model.prompt_tokens or kind.vocabulary or kind.per_token or model.pooling != "first":
        return ""
    return 'the first vector of the trained prompt stands for the text; try pooling = "mean" as well'


def pooling_hint(config: Any, base: Artifact, model: ModelConfig) -> str:
    """Return a message that suggests mean pooling, or "" if the default pooling suffices.

    The message is returned if the first token is pooled by default, but was not trained as a summary. An example is a
    small BERT that was pretrained only on masked tokens. Its accuracy was 67% with the first token, and 78% with the
    mean of all tokens. A next-sentence objective trains the first token and its pooler.
    """
    kind = HEAD_KINDS[model.head]
    if kind.vocabulary or kind.per_token or model.pooling != "first" or config.pooling or base.model.head == model.head:
        return ""
    if "pooler" in base.params.get("head", {}):
        return ""
    return 'the first token stands for the text, which this pretraining did not train; try pooling = "mean" as well'


def with_head(config: Any, base: Artifact, labels: list[str], devices: Any) -> tuple[ModelConfig, dict[str, Any]]:
    """Return (config, parameters) of the artifact's model with a head for the task.

    If the head of the model does not fit the task, a new head replaces it.
    """
    cfg, params, task = base.model, dict(base.params), TASKS[config.task]
    if HEAD_KINDS[task.head_for(cfg)].vocabulary:
        if not cfg.head_kind.vocabulary:
            raise RequestError(
                f"{base.path}: has no language-model head (its head is {cfg.head!r}); start from one that has"
            )
        task.check_model(cfg, str(base.path))
        return cfg, params
    task.check_data(config.data, labels)
    per_token = HEAD_KINDS[task.head].per_token
    if not _why_new(config, base, labels):
        return cfg, params
    head = {"head": task.head, "labels": len(labels), "pooling": config.pooling or task.pooling or cfg.pooling}
    head |= {"pooler": False, "head_bias": True} if per_token else {}  # no pooling; biases as in published models
    if cfg.architecture == "encoder_decoder":
        # The task generates no text, so only the encoder is kept, as an encoder of the same family.
        head |= {"architecture": "encoder", "layers": cfg.encoder_layers, "encoder_layers": 0, "preset": ""}
        head |= {"pooling": config.pooling or "mean"} | prefix.removed(cfg)
        params.pop("decoder")
    new = ModelConfig.model_validate({**cfg.model_dump(), **head, "head_transform": False, "next_sentence": False})
    params.pop("lm_head", None)
    pooler = {k: v for k, v in params.pop("head", {}).items() if k == "pooler" and new.pooler}  # BERT's is pretrained
    shardings = functional.shardings(new, functional.abstract(new), devices).get("head")
    if not shardings:  # embeddings by the mean have no head parameters
        return new, params
    fresh = jax.jit(lambda key: functional.init(new, key)["head"], out_shardings=shardings)(jax.random.key(config.seed))
    return new, params | {"head": fresh | pooler}
