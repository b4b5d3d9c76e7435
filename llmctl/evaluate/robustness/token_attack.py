"""Attack a classifier by substituting tokens: guided by the gradient (HotFlip), or at random.

HotFlip (Ebrahimi et al., 2018, arXiv:1712.06751) estimates to first order how much each substitution of one token by
another increases the loss: the product of the loss's gradient at the token's embedding and the difference of the two
embeddings. Each iteration makes the substitution with the largest estimate. The attack stops when the prediction is
wrong, or when the budget is used up. A position is substituted at most once.

The attack changes token ids. Other tokens may result if the substituted text is tokenized again.

Shapes: B rows per batch, T tokens per row, N rows, V entries of the embedding table, D model width, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmctl.artifacts.artifact import Artifact
from llmctl.data import device_batches
from llmctl.data.device_batches import Rows
from llmctl.data.tokenizers import loading as tokenizers
from llmctl.data.tokenizers.base import Tokenizer
from llmctl.distributed import host_arrays
from llmctl.distributed import mesh as meshes
from llmctl.evaluate.robustness.outcome import Outcome, budget
from llmctl.evaluate.robustness.settings import AttackConfig
from llmctl.evaluate.setup import Batch, Setup
from llmctl.evaluate.tasks.base import Task
from llmctl.model import functional, weights
from llmctl.model.config import ModelConfig

Propose = Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Function that selects one substitution per row. Its arguments are the indices of K rows [K], the tokens [N, T], and
the open positions [N, T]. It returns the position [K] and the new token [K] of each substitution. Open positions are
those that may still be substituted. The position is -1 if there is no substitution."""


def flipper(model: ModelConfig, dtype: str, similarity: float = 0.0) -> Any:
    """Return the compiled function that selects the substitution with the largest estimated increase of the loss.

    Its arguments are the parameters, a batch, labels [B], open positions [B, T], and allowed tokens [V]. Open positions
    are those that may still be substituted. It returns int32 [B, 2]: position and new token. The position is -1 if
    there is no substitution.

    Args:
        model: Config of the classifier.
        dtype: Dtype of the computation.
        similarity: Minimum cosine similarity between the embeddings of a token and its substitute; 0 allows any token.
    """

    @jax.jit
    def flip(
        params: functional.Params, batch: Batch, label_B: jax.Array, open_BT: jax.Array, allowed_V: jax.Array
    ) -> jax.Array:
        # The gradient of rounded activations is zero, so it is computed without their quantization.
        smooth = jax.tree.map(lambda w: weights.as_node(w).without_activations(), params, is_leaf=weights.is_weight)

        def loss(offset_BTD: jax.Array) -> jax.Array:
            there = batch | {"embedding_offset": offset_BTD}
            x_BTD = functional.hidden(model, smooth, there, dtype=dtype)
            logits_BC = functional.outputs(model, smooth, x_BTD, there, dtype).astype(jnp.float32)
            log_p_BC = jax.nn.log_softmax(logits_BC)
            return -jnp.sum(jnp.take_along_axis(log_p_BC, label_B[:, None], axis=-1))

        gradient_BTD = jax.grad(loss)(jnp.zeros((*batch["tokens"].shape, model.d_model), jnp.float32))
        table_VD = weights.dense(params["embed"]["tokens"], jnp.float32)
        id_BT = jnp.minimum(batch["tokens"], len(table_VD) - 1)  # tokens of trained prompts come after the vocabulary

        def best(column: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            gradient_BD, id_B = column
            rise_BV = gradient_BD @ table_VD.T
            rise_BV -= jnp.take_along_axis(rise_BV, id_B[:, None], axis=-1)
            usable_BV = allowed_V & (jnp.arange(len(table_VD)) != id_B[:, None])
            if similarity:
                unit_VD = unit(table_VD)
                usable_BV &= unit_VD[id_B] @ unit_VD.T >= similarity
            rise_BV = jnp.where(usable_BV, rise_BV, -jnp.inf)
            return jnp.max(rise_BV, axis=-1), jnp.argmax(rise_BV, axis=-1)

        # One position at a time, so that memory holds [B, V] and not [B, T, V].
        rise_TB, token_TB = jax.lax.map(best, (jnp.moveaxis(gradient_BTD, 1, 0), id_BT.T))
        rise_BT = jnp.where(open_BT, rise_TB.T, -jnp.inf)
        position_B = jnp.argmax(rise_BT, axis=-1)
        token_B = jnp.take_along_axis(token_TB.T, position_B[:, None], axis=-1)[:, 0]
        found_B = jnp.isfinite(jnp.max(rise_BT, axis=-1))
        return jnp.stack([jnp.where(found_B, position_B, -1), token_B], axis=-1).astype(jnp.int32)

    return flip


def unit(table: weights.Weight) -> jax.Array:
    """Return the embeddings divided by their Euclidean norms, [V, D]."""
    table_VD = weights.dense(table, jnp.float32)
    return table_VD / jnp.maximum(jnp.linalg.norm(table_VD, axis=-1, keepdims=True), 1e-30)


def attackable(tokenizer: Tokenizer, size: int) -> np.ndarray:
    """Return whether each token has visible text, bool [size]. Only such tokens are substituted or used as
    substitutes."""
    found = np.zeros(size, bool)
    pieces = tokenizer.pieces()[:size]
    found[: len(pieces)] = [bool(piece.strip()) and "\ufffd" not in piece for piece in pieces]
    return found


class TokenAttack:
    """Attack the rows of a classifier by substituting tokens.

    The function that predicts and the function that selects substitutions are compiled once, because all batches have
    the same shape. The last batch is filled with copies of its first row.
    """

    def __init__(
        self, artifact: Artifact, task: Task, rows: Rows, label_N: np.ndarray, setup: Setup, settings: AttackConfig
    ) -> None:
        """Prepare attacks.

        Args:
            artifact: The attacked classifier.
            task: Task of the classifier.
            rows: Rows to attack.
            label_N: True classes of the rows.
            setup: Batch size, dtype and mesh.
            settings: Settings of the attack.
        """
        self._params, self._model, self._mesh, self._settings = artifact.params, artifact.model, setup.mesh, settings
        self._dtype, self._size = setup.dtype, -(-setup.batch_size // setup.mesh.size) * setup.mesh.size
        batch = rows.batch(np.arange(len(rows)))
        self._batch, self._label_N = {k: batch[k] for k in task.reads if k in batch}, label_N
        self._table = artifact.params["embed"]["tokens"]
        self._allowed_V = attackable(tokenizers.load(artifact.tokenizer_dir), self._table.shape[0])
        known = np.append(self._allowed_V, False)  # tokens of trained prompts come after the vocabulary
        self._open_NT = (batch["segments"] > 0) & known[np.minimum(batch["tokens"], len(self._allowed_V))]
        self.budget_N = np.array([budget(settings.budget, int(n)) for n in self._open_NT.sum(-1)])

    def run(self, propose: Propose, step: Any, right_N: np.ndarray) -> tuple[Outcome, np.ndarray]:
        """Substitute tokens until predictions are wrong or budgets are used up.

        Args:
            propose: Function that selects substitutions, such as the result of `hotflip`.
            step: Compiled function of `Task.scorer`.
            right_N: Whether the classifier is right about each row.

        Returns:
            The outcome, and the tokens after the attack [N, T].
        """
        outcome = Outcome.before(right_N, self.budget_N)
        tokens_NT, open_NT = self._batch["tokens"].copy(), self._open_NT.copy()
        with meshes.use(self._mesh):
            while len(rows_K := outcome.active()):
                position_K, token_K = propose(rows_K, tokens_NT, open_NT)
                there_K = position_K >= 0
                outcome.give_up(rows_K[~there_K])
                rows_K, position_K, token_K = rows_K[there_K], position_K[there_K], token_K[there_K]
                tokens_NT[rows_K, position_K] = token_K
                open_NT[rows_K, position_K] = False
                outcome.edits_N[rows_K] += 1
                if len(rows_K):
                    logits_KC = self._mapped(lambda batch, _: step(self._params, batch), rows_K, tokens_NT)
                    outcome.right_N[rows_K] = logits_KC.argmax(-1) == self._label_N[rows_K]
        return outcome, tokens_NT

    def hotflip(self) -> Propose:
        """Return the function that selects the substitution with the largest estimated increase of the loss."""
        flip = flipper(self._model, self._dtype, self._settings.similarity)
        allowed_V = host_arrays.put(self._allowed_V, meshes.replicated(self._mesh))

        def propose(rows_K: np.ndarray, tokens_NT: np.ndarray, open_NT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            found_K2 = self._mapped(
                lambda batch, more: flip(self._params, batch, more["label"], more["open"], allowed_V),
                rows_K, tokens_NT, {"label": self._label_N, "open": open_NT},
            )  # fmt: skip
            return found_K2[:, 0], found_K2[:, 1]

        return propose

    def random(self) -> Propose:
        """Return the function that selects a random position and a random token.

        The tokens are those that `hotflip` may use. Each row has its own random numbers.
        """
        generators = [np.random.default_rng((self._settings.seed, row)) for row in range(len(self._label_N))]
        similarity, unit_VD = self._settings.similarity, np.zeros(0)
        if similarity:
            unit_VD = host_arrays.read(jax.jit(unit)(self._table))

        def propose(rows_K: np.ndarray, tokens_NT: np.ndarray, open_NT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            position_K, token_K = np.full(len(rows_K), -1), np.zeros(len(rows_K), np.int64)
            for k, row in enumerate(rows_K):
                for position in generators[row].permutation(np.flatnonzero(open_NT[row])):
                    old = tokens_NT[row, position]
                    usable_V = self._allowed_V & (np.arange(len(self._allowed_V)) != old)
                    if similarity:
                        usable_V &= unit_VD @ unit_VD[old] >= similarity
                    if usable_V.any():
                        position_K[k], token_K[k] = position, generators[row].choice(np.flatnonzero(usable_V))
                        break
            return position_K, token_K

        return propose

    def _mapped(
        self,
        function: Callable[[Batch, Batch], jax.Array],
        rows_K: np.ndarray,
        tokens_NT: np.ndarray,
        more: Mapping[str, np.ndarray] | None = None,
    ) -> np.ndarray:
        """Return the outputs of a compiled function for some rows, [K, ...].

        The function gets the batch with the current tokens, and the arrays `more` of the same rows.
        """
        whole, more = self._batch | {"tokens": tokens_NT}, more or {}
        running = []
        for first in range(0, len(rows_K), self._size):
            index_B = np.resize(rows_K[first : first + self._size], self._size)
            placed = device_batches.place(
                {k: a[index_B] for k, a in {**whole, **more}.items()}, self._mesh, reading_order=True
            )
            running.append(function({k: placed[k] for k in whole}, {k: placed[k] for k in more}))
        return np.concatenate([host_arrays.read(found) for found in running])[: len(rows_K)]
