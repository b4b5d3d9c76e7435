"""Generate text with a key-value cache, by two compiled programs: the prefill and the decoding loop.

In an encoder-decoder, the encoder reads the prompt once, and the decoder starts from a single token.

Prompts of unequal length are padded on the left. All rows then write to the same cache slot, by one in-place update per
step. Padding is masked, and positions count from the first token of each prompt. The result of a row therefore does not
depend on the other rows.

The program has one copy of the code per layer, and the parameters are split into layers once. A `lax.scan` over layers
would copy the weights of every layer from the stacked parameters at each step. Such copies are expensive, because a
step spends most of its time on reading the weights.

A slot is one position along the sequence axis of the cache. A slot holds the keys and values of one token, or of
padding.

Shapes: B rows, T prompt slots, S cache slots, G key/value heads, K head width, V vocabulary, E end tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmctl.config import limits
from llmctl.model import compressed_cache, flops, functional, kv_cache
from llmctl.model.config import ModelConfig
from llmctl.model.generate.padded_prompts import (
    NOTHING,
    ROUND,
    Prompts,
    left_padded,
    padded_ends,
    right_padded,
    round_up,
)
from llmctl.model.generate.sampling import Sampling, choose, row_keys
from llmctl.model.generate.served import Served, Shared, served

State = dict[str, Any]
"""State of the decoding loop by name: key-value cache, positions of the next tokens, last tokens, and so on."""


class Decoder:
    """Generate text with a language model.

    Greedy decoding gives the same tokens as repeated full forward passes over the prompt and its continuation.

    Example:
        >>> from llmctl.model import functional
        >>> from llmctl.model.config import ModelConfig
        >>> cfg = ModelConfig(preset="llama-tiny", layers=1, vocab_size=16)
        >>> decoder = Decoder(cfg, functional.init(cfg, jax.random.key(0)))
        >>> [chunk.shape for chunk in decoder.generate([[1, 2, 3]], max_new=4, chunk=3)]
        [(1, 1), (1, 3)]
    """

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
        self._prefill = jax.jit(self.first, static_argnames=("slots", "rules"))
        self._decode = jax.jit(self._decode_loop, static_argnames=("rules", "count"), donate_argnames="state")

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

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new: int,
        *,
        ends: Sequence[int] = (),
        sampling: Sampling | None = None,
        seed: int = 0,
        first: int = 0,
        chunk: int = 16,
        stopped_B: np.ndarray | None = None,
    ) -> Iterator[np.ndarray]:
        """Continue prompts and yield the new tokens in chunks.

        Args:
            prompts: Token ids of B prompts.
            max_new: Maximum number of new tokens per row.
            ends: Token ids that end a row. The end token is part of the output, and NOTHING follows it.
            sampling: Sampling rules; greedy if None.
            seed: Seed of the sampling.
            first: Index of the first prompt among all prompts that share the seed.
            chunk: Number of tokens per yield, after a first yield of one token.
            stopped_B: Array bool [B]. Between two chunks, the caller may end a row by setting its element to true.

        Yields:
            New tokens int32 [B, n]. The generator stops when all rows have ended or after `max_new` tokens. The caller
            may close the generator earlier.

        Raises:
            ValueError: If a prompt is empty, or too long together with `max_new` tokens.
            RequestError: If the cache does not fit into memory.
        """
        inputs, slots = self.inputs(prompts, max_new)
        self.check_cache(len(prompts), slots)
        rules, ends_E, keys_B = sampling or Sampling(), padded_ends(ends), row_keys(seed, len(prompts), first)
        state = self._prefill(self.weights, inputs, keys_B, ends_E, slots=slots, rules=rules)
        left = max_new
        for _, out_BN in self.follow(state, max_new, keys_B, ends_E, rules, chunk, stopped_B):
            yield out_BN[:, :left]
            left -= out_BN.shape[1]

    def follow(
        self,
        state: State,
        max_new: int,
        keys_B: jax.Array,
        ends_E: np.ndarray,
        rules: Sampling,
        chunk: int,
        stopped_B: np.ndarray | None = None,
    ) -> Iterator[tuple[State, np.ndarray]]:
        """Continue decoding from a state (key-value cache and last tokens), and yield (state, new tokens [B, n]).

        A yielded state is valid only until the next state is requested, because the arrays of the state are then
        donated. The last chunk has full length, even if the number of tokens exceeds `max_new`. The first yielded token
        is the last token in `state`.

        Args:
            state: Result of `first`.
            max_new: Maximum number of new tokens per row.
            keys_B: One random key per row.
            ends_E: End tokens.
            rules: Sampling rules.
            chunk: Number of tokens per chunk, after a first chunk of one token.
            stopped_B: Array bool [B] of rows to end (see `generate`).
        """
        yield state, np.asarray(state["token"])[:, None]
        for _ in range(1, max_new, chunk):
            if stopped_B is not None:
                state["done"] = state["done"] | stopped_B
            if bool(np.all(state["done"])):
                return
            state, out_BN = self._decode(self.weights, state, keys_B, ends_E, rules=rules, count=chunk)
            yield state, np.asarray(out_BN)

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

    def run(self, served: Served, batch: dict[str, Any], cache: list[Any], last: jax.Array | int = -1) -> Any:
        """Run the decoder layers on a batch of tokens, with a key-value cache.

        Args:
            served: Parameters, converted for decoding (`served.served`).
            batch: Arrays of the batch. `slot` is the first cache slot to write. `cached_segments` [B, S] is 0 for cache
                slots of padding.
            cache: Key-value cache of each layer.
            last: Index of the token whose hidden state is returned.

        Returns:
            The hidden state [B, D] of the token at index `last`, and the cache with the new keys and values.
        """
        rest, layers = served
        carry = functional.embed(self.model, rest, batch, batch.get("memory"), dtype=self.dtype)
        kept = []
        for i, (layer, old) in enumerate(zip(layers, cache, strict=True)):
            carry, new = functional.cached_block(self.model, "decoder", layer, carry, i, old, self.dtype)
            kept.append(new)
        carry = carry._replace(x_BTD=jax.lax.dynamic_slice_in_dim(carry.x_BTD, last, 1, axis=1))
        return functional.finish(self.model, rest, "decoder", carry, self.dtype)[:, 0], kept

    def next(
        self, served: Served, x_BD: jax.Array, state: State, keys_B: jax.Array, ends_E: jax.Array, rules: Sampling
    ) -> State:
        """Select the next token of each row from the hidden state of the row's last token, and return the new decoding
        state.

        Rows that have ended get the token id NOTHING.
        """
        logits_BV = functional.lm_logits(self.model, served[0], x_BD, self.dtype)
        chosen_B = choose(logits_BV, state.get("seen"), keys_B, state["step"], rules)
        token_B = jnp.where(state["done"], NOTHING, chosen_B)
        out = {**state, "token": token_B, "step": state["step"] + 1}
        out["done"] = state["done"] | jnp.any(token_B[:, None] == ends_E, axis=1)
        if "seen" in state:
            out["seen"] = state["seen"].at[jnp.arange(len(token_B)), chosen_B].set(True)
        return out

    def check_cache(self, rows: int, slots: int) -> None:
        """Check that a key-value cache with at most two bytes per element fits into the memory of this machine.

        Raises:
            RequestError: If the cache does not fit.
        """
        what = f"the cache of {rows:,} texts of {slots:,} tokens"
        size = rows * slots * flops.kv_cache(self.model, kv_cache=self.kv_cache)
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
            batch |= source | {"memory": functional.encode(cfg, served[0], source, self.dtype)}
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

    def first(
        self,
        served: Served,
        prompts: Prompts,
        keys_B: jax.Array,
        ends_E: jax.Array,
        slots: int,
        rules: Sampling,
    ) -> State:
        """Run the model on padded prompts, select the first new token of each row, and return the decoding state."""
        B = len(prompts.tokens_BT)
        x_BD, state = self.read(served, prompts, slots)
        state |= {"done": jnp.zeros(B, bool), "step": jnp.int32(0)}
        if rules.repetition_penalty != 1.0:
            seen_BV = jnp.zeros((B, self.model.vocab_size), bool)
            state["seen"] = seen_BV.at[jnp.arange(B)[:, None], prompts.tokens_BT].max(prompts.segments_BT > 0)
        return self.next(served, x_BD, state, keys_B, ends_E, rules)

    def one(self, served: Served, state: State, keys_B: jax.Array, ends_E: jax.Array, rules: Sampling) -> State:
        """Run the decoder on the last token of each row, select the next token, and return the new decoding state."""
        x_BD, state = self.advance(served, state, jnp.maximum(state["token"], 0))
        return self.next(served, x_BD, state, keys_B, ends_E, rules)

    def _decode_loop(
        self, served: Served, state: State, keys_B: jax.Array, ends_E: jax.Array, rules: Sampling, count: int
    ) -> tuple[State, jax.Array]:
        """Generate up to `count` tokens per row, and fewer if all rows end.

        Returns:
            The decoding state, and the new tokens int32 [B, count], with NOTHING after the end of a row.
        """

        def step(carry: tuple[jax.Array, State, jax.Array]) -> tuple[jax.Array, State, jax.Array]:
            n, state, out_BN = carry
            state = self.one(served, state, keys_B, ends_E, rules)
            return n + 1, state, jax.lax.dynamic_update_slice(out_BN, state["token"][:, None], (0, n))

        def goes_on(carry: tuple[jax.Array, State, jax.Array]) -> jax.Array:
            n, state, _ = carry
            return (n < count) & ~jnp.all(state["done"])

        out_BN = jnp.full((len(state["token"]), count), NOTHING, jnp.int32)
        _, state, out_BN = jax.lax.while_loop(goes_on, step, (jnp.int32(0), state, out_BN))
        return state, out_BN
