"""One conversation's cache: of a prompt that goes on from what was read before, only what is new is read.

Tokens stand in the cache from slot 0 on without gaps. A prompt is compared with the tokens that are there, one by one:
what differs, and all behind it, is read anew, so the answer is that of a fresh run whatever the prompt kept.

Shapes: T new tokens with padding, S slots of the cache, V vocabulary, E end tokens; there is one row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmctl.model.config import ModelConfig
from llmctl.model.generate.decode import NOTHING, ROUND, Decoder, Served, State, empty_cache, padded_ends, round_up
from llmctl.model.generate.sampling import Sampling, row_keys


class Session:
    """A decoder that remembers; `generate` is `Decoder.generate` for one prompt at a time."""

    def __init__(self, decoder: Decoder) -> None:
        """Raises ValueError for an encoder-decoder, whose prompts are no beginning of what it writes."""
        if decoder.model.encoder_layers:
            raise ValueError("an encoder-decoder holds no conversations")
        self.decoder = decoder
        self.read = 0
        """Tokens of prompts that were read so far."""
        self._ids: list[int] = []
        self._cache: list[Any] = []
        self._extend = jax.jit(self._go_on, static_argnames="rules", donate_argnames="cache")

    @property
    def model(self) -> ModelConfig:
        """What the decoder runs."""
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
        """Continues the only prompt; yields and raises as `Decoder.generate`."""
        (prompt,) = prompts
        self.decoder.check([prompt], max_new)
        rules, ends_E, keys_B = sampling or Sampling(), padded_ends(ends), row_keys(seed, 1, first)
        kept = next((i for i, (a, b) in enumerate(zip(self._ids, prompt, strict=False)) if a != b), len(self._ids))
        kept = min(kept, len(prompt) - 1)  # the last token is read for what follows it
        new = np.asarray(prompt[kept:], np.int32)
        T = round_up(len(new))
        # The loop goes on to the end of its last chunk; padding behind the prompt is overwritten.
        cache = self._room(max(kept + T, len(prompt) + round_up(max_new, chunk)))
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
            # Ours until the loop takes it back; the last token was chosen and not read.
            self._ids, self._cache = ids[:-1], state["cache"]
            yield out_1N[:, :left]
            left -= out_1N.shape[1]

    def _room(self, slots: int) -> list[Any]:
        """The cache with room for so many tokens, no longer ours. Doubled where it grows, so that few sizes compile."""
        cfg, cache = self.model, self._cache
        held = cache[0]["attn"]["past_k"].shape[-2] if cache else 0
        self._ids, self._cache = [], []
        if slots <= held:
            return cache
        size = ROUND * 2 ** (round_up(slots) // ROUND - 1).bit_length()
        if not held:
            return empty_cache(cfg, 1, size, self.decoder.dtype)
        wider = [(0, 0)] * (cache[0]["attn"]["past_k"].ndim - 2) + [(0, size - held), (0, 0)]
        return jax.tree.map(lambda a: jnp.pad(a, wider), cache)

    def _go_on(
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
        """`new` tokens behind the `kept` ones in the cache, and the token after them chosen."""
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
