"""Train vectors in front of every text (prompt tuning; Lester et al., 2021, arXiv:2104.08691).

The vectors are a separate embedding table, `embed/prompt`. The token embedding table is frozen, and may be quantized.
The ids of the prompt vectors come after the ids of the vocabulary. The tokenizer is changed so that every text begins
with these ids. Every command that reads texts therefore uses the prompt. The output projection has no row for the
prompt, so the model never predicts a prompt vector.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmctl.config.errors import RequestError
from llmctl.train.adapters.method import Method, Params

if TYPE_CHECKING:
    import jax

    from llmctl.artifacts.artifact import Artifact
    from llmctl.model.config import ModelConfig


class Prompt(Method):
    """Train prompt vectors and the task's head."""

    name = "prompt"
    settings = ("prompt",)

    def check(self, config: Any, base: Artifact) -> None:
        """Check the config as Method.check does, and check that the prompt leaves room for texts.

        Raises:
          RequestError: If a setting freezes layers or selects layers to train. If the prompt leaves no room for texts.
            If Method.check fails.
        """
        super().check(config, base)
        given = [f"trained.{name}" for name in ("last_layers", "layer_decay", "unfreeze_every") if name in
                 config.trained.model_fields_set]  # fmt: skip
        if config.freeze_layers:
            given.append("freeze_layers")
        if given:
            raise RequestError(f"{given[0]}: not for method 'prompt', which trains no layer")
        if config.prompt.tokens > config.train.seq_len // 2:
            raise RequestError(
                f"prompt.tokens = {config.prompt.tokens:,}: more than half of train.seq_len = {config.train.seq_len:,}"
            )

    def network(self, config: Any, model: ModelConfig) -> ModelConfig:
        """Return the config of the model with the prompt. An existing prompt is trained further.

        Raises:
          RequestError: If an existing prompt has another length.
        """
        tokens = config.prompt.tokens
        if model.prompt_tokens not in (0, tokens):
            raise RequestError(
                f"prompt.tokens = {tokens:,}: the parent has a trained prompt of {model.prompt_tokens:,} tokens, which "
                "these settings must repeat"
            )
        return model.model_copy(update={"prompt_tokens": tokens})

    def attach(
        self, config: Any, model: ModelConfig, params: Params, key: jax.Array, mesh: jax.sharding.Mesh
    ) -> Params:
        """Return the parameters with a table of prompt vectors, sharded over `mesh`."""
        import jax
        import jax.numpy as jnp

        from llmctl.model import functional, weights

        if "prompt" in params["embed"]:
            return params
        shape = (model.prompt_tokens, model.d_model)
        if config.prompt.init == "vocabulary":
            ids_P = jax.random.randint(key, shape[:1], 0, model.vocab_size)
            table = weights.take(params["embed"]["tokens"], ids_P, jnp.float32)
        else:
            table = jax.random.uniform(key, shape, minval=-0.5, maxval=0.5)
        tree = weights.updated(params, {"embed/prompt": table})
        return jax.device_put(tree, functional.shardings(model, tree, mesh))

    def trains(self, config: Any, model: ModelConfig, params: Params) -> Callable[[str], bool]:
        """Return a predicate on array names: True for the trained arrays, which are the prompt and the task's head."""
        from llmctl.model import weights

        return lambda name: weights.parse(name).prompt or weights.parse(name).task_head

    def tokenizer_dir(self, config: Any, model: ModelConfig, folder: Path, work: Path) -> Path:
        """Return the folder of a tokenizer that begins every text with the prompt: a changed copy in `work`."""
        from llmctl.data.tokenizers.prompt_prefix import with_prefix

        return with_prefix(folder, work, range(model.vocab_size, model.vocab_size + config.prompt.tokens))

    def check_rows(self, config: Any, model: ModelConfig, rows: Any) -> None:
        """Check that all training rows (token sequences) begin with the prompt.

        Raises:
          RequestError: If rows do not begin with the prompt, because texts without prompts were packed into rows.
        """
        row = rows[0]
        if row.get("encoder_tokens", row["tokens"])[0] != model.vocab_size:
            raise RequestError(
                f"method = 'prompt': task {config.task!r} packs texts into rows, which have no beginning of their own; "
                "give the data prompts and completions, or use method = 'lora'"
            )


METHOD = Prompt()
