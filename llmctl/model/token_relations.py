"""Compare the relations between tokens in two models (MiniLMv2; Wang et al., 2020, arXiv:2012.15828).

A relation is softmax(a a^T / sqrt(width)) over the tokens of a text. The vectors `a` are the queries, the keys or the
values of a layer. The vectors of all attention heads are joined and divided into R relation heads. The two models may
therefore have different numbers of heads. The forward and the backward pass compute the relations for one block of
tokens at a time. A map of all pairs of tokens is never stored.

Shapes: B batch, T sequence, c tokens per block, W joined width, R relation heads, K width of a relation head.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from llmctl.distributed import mesh as meshes
from llmctl.model.chunked_loss import chunk_length
from llmctl.model.divergences import EXCLUDED_LOGIT


def divergence(student_BTW: jax.Array, teacher_BTW: jax.Array, segments_BT: jax.Array, heads: int) -> jax.Array:
    """Return the mean of KL(teacher's relation || student's relation) in nats, over tokens and relation heads.

    Args:
        student_BTW: Queries, keys or values of the student, with the vectors of all heads joined.
        teacher_BTW: Queries, keys or values of the teacher. Their width may differ from the student's.
        segments_BT: Number of the packed text of each token. Relations exist only between tokens of the same text. 0 is
            padding, and has no relations.
        heads: Number of relation heads; a divisor of both widths.
    """
    B, T = segments_BT.shape
    student, teacher = (a.astype(jnp.float32).reshape(B, T, heads, -1) for a in (student_BTW, teacher_BTW))
    ways = meshes.axis_size("data") * meshes.axis_size("fsdp")
    c = chunk_length(max(1, B // ways) * heads, T, T)

    def relations(rows_BcRK: jax.Array, all_BTRK: jax.Array, same_BcT: jax.Array) -> jax.Array:
        scores = jnp.einsum("bcrk,btrk->brct", rows_BcRK, all_BTRK) * rows_BcRK.shape[-1] ** -0.5
        return jax.nn.log_softmax(jnp.where(same_BcT[:, None], scores, EXCLUDED_LOGIT), axis=-1)

    # The maps of a block are computed again in the backward pass.
    @jax.checkpoint
    def block(x_BcRK: jax.Array, y_BcRK: jax.Array, segments_Bc: jax.Array) -> jax.Array:
        same_BcT = (segments_Bc[:, :, None] == segments_BT[:, None]) & (segments_BT > 0)[:, None]
        log_q, log_p = relations(x_BcRK, student, same_BcT), relations(y_BcRK, teacher, same_BcT)
        kl_BRc = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
        return jnp.sum(jnp.where((segments_Bc > 0)[:, None], kl_BRc, 0.0))

    def body(total: jax.Array, rows: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        return total + block(*rows), None

    rows = [jnp.moveaxis(a.reshape(B, T // c, c, *a.shape[2:]), 1, 0) for a in (student, teacher, segments_BT)]
    total, _ = jax.lax.scan(body, jnp.float32(0.0), tuple(rows))
    return total / (heads * jnp.maximum(jnp.sum(segments_BT > 0), 1))
