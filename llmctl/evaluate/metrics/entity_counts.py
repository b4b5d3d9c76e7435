"""Count entities on the devices, so that validation can select checkpoints by entity F1.

`llmctl.evaluate.metrics.entities` finds the same entities on the host, and computes more metrics.

Shapes: B texts, T tokens, W words (at most T), C labels.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def sums(
    mark_C2: np.ndarray,
    truth_BT: jax.Array,
    predicted_BT: jax.Array,
    weight_BT: jax.Array,
    position_BT: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """Return two sums over the texts. The first sum divided by the second is the entity F1.

    Args:
        mark_C2: Result of `entities.marks`: prefix (B, I, E, S or O) and entity type of each label.
        truth_BT: True labels, read only at the first token of each word.
        predicted_BT: Predicted labels, read only at the first token of each word.
        weight_BT: Weights, which are positive only at the first token of each word.
        position_BT: Positions of the tokens in the text, if they differ from the array order.

    Returns:
        {"entity_f1": twice the number of correct entities, "entity_weight": true plus predicted entities}.
    """
    word_BT = weight_BT > 0
    T = word_BT.shape[1]
    position_BT = jnp.arange(T) if position_BT is None else position_BT
    order_BW = jnp.argsort(jnp.where(word_BT, position_BT, T), axis=1)  # words first, in text order
    real_BW = jnp.take_along_axis(word_BT, order_BW, axis=1)

    def found(label_BT: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return arrays [B, W]: whether an entity begins at the word, the entity's type, and the word after the
        entity's end.
        """
        label_BW = jnp.take_along_axis(label_BT, order_BW, axis=1)
        letter_BW, kind_BW = (jnp.where(real_BW, jnp.asarray(mark_C2[:, k])[label_BW], 0) for k in (0, 1))
        before_BW, kind_before_BW = (jnp.pad(a, ((0, 0), (1, 0)))[:, :-1] for a in (letter_BW, kind_BW))
        new_BW = (letter_BW == 1) | (letter_BW == 4) | (kind_BW != kind_before_BW)  # B, S
        new_BW |= (before_BW == 0) | (before_BW == 3) | (before_BW == 4)  # O, E, S
        begins_BW = (letter_BW > 0) & new_BW
        W = label_BW.shape[1]
        stop_BW = jnp.where(begins_BW | (letter_BW == 0), jnp.arange(W), W)
        next_BW = jnp.pad(jax.lax.cummin(stop_BW, axis=1, reverse=True), ((0, 0), (0, 1)), constant_values=W)[:, 1:]
        return begins_BW, kind_BW, next_BW

    there, named = found(truth_BT), found(predicted_BT)
    right_BW = there[0] & named[0] & (there[1] == named[1]) & (there[2] == named[2])
    right, both = jnp.sum(right_BW, dtype=jnp.float32), jnp.sum(there[0], dtype=jnp.float32) + jnp.sum(named[0])
    return {"entity_f1": 2 * right, "entity_weight": both}
