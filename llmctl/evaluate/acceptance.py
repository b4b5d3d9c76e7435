"""Measure the fraction of a draft's tokens that a target accepts, without generating text.

Let p be the distribution of the target, and q the distribution of the draft. With sampling at temperature 1, the target
accepts a token of the draft with probability sum(min(p, q)) (Leviathan et al., 2023, arXiv:2211.17192). Greedy decoding
accepts the token if both models have the same most probable token. Both metrics are means over the predicted tokens of
a text. During generation, the models read the generated text, so the acceptance may differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from llmctl.artifacts.artifact import Artifact
from llmctl.artifacts.drafts import check_draft
from llmctl.artifacts.manifest import Manifest
from llmctl.config.errors import RequestError
from llmctl.data.tokenizers import loading as tokenizers
from llmctl.evaluate.setup import Batch, Held, Setup
from llmctl.evaluate.tasks.base import Task
from llmctl.evaluate.tasks.rows import RowSettings
from llmctl.evaluate.tasks.token_losses import TokenLosses
from llmctl.model import chunked_loss, functional
from llmctl.model.config import ModelConfig
from llmctl.model.losses import Sums


def check(draft: Manifest, target: Manifest, name: str) -> None:
    """Check that the acceptance of a draft can be measured.

    Raises:
        RequestError: If the two models differ in tokenizer, vocabulary size, architecture or trained prompt. If one
            of them does not generate text.
    """
    check_draft(f"draft_of: {name}", draft, target, target.name)
    sizes = draft.model.vocab_size, target.model.vocab_size
    if sizes[0] != sizes[1]:
        raise RequestError(f"draft_of: {name} has {sizes[0]:,} tokens, and {target.name} has {sizes[1]:,}")


def check_tasks(tasks: Sequence[Task], name: str) -> None:
    """Check that a draft is measured on at least one task, and that all its tasks predict tokens of texts.

    Raises:
        RequestError: If a task predicts something else than tokens, or if no task reads the data.
    """
    if not tasks:
        raise RequestError(f"draft_of: {name}: no task reads the texts of the data; add one to tasks, such as lm")
    for task in tasks:
        if not isinstance(task, TokenLosses):
            raise RequestError(f"draft_of: {name}: task {task.name} predicts no tokens that a target could accept")


def scorer(task: Task, models: tuple[ModelConfig, ModelConfig], dtype: str) -> Any:
    """Return a compiled function that computes the sums "acceptance", "agreement" and "weight" of a batch.

    Its arguments are the pair (parameters of the draft, parameters of the target), and a batch.
    """

    def sums(params: tuple[functional.Params, functional.Params], batch: Batch) -> Sums:
        batch, kind = task.model_inputs(batch), jnp.dtype(dtype)
        draft, target = (
            (cfg, own, functional.hidden(cfg, own, batch, dtype=kind)) for cfg, own in zip(models, params, strict=True)
        )
        return task.agreement(draft, [target], batch, kind)

    return jax.jit(sums)


def measure(task: Task, draft: Artifact, target: Artifact, held: Held, setup: Setup) -> dict[str, float]:
    """Return "acceptance" (for sampling) and "greedy_acceptance", means over the predicted tokens of all examples."""
    settings = RowSettings(setup.seq_len, truncate=setup.truncate, corpus=held.corpus)
    rows = task.rows(draft.model, held.examples, tokenizers.load(draft.tokenizer_dir), settings)
    step = partial(scorer(task, (draft.model, target.model), setup.dtype), (draft.params, target.params))
    total: Sums = {}
    with setup.batches().once(rows) as steps:
        for _, batch in steps:
            total = {name: total.get(name, 0.0) + value for name, value in step(batch).items()}
    found = {name: float(value) for name, value in chunked_loss.means(total).items()}
    return {"acceptance": found["acceptance"], "greedy_acceptance": found["agreement"]}
