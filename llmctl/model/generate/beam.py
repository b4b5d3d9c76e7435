"""Beam search: the likeliest whole answers instead of the likeliest next tokens, in one compiled program.

Each prompt has W live answers, which may go on, and up to W finished ones. A step takes the best continuations of all
live answers together; those that end compete for the finished places by their score, the sum of their log probabilities
over length ** penalty (arXiv:1609.08144, section 7), and the best of the others live on. Their caches follow by index;
what the prompt left in the cache is the same for all of them and stays where it is.

Shapes: B prompts, W beams, C candidates a prompt, N new tokens at most, D model width, V vocabulary, E end tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llmctl.model import functional
from llmctl.model.attention import cache_shape
from llmctl.model.generate.decode import NOTHING, Decoder, Prompts, Served, State, padded_ends

STOPS = ("no", "yes", "never")
WORST = -jnp.inf
"""Score of a place that nothing has taken."""


@dataclass(frozen=True)
class Beams:
    """How wide to search, how to compare answers of unequal length, and when to stop."""

    width: int
    length_penalty: float = 1.0
    """Power of the length that divides a sum of log probabilities; above 0 favours long answers."""
    early_stopping: str = "no"
    """Ends a prompt's search with W finished answers: "yes" at once; "no" when its best live answer, as long as it is
    now, is no better than the worst of them; "never" when it could not become so at any length."""

    def __post_init__(self) -> None:
        if self.width < 1 or self.early_stopping not in STOPS:
            raise ValueError(f"beams must be at least 1, and early stopping one of {', '.join(STOPS)}")


class Search(NamedTuple):
    """Where a search is after `made` tokens."""

    made: jax.Array
    live_BW: jax.Array
    """Sums of log probabilities, best first."""
    live_BWN: jax.Array
    """Tokens; NOTHING where none is yet."""
    done_BW: jax.Array
    """Scores, best first; WORST where nothing is finished yet."""
    done_BWN: jax.Array
    open_B: jax.Array
    """A better answer is possible still."""
    parent_BW: jax.Array
    """Which of the live answers before the last token each one continues."""


class BeamSearch:
    """A decoder's beam search; one compiled program a shape."""

    def __init__(self, decoder: Decoder, beams: Beams) -> None:
        self.decoder, self.beams = decoder, beams
        self._compiled = jax.jit(self._run, static_argnames=("slots", "candidates"))

    def __call__(
        self, prompts: Sequence[Sequence[int]], max_new: int, ends: Sequence[int] = ()
    ) -> tuple[np.ndarray, np.ndarray]:
        """The W best answers to each prompt, best first: tokens int32 [B, W, N] and scores float32 [B, W].

        An answer that ends has its end token, and NOTHING after it. Where fewer than W were found, the score is -inf.
        Raises ValueError as `Decoder.generate`.
        """
        decoder = self.decoder
        inputs, slots = decoder.inputs(prompts, max_new)
        # So many that W answers are left to go on if every beam's best continuations are its end tokens.
        candidates = max(2, 1 + len(ends)) * self.beams.width
        if candidates > decoder.model.vocab_size:
            raise ValueError(f"{self.beams.width} beams are too many for {decoder.model.vocab_size} tokens")
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
            jnp.full((B, W), WORST).at[:, 0].set(0.0),  # all beams are the prompt: only one of them counts
            empty_BWN,
            jnp.full((B, W), WORST),
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
        return open_ & jnp.any(search.done_BW == WORST) if self.beams.early_stopping == "yes" else open_

    def _extend(
        self,
        served: Served,
        x_BD: jax.Array,
        search: Search,
        ends_E: jax.Array,
        max_new: jax.Array,
        candidates: int,
    ) -> Search:
        """One token more for every live answer; `x_BD` [B * W, D] are the hidden states after them."""
        (B, W), penalty, made = search.live_BW.shape, self.beams.length_penalty, search.made
        logits = functional.lm_logits(self.decoder.model, served[0], x_BD, self.decoder.dtype)
        V = logits.shape[-1]
        sums_BWV = search.live_BW[..., None] + jax.nn.log_softmax(logits).reshape(B, W, V)
        sum_BC, at_BC = jax.lax.top_k(sums_BWV.reshape(B, W * V), candidates)
        parent_BC, token_BC = at_BC // V, at_BC % V
        answer_BCN = jnp.take_along_axis(search.live_BWN, parent_BC[..., None], axis=1)
        answer_BCN = jax.lax.dynamic_update_slice_in_dim(answer_BCN, token_BC[..., None], made, axis=2)
        ends_BC = jnp.any(token_BC[..., None] == ends_E, axis=-1) | (made + 1 == max_new)

        # A finished answer takes a place only from among the W best; nothing is taken where a prompt's search is over.
        taken_BC = ends_BC & (jnp.arange(candidates) < W) & search.open_B[:, None]
        if self.beams.early_stopping == "yes":
            taken_BC &= ~jnp.all(search.done_BW > WORST, axis=1, keepdims=True)
        length = (made + 1).astype(jnp.float32)
        score_BC = jnp.where(taken_BC, sum_BC / length**penalty, WORST)
        done_BW, best_BW = jax.lax.top_k(jnp.concatenate([search.done_BW, score_BC], axis=1), W)
        done_BWN = jnp.concatenate([search.done_BWN, answer_BCN], axis=1)
        done_BWN = jnp.take_along_axis(done_BWN, best_BW[..., None], axis=1)

        live_BW, best_BW = jax.lax.top_k(jnp.where(ends_BC, WORST, sum_BC), W)
        # Never: a positive penalty helps long answers most, so the best that can come has the full length.
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
    """What `Decoder.read` left of B prompts, W times each."""

    def cached(a: jax.Array) -> jax.Array:
        rows = jnp.repeat(a.reshape(B, -1, *a.shape[-2:]), W, axis=0)  # without the axes of size 1: see `cache_shape`
        return rows.reshape(cache_shape(*rows.shape))

    out = {k: jnp.repeat(v, W, axis=0) if v.ndim else v for k, v in state.items() if k != "cache"}
    return out | {"cache": jax.tree.map(cached, state["cache"])}


def _follow(cache: list[Any], parent_BW: jax.Array, prompt: int) -> list[Any]:
    """Every live answer with the keys and values of the answer that it continues, from slot `prompt` on."""
    B, W = parent_BW.shape
    rows = (parent_BW + jnp.arange(B)[:, None] * W).reshape(-1)

    def moved(a: jax.Array) -> jax.Array:
        all_ = a.reshape(B * W, -1, *a.shape[-2:])
        return all_.at[:, :, prompt:].set(all_[rows, :, prompt:]).reshape(a.shape)

    return [{**layer, "attn": jax.tree.map(moved, layer["attn"])} for layer in cache]
