"""Train keys and values in front of each text (prefix tuning; Li and Liang, 2021, arXiv:2101.00190).

Each layer has trained keys and values: the parameters `attn/prefix/k` and `attn/prefix/v`. In an encoder-decoder, only
the layers of the decoder have a prefix. The prefix is part of the network, so ModelConfig contains its length. The
other parameters are frozen, and may be quantized.

If `prefix.projection` is set, a network of two linear layers computes all keys and values from trained embeddings. This
makes training more stable. The network exists only in training, and its parameters are not part of the model.

Shapes: P vectors per layer, L layers, W total width of all key heads, H inner width of the network.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from llmctl.config.errors import RequestError
from llmctl.data.pretraining.packing import PackedRows
from llmctl.evaluate.tasks.registry import TASKS
from llmctl.model.head_kinds import HEAD_KINDS
from llmctl.model.prefix import added, removed
from llmctl.train.adapters.method import Method, Params

if TYPE_CHECKING:
    import jax

    from llmctl.artifacts.artifact import Artifact
    from llmctl.model.config import ModelConfig

PROJECTION = 2
"""Constant that is folded into a run's random key. The resulting key initializes the network that computes the
prefix."""


class Prefix(Method):
    """Train the prefix (keys and values in front of every text) and the task's head."""

    name = "prefix"
    settings = ("prefix",)

    def check(self, config: Any, base: Artifact) -> None:
        """Check the config as Method.check does, and check that the settings and the model allow a prefix.

        Raises:
          RequestError: If Method.check fails. If layers are frozen. If the prefix leaves too few positions for texts.
            If the model is a decoder with relative positions. If `prefix.projection` is set for a model that already
            has a prefix. If `prefix.projection` and `prefix.deviation` are both set.
        """
        super().check(config, base)
        settings, model, trained = config.prefix, base.model, config.trained
        if model.architecture == "encoder_decoder" and not HEAD_KINDS[TASKS[config.task].head_for(model)].vocabulary:
            model = model.model_copy(update=removed(model))  # the decoder and its prefix are dropped
        given = [f"trained.{name}" for name in ("last_layers", "unfreeze_every") if getattr(trained, name)]
        if config.freeze_layers:
            given.append("freeze_layers")
        if given:
            raise RequestError(f"{given[0]}: not for method 'prefix', whose vectors in frozen layers would stay random")
        if settings.projection and settings.deviation != type(settings)().deviation:
            raise RequestError("prefix.deviation: has no effect with prefix.projection; leave out one of the two")
        if settings.projection and model.prefix_tokens:
            raise RequestError(
                f"prefix.projection: {base.path} has a trained prefix, from which a projection cannot start; leave "
                "prefix.projection out"
            )
        if model.positions == "relative" and model.architecture == "decoder":
            raise RequestError(
                f"method = 'prefix': {base.path} is a decoder with relative positions, which are counted from the "
                "padding of a prompt; use method = 'lora'"
            )
        room = self.network(config, model).max_seq_len
        if config.train.seq_len > room:
            raise RequestError(
                f"prefix.tokens = {settings.tokens:,}: leaves {max(room, 0):,} of the {model.max_seq_len:,} positions "
                f"of {base.path} for texts, and train.seq_len = {config.train.seq_len:,}"
            )

    def network(self, config: Any, model: ModelConfig) -> ModelConfig:
        """Return the config of the model with the prefix. An existing prefix is trained further.

        The prefix takes the first positions, so fewer positions remain for texts. With relative positions, texts keep
        all positions.

        Raises:
          RequestError: If an existing prefix has another length.
        """
        tokens = config.prefix.tokens
        if model.prefix_tokens == tokens:
            return model
        if model.prefix_tokens:
            raise RequestError(
                f"prefix.tokens = {tokens:,}: the parent has a trained prefix of {model.prefix_tokens:,} tokens, which "
                "these settings must repeat"
            )
        return model.model_copy(update=added(model, tokens))

    def check_rows(self, config: Any, model: ModelConfig, rows: Any) -> None:
        """Check that each training row has only one text, if the model has relative positions.

        The distance from a token to the prefix is counted from the start of the row. For a second text, this distance
        would be wrong.

        Raises:
          RequestError: If rows are packed from several texts.
        """
        if model.positions == "relative" and isinstance(rows, PackedRows):
            raise RequestError(
                f"method = 'prefix': task {config.task!r} packs several texts into a row, and this model's relative "
                "positions count from the row's start; give the data prompts and completions, or use method = 'lora'"
            )

    def attach(
        self, config: Any, model: ModelConfig, params: Params, key: jax.Array, mesh: jax.sharding.Mesh
    ) -> Params:
        """Return the parameters with a prefix, sharded over `mesh`. A prefix that the model already has is kept."""
        import jax

        from llmctl.model import functional, weights

        shapes = weights.flatten(functional.abstract(model))
        missing = sorted(shapes.keys() - weights.flatten(params).keys())
        if not missing:
            return params
        layout = weights.flatten(functional.shardings(model, functional.abstract(model), mesh))

        def fresh(key: jax.Array) -> dict[str, Any]:
            keys = jax.random.split(key, len(missing))
            return {
                path: config.prefix.deviation * jax.random.normal(k, shapes[path].shape)
                for path, k in zip(missing, keys, strict=True)
            }

        new = jax.jit(fresh, out_shardings={path: layout[path] for path in missing})(key)
        return weights.updated(params, new)

    def trains(self, config: Any, model: ModelConfig, params: Params) -> Callable[[str], bool]:
        """Return a predicate on array names: True for the trained arrays, which are the prefix and the task's head.

        If `prefix.projection` is set, the network that computes the prefix is trained instead.
        """
        from llmctl.model import weights

        own = not config.prefix.projection
        return lambda name: (own and weights.parse(name).prefix) or weights.parse(name).task_head

    def trains_extra(self, config: Any) -> bool:
        """Return whether a network that computes the prefix is trained, instead of the prefix itself."""
        return config.prefix.projection > 0

    def during(self, config: Any, params: Params, steps: int) -> dict[str, Any]:
        """Return the fields of the training job with which the network for the prefix is trained, by name.

        The fields are those of `llmctl.train.job.Job`. If `prefix.projection` is not set, the result is empty.
        """
        if not config.prefix.projection:
            return {}
        return {"extra": projection(config, params), "result": projected, "trains_result": True}


def projection(config: Any, params: Params) -> dict[str, jax.Array]:
    """Return the initial parameters, by name, of the network that computes the prefix. All parameters are replicated.

    If the arrays of `params` are abstract, the result is abstract too. `embedding` [P, W] is normally distributed.
    `first` [W, H], `last` [H, 2 * L * W] and their biases are uniformly distributed, as in torch's linear layers.
    """
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    k_LPW, _ = vectors(params).values()
    (L, P, W), H = k_LPW.shape, config.prefix.projection
    key = jax.random.fold_in(jax.random.key(config.seed), PROJECTION)

    def fresh() -> dict[str, jax.Array]:
        first, last, *keys = jax.random.split(key, 5)

        def uniform(key: jax.Array, shape: tuple[int, ...], inputs: int) -> jax.Array:
            return jax.random.uniform(key, shape, minval=-(inputs**-0.5), maxval=inputs**-0.5)

        return {
            "embedding": jax.random.normal(keys[0], (P, W)),
            "first": uniform(first, (W, H), W),
            "first_bias": uniform(keys[1], (H,), W),
            "last": uniform(last, (H, 2 * L * W), H),
            "last_bias": uniform(keys[2], (2 * L * W,), H),
        }

    placed: Any = k_LPW.sharding
    replicated = NamedSharding(placed.mesh, PartitionSpec())
    if isinstance(k_LPW, jax.ShapeDtypeStruct):
        return jax.tree.map(lambda a: a.update(sharding=replicated), jax.eval_shape(fresh))
    return jax.jit(fresh, out_shardings=replicated)()


def projected(params: Params, extra: Params) -> Params:
    """Return `params` with new keys and values of the prefix. A network with the parameters `extra` computes the new
    values.
    """
    import jax.numpy as jnp

    from llmctl.model import weights

    found = vectors(params)
    L, P, W = next(iter(found.values())).shape
    inner_PH = jnp.tanh(extra["embedding"] @ extra["first"] + extra["first_bias"])
    out_PLSW = (inner_PH @ extra["last"] + extra["last_bias"]).reshape(P, L, 2, W)
    both = {path: out_PLSW[:, :, i].swapaxes(0, 1) for i, path in enumerate(found)}
    return weights.updated(params, both)


def vectors(params: Params) -> dict[str, jax.Array]:
    """Return {parameter path: array [L, P, W]} for the trained keys and values of a prefix. Keys come before values."""
    from llmctl.model import weights

    return {path: w for path, w in sorted(weights.flatten(params).items()) if weights.parse(path).prefix}


METHOD = Prefix()
