"""Generate text with a key-value cache, by two compiled programs: the prefill and the decoding loop.

Shapes: B rows, N new tokens, D model width, V vocabulary, E end tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmctl.model import functional
from llmctl.model.config import ModelConfig
from llmctl.model.generate.cached_model import CachedModel, State
from llmctl.model.generate.padded_prompts import NOTHING, Prompts, padded_ends
from llmctl.model.generate.sampling import Sampling, choose, row_keys
from llmctl.model.generate.served import Served


class Decoder(CachedModel):
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
        """Wrap the prefill and the decoding loop in `jax.jit`. The arguments and errors are those of `CachedModel`."""
        super().__init__(model, params, dtype, start, platform, kv_cache)
        self._prefill = jax.jit(self.first, static_argnames=("slots", "rules"))
        self._decode = jax.jit(self._decode_loop, static_argnames=("rules", "count"), donate_argnames="state")

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

        When the next state is requested, the arrays of the yielded state are donated. Do not use a state after that.
        The last chunk has full length, even if the number of tokens exceeds `max_new`. The first yielded token is the
        last token in `state`.

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

    def next(
        self, served: Served, x_BD: jax.Array, state: State, keys_B: jax.Array, ends_E: jax.Array, rules: Sampling
    ) -> State:
        """Select the next token of each row, and return the new decoding state.

        `x_BD` has the hidden state of each row's last token.

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
