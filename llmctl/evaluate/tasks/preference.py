"""Train on preferences, so that the chosen completion of a prompt becomes more likely than the rejected completion.

Losses: DPO (Rafailov et al., 2023, arXiv:2305.18290), IPO (Azar et al., 2023, arXiv:2310.12036) and SimPO (Meng et al.,
2024, arXiv:2405.14734). The reference model of DPO and IPO is the model in training, without its adapters. A second
copy of the parameters is not needed.

Shapes: B pairs, T tokens per row, D model width. Rows 2i and 2i + 1 of [2B, T] are
the chosen and the rejected completion of pair i.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmctl.artifacts.artifact import Artifact
from llmctl.config.errors import RequestError
from llmctl.data.examples.preferences import REJECTED, PreferencePairRows, PreferenceRows
from llmctl.data.splits import Examples
from llmctl.data.tokenizers.base import Tokenizer
from llmctl.evaluate.setup import Batch, Held, Setup
from llmctl.evaluate.tasks.evaluation import Found, Scores
from llmctl.evaluate.tasks.language import Language
from llmctl.evaluate.tasks.likelihoods import interleaved, log_likelihood, loss_of_rows
from llmctl.evaluate.tasks.losses import Options
from llmctl.evaluate.tasks.rows import RowSettings
from llmctl.evaluate.tasks.settings import PreferenceConfig
from llmctl.model import functional, weights
from llmctl.model.config import ModelConfig
from llmctl.model.losses import Loss, Sums, row_weight


class Preference(Language):
    """Train with a loss on the log-likelihoods of two completions; measure the fraction of pairs whose chosen
    completion is likelier."""

    name = "preference"
    title = "preferences"
    architectures = ("decoder", "encoder_decoder")
    columns = ("prompt", "chosen", "rejected")
    columns_read = columns
    section = "preference"
    distilled_as = "lm"  # a teacher gives probabilities of tokens, not preferences

    def check_method(self, adapts: bool, options: Options) -> None:
        """Check that the loss can be computed with a finetuning method.

        Raises:
            RequestError: If DPO or IPO is used without adapters, or label smoothing with IPO.
        """
        settings = options.settings
        if self.reads_adapters(settings) and not adapts:
            raise RequestError(
                f"preference.loss = {settings.loss!r}: compares the model with itself without adapters; use "
                "method = 'lora', or preference.loss = 'simpo'"
            )
        if settings.loss == "ipo" and options.label_smoothing:
            raise RequestError("train.label_smoothing: not for preference.loss = 'ipo'")

    def extra_passes(self, settings: Any) -> int:
        """Return 1 for the forward pass of the reference model, or 0 if the loss is SimPO.

        SimPO has no reference model.
        """
        return int(self.reads_adapters(settings))

    def reads_adapters(self, settings: Any) -> bool:
        """Return True for DPO and IPO, whose reference is the model without its adapters."""
        return settings.loss != "simpo"

    def rows(
        self, model: ModelConfig, examples: Examples, tokenizer: Tokenizer, settings: RowSettings
    ) -> PreferenceRows | PreferencePairRows:
        """Return rows of one prompt each, with both completions."""
        if model.architecture == "encoder_decoder":
            return PreferencePairRows(
                examples, tokenizer, settings.seq_len, target_len=settings.target_len, **settings.order
            )
        if settings.target_len:
            raise RequestError("data.target_len is for encoder-decoders; a decoder reads both texts in one row")
        return PreferenceRows(examples, tokenizer, settings.seq_len, **settings.order)

    def model_inputs(self, batch: Batch) -> Batch:
        """Return the batch with the chosen and the rejected completion of each prompt as successive rows, [2B, T]."""
        return interleaved(batch, ("", REJECTED))

    def loss_of(self, cfg: ModelConfig, *, remat: str = "none", **options: Any) -> Loss:
        """Return the loss function, which returns (loss, metrics summed over the batch).

        The arguments of the loss function are the parameters, a batch, and a dropout key or None.

        The loss is summed over pairs. The metrics include "accuracy", the fraction of pairs in the right order. They
        also include "margin", the mean difference of rewards in nats. `options` are fields of `Options`.
        """
        settings = Options(**options)
        chosen: PreferenceConfig = settings.settings or PreferenceConfig()

        def loss(params: functional.Params, batch: Batch, key: jax.Array | None = None) -> tuple[jax.Array, Sums]:
            weight_B = row_weight(batch, batch["tokens"])
            batch = self.model_inputs(batch)
            reference_2B: Any = 0.0
            if self.reads_adapters(chosen):
                if not weights.adapted(params):
                    raise ValueError("the parameters have no adapters, so they are their own reference")
                bare = weights.without_adapters(params)
                # Perturbations of the embeddings (adversarial training, NEFTune) are for the model in training.
                clean = {k: a for k, a in batch.items() if not k.endswith("embedding_offset")}
                x_2BTD = functional.hidden(cfg, bare, clean, dtype=settings.dtype)
                reference_2B = jax.lax.stop_gradient(log_likelihood(cfg, bare, x_2BTD, batch, settings.dtype))
            x_2BTD = functional.hidden(
                cfg, params, batch, train=key is not None, rng=key, dtype=settings.dtype, remat=remat
            )
            tokens_2B = jnp.maximum(batch["weights"].sum(-1), 1)

            def compute(policy_2B: jax.Array) -> tuple[jax.Array, Sums]:
                gained_2B = policy_2B - reference_2B
                return pair_loss(gained_2B, tokens_2B, weight_B, chosen, settings.label_smoothing)

            return loss_of_rows(cfg, params, x_2BTD, batch, settings.dtype, compute)

        return loss

    def scorer(self, model: ModelConfig, dtype: str) -> Any:
        """Return a compiled function that computes scores of both completions, [B, 2, 2].

        Its arguments are the parameters and a batch. The scores of a completion are its log-likelihood in nats and its
        number of tokens.
        """

        @jax.jit
        def score(params: functional.Params, batch: Batch) -> jax.Array:
            batch = self.model_inputs(batch)
            x_2BTD = functional.hidden(model, params, batch, dtype=dtype)
            found_2B = log_likelihood(model, params, x_2BTD, batch, dtype)
            return jnp.stack([found_2B, batch["weights"].sum(-1)], axis=-1).reshape(-1, 2, 2)

        return score

    def evaluate(self, artifact: Artifact, held: Held, setup: Setup) -> Any:
        """Measure the fraction of pairs whose chosen completion is more likely than the rejected completion, without a
        reference model.
        """
        return super(Language, self).evaluate(artifact, held, setup)

    def metrics(self, artifact: Artifact, examples: Examples, rows: Any, found: Found) -> Scores:
        """Return the fraction of pairs whose chosen completion is likelier than the rejected one, and the margin.

        "accuracy" compares log-likelihoods summed over the tokens of a completion. "accuracy_per_token" compares means
        per token. "margin" is the mean difference of the summed log-likelihoods, in nats.
        """
        scores_N22 = np.concatenate([outputs for _, outputs in found]).astype(np.float64)
        total_N2, tokens_N2 = scores_N22[..., 0], scores_N22[..., 1]
        mean_N2 = total_N2 / np.maximum(tokens_N2, 1)
        values = {
            "accuracy": total_N2[:, 0] > total_N2[:, 1],
            "accuracy_per_token": mean_N2[:, 0] > mean_N2[:, 1],
            "margin": total_N2[:, 0] - total_N2[:, 1],
        }
        return Scores({name: float(np.mean(value_N)) for name, value_N in values.items()}, values=values)

    def compares(self, model: ModelConfig, columns: Iterable[str]) -> bool:
        """Return True: two artifacts can be compared by the log-likelihoods of each pair."""
        return True


def pair_loss(
    gained_2B: jax.Array, tokens_2B: jax.Array, weight_B: jax.Array, settings: PreferenceConfig, smoothing: float = 0.0
) -> tuple[jax.Array, Sums]:
    """Return the loss summed over pairs, and the metrics summed over the batch.

    Args:
      gained_2B: Log-likelihoods of chosen and rejected completions. If there is a reference model, the log-likelihoods
          of the reference model are subtracted.
      tokens_2B: Number of tokens of each completion.
      weight_B: Weight of each pair.
      settings: Loss and its scale.
      smoothing: Probability that a pair is in the wrong order (conservative DPO; Mitchell, 2023).
    """
    beta = settings.scale
    # IPO's log-likelihoods are means per token, as its authors compute them.
    reward_2B = beta * (gained_2B if settings.loss == "dpo" else gained_2B / tokens_2B)
    margin_B = reward_2B[0::2] - reward_2B[1::2]
    if settings.loss == "ipo":
        loss_B = jnp.square(margin_B / beta - 1 / (2 * beta))
    else:
        apart_B = margin_B - (settings.gap if settings.loss == "simpo" else 0.0)
        loss_B = -(1 - smoothing) * jax.nn.log_sigmoid(apart_B) - smoothing * jax.nn.log_sigmoid(-apart_B)
    total = jnp.sum(loss_B * weight_B)
    sums = {"loss": total, "accuracy": jnp.sum((margin_B > 0) * weight_B), "margin": jnp.sum(margin_B * weight_B)}
    return total, sums | {"weight": jnp.sum(weight_B)}


TASK = Preference()
