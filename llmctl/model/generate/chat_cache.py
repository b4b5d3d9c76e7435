"""Cache the keys and values of one conversation, so that only new tokens of a longer prompt are computed.

A slot is one position along the sequence axis of the cache. Tokens fill the slots from 0 on, without gaps. A new prompt
is compared with the cached tokens. All tokens from the first difference on are computed again, so the answer is the
same as without a cache. The center of quantized keys is the mean of the first 16 keys
(`llmctl.model.compressed_cache`). If the new prompt and the cached tokens differ within the first 16 tokens, this mean
changes. With quantized keys, all tokens are then computed again.

Shapes: T new tokens with padding, S cache slots, V vocabulary, E end tokens. The batch size is 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmctl.model import kv_cache
from llmctl.model.config import ModelConfig
from llmctl.model.generate.cached_model import State
from llmctl.model.generate.decode import Decoder
from llmctl.model.generate.padded_prompts import NOTHING, ROUND, padded_ends, round_up
from llmctl.model.generate.sampling import Sampling, row_keys
from llmctl.model.generate.served import Served


class Session:
    """Generate text with a Decoder for one prompt at a time, and keep the key-value cache between calls.

    `generate` has the same arguments as `Decoder.generate`.
    """

    def __init__(self, decoder: Decoder) -> None:
        """Start with an empty cache.

        Raises:
            ValueError: If the model is an encoder-decoder, because its answer does not continue the prompt.
        """
        if decoder.model.encoder_layers:
            raise ValueError("an encoder-decoder holds no conversations")
        self.decoder = decoder
        self.read = 0
        """Number of prompt tokens that were computed so far. Tokens found in the cache are not counted."""
        self._begun = 0  # number of tokens in the prompt that was computed from its first token on
        self._ids: list[int] = []
        self._cache: list[Any] = []
        self._extend = jax.jit(self._read_and_select, static_argnames="rules", donate_argnames="cache")

    @property
    def model(self) -> ModelConfig:
        """Return the config of the decoder's model."""
        return self.decoder.model

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
        """Continue one prompt, and yield the new tokens in chunks. See `Decoder.generate` for arguments and errors."""
        (prompt,) = prompts
        self.decoder.check([prompt], max_new)
        rules, ends_E, keys_B = sampling or Sampling(), padded_ends(ends), row_keys(seed, 1, first)
        kept = next((i for i, (a, b) in enumerate(zip(self._ids, prompt, strict=False)) if a != b), len(self._ids))
        kept = min(kept, len(prompt) - 1)  # the last token's hidden state predicts the next one
        if self.decoder.kv_cache and min(kept, self._begun) < kv_cache.CENTER_TOKENS:
            kept = 0  # quantized keys depend on the mean of the first keys, which is computed once
        if not kept:
            self._begun = len(prompt)
        new = np.asarray(prompt[kept:], np.int32)
        T = round_up(len(new))
        # The loop runs to the end of its last chunk. Padding after the prompt is overwritten later.
        cache = self._take_cache(max(kept + T, len(prompt) + round_up(max_new, chunk)))
        seen_1V = np.zeros((1, self.model.vocab_size), bool)
        seen_1V[0, np.asarray(prompt)] = True
        begun = self._extend(
            self.decoder.weights, cache, np.pad(new, (0, T - len(new)))[None],
            np.int32(kept), np.int32(len(new)), seen_1V, keys_B, ends_E, rules=rules,
        )  # fmt: skip
        self.read += len(new)
        ids, left = list(prompt), max_new
        for state, out_1N in self.decoder.follow(begun, max_new, keys_B, ends_E, rules, chunk, stopped_B):
            ids += [i for i in out_1N[0].tolist() if i != NOTHING]
            # The caller may use the cache until the next chunk, which donates it. The last token was sampled but not
            # yet computed.
            self._ids, self._cache = ids[:-1], state["cache"]
            yield out_1N[:, :left]
            left -= out_1N.shape[1]

    def _take_cache(self, slots: int) -> list[Any]:
        """Remove the cache from this object, and return it with room for at least `slots` tokens.

        The caller donates the cache to a compiled function, so this object must not use it any more. Sizes are powers
        of two times `ROUND`, so that functions are compiled for few sizes.
        """
        cache = self._cache
        held = cache[0]["attn"]["past_k"].shape[-2] if cache else 0
        self._ids, self._cache = [], []
        if slots <= held:
            return cache
        self.decoder.check_cache(1, slots)
        size = ROUND * 2 ** (round_up(slots) // ROUND - 1).bit_length()
        if not held:
            return self.decoder.empty_cache(1, size)
        return kv_cache.widened(cache, size - held)

    def _read_and_select(
        self,
        served: Served,
        cache: list[Any],
        tokens_1T: jax.Array,
        kept: jax.Array,
        new: jax.Array,
        seen_1V: jax.Array,
        keys_B: jax.Array,
        ends_E: jax.Array,
        rules: Sampling,
    ) -> State:
        """Run the model on the new tokens of the prompt, select the next token, and return the decoding state.

        Args:
            served: Parameters, converted for decoding (`served.served`).
            cache: Key-value cache. Only the first `kept` positions are valid.
            tokens_1T: New tokens, padded on the right.
            kept: Number of cached tokens.
            new: Number of new tokens.
            seen_1V: Whether each token of the vocabulary occurs in the prompt.
            keys_B: Random key.
            ends_E: End tokens.
            rules: Sampling rules.
        """
        at_1T = jnp.arange(tokens_1T.shape[1])[None]
        segments_1S = (jnp.arange(cache[0]["attn"]["past_k"].shape[-2])[None] < kept + new).astype(jnp.int32)
        batch = {
            "tokens": tokens_1T,
            "segments": (at_1T < new).astype(jnp.int32),
            "positions": kept + jnp.minimum(at_1T, new - 1),
            "cached_segments": segments_1S,
            "slot": kept,
        }
        x_1D, cache = self.decoder.run(served, batch, cache, new - 1)
        state: State = {"cache": cache, "segments": segments_1S, "slot": kept + new, "position": (kept + new)[None]}
        state |= {"done": jnp.zeros(1, bool), "step": jnp.int32(0)}
        if rules.repetition_penalty != 1.0:
            state["seen"] = seen_1V
        return self.decoder.next(served, x_1D, state, keys_B, ends_E, rules)
