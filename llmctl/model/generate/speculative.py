"""Generate text faster by speculative decoding: a small draft model proposes tokens, and the target verifies them.

The output is the same as without a draft (Leviathan et al., 2023, arXiv:2211.17192). Greedy decoding selects the same
tokens, with one exception. A forward pass over several tokens adds numbers in another order. This order may decide
between two tokens with almost equal logits. Sampling has the same distribution, but other random numbers.

One compiled loop repeats three actions. The draft proposes N tokens. The target computes the logits after the last
token and after every proposed token in one forward pass. Each row keeps the accepted tokens and one more token. Rows
accept different numbers of tokens, so each row has its own position in the key-value cache (`CachedModel.extend`).

Shapes: B rows, N proposed tokens, M = N + 1 verified tokens, R room for new tokens, V vocabulary, E end tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmctl.config.errors import RequestError
from llmctl.model import functional
from llmctl.model.config import ModelConfig
from llmctl.model.generate.cached_model import CachedModel, State
from llmctl.model.generate.decode import Decoder
from llmctl.model.generate.padded_prompts import NOTHING, Prompts, padded_ends, round_up
from llmctl.model.generate.sampling import Sampling, adjust_logits, row_keys
from llmctl.model.generate.served import Served
from llmctl.model.generate.speculative_sampling import resized, seen_before, verify_greedy, verify_sampled

DRAFT_TOKENS = 4
"""Default number of tokens that the draft proposes per step of the target."""
Pair = tuple[Served, Served]
"""Parameters of the target and of the draft, converted for decoding."""


@dataclass
class Acceptance:
    """Count the results of speculative decoding, over all rows.

    Example:
        >>> counts = Acceptance(steps=2, judged=5, accepted=4, tokens=6)
        >>> counts.rate, counts.tokens_per_step
        (0.8, 3.0)
    """

    steps: int = 0
    """Number of target steps. A step of the batch counts once for each row that has not ended."""
    judged: int = 0
    """Number of proposed tokens that the target accepted or rejected. Tokens after a rejection, and after the end of a
    row, are not judged."""
    accepted: int = 0
    """Number of accepted tokens."""
    tokens: int = 0
    """Number of new tokens of all steps. The first token of each row, which the prefill selects, is not counted."""

    @property
    def rate(self) -> float | None:
        """Return the fraction of judged tokens that were accepted, or None before the first step."""
        return self.accepted / self.judged if self.judged else None

    @property
    def tokens_per_step(self) -> float | None:
        """Return the mean number of new tokens per target step, or None before the first step."""
        return self.tokens / self.steps if self.steps else None


class SpeculativeDecoder:
    """Generate text with a target model and a draft model. `generate` has the same arguments as `Decoder.generate`.

    Example:
        >>> cfg = ModelConfig(preset="llama-tiny", layers=1, vocab_size=16)
        >>> target, draft = (Decoder(cfg, functional.init(cfg, jax.random.key(i))) for i in (0, 1))
        >>> fast = SpeculativeDecoder(target, draft, tokens=2)
        >>> np.array_equal(*(np.concatenate(list(d.generate([[1, 2]], 8)), 1) for d in (target, fast)))
        True
    """

    def __init__(self, target: Decoder, draft: Decoder, tokens: int = DRAFT_TOKENS) -> None:
        """Store the decoders, and wrap the functions of speculative decoding in `jax.jit`.

        Args:
            target: Decoder of the model whose text is generated.
            draft: Decoder of the draft.
            tokens: Number of tokens N that the draft proposes per step of the target.

        Raises:
            RequestError: If only one of the two models has an encoder.
        """
        if bool(target.model.encoder_layers) != bool(draft.model.encoder_layers):
            raise RequestError("a draft needs the architecture of its target: an encoder-decoder, or a decoder")
        self.target, self.draft, self.tokens = target, draft, tokens
        self.acceptance = Acceptance()
        self._prefill = jax.jit(target.first, static_argnames=("slots", "rules"))
        self._read = jax.jit(self.read, static_argnames="slots")
        self._begin = jax.jit(self.begin, donate_argnums=(0, 1))
        self._continue = jax.jit(self._loop, static_argnames="rules", donate_argnames="state")

    @property
    def model(self) -> ModelConfig:
        """Return the config of the target."""
        return self.target.model

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
        """Continue prompts, and yield the new tokens in chunks. See `Decoder.generate` for arguments and errors."""
        inputs, slots = self.inputs(prompts, max_new)
        for model in (self.target, self.draft):
            model.check_cache(len(prompts), slots)
        rules, ends_E, keys_B = sampling or Sampling(), padded_ends(ends), row_keys(seed, len(prompts), first)
        served = self.target.weights, self.draft.weights
        stopped = np.zeros(len(prompts), bool) if stopped_B is None else stopped_B
        before = self.acceptance
        begun = self._prefill(served[0], inputs, keys_B, ends_E, slots=slots, rules=rules)
        state = self._begin(begun, self._read(served[1], inputs, slots=slots), inputs.tokens_BT)
        yield np.asarray(state["out"])[:, :1]
        for given in range(1, max_new, chunk):
            state["done"] = state["done"] | stopped
            made_B = np.where(stopped, 0, np.asarray(state["made"]))
            if bool(np.all(state["done"])) and made_B.max() <= given:
                return
            wanted = min(given + chunk, max_new)
            limits = np.int32(wanted), np.int32(max_new)
            state = self._continue(served, state, keys_B, ends_E, *limits, rules=rules)
            counts = {name: int(state[name]) for name in ("steps", "judged", "accepted", "tokens")}
            self.acceptance = Acceptance(**{name: getattr(before, name) + n for name, n in counts.items()})
            out_BN = np.array(state["out"])[:, given:wanted]
            out_BN[stopped] = NOTHING  # a stopped row may have tokens that no chunk has contained yet
            yield out_BN

    def inputs(self, prompts: Sequence[Sequence[int]], max_new: int) -> tuple[Prompts, int]:
        """Return the padded prompts and the number of cache slots, with room for a last proposal beyond `max_new`.

        Raises:
            ValueError: If a prompt is empty, or too long together with `max_new` tokens.
        """
        inputs, _ = self.target.inputs(prompts, max_new)
        return inputs, round_up(inputs.tokens_BT.shape[1] + max_new + self.tokens + 1)

    def read(self, served: Served, prompts: Prompts, slots: int) -> list[Any]:
        """Read the prompts with the draft, and return the draft's cache."""
        return self.draft.read(served, prompts, slots)[1]["cache"]

    def begin(self, begun: State, draft: list[Any], prompts_BT: jax.Array) -> State:
        """Join the draft's cache and the target's state after the prefill into the state of the loop.

        The state has the cache slot of each row's last token. No model has read this token yet.
        """
        B, T = prompts_BT.shape
        room = begun["segments"].shape[1] - T
        kept = {name: begun[name] for name in ("done", "seen", "source") if name in begun}
        zeros = {name: jnp.int32(0) for name in ("steps", "judged", "accepted", "tokens")}
        return kept | zeros | {
            "target": begun["cache"],
            "draft": draft,
            "padding": begun["slot"] - begun["position"],
            "slot": jnp.full(B, T, jnp.int32),
            "previous": prompts_BT[:, -1],
            "token": jnp.maximum(begun["token"], 0),
            "made": jnp.ones(B, jnp.int32),
            "out": jnp.full((B, room), NOTHING, jnp.int32).at[:, 0].set(begun["token"]),
        }  # fmt: skip

    def _loop(
        self, served: Pair, state: State, keys_B: jax.Array, ends_E: jax.Array, wanted: jax.Array, limit: jax.Array,
        rules: Sampling,
    ) -> State:  # fmt: skip
        """Run steps until every row has `wanted` new tokens or has ended. A row ends at `limit` new tokens."""

        def goes_on(state: State) -> jax.Array:
            return jnp.any(~state["done"] & (state["made"] < wanted))

        return jax.lax.while_loop(goes_on, lambda s: self.step(served, s, keys_B, ends_E, limit, rules), state)

    def step(
        self, served: Pair, state: State, keys_B: jax.Array, ends_E: jax.Array, limit: jax.Array, rules: Sampling
    ) -> State:
        """Propose N tokens, verify them with the target, and add the accepted tokens and one token more to each row."""
        B, N = len(state["token"]), self.tokens
        keys_B = jax.vmap(jax.random.fold_in)(keys_B, state["made"])
        proposed_BN, draft_BNV, cache = self._propose(served[1], state, keys_B, rules)
        state = state | {"draft": cache}
        tokens_BM = jnp.concatenate([state["token"][:, None], proposed_BN], axis=1)
        x_BMD, state["target"] = self._extend(self.target, served[0], "target", state, tokens_BM, state["slot"])
        logits_BMV = functional.lm_logits(self.model, served[0][0], x_BMD, self.target.dtype)
        seen = seen_before(state["seen"], proposed_BN).reshape(B * (N + 1), -1) if "seen" in state else None
        flat = adjust_logits(logits_BMV.reshape(B * (N + 1), -1), seen, rules)
        target_BMV = flat.reshape(logits_BMV.shape)
        if rules.temperature:
            keys = _folded(keys_B, N), _folded(keys_B, N + 1)
            accepted_B, next_B = verify_sampled(proposed_BN, draft_BNV, target_BMV, *keys)
        else:
            accepted_B, next_B = verify_greedy(proposed_BN, target_BMV)
        return self._added(state, proposed_BN, accepted_B, next_B, ends_E, limit)

    def _propose(
        self, served: Served, state: State, keys_B: jax.Array, rules: Sampling
    ) -> tuple[jax.Array, jax.Array, list[Any]]:
        """Return the draft's tokens [B, N], the logits of their distributions [B, N, V], and the draft's cache.

        The first pass of the draft reads the last two tokens of each row. The first of these two tokens is new to the
        draft only if the last step accepted all tokens. Otherwise, its keys and values are computed a second time, with
        the same result.
        """
        B, N = len(state["token"]), self.tokens
        proposed_BN = jnp.zeros((B, N), jnp.int32)
        both_B2 = jnp.stack([state["previous"], state["token"]], axis=1)
        x_B2D, cache = self._extend(self.draft, served, "draft", state, both_B2, state["slot"] - 1)

        def select(i: Any, x_BD: jax.Array, seen_BV: Any) -> tuple[jax.Array, jax.Array, Any]:
            logits_BV = functional.lm_logits(self.draft.model, served[0], x_BD, self.draft.dtype)
            logits_BV = adjust_logits(resized(logits_BV, self.model.vocab_size), seen_BV, rules)
            if rules.temperature:
                token_B = jax.vmap(jax.random.categorical)(_folded(keys_B, i), logits_BV).astype(jnp.int32)
            else:
                token_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
            seen_BV = None if seen_BV is None else seen_BV.at[jnp.arange(B), token_B].set(True)
            return token_B, logits_BV, seen_BV

        token_B, logits_BV, seen_BV = select(0, x_B2D[:, 1], state.get("seen"))

        def more(carry: Any, i: jax.Array) -> Any:
            token_B, cache, seen_BV = carry
            x_B1D, cache = self._extend(
                self.draft, served, "draft", state | {"draft": cache}, token_B[:, None], state["slot"] + i
            )
            token_B, logits_BV, seen_BV = select(i, x_B1D[:, 0], seen_BV)
            return (token_B, cache, seen_BV), (token_B, logits_BV if rules.temperature else None)

        (_, cache, _), (rest_nB, logits_nBV) = jax.lax.scan(more, (token_B, cache, seen_BV), jnp.arange(1, N))
        proposed_BN = jnp.concatenate([token_B[None], rest_nB]).T
        if not rules.temperature:
            return proposed_BN, logits_BV[:, None], cache
        return proposed_BN, jnp.concatenate([logits_BV[None], logits_nBV]).swapaxes(0, 1), cache

    def _extend(
        self, model: CachedModel, served: Served, name: str, state: State, tokens_BT: jax.Array, slot_B: jax.Array
    ) -> tuple[jax.Array, list[Any]]:
        return model.extend(served, state[name], tokens_BT, slot_B, state["padding"], state.get("source"))

    def _added(
        self, state: State, proposed_BN: jax.Array, accepted_B: jax.Array, next_B: jax.Array, ends_E: jax.Array,
        limit: jax.Array,
    ) -> State:  # fmt: skip
        """Add the accepted tokens and the next token to each row, up to an end token or the limit."""
        (B, N), live_B, at_M = proposed_BN.shape, ~state["done"], jnp.arange(self.tokens + 1)
        new_BM = jnp.pad(proposed_BN, ((0, 0), (0, 1)))
        new_BM = jnp.where(at_M == accepted_B[:, None], next_B[:, None], new_BM)
        made_B = jnp.minimum(accepted_B + 1, limit - state["made"])
        ends_BM = jnp.any(new_BM[..., None] == ends_E, axis=-1) & (at_M < made_B[:, None])
        ended_B = jnp.any(ends_BM, axis=1)
        made_B = jnp.where(ended_B, jnp.argmax(ends_BM, axis=1).astype(jnp.int32) + 1, made_B)
        made_B = jnp.where(live_B, made_B, 0)
        new_BM = jnp.where(at_M < made_B[:, None], new_BM, NOTHING)

        def write(row_R: jax.Array, new_M: jax.Array, at: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice(row_R, new_M, (at,))

        last_BM = jnp.concatenate([state["token"][:, None], new_BM], axis=1)
        token_B, previous_B = (
            jnp.take_along_axis(last_BM, jnp.maximum(made_B - back, 0)[:, None], axis=1)[:, 0] for back in (0, 1)
        )
        out = state | {
            "out": jax.vmap(write)(state["out"], new_BM, state["made"]),
            "made": state["made"] + made_B,
            "slot": state["slot"] + made_B,
            "token": token_B,
            "previous": previous_B,
            "done": state["done"] | ended_B & live_B | (state["made"] + made_B >= limit),
            "steps": state["steps"] + jnp.sum(live_B),
            "judged": state["judged"] + jnp.sum(jnp.minimum(jnp.minimum(accepted_B + 1, N), made_B)),
            "accepted": state["accepted"] + jnp.sum(jnp.minimum(accepted_B, made_B)),
            "tokens": state["tokens"] + jnp.sum(made_B),
        }
        if "seen" in state:
            out["seen"] = state["seen"].at[jnp.arange(B)[:, None], jnp.maximum(new_BM, 0)].max(new_BM >= 0)
        return out


def _folded(keys_B: jax.Array, i: Any) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (0, None))(keys_B, i)
