"""Run the decoder of a language model with a key-value cache: read prompts, and then new tokens.

In an encoder-decoder, the encoder reads the prompt once, and the decoder starts from a single token.

Prompts of unequal length are padded on the left. All rows then write to the same cache slot, by one in-place update per
step. Padding is masked, and positions count from the first token of each prompt. The result of a row therefore does not
depend on the other rows.

The program has one copy of the code per layer, and the parameters are split into layers once. A `lax.scan` over layers
would copy the weights of every layer from the stacked parameters at each step. Such copies are expensive, because a
step spends most of its time on reading the weights.

A slot is one position along the sequence axis of the cache. A slot holds the keys and values of one token, or of
padding.

Shapes: B rows, T new tokens per row, S cache slots, G key/value heads, K head width, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from llmctl.config import limits
from llmctl.model import compressed_cache, flops, functional, kv_cache, layerwise
from llmctl.model.config import ModelConfig
from llmctl.model.generate.padded_prompts import ROUND, Prompts, left_padded, right_padded, round_up
from llmctl.model.generate.served import Served, Shared, served

State = dict[str, Any]
"""Arrays of the decoding loop's state, by name: key-value cache, positions of the next tokens, last tokens, …"""


class CachedModel:
    """Store the parameters of a language model for decoding, and run its decoder with a key-value cache."""

    def __init__(
        self,
        model: ModelConfig,
        params: functional.Params,
        dtype: Any = jnp.float32,
        start: int = 0,
        platform: str = "",
        kv_cache: str = "",
    ) -> None:
        """Split the stacked layers of `params` [L, ...] into one tree per layer.

        Args:
            model: Config of the model.
            params: Parameters of the model. If empty, call `set_params` before decoding.
            dtype: Dtype of the computation and of the cache.
            start: First input token of the decoder in an encoder-decoder.
            platform: Platform that will run the programs. If empty, the platform of the current mesh or of the default
                device.
            kv_cache: Format of the cached keys and values: int8, fp8_e4m3 or int4 (`compressed_cache`). If empty, keys
                and values have the dtype of the computation.

        Raises:
            ValueError: If the model does not generate text.
            RequestError: If the model's keys cannot be stored in the format `kv_cache`.
        """
        if model.architecture == "encoder" or not model.head_kind.vocabulary:
            raise ValueError(
                f"a model with {model.architecture!r} stacks and head {model.head!r} does not continue text"
            )
        compressed_cache.check(kv_cache, model)
        self._given, self._platform, self.dtype, self.start, self.kv_cache = model, platform, dtype, start, kv_cache
        self.model, self.weights = model, ({}, [])
        if params:
            self.set_params(params)

    def set_params(self, params: functional.Params, shared: Shared | None = None) -> None:
        """Replace the parameters by others of the same shapes, without compiling the programs again.

        Args:
            params: Parameters of the model.
            shared: Cache of converted arrays, if several models have arrays in common (see
                `llmctl.model.generate.served`).
        """
        self.model, self.weights = served(self._given, params, self._platform, shared)

    def drop_params(self) -> None:
        """Delete the references to the parameters, so that their memory is free until the next `set_params`."""
        self.weights = {}, []

    def inputs(self, prompts: Sequence[Sequence[int]], max_new: int) -> tuple[Prompts, int]:
        """Return the arguments of `read`: the padded prompts, and the number of tokens for which the cache needs room.

        Raises:
            ValueError: If a prompt is empty, or too long together with `max_new` tokens.
        """
        self.check(prompts, max_new)
        reads = self.model.encoder_layers > 0
        tokens_BT, segments_BT = left_padded([[self.start]] * len(prompts) if reads else prompts, 1 if reads else ROUND)
        source = right_padded(prompts) if reads else {}
        return Prompts(tokens_BT, segments_BT, source), round_up(tokens_BT.shape[1] + max_new)

    def check(self, prompts: Sequence[Sequence[int]], max_new: int) -> None:
        """Check that each prompt has tokens and, with `max_new` more tokens, fits the maximum sequence length.

        In an encoder-decoder, the prompt and the new tokens must fit the maximum sequence length separately.

        Raises:
            ValueError: If a prompt is empty or too long.
        """
        longest = max(map(len, prompts))
        if not min(map(len, prompts)):
            raise ValueError("a prompt has no tokens; begin it with the BOS token")
        if (max(longest, max_new + 1) if self.model.encoder_layers else longest + max_new) > self.model.max_seq_len:
            raise ValueError(f"prompt ({longest}) and continuation ({max_new}) exceed {self.model.max_seq_len} tokens")

    def run(self, served: Served, batch: dict[str, Any], cache: list[Any], last: jax.Array | int | None = -1) -> Any:
        """Run the decoder layers on a batch of tokens, with a key-value cache.

        Args:
            served: Parameters, converted for decoding (`served.served`).
            batch: Arrays of the batch. `slot` is the first cache slot to write: a scalar, or one slot per row [B].
                `cached_segments` [B, S] is 0 for cache slots of padding.
            cache: Key-value cache of each layer.
            last: Index of the token whose hidden state is returned; None returns the hidden states of all tokens.

        Returns:
            Two values: hidden states, and the cache with the new keys and values. The hidden states are [B, D] for one
            token, or [B, T, D] for all tokens.
        """
        rest, layers = served
        carry = layerwise.embed(self.model, rest, batch, batch.get("memory"), dtype=self.dtype)
        kept = []
        for i, (layer, old) in enumerate(zip(layers, cache, strict=True)):
            carry, new = layerwise.cached_block(self.model, "decoder", layer, carry, i, old, self.dtype)
            kept.append(new)
        if last is None:
            return layerwise.finish(self.model, rest, "decoder", carry, self.dtype), kept
        carry = carry._replace(x_BTD=jax.lax.dynamic_slice_in_dim(carry.x_BTD, last, 1, axis=1))
        return layerwise.finish(self.model, rest, "decoder", carry, self.dtype)[:, 0], kept

    def check_cache(self, rows: int, slots: int) -> None:
        """Check that a key-value cache for `rows` texts of `slots` tokens fits into the memory of this machine.

        The check assumes two bytes per element, or the size of an element in the cache's quantized format.

        Raises:
            RequestError: If the cache does not fit.
        """
        what = f"the cache of {rows:,} texts of {slots:,} tokens"
        size = rows * flops.cache_row(self.model, slots, form=self.kv_cache)
        limits.check_memory(size, what, "lower --max-new, --batch-size or --beams")

    def empty_cache(self, B: int, slots: int) -> list[Any]:
        """Return a key-value cache of zeros for each decoder layer, with room for `slots` tokens in each of B rows."""

        def arrays(prefix: str, slots: int) -> dict[str, kv_cache.Cached]:
            shape = kv_cache.cache_shape(B, self.model.kv_heads, slots, self.model.head_dim)
            centered = {"k": prefix == "past", "v": False}
            return {
                f"{prefix}_{name}": kv_cache.empty(shape, self.kv_cache, self.dtype, centered[name]) for name in "kv"
            }

        def layer() -> dict[str, Any]:
            attn = {"attn": arrays("past", slots)}
            # Arrays without slots set the format of the keys and values of cross-attention.
            return attn | ({"cross": arrays("memory", 0)} if self.model.encoder_layers and self.kv_cache else {})

        return [layer() for _ in range(self.model.layers)]

    def read(self, served: Served, prompts: Prompts, slots: int) -> tuple[jax.Array, State]:
        """Run the model on left-padded prompts, and store their keys and values in a new cache for `slots` tokens.

        Call this method in a traced function that has the parameters as an argument. Otherwise, the parameters become
        constants of the program.

        Returns:
            The hidden state [B, D] of the last token of each prompt, and the decoding state, from which `advance`
            continues. The decoding state is a dict with the cache and the position of the next token.
        """
        cfg, (B, T) = self.model, prompts.tokens_BT.shape
        real_BS = jnp.pad(prompts.segments_BT, ((0, 0), (0, slots - T)))
        positions_BT = jnp.maximum(jnp.cumsum(prompts.segments_BT, axis=1) - 1, 0)
        batch = {"tokens": prompts.tokens_BT, "segments": prompts.segments_BT, "positions": positions_BT}
        batch |= {"cached_segments": real_BS, "slot": 0}
        source = prompts.source
        if source:
            batch |= source | {"memory": layerwise.encode(cfg, served[0], source, self.dtype)}
        x_BD, cache = self.run(served, batch, self.empty_cache(B, slots))
        state: State = {
            "cache": cache,
            "segments": real_BS,
            "slot": jnp.int32(T),
            "position": jnp.sum(prompts.segments_BT, axis=1),
        }
        if source:
            state["source"] = source["encoder_segments"]
        return x_BD, state

    def advance(self, served: Served, state: State, token_B: jax.Array) -> tuple[jax.Array, State]:
        """Run the decoder on one token per row, with the key-value cache in the decoding state.

        Returns:
            The hidden state [B, D] of the token, and the new decoding state.
        """
        ones_B1 = jnp.ones((len(token_B), 1), jnp.int32)
        slot = state["slot"]
        segments_BS = jax.lax.dynamic_update_slice(state["segments"], ones_B1, (0, slot))
        batch = {
            "tokens": token_B[:, None],
            "segments": ones_B1,
            # The last chunk may run past the maximum sequence length. Those tokens are cut. Without the limit a lookup
            # beyond the position table gives NaN, which would also enter a conversation's cache.
            "positions": jnp.minimum(state["position"], self.model.max_seq_len - 1)[:, None],
            "cached_segments": segments_BS,
            "slot": slot,
        }
        if "source" in state:
            batch["encoder_segments"] = state["source"]
        x_BD, cache = self.run(served, batch, state["cache"])
        moved = {"cache": cache, "segments": segments_BS, "slot": slot + 1, "position": state["position"] + 1}
        return x_BD, {**state, **moved}

    def extend(
        self,
        served: Served,
        cache: list[Any],
        tokens_BT: jax.Array,
        slot_B: jax.Array,
        padding_B: jax.Array,
        source_BS: jax.Array | None = None,
    ) -> tuple[jax.Array, list[Any]]:
        """Run the decoder on T tokens per row. Each row writes to its own cache slots, from `slot_B` on.

        Slots after the last token of a row may contain keys of tokens that were rejected. Causal attention hides these
        slots, and later tokens overwrite them. A rejection therefore needs no change of the cache.

        Args:
            served: Parameters, converted for decoding (`served.served`).
            cache: Key-value cache of each layer.
            tokens_BT: New tokens.
            slot_B: Cache slot of the first new token of each row.
            padding_B: Number of padding slots before the first token of each row.
            source_BS: Segments of the encoder's tokens in an encoder-decoder.

        Returns:
            The hidden states [B, T, D] of the new tokens, and the new cache.
        """
        at_BT = slot_B[:, None] + jnp.arange(tokens_BT.shape[1])
        slots = jnp.arange(cache[0]["attn"]["past_k"].shape[-2])
        batch: dict[str, Any] = {
            "tokens": tokens_BT,
            "segments": jnp.ones_like(tokens_BT),
            # Proposed tokens may exceed the maximum sequence length, and are then rejected (see `advance`).
            "positions": jnp.clip(at_BT - padding_B[:, None], 0, self.model.max_seq_len - 1),
            "cached_segments": (slots >= padding_B[:, None]).astype(jnp.int32),
            "slot": slot_B,
        }
        if source_BS is not None:
            batch["encoder_segments"] = source_BS
        return self.run(served, batch, cache, last=None)
