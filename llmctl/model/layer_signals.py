"""Compare inner layers of a student and a teacher: hidden states, embeddings, and relations between tokens.

The hidden states are the outputs of layers, and the embeddings are the input of the first layer. Learned projections
map the student's vectors to the teacher's width, if the widths differ (Jiao et al., 2019, arXiv:1909.10351). Relations
are described in `token_relations`.

    signals = Signals(hidden=0.5, relations=0.1, pairs=((0, 1), (1, 3)))
    x_BTD, own = signals.read(cfg, params, batch, "student", train=True, rng=key)
    y_BTE, theirs = signals.read(teacher_cfg, teacher, batch, "teacher")
    losses = signals.losses(own, theirs, batch["segments"], signals.projections(cfg, teacher_cfg, key))

In an encoder-decoder, decoder layers are compared.

Shapes: B batch, T sequence, D width of the student, E width of the teacher, n layer pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from llmctl.model import functional, layerwise, token_relations
from llmctl.model.config import ModelConfig
from llmctl.model.layers import Dense, Norm
from llmctl.model.transformer import Batch, Params, apply

Side = Literal["student", "teacher"]
INPUT = -1
"""Index that stands for the input of the first layer, as in `layer_states.run`."""


@dataclass(frozen=True)
class Inner:
    """Store intermediate activations of the student or a teacher: layer outputs by index, queries, keys and values."""

    states: dict[int, jax.Array]
    projections: dict[str, jax.Array]


@dataclass(frozen=True)
class Signals:
    """Define which layers of student and teacher are compared, by which distances, and with which loss weights."""

    hidden: float = 0.0
    relations: float = 0.0
    embeddings: float = 0.0
    pairs: tuple[tuple[int, int], ...] = ()
    """Compared layers: (layer of the student, layer of the teacher). Relations are compared in the last pair."""
    distance: Literal["mse", "cosine"] = "mse"
    """Distance between the student's and the teacher's vector of a token. mse: mean squared difference of the elements.
    cosine: 1 - cosine similarity. Losses are means of the distance over tokens."""
    relation_heads: int = 1
    """Number of parts into which queries, keys and values are split. A relation is the attention-like similarity of all
    pairs of tokens within one part, as in MiniLMv2 (`llmctl.model.token_relations`)."""

    def weight(self, name: str) -> float:
        """Return the loss weight of a signal: "hidden", "relations" or "embeddings"."""
        return getattr(self, name)

    def layers(self, side: Side) -> list[int]:
        """Return the indices of the layers whose outputs the losses read; INPUT stands for the embeddings."""
        at = ("student", "teacher").index(side)
        found = {pair[at] for pair in self.pairs} if self.hidden else set()
        found |= {self.pairs[-1][at] - 1} if self.relations else set()
        return sorted(found | ({INPUT} if self.embeddings else set()))

    def read(
        self, cfg: ModelConfig, params: Params, batch: Batch, side: Side, *, dtype: Any = jnp.float32, **options: Any
    ) -> tuple[jax.Array, Inner]:
        """Run a model, and return its final hidden states and the inner values that the losses read.

        Args:
            cfg: Config of the model.
            params: Parameters of the model.
            batch: Batch.
            side: Role of the model, "student" or "teacher". Gradients do not flow into a teacher.
            dtype: Dtype of the computation.
            **options: Further arguments of `functional.hidden_states`.
        """
        layers = self.layers(side)
        x_BTD, states = functional.hidden_states(cfg, params, batch, layers, dtype=dtype, **options)
        found, projections = dict(zip(layers, states, strict=True)), {}
        if self.relations:
            layer = self.pairs[-1][("student", "teacher").index(side)]
            projections = heads_of(cfg, params, layer, found[layer - 1], dtype)
        inner = Inner(found, projections)
        if side == "teacher":
            inner = Inner(*jax.lax.stop_gradient((inner.states, inner.projections)))
        return x_BTD, inner

    def projections(self, cfg: ModelConfig, teacher_cfg: ModelConfig, key: jax.Array) -> Params:
        """Return initial projections from the student's width to the teacher's, by name; {} if the widths are equal.

        The projections are "hidden" [n, D, E] and "embeddings" [D, E], normally distributed with the variance 1 / D.
        """
        D, E = cfg.d_model, teacher_cfg.d_model
        shapes = {"hidden": (len(self.pairs), D, E)} if self.hidden else {}
        shapes |= {"embeddings": (D, E)} if self.embeddings else {}
        keys = jax.random.split(key, 2)
        drawn = {name: jax.random.normal(k, s) * D**-0.5 for k, (name, s) in zip(keys, shapes.items(), strict=False)}
        return drawn if D != E else {}

    def losses(self, student: Inner, teacher: Inner, segments_BT: jax.Array, projections: Params) -> Params:
        """Return the unweighted losses by name, each a mean over the tokens that are not padding.

        Args:
            student: Inner values of the student.
            teacher: Inner values of the teacher.
            segments_BT: Number of the packed text of each token; 0 is padding.
            projections: Projections that were initialized by the method `projections` and then trained.
        """
        real_BT, found = (segments_BT > 0).astype(jnp.float32), {}

        def apart(a: int, b: int, w: jax.Array | None) -> jax.Array:
            return self._distance(student.states[a], teacher.states[b], w, real_BT)

        if self.hidden:
            w = projections.get("hidden")
            each = [apart(a, b, None if w is None else w[i]) for i, (a, b) in enumerate(self.pairs)]
            found["hidden"] = sum(each[1:], each[0]) / len(each)
        if self.embeddings:
            found["embeddings"] = apart(INPUT, INPUT, projections.get("embeddings"))
        if self.relations:
            pairs = [(student.projections[n], teacher.projections[n]) for n in ("q", "k", "v")]
            each = [token_relations.divergence(a, b, segments_BT, self.relation_heads) for a, b in pairs]
            found["relations"] = sum(each[1:], each[0]) / len(each)
        return found

    def _distance(self, x_BTD: jax.Array, y_BTE: jax.Array, w_DE: jax.Array | None, real_BT: jax.Array) -> jax.Array:
        """Return the distance between student vectors x and teacher vectors y, as a mean over tokens without padding.

        If `w_DE` is given, x is projected to the teacher's width first.
        """
        x, y = x_BTD.astype(jnp.float32), y_BTE.astype(jnp.float32)
        x = x if w_DE is None else x @ w_DE
        if self.distance == "mse":
            apart_BT = jnp.mean(jnp.square(x - y), axis=-1)
        else:
            size = jnp.sqrt(jnp.sum(x * x, axis=-1) * jnp.sum(y * y, axis=-1) + 1e-12)
            apart_BT = 1 - jnp.sum(x * y, axis=-1) / size
        return jnp.sum(apart_BT * real_BT) / jnp.maximum(jnp.sum(real_BT), 1.0)


def heads_of(
    cfg: ModelConfig, params: Params, layer: int, x_BTD: jax.Array, dtype: Any = jnp.float32
) -> dict[str, jax.Array]:
    """Compute queries, keys and values of a layer's self-attention, before positions are applied.

    Args:
        cfg: Config of the model.
        params: Parameters of the model.
        layer: Index of the layer in the decoder or, if there is none, in the encoder.
        x_BTD: Input of the layer.
        dtype: Dtype of the computation.

    Returns:
        {"q", "k", "v"}: arrays [B, T, W], for the total width W of the heads.
    """
    own = layerwise.layer_params(params, functional.stacks(cfg)[-1], layer)
    x = x_BTD if cfg.norm_position == "post" else apply(Norm(cfg, dtype), {"params": own["attn_norm"]}, x_BTD)

    def one(name: str, heads: int) -> jax.Array:
        module = Dense(heads * cfg.head_dim, ("embed", "heads"), cfg.qkv_bias, dtype)
        y = apply(module, {"params": own["attn"][name]}, x)
        if not cfg.qk_norm or name == "v":
            return y
        y_BTHK = y.reshape(*y.shape[:2], heads, cfg.head_dim)
        return apply(Norm(cfg, dtype), {"params": own["attn"][f"{name}_norm"]}, y_BTHK).reshape(y.shape)

    return {name: one(name, cfg.heads if name == "q" else cfg.kv_heads) for name in ("q", "k", "v")}
