"""Generation with a key-value cache: one compiled prefill, one compiled loop, the layers' own code in both.

An encoder-decoder reads prompts with its encoder, once; its decoder begins with one token.

Prompts of unequal length are padded on the left, so that all rows write the same slot of the cache and a step costs one
in-place update; padding is masked out and positions count from each prompt's first token, so a row's result is what it
would be alone. Layers are unrolled, their parameters split once: a scan would copy every layer's weights out of the
stack at every step, and one token is nothing but a pass over the weights.

Shapes: B rows, T prompt slots, S slots of the cache, G key/value heads, K head width, V vocabulary, E end tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llmctl.distributed import mesh as meshes
from llmctl.model import functional, weights
from llmctl.model.attention import cache_shape
from llmctl.model.config import ModelConfig
from llmctl.model.generate.sampling import Sampling, choose, row_keys

State = dict[str, Any]
Served = tuple[functional.Params, list[functional.Params]]
"""Parameters as a step reads them: all but the decoder's blocks, and those one tree a layer."""

NOTHING = -1
"""Stands in a row of output after the row has ended."""

ROUND = 64
"""Prompt slots and cache slots are rounded up to this many, so that few lengths compile."""


class Prompts(NamedTuple):
    """What `Decoder.read` reads."""

    tokens_BT: Any
    segments_BT: Any
    source: dict[str, Any]
    """What an encoder reads; empty without one."""


class Decoder:
    """A model ready to generate.

    Invariant: greedy tokens are those of repeated full forwards over prompt and continuation.
    """

    def __init__(
        self,
        model: ModelConfig,
        params: functional.Params,
        dtype: Any = jnp.float32,
        start: int = 0,
        platform: str = "",
    ) -> None:
        """Splits the stacked layers of `params` [L, ...] into one tree a layer.

        `start` is the first token of an encoder-decoder's decoder; `platform` is where it will run, by default where
        JAX computes here. Raises ValueError for a model that writes no text.
        """
        if model.architecture == "encoder" or model.head != "lm":
            raise ValueError(
                f"a model with {model.architecture!r} stacks and head {model.head!r} does not continue text"
            )
        model, params = served(model, params, platform)
        self.model, self.dtype, self.start = model, dtype, start
        rest = {**params, "decoder": {k: v for k, v in params["decoder"].items() if k != "blocks"}}
        self.weights: Served = rest, [functional.layer_params(params, "decoder", i) for i in range(model.layers)]
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
        """Continues prompts of token ids; yields int32 [B, n] of new tokens, first one, then `chunk` at a time.

        A row ends with the first token in `ends` (which is yielded) and has NOTHING after it; the generator stops when
        all rows have ended, or after `max_new` tokens, and may be closed at any time before. Between two chunks the
        caller may end rows of its own accord by setting `stopped_B` (bool [B]). Where prompts are a part of those that
        share a seed, `first` is the number of the first one.

        Raises ValueError for an empty prompt, or one that leaves no room within the model's longest sequence.
        """
        inputs, slots = self.inputs(prompts, max_new)
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
        """What comes after a prompt, of the state that `first` gave: (state, tokens [B, n]) as `generate` has them.

        A state is good until the next one is asked for. The last chunk is whole, though `max_new` may cut it.
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
        """What `read` takes, and the number of slots. Raises ValueError as `generate`."""
        self.check(prompts, max_new)
        reads = self.model.encoder_layers > 0
        tokens_BT, segments_BT = left_padded([[self.start]] * len(prompts) if reads else prompts, 1 if reads else ROUND)
        source = right_padded(prompts) if reads else {}
        return Prompts(tokens_BT, segments_BT, source), round_up(tokens_BT.shape[1] + max_new)

    def check(self, prompts: Sequence[Sequence[int]], max_new: int) -> None:
        """Raises ValueError as `generate`."""
        longest = max(map(len, prompts))
        if not min(map(len, prompts)):
            raise ValueError("a prompt has no tokens; begin it with the BOS token")
        if (max(longest, max_new + 1) if self.model.encoder_layers else longest + max_new) > self.model.max_seq_len:
            raise ValueError(f"prompt ({longest}) and continuation ({max_new}) exceed {self.model.max_seq_len} tokens")

    def run(self, served: Served, batch: dict[str, Any], cache: list[Any], last: jax.Array | int = -1) -> Any:
        """Hidden state [B, D] of the token at index `last`, and the cache with these tokens in it."""
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
        """Chooses the token after `x_BD` for the rows that have not ended."""
        logits_BV = functional.lm_logits(self.model, served[0], x_BD, self.dtype)
        chosen_B = choose(logits_BV, state.get("seen"), keys_B, state["step"], rules)
        token_B = jnp.where(state["done"], NOTHING, chosen_B)
        out = {**state, "token": token_B, "step": state["step"] + 1}
        out["done"] = state["done"] | jnp.any(token_B[:, None] == ends_E, axis=1)
        if "seen" in state:
            out["seen"] = state["seen"].at[jnp.arange(len(token_B)), chosen_B].set(True)
        return out

    def read(self, served: Served, prompts: Prompts, slots: int) -> tuple[jax.Array, State]:
        """Left-padded prompts into a cache of `slots` -> the hidden state [B, D] after each, and where that leaves us.

        To be traced: parameters are arguments, so that no program has them as constants.
        """
        cfg, (B, T) = self.model, prompts.tokens_BT.shape
        real_BS = jnp.pad(prompts.segments_BT, ((0, 0), (0, slots - T)))
        positions_BT = jnp.maximum(jnp.cumsum(prompts.segments_BT, axis=1) - 1, 0)
        batch = {"tokens": prompts.tokens_BT, "segments": prompts.segments_BT, "positions": positions_BT}
        batch |= {"cached_segments": real_BS, "slot": 0}
        source = prompts.source
        if source:
            batch |= source | {"memory": functional.encode(cfg, served[0], source, self.dtype)}
        x_BD, cache = self.run(served, batch, empty_cache(cfg, B, slots, self.dtype))
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
        """One more token a row, of the state that `read` gave -> the hidden state [B, D] after it, and the state."""
        ones_B1 = jnp.ones((len(token_B), 1), jnp.int32)
        slot = state["slot"]
        segments_BS = jax.lax.dynamic_update_slice(state["segments"], ones_B1, (0, slot))
        batch = {
            "tokens": token_B[:, None],
            "segments": ones_B1,
            # The last chunk may go on behind the longest sequence. Those tokens are cut, but where a table of positions
            # ends they would be no numbers, and so would a conversation that finds them in its cache.
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
        """Prompts (as `inputs` gives them) read, and the token after each chosen."""
        B = len(prompts.tokens_BT)
        x_BD, state = self.read(served, prompts, slots)
        state |= {"done": jnp.zeros(B, bool), "step": jnp.int32(0)}
        if rules.repetition_penalty != 1.0:
            seen_BV = jnp.zeros((B, self.model.vocab_size), bool)
            state["seen"] = seen_BV.at[jnp.arange(B)[:, None], prompts.tokens_BT].max(prompts.segments_BT > 0)
        return self.next(served, x_BD, state, keys_B, ends_E, rules)

    def one(self, served: Served, state: State, keys_B: jax.Array, ends_E: jax.Array, rules: Sampling) -> State:
        """One step of the loop, of the state that `first` gave: the last token is read and the next one chosen."""
        x_BD, state = self.advance(served, state, jnp.maximum(state["token"], 0))
        return self.next(served, x_BD, state, keys_B, ends_E, rules)

    def _decode_loop(
        self, served: Served, state: State, keys_B: jax.Array, ends_E: jax.Array, rules: Sampling, count: int
    ) -> tuple[State, jax.Array]:
        """Up to `count` steps; stops early when all rows have ended."""

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


def empty_cache(cfg: ModelConfig, B: int, slots: int, dtype: Any) -> list[Any]:
    """Room for the keys and values of so many tokens a row, of every layer."""
    shape = cache_shape(B, cfg.kv_heads, slots, cfg.head_dim)
    return [{"attn": {"past_k": jnp.zeros(shape, dtype), "past_v": jnp.zeros(shape, dtype)}} for _ in range(cfg.layers)]


def padded_ends(ends: Sequence[int]) -> np.ndarray:
    """End tokens int32 [E]; a few more or less must not compile anew. NOTHING marks rows that have ended already."""
    return np.array([*ends, *[NOTHING] * max(0, 8 - len(ends))], np.int32)


def left_padded(prompts: Sequence[Sequence[int]], multiple: int = ROUND) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, segments) int32 [B, T], T the longest prompt rounded up to a multiple."""
    T = round_up(max(map(len, prompts)), multiple)
    tokens_BT = np.zeros((len(prompts), T), np.int32)
    segments_BT = np.zeros_like(tokens_BT)
    for b, prompt in enumerate(prompts):
        tokens_BT[b, T - len(prompt) :] = prompt
        segments_BT[b, T - len(prompt) :] = 1
    return tokens_BT, segments_BT


def right_padded(prompts: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
    """What an encoder reads: encoder_tokens, encoder_segments, encoder_positions, int32 [B, S]."""
    S = round_up(max(map(len, prompts)))
    tokens_BS = np.zeros((len(prompts), S), np.int32)
    segments_BS = np.zeros_like(tokens_BS)
    for b, prompt in enumerate(prompts):
        tokens_BS[b, : len(prompt)] = prompt
        segments_BS[b, : len(prompt)] = 1
    positions_BS = np.arange(S, dtype=np.int32) * segments_BS
    return {"encoder_tokens": tokens_BS, "encoder_segments": segments_BS, "encoder_positions": positions_BS}


def served(model: ModelConfig, params: functional.Params, platform: str = "") -> tuple[ModelConfig, functional.Params]:
    """The same network in the form that a step reads fastest.

    Low-rank updates are merged. On a CPU, which would convert integers one token after the other, weights that are
    quantized alone become dense once (those that quantize their activations stay, for they compute something else); and
    the output projection of tied embeddings gets a table of its own that lies the other way round, [D, V], which XLA's
    CPU backend reads up to twice as fast as the transpose of [V, D].
    """
    mesh = meshes.current()
    on_cpu = (platform or (jax.devices()[0] if mesh is None else mesh.devices.flat[0]).platform) == "cpu"

    def ready(w: Any) -> Any:
        base = w.base if isinstance(w, weights.LowRank) else w
        if isinstance(base, weights.Quantized) and (base.activations or not on_cpu):
            return w
        return weights.dense(w) if base is not w or isinstance(base, weights.Quantized) else w

    params = jax.tree.map(ready, params, is_leaf=weights.is_weight)
    table = params["embed"]["tokens"]
    if not model.tied or not on_cpu or not isinstance(table, jax.Array):
        return model, params
    untied = {**params, "lm_head": {**params.get("lm_head", {}), "kernel": table.T}}
    return model.model_copy(update={"tied": False}), untied


def round_up(n: int, multiple: int = ROUND) -> int:
    """The next multiple."""
    return -(-n // multiple) * multiple
