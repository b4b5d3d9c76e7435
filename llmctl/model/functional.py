"""Run the model by functions of a config and a parameter tree, so that callers need no Flax modules.

The parameter tree is a nested dict. Its keys are `embed`, `encoder` and/or `decoder` (each with `blocks` and `norm`),
and sometimes `lm_head` and `head`. If the output projection is untied or transformed, the tree has `lm_head`. If the
model has a task head, the tree has `head`. The functions of the training step, `hidden` and `head_logits`, are defined
in `llmctl.model.transformer`.

A stack is the encoder or the decoder. The last stack is the decoder or, if there is none, the encoder.

Shapes: B batch, T sequence, D model width, V vocabulary, C classes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llmctl.config.errors import RequestError
from llmctl.model import bert_init
from llmctl.model.config import ModelConfig
from llmctl.model.layers import LMHead
from llmctl.model.param_sharding import shard_params
from llmctl.model.task_head import TaskHead, pool_segments
from llmctl.model.transformer import (
    Batch,
    Params,
    Transformer,
    apply,
    body_params,
    head_logits,
    head_params,
    hidden,
    product_rules,
)
from llmctl.model.wiring import stacks

__all__ = [
    "Params",
    "abstract",
    "axes",
    "check_mesh",
    "depth",
    "example_batch",
    "head_logits",
    "head_params",
    "hidden",
    "hidden_states",
    "init",
    "laid_out",
    "lm_logits",
    "outputs",
    "segment_outputs",
    "shardings",
    "stacks",
]


def example_batch(cfg: ModelConfig, batch: int = 1, length: int = 2) -> Batch:
    """Return a batch of zeros for tracing: {name: int32 array [batch, length]} with all arrays that the model reads."""
    zeros = jnp.zeros((batch, length), jnp.int32)
    names = ["tokens", "positions", "segments"]
    names += [f"encoder_{n}" for n in names] if cfg.encoder_layers else []
    return dict.fromkeys(names, zeros)


def _boxed_init(cfg: ModelConfig, key: jax.Array) -> Params:
    batch = example_batch(cfg)
    body_key, lm_key, head_key = jax.random.split(key, 3)
    params = dict(Transformer(cfg).init(body_key, batch, mutable=["params"])["params"])
    x = jnp.zeros((1, 2, cfg.d_model))
    if cfg.head_kind.vocabulary:
        table = nn.meta.unbox(params["embed"]["tokens"]) if cfg.tied else None
        lm = LMHead(cfg, jnp.float32).init(lm_key, x, table, mutable=["params"]).get("params", {})
        params |= {"lm_head": lm} if lm else {}
    if cfg.task_head:
        head = TaskHead(cfg, jnp.float32).init(head_key, x, batch["segments"], mutable=["params"]).get("params", {})
        params |= {"head": head} if head else {}
    return params


def init(cfg: ModelConfig, key: jax.Array) -> Params:
    """Return the randomly initialized parameters of a new model, in float32.

    Example:
        >>> cfg = ModelConfig(preset="llama-tiny", layers=1, vocab_size=16)
        >>> params = init(cfg, jax.random.key(0))
        >>> hidden(cfg, params, example_batch(cfg, batch=1, length=2)).shape
        (1, 2, 128)
    """
    params = nn.meta.unbox(_boxed_init(cfg, key))
    return bert_init.initialize(cfg, params) if bert_init.applies_to(cfg) else params


def abstract(cfg: ModelConfig) -> Params:
    """Return the shapes and dtypes of the parameters, without arrays."""
    return _of_boxes(cfg, lambda box: box.value)


def axes(cfg: ModelConfig) -> Params:
    """Return the logical axes of every parameter, as tuples of names in `llmctl.distributed.mesh.RULES`."""
    return _of_boxes(cfg, lambda box: box.names)


def _of_boxes(cfg: ModelConfig, part: Callable[[Any], Any]) -> Params:
    return jax.tree.map(part, _boxes(cfg.model_dump_json()), is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata))


@functools.lru_cache(64)
def _boxes(config: str) -> Params:
    """Return abstract parameters with their logical axes, from a cache of the last 64 configs.

    Args:
        config: ModelConfig as JSON text, because a key of the cache must be hashable.
    """
    cfg = ModelConfig.model_validate_json(config)
    return jax.eval_shape(lambda: _boxed_init(cfg, jax.random.key(0)))


def shardings(cfg: ModelConfig, params: Params, mesh: Mesh) -> Params:
    """Return the sharding on `mesh` of every array in `params`. The arrays may be abstract.

    Raises:
        RequestError: If `check_mesh` rejects the mesh. If the size of a mesh axis does not divide the length of a
            dimension.
    """
    check_mesh(cfg, mesh)
    return shard_params(axes(cfg), params, mesh)


def laid_out(cfg: ModelConfig, params: Params, mesh: Mesh) -> Params:
    """Add the shardings on `mesh` to abstract parameters, and return the parameters.

    Raises:
        RequestError: If the mesh does not fit the model.
    """
    return jax.tree.map(lambda a, s: a.update(sharding=s), params, shardings(cfg, params, mesh))


def check_mesh(cfg: ModelConfig, mesh: Mesh) -> None:
    """Check that the mesh fits the model.

    Raises:
        RequestError: If the size of the tensor axis does not divide the number of heads. If the size of the pipeline
            axis does not divide the number of layers. If a model with prefix tuning has a context axis larger than 1.
    """
    tensor, pipeline = mesh.shape["tensor"], mesh.shape["pipeline"]
    if cfg.prefix_tokens and mesh.shape["context"] > 1:
        raise RequestError(
            f"mesh.context = {mesh.shape['context']}: devices that share a text do not exchange the trained prefix of "
            "the model; use mesh.context = 1"
        )
    for stack in stacks(cfg):
        if depth(cfg, stack) % pipeline:
            raise RequestError(
                f"model: {depth(cfg, stack)} {stack} layers do not divide over mesh.pipeline = {pipeline}"
            )
    for name, size in (("heads", cfg.heads), ("kv_heads", cfg.kv_heads)):
        if size % tensor:
            raise RequestError(f"model.{name}: {size} heads do not divide over mesh.tensor = {tensor}")


def hidden_states(
    cfg: ModelConfig,
    params: Params,
    batch: Batch,
    layers: Sequence[int],
    *,
    train: bool = False,
    rng: jax.Array | None = None,
    dtype: Any = jnp.float32,
    remat: str = "none",
) -> tuple[jax.Array, jax.Array]:
    """Compute the final hidden states of the model, and the outputs of selected layers.

    Args:
        cfg: Config of the model.
        params: Parameters of the model.
        batch: Batch (see `hidden`).
        layers: Indices of the selected layers, from 0. The layers are those of the decoder or, if there is none, of the
            encoder. -1 selects the input of the first layer: the embeddings.
        train: Whether dropout is applied.
        rng: Random key (see `hidden`).
        dtype: Dtype of the computation.
        remat: Rematerialization policy (see `hidden`).

    Returns:
        The result of `hidden` [B, T, D], and the outputs of the n selected layers [n, B, T, D]. The final norm is not
        applied to these outputs.

    Raises:
        RequestError: If an index is not a layer or is given twice, or if the mesh has a pipeline.
    """
    body, rngs = body_params(params), {} if rng is None else {"dropout": rng}
    with product_rules(train):
        return apply(Transformer(cfg, dtype, remat, train), {"params": body}, batch, layers, rngs=rngs, method="states")


def lm_logits(cfg: ModelConfig, params: Params, x: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    """Compute float32 logits [..., V] from hidden states [..., D]."""
    table = params["embed"]["tokens"] if cfg.tied else None
    return apply(LMHead(cfg, dtype), {"params": params.get("lm_head", {})}, x, table)


def outputs(cfg: ModelConfig, params: Params, x_BTD: jax.Array, batch: Batch, dtype: Any = jnp.float32) -> jax.Array:
    """Compute the outputs of the task head in float32 from the final hidden states.

    Shapes: classify [B, C], regress [B], tokens [B, T, C], span [B, T, 2], embed [B, D].
    """
    head = {"params": params.get("head", {})}
    return apply(TaskHead(cfg, dtype), head, x_BTD, batch["segments"], batch.get("order"))


def segment_outputs(
    cfg: ModelConfig, params: Params, x_BTD: jax.Array, segments_BT: jax.Array, count: int, dtype: Any = jnp.float32
) -> jax.Array:
    """Compute the outputs of the task head for rows of E packed texts: one output per text, [B, E, ...].

    Args:
        cfg: Config of the model.
        params: Parameters of the model.
        x_BTD: Final hidden states.
        segments_BT: Number of the text that each token belongs to, from 1 to E; 0 is padding.
        count: Number of texts per row, E. Texts without tokens get arbitrary outputs.
        dtype: Dtype of the computation.
    """
    pooled_BED = pool_segments(x_BTD, segments_BT, cfg.pooling, count)
    alone = pooled_BED.reshape(-1, 1, cfg.d_model)
    y = outputs(cfg, params, alone, {"segments": jnp.ones(alone.shape[:2], jnp.int32)}, dtype)
    return y.reshape(*pooled_BED.shape[:2], *y.shape[1:])


def depth(cfg: ModelConfig, stack: str) -> int:
    """Return the number of layers in a stack, "encoder" or "decoder"."""
    return cfg.encoder_layers if stack == "encoder" and cfg.encoder_layers else cfg.layers
