"""Compute losses over a vocabulary in chunks of the sequence, so that logits [B, T, V] are never stored.

The function `chunked` sums a loss over the chunks. If a gradient is needed, the same pass over the chunks computes the
gradient. The output projection then takes three matrix products per chunk, instead of four with rematerialization.

On a mesh, every device processes its own rows and tokens. The sums are added over devices once, after the last chunk.
The vocabulary stays sharded over the `tensor` axis: devices exchange a few numbers per token, never logits.

Shapes: B batch, T sequence, c tokens per chunk, D model width, V vocabulary; b and t are the parts of B and T on one
device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from llmctl.distributed import mesh as meshes
from llmctl.model import weights

CHUNK_BYTES = 16 * 2**20
"""Approximate size of the float32 logits of a chunk in bytes: large enough for fast products, small enough for CPU
caches."""

Tree = Any
ChunkLoss = Callable[[Tree, Tree, jax.Array, Tree], tuple[jax.Array, Tree]]
"""Function that computes the loss of one chunk of c tokens per row.

The arguments are the parameters of the head, constants, hidden states [B, c, D] and per-token arrays [B, c, ...]. The
results are the sum of losses, and a tree of sums for metrics.
"""

Project = Callable[[Tree, jax.Array], jax.Array]
"""Output projection, a function that computes logits [..., V] from head parameters and hidden states [..., D]."""


def chunk_length(batch: int, length: int, vocab: int) -> int:
    """Return the largest divisor of `length` for which the logits of one chunk fit CHUNK_BYTES.

    Args:
        batch: Rows per device.
        length: Tokens per row and device.
        vocab: Vocabulary entries per device.
    """
    most = max(1, CHUNK_BYTES // (4 * batch * vocab))
    return max(c for c in range(1, length + 1) if length % c == 0 and c <= most)


def _split(tree: Tree, chunk: int) -> Tree:
    """Split the arrays [B, T, ...] of a tree into chunks [T / c, B, c, ...]."""
    return jax.tree.map(lambda a: a.reshape(a.shape[0], -1, chunk, *a.shape[2:]).swapaxes(0, 1), tree)


def _floats(tree: Tree) -> tuple[list[jax.Array], Callable[[list[jax.Array]], Tree]]:
    """Return the floating-point leaves of a tree, and a function that replaces these leaves.

    Only floating-point leaves have gradients.
    """
    leaves, treedef = jax.tree.flatten(tree)
    places = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating)]

    def rebuild(new: list[jax.Array]) -> Tree:
        out = list(leaves)
        for i, leaf in zip(places, new, strict=True):
            out[i] = leaf
        return jax.tree.unflatten(treedef, out)

    return [leaves[i] for i in places], rebuild


def _on_rows(fn: Callable[..., tuple[Tree, Tree]], head: Tree, constants: Tree, x_BTD: jax.Array, rest: Tree) -> Tree:
    """Run `fn(head, constants, x [b, t, D], rest [b, t, ...])` on every device.

    `fn` gets only the rows and tokens of its own device. XLA still shards the vocabulary automatically. Matrices of the
    output head, and the gradients of these matrices, are sent between devices in the dtype of `x_BTD`.

    Returns:
        The first result of `fn`, summed over the devices, and the second result of `fn` as global arrays [B, T, ...].
    """
    mesh = meshes.current()
    if mesh is None or mesh.size == 1:
        return fn(head, constants, x_BTD, rest)
    rows = meshes.spec(("batch_out", "seq"), mesh, x_BTD.shape[:2])
    if rows[0] is None:  # too few rows for all pipeline stages
        rows = meshes.spec(("batch", "seq"), mesh, x_BTD.shape[:2])
    axes = meshes.axes_of(rows)

    def light(a: jax.Array) -> jax.Array:
        return a.astype(x_BTD.dtype) if a.ndim == 2 and a.dtype == jnp.float32 else a

    def here(head: Tree, constants: Tree, x_btD: jax.Array, rest: Tree) -> tuple[Tree, Tree]:
        sums, along = fn(head, constants, x_btD, rest)
        return jax.lax.psum(jax.tree.map(light, sums), axes) if axes else sums, along

    whole = PartitionSpec()
    run = meshes.per_device(here, mesh, (whole, whole, rows, rows), (whole, rows), automatic=("tensor",))

    def is_weight(w: Any) -> bool:  # the heads of several models are a tuple
        return weights.is_weight(w) and not isinstance(w, tuple)

    head = jax.tree.map(lambda w: light(w) if weights.is_plain(w) else w, head, is_leaf=is_weight)
    return run(head, constants, x_BTD, rest)


def _chunk_of(x_btD: jax.Array, vocab: int) -> int:
    mesh = meshes.current()
    return chunk_length(x_btD.shape[0], x_btD.shape[1], vocab // (mesh.shape["tensor"] if mesh else 1))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def chunked(
    fn: ChunkLoss, vocab: int, head: Tree, constants: Tree, x_BTD: jax.Array, aligned: Tree
) -> tuple[jax.Array, Tree]:
    """Sum a loss over chunks of the sequence, so that logits are never stored for all tokens.

    Args:
        fn: Function that computes the loss of one chunk.
        vocab: Size of the vocabulary, which determines the length of a chunk.
        head: Parameters of the output head.
        constants: Further arguments of `fn` that are not differentiated.
        x_BTD: Hidden states.
        aligned: Tree of arrays [B, T, ...] with one value per token, such as targets and weights.

    Returns:
        (sum of losses, tree of sums for metrics). Only the sum of losses is differentiable, with respect to `head` and
        `x_BTD`.
    """

    def sums(head: Tree, constants: Tree, x: jax.Array, aligned: Tree) -> tuple[Tree, None]:
        def body(carry: Tree, piece: Tree) -> tuple[Tree, None]:
            return jax.tree.map(jnp.add, carry, fn(head, constants, *piece)), None

        pieces = _split((x, aligned), _chunk_of(x, vocab))
        zero = _zeros(fn, head, constants, *jax.tree.map(lambda a: a[0], pieces))
        return jax.lax.scan(body, zero, pieces)[0], None

    return _on_rows(sums, head, constants, x_BTD, aligned)[0]


def _zeros(fn: Callable[..., Tree], *operands: Tree) -> Tree:
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(fn, *operands))


def _forward(
    fn: ChunkLoss, vocab: int, head: Tree, constants: Tree, x_BTD: jax.Array, aligned: Tree
) -> tuple[Tree, Tree]:
    def gradients(head: Tree, constants: Tree, x_btD: jax.Array, aligned: Tree) -> tuple[Tree, jax.Array]:
        floats, rebuild = _floats(head)

        def body(carry: Tree, piece: Tree) -> tuple[Tree, jax.Array]:
            x, rest = piece

            def loss(floats: list[jax.Array], x: jax.Array) -> tuple[jax.Array, Tree]:
                return fn(rebuild(floats), constants, x, rest)

            total, pull, sums = jax.vjp(loss, floats, x, has_aux=True)
            d_floats, d_x = pull(jnp.ones_like(total))
            d_floats = [d.astype(jnp.float32) for d in d_floats]
            return jax.tree.map(jnp.add, carry, ((total, sums), d_floats)), d_x

        pieces = _split((x_btD, aligned), _chunk_of(x_btD, vocab))
        zero = _zeros(fn, head, constants, *jax.tree.map(lambda a: a[0], pieces))
        start = (zero, [jnp.zeros(f.shape, jnp.float32) for f in floats])
        found, d_x = jax.lax.scan(body, start, pieces)
        return found, d_x.swapaxes(0, 1).reshape(x_btD.shape)

    (out, d_floats), d_x = _on_rows(gradients, head, constants, x_BTD, aligned)
    d_floats = [
        meshes.constrain(d, "embed", "vocab" if d.shape[1] == vocab else None) if d.ndim == 2 else d for d in d_floats
    ]
    # Without the barrier, XLA keeps every device's own gradient through the backward pass, and reduces it at the end.
    d_floats, d_x = jax.lax.optimization_barrier((d_floats, d_x))
    d_floats = [d.astype(f.dtype) for d, f in zip(d_floats, _floats(head)[0], strict=True)]
    return out, (d_floats, d_x, head)


def _backward(fn: ChunkLoss, vocab: int, saved: Tree, cotangent: Tree) -> Tree:
    d_floats, d_x, head = saved
    scale = cotangent[0]
    leaves, treedef = jax.tree.flatten(head)
    rest = iter(d_floats)
    # Integer leaves (a quantized head) have no gradient.
    d_head = [
        next(rest) * scale.astype(leaf.dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else None for leaf in leaves
    ]
    return jax.tree.unflatten(treedef, d_head), None, d_x * scale.astype(d_x.dtype), None


chunked.defvjp(_forward, _backward)


def target_log_probability(logits_V: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the log probability of each target, and the logarithm of the partition function, for logits [..., V].

    The logit of the target is selected by comparison, not by a gather, so that a sharded vocabulary stays sharded.

    Returns:
        Two arrays [...], in nats.
    """
    partition = jax.nn.logsumexp(logits_V, axis=-1)
    hit = jnp.arange(logits_V.shape[-1]) == targets[..., None]
    return jnp.sum(jnp.where(hit, logits_V, 0.0), axis=-1) - partition, partition


def hits(logits_V: jax.Array, targets: jax.Array) -> jax.Array:
    """Return whether each target is the argmax of its logits [..., V], bool [...].

    Unlike an argmax, the computation does not gather a sharded vocabulary.
    """
    return first_best(logits_V) == targets


def first_best(logits_V: jax.Array) -> jax.Array:
    """Return the argmax of logits [..., V], int [...]. Unlike `jnp.argmax`, this function does not gather a sharded
    vocabulary."""
    places = jnp.arange(logits_V.shape[-1])
    top = jnp.max(logits_V, axis=-1, keepdims=True)
    return jnp.min(jnp.where(logits_V == top, places, logits_V.shape[-1]), axis=-1)


def chunk_logits(project: Project, head: Tree, x: jax.Array) -> jax.Array:
    """Return the logits [..., V] of hidden states [..., D], sharded over the vocabulary if the mesh shards the
    vocabulary."""
    return meshes.constrain(project(head, x), "batch", "seq", "act_vocab")


def cross_entropy(
    project: Project,
    head: Tree,
    x_BTD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    vocab: int,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Compute the weighted sum of token cross-entropies in nats.

    Args:
        project: Output projection.
        head: Parameters of the output projection.
        x_BTD: Hidden states.
        targets_BT: Target tokens.
        weights_BT: Weights of the targets.
        vocab: Size of the vocabulary.
        label_smoothing: Weight of the uniform distribution in the target (Szegedy et al., 2015, arXiv:1512.00567).
        z_loss: Coefficient of log(Z)^2 per token (Chowdhery et al., 2022, arXiv:2204.02311).

    Returns:
        The loss, and the sums {"nll", "correct", "weight"} over the batch. "nll" is the cross-entropy without label
        smoothing and z-loss.
    """

    def fn(head: Tree, _: Tree, x: jax.Array, aligned: Tree) -> tuple[jax.Array, Tree]:
        targets, weights = aligned
        logits = chunk_logits(project, head, x)
        log_p, partition = target_log_probability(logits, targets)
        loss = -log_p
        if label_smoothing:
            loss = (1 - label_smoothing) * loss + label_smoothing * (partition - jnp.mean(logits, axis=-1))
        if z_loss:
            loss = loss + z_loss * jnp.square(partition)
        correct = hits(logits, targets) * weights
        sums = {"nll": jnp.sum(-log_p * weights), "correct": jnp.sum(correct), "weight": jnp.sum(weights)}
        return jnp.sum(loss * weights), sums

    return chunked(fn, vocab, head, (), x_BTD, (targets_BT, weights_BT))


def means(sums: dict[str, Any]) -> dict[str, Any]:
    """Convert sums to metrics: divide each sum by the sum "weight".

    If there is a sum "PREFIX_weight", sums whose names begin with "PREFIX_" are divided by "PREFIX_weight" instead. A
    sum and its weight may be vectors, for example with one element per class. The division is then element by element,
    and the metric is the mean quotient over elements with positive weight.
    """
    apart = [name.removesuffix("weight") for name in sums if name.endswith("_weight")]

    def weight(name: str) -> Any:
        return sums[next((f"{prefix}weight" for prefix in apart if name.startswith(prefix)), "weight")]

    def mean(total: Any, weight: Any) -> Any:
        ratio = total / jnp.maximum(weight, 1e-9)
        return ratio if not jnp.ndim(ratio) else jnp.sum(ratio) / jnp.maximum(jnp.sum(weight > 0), 1)

    return {k: mean(v, weight(k)) for k, v in sums.items() if not k.endswith("weight")}


def token_nll(project: Project, head: Tree, x_BTD: jax.Array, targets_BT: jax.Array, vocab: int) -> jax.Array:
    """Return the negative log-likelihood of every target token in nats, [B, T]. The result is not differentiable."""

    def nll(head: Tree, x: jax.Array, targets: jax.Array) -> jax.Array:
        return -target_log_probability(chunk_logits(project, head, x), targets)[0]

    return per_token(nll, head, x_BTD, targets_BT, vocab)


def per_token(
    fn: Callable[[Tree, jax.Array, Tree], Any], head: Tree, x_BTD: jax.Array, aligned: Tree, vocab: int
) -> Any:
    """Compute values per token, an array [B, T, ...] or a tree of such arrays, in chunks. The values are not
    differentiable.

    Args:
        fn: Function that computes the values [B, c, ...] of one chunk. Its arguments are `head`, and the chunk's
            parts of `x_BTD` and `aligned`.
        head: Parameters of the output head.
        x_BTD: Hidden states.
        aligned: Tree of further arrays [B, T, ...].
        vocab: Size of the vocabulary, which determines the length of a chunk.
    """

    def values(head: Tree, _: Tree, x_btD: jax.Array, aligned: Tree) -> tuple[None, Tree]:
        def body(_: None, piece: Tree) -> tuple[None, Tree]:
            return None, fn(head, *piece)

        found = jax.lax.scan(body, None, _split((x_btD, aligned), _chunk_of(x_btD, vocab)))[1]
        return None, jax.tree.map(lambda a: a.swapaxes(0, 1).reshape(*x_btD.shape[:2], *a.shape[3:]), found)

    return _on_rows(values, head, (), x_BTD, aligned)[1]
