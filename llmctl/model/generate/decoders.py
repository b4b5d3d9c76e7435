"""Generate text with several models that have arrays in common, such as one base model with several adapters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import combinations
from typing import Any

import jax
import jax.numpy as jnp

from llmctl.model import functional
from llmctl.model.config import ModelConfig
from llmctl.model.generate.decode import Decoder
from llmctl.model.generate.served import Served, Shared


class Decoders:
    """Store one decoder per model config, and the parameters of each model by name.

    Models with the same config use the same compiled programs. Arrays that models have in common, such as the base of
    several adapters, are stored once. An adapter is therefore merged only if no other model has the same base.

    Example:
        >>> import jax
        >>> cfg = ModelConfig(preset="llama-tiny", layers=1, vocab_size=16)
        >>> params = functional.init(cfg, jax.random.key(0))
        >>> decoders = Decoders({"one": (cfg, params), "two": (cfg, params)})
        >>> decoders.use("one") is decoders.use("two")
        True
    """

    def __init__(
        self,
        models: Mapping[str, tuple[ModelConfig, functional.Params]],
        dtype: Any = jnp.float32,
        start: int = 0,
        kv_cache: str = "",
        draft: tuple[ModelConfig, functional.Params] | None = None,
    ) -> None:
        """Convert the parameters of the models for decoding, and create one decoder per model config.

        Args:
            models: Config and parameters of each model, by name.
            dtype: Dtype of the computation and of the caches.
            start: First token of the decoder of an encoder-decoder.
            kv_cache: Format of cached keys and values, if they are quantized (`Decoder`).
            draft: Config and parameters of a draft model for speculative decoding. The draft model gets a separate
                decoder.

        Raises:
            ValueError: If a model does not generate text.
            RequestError: If a model's keys cannot be stored in the format `kv_cache`.
        """
        self._held: dict[str, tuple[Decoder, ModelConfig, Served]] = {}
        shared = Shared() if _have_common_arrays([*models.values(), *([draft] if draft else [])]) else None
        by_config: dict[str, Decoder] = {}
        for name, (model, params) in models.items():
            decoder = by_config.setdefault(model.model_dump_json(), Decoder(model, {}, dtype, start, kv_cache=kv_cache))
            decoder.set_params(params, shared)
            self._held[name] = decoder, decoder.model, decoder.weights
        self.draft = Decoder(draft[0], {}, dtype, start, kv_cache=kv_cache) if draft else None
        if draft and self.draft:
            self.draft.set_params(draft[1], shared)

    def use(self, name: str) -> Decoder:
        """Return the decoder of a model, with the parameters of this model."""
        decoder, model, held = self._held[name]
        decoder.model, decoder.weights = model, held
        return decoder


def _have_common_arrays(models: Iterable[tuple[ModelConfig, functional.Params]]) -> bool:
    """Return whether any two of the models have a parameter array in common."""
    arrays = [{id(a) for a in jax.tree.leaves(params)} for _, params in models]
    return any(one & other for one, other in combinations(arrays, 2))
