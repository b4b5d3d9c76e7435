"""Search for the most probable answers by beam search, in one compiled program.

Each prompt has W live beams, which can be continued, and up to W finished answers. A step ranks the continuations of
all live beams together. A continuation with an end token replaces the worst finished answer if the continuation has a
better score. The score is the sum of log probabilities divided by length ** penalty (Wu et al., 2016, arXiv:1609.08144,
section 7). The best of the other continuations become the new live beams, and the key-value cache is reordered
accordingly. The keys and values of the prompt are equal for all beams, and are not reordered.

Shapes: B prompts, W beams, C best continuations (candidates) per prompt, N maximum new tokens, D model width, V
vocabulary, E end tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llmctl.config.errors import RequestError
from llmctl.model import functional
from llmctl.model.generate.cached_model import State
from llmctl.model.generate.decode import Decoder
from llmctl.model.generate.padded_prompts import NOTHING, Prompts, padded_ends
from llmctl.model.generate.served import Served
from llmctl.model.kv_cache import cache_shape

STOPS = ("no", "yes", "never")
MAX_LENGTH_PENALTY = 6
"""Maximum absolute value of the length penalty, so that length ** penalty is finite in float32 up to a million
tokens."""
NO_SCORE = -jnp.inf
"""Score that stands for a missing answer, as long as a prompt has fewer than W finished answers."""


@dataclass(frozen=True)
class Beams:
    """Configure a beam search: width, length normalization and stopping rule."""

    width: int
    length_penalty: float = 1.0
    """Exponent p of the length normalization: scores are divided by length ** p. Larger values favor longer answers."""
    early_stopping: str = "no"
    """Rule for stopping the search for a prompt that has W finished answers.

    "yes": stop immediately. "no": stop if the best live beam, scored at its current length, is no better than the worst
    finished answer. "never": stop only if no live beam can reach a better score at any length.
    """

    def __post_init__(self) -> None:
        if self.width < 1 or self.early_stopping not in STOPS:
            raise ValueError(f"beams must be at least 1, and early stopping one of {', '.join(STOPS)}")
        if not abs(self.length_penalty) <= MAX_LENGTH_PENALTY:
            raise ValueError(f"length_penalty must be from -{MAX_LENGTH_PENALTY} to {MAX_LENGTH_PENALTY}")


class Search(NamedTuple):
    """Store the state of a beam search between two steps. A step adds one token to each live beam."""

    made: jax.Array
    """Number of generated tokens per beam."""
    live_BW: jax.Array
    """Sums of log probabilities of the live beams, best first."""
    live_BWN: jax.Array
    """Tokens of the live beams; NOTHING at positions that are not generated yet."""
    done_BW: jax.Array
    """Scores of the finished answers, best first, padded with NO_SCORE to W scores."""
    done_BWN: jax.Array
    open_B: jax.Array
    """Whether a better answer to the prompt is still possible."""
    parent_BW: jax.Array
    """Index of the beam of the previous step that each live beam continues."""


class BeamSearch:
    """Run beam search on a Decoder, with one compiled program per shape.

    Args:
        decoder: Decoder that runs the model.
        beams: Settings of the search.
    """

    def __init__(self, decoder: Decoder, beams: Beams) -> None:
        self.decoder, self.beams = decoder, beams
        self._compiled = jax.jit(self._run, static_argnames=("slots", "candidates"))

    def __call__(
        self, prompts: Sequence[Sequence[int]], max_new: int, ends: Sequence[int] = ()
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the W best answers to each prompt, best first.

        Args:
            prompts: Token ids of B prompts.
            max_new: Maximum number of new tokens N.
            ends: Ids of the end tokens, at which an answer ends.

        Returns:
            Tokens int32 [B, W, N] and scores float32 [B, W]. A finished answer includes its end token and has NOTHING
            after it. If fewer than W answers were found, the remaining scores are -inf.

        Raises:
            ValueError: If a prompt is empty, or too long together with `max_new`.
            RequestError: If there are more candidates than tokens in the vocabulary.
        """
        decoder = self.decoder
        inputs, slots = decoder.inputs(prompts, max_new)
        decoder.check_cache(len(prompts) * self.beams.width, slots)
        # Enough candidates to keep W live beams even if the best continuations of every beam are its end tokens.
        candidates = max(2, 1 + len(ends)) * self.beams.width
        if candidates > decoder.model.vocab_size:
            raise RequestError(f"{self.beams.width} beams are too many for {decoder.model.vocab_size} tokens")
        tokens_BWN, scores_BW = self._compiled(
            decoder.weights, inputs, padded_ends(ends), np.int32(max_new), slots=slots, candidates=candidates
        )
        return np.asarray(tokens_BWN)[:, :, :max_new], np.asarray(scores_BW)

    def _run(
        self,
        served: Served,
        prompts: Prompts,
        ends_E: jax.Array,
        max_new: jax.Array,
        slots: int,
        candidates: int,
    ) -> tuple[jax.Array, jax.Array]:
        (B, T), W = prompts.tokens_BT.shape, self.beams.width
        x_BD, state = self.decoder.read(served, prompts, slots)
        empty_BWN = jnp.full((B, W, slots - T), NOTHING, jnp.int32)
        begun = Search(
            jnp.int32(0),
            jnp.full((B, W), NO_SCORE).at[:, 0].set(0.0),  # all beams equal the prompt at first, so only one may count
            empty_BWN,
            jnp.full((B, W), NO_SCORE),
            empty_BWN,
            jnp.ones(B, bool),
            jnp.zeros((B, W), jnp.int32),
        )
        search = self._extend(served, jnp.repeat(x_BD, W, axis=0), begun, ends_E, max_new, candidates)
        state = _repeated(state, B, W)

        def step(carry: tuple[Search, State]) -> tuple[Search, State]:
            search, state = carry
            state = {**state, "cache": _follow(state["cache"], search.parent_BW, T)}
            token_BW = jax.lax.dynamic_index_in_dim(search.live_BWN, search.made - 1, axis=2, keepdims=False)
            x_BD, state = self.decoder.advance(served, state, token_BW.reshape(-1))
            return self._extend(served, x_BD, search, ends_E, max_new, candidates), state

        search, _ = jax.lax.while_loop(lambda c: self._goes_on(c[0], max_new), step, (search, state))
        return search.done_BWN, search.done_BW

    def _goes_on(self, search: Search, max_new: jax.Array) -> jax.Array:
        open_ = (search.made < max_new) & jnp.any(search.open_B)
        return open_ & jnp.any(search.done_BW == NO_SCORE) if self.beams.early_stopping == "yes" else open_

    def _extend(
        self,
        served: Served,
        x_BD: jax.Array,
        search: Search,
        ends_E: jax.Array,
        max_new: jax.Array,
        candidates: int,
    ) -> Search:
        """Extend every live beam by one token, and return the new state of the search.

        Args:
            served: Parameters, converted for decoding (`served.served`).
            x_BD: Hidden states [B * W, D] of the last token of each live beam.
            search: State of the beam search.
            ends_E: End tokens.
            max_new: Maximum number of new tokens, int32 scalar.
            candidates: Number of candidates C per prompt.
        """
        (B, W), penalty, made = search.live_BW.shape, self.beams.length_penalty, search.made
        logits = functional.lm_logits(self.decoder.model, served[0], x_BD, self.decoder.dtype)
        V = logits.shape[-1]
        sums_BWV = search.live_BW[..., None] + jax.nn.log_softmax(logits).reshape(B, W, V)
        sum_BC, at_BC = jax.lax.top_k(sums_BWV.reshape(B, W * V), candidates)
        parent_BC, token_BC = at_BC // V, at_BC % V
        answer_BCN = jnp.take_along_axis(search.live_BWN, parent_BC[..., None], axis=1)
        answer_BCN = jax.lax.dynamic_update_slice_in_dim(answer_BCN, token_BC[..., None], made, axis=2)
        ends_BC = jnp.any(token_BC[..., None] == ends_E, axis=-1) | (made + 1 == max_new)

        # Only the W best candidates may finish, and none may after a prompt's search has stopped.
        taken_BC = ends_BC & (jnp.arange(candidates) < W) & search.open_B[:, None]
        if self.beams.early_stopping == "yes":
            taken_BC &= ~jnp.all(search.done_BW > NO_SCORE, axis=1, keepdims=True)
        length = (made + 1).astype(jnp.float32)
        score_BC = jnp.where(taken_BC, sum_BC / length**penalty, NO_SCORE)
        done_BW, best_BW = jax.lax.top_k(jnp.concatenate([search.done_BW, score_BC], axis=1), W)
        done_BWN = jnp.concatenate([search.done_BWN, answer_BCN], axis=1)
        done_BWN = jnp.take_along_axis(done_BWN, best_BW[..., None], axis=1)

        live_BW, best_BW = jax.lax.top_k(jnp.where(ends_BC, NO_SCORE, sum_BC), W)
        # A positive penalty favours long answers most, so "never" takes the full length as the upper bound.
        longest = max_new if self.beams.early_stopping == "never" and penalty > 0 else length
        hope_B = live_BW[:, 0] / longest**penalty
        return Search(
            made + 1,
            live_BW,
            jnp.take_along_axis(answer_BCN, best_BW[..., None], axis=1),
            done_BW,
            done_BWN,
            search.open_B & (hope_B > done_BW[:, -1]),
            jnp.take_along_axis(parent_BC, best_BW, axis=1),
        )


def _repeated(state: State, B: int, W: int) -> State:
    """Repeat the decoding state (cache and position) of each of B prompts W times, once per beam."""

    def cached(a: jax.Array) -> jax.Array:
        rows = jnp.repeat(a.reshape(B, -1, *a.shape[-2:]), W, axis=0)  # merge axes of size 1; see `cache_shape`
        return rows.reshape(cache_shape(*rows.shape))

    out = {k: jnp.repeat(v, W, axis=0) if v.ndim else v for k, v in state.items() if k != "cache"}
    return out | {"cache": jax.tree.map(cached, state["cache"])}


def _follow(cache: list[Any], parent_BW: jax.Array, prompt: int) -> list[Any]:
    """Reorder the cache: each live beam gets the keys and values of the beam that it continues.

    The first `prompt` positions of the cache are not reordered. These positions belong to the prompt, so their keys and
    values are equal for all beams.
    """
    B, W = parent_BW.shape
    rows = (parent_BW + jnp.arange(B)[:, None] * W).reshape(-1)

    def moved(a: jax.Array) -> jax.Array:
        all_ = a.reshape(B * W, -1, *a.shape[-2:])
        return all_.at[:, :, prompt:].set(all_[rows, :, prompt:]).reshape(a.shape)

    return [{**layer, "attn": jax.tree.map(moved, layer["attn"])} for layer in cache]
