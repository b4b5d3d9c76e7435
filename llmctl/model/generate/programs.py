"""List the two compiled programs of text generation, prefill and decoding step, for the cost model of `llmctl plan`.

With a draft, the decoding step is a step of speculative decoding.

The parameters are replicated on all devices, as in `llmctl generate`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llmctl.config.settings import MeshConfig
from llmctl.distributed import mesh as meshes
from llmctl.model import attention_kernels, flops, functional
from llmctl.model.array_bytes import bytes_of
from llmctl.model.config import ModelConfig
from llmctl.model.generate.decode import Decoder
from llmctl.model.generate.padded_prompts import padded_ends
from llmctl.model.generate.sampling import Sampling, row_keys
from llmctl.model.generate.speculative import SpeculativeDecoder
from llmctl.model.program import Cost, Pass, Program

DTYPE = "float32"
"""Default dtype of the computation in `llmctl generate`."""


class Request(NamedTuple):
    """Store the sizes of a batch: number of prompts, tokens per prompt, and new tokens per prompt."""

    rows: int
    prompt: int
    new: int


class Draft(NamedTuple):
    """Store the draft of speculative decoding: config, abstract parameters, and number of proposed tokens per step."""

    model: ModelConfig
    weights: functional.Params
    tokens: int


def generation(
    model: ModelConfig,
    weights: functional.Params,
    request: Request,
    mesh: Mesh,
    platform: str = "",
    dtype: str = DTYPE,
    kv_cache: str = "",
    draft: Draft | None = None,
) -> list[Program]:
    """Return the programs of the prefill and of one decoding step.

    Args:
        model: Config of the model.
        weights: Abstract parameters of the model.
        request: Sizes of the batch.
        mesh: Device mesh. Its devices may be placeholders for devices of another platform.
        platform: Platform that will run the programs; by default the platform of the devices.
        dtype: Dtype of the computation and of the cache.
        kv_cache: Format of cached keys and values, if they are quantized (`Decoder`).
        draft: Draft of speculative decoding; None without speculative decoding.

    Raises:
        ValueError: If the model does not generate text, or if prompt and new tokens exceed its maximum sequence length.
        RequestError: If the model's keys cannot be stored in the format `kv_cache`.
    """
    whole = meshes.replicated(mesh)
    one = meshes.make(MeshConfig(data=1), [mesh.devices.flat[0]])  # nothing is split

    def on_all(tree: Any) -> Any:
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole), tree)

    def decoding(model: ModelConfig, weights: functional.Params) -> tuple[Decoder, Any]:
        made: list[Decoder] = []

        def served(params: functional.Params) -> Any:
            made.append(Decoder(model, params, dtype, platform=platform, kv_cache=kv_cache))
            return made[0].weights

        with meshes.use(one):
            params = on_all(jax.eval_shape(served, weights))
        return made[0], params

    (target, params), rules = decoding(model, weights), Sampling()
    inputs, slots = target.inputs([[0] * request.prompt] * request.rows, request.new)
    fast, others = None, ()
    if draft:
        other, others = decoding(draft.model, draft.weights)
        fast = SpeculativeDecoder(target, other, draft.tokens)
        _, slots = fast.inputs([[0] * request.prompt] * request.rows, request.new)
    inputs, ends = on_all(inputs), on_all(padded_ends(()))
    keys = on_all(jax.eval_shape(lambda: row_keys(0, request.rows)))
    first = jax.jit(target.first, static_argnames=("slots", "rules"))

    def prefill() -> Any:
        with meshes.use(one), attention_kernels.use("auto"):
            return first.trace(params, inputs, keys, ends, slots=slots, rules=rules)

    def prefill_draft() -> Any:
        with meshes.use(one), attention_kernels.use("auto"):
            return jax.jit(fast.read, static_argnames="slots").trace(others, inputs, slots=slots) if fast else None

    def decode() -> Any:
        step = jax.jit(fast.step if fast else target.one, static_argnames="rules", donate_argnums=1)
        both, limit = ((params, others), [on_all(jax.ShapeDtypeStruct((), jnp.int32))]) if fast else (params, [])
        with meshes.use(one), attention_kernels.use("auto"):
            return step.trace(both, state, keys, ends, *limit, rules=rules)

    with meshes.use(one):
        state = on_all(prefill().out_info)
        if fast:
            state = on_all(jax.eval_shape(fast.begin, state, prefill_draft().out_info, inputs.tokens_BT))
    source, begins = (request.prompt, 1) if model.encoder_layers else (0, request.prompt)
    common: dict[str, Any] = {
        "mesh": mesh, "rows": request.rows, "dtype": dtype, "parameters": [params, others],
        "cache": [state[name] for name in ("cache", "target", "draft") if name in state],
    }  # fmt: skip
    read = {"tokens": request.rows * request.prompt, "seq_len": request.prompt, "batch": inputs}
    found = [
        Program(
            title, cfg, trace=trace, flops=request.rows * flops.row(cfg, begins, source, 1), work=_prefill(cfg, begins),
            beside=beside, **read, **common,
        )
        for title, cfg, trace, beside in (
            ("prefill", model, prefill, others),
            *([("prefill of the draft", draft.model, prefill_draft, params)] if draft else []),
        )
    ]  # fmt: skip
    size = {"rows": request.rows, "slots": slots, "ends_at": begins + request.new, "source": source}
    how = {"rotated": bool(kv_cache), **size}
    if (
        draft
    ):  # the target reads N + 1 tokens in one pass; the draft two tokens in its first pass, and one in each other
        every = draft.tokens + 1
        one_pass = _step(model, params, state["target"], calls=1, tokens=every, **how)
        passes = _step(draft.model, others, state["draft"], calls=draft.tokens, tokens=every, **how)
        cost = _Step(
            max(one_pass.between, passes.between), one_pass.moved + passes.moved, one_pass.flops + passes.flops
        )
    else:
        every, cost = 1, _step(model, params, state["cache"], calls=1, tokens=1, **how)
    found.append(
        Program(
            "speculative step" if draft else "decoding step", model, trace=decode, flops=cost.flops,
            tokens=request.rows * every, seq_len=begins + request.new, steps=0 if draft else request.new - 1,
            work=Cost(cost.between, cost.moved, {dtype: cost.flops}), **common,
        )
    )  # fmt: skip
    return found


def _prefill(model: ModelConfig, tokens: int) -> Pass:
    """Return the description of a prefill for the cost model; `tokens` is the number of decoder tokens."""
    if model.encoder_layers:  # the decoder's first token is negligible beside the encoder's pass
        alone = {"architecture": "encoder", "layers": 0, "vocab_size": 0}
        return Pass(model.model_copy(update=alone), replicated=True)
    return Pass(predicted=1 / tokens, cached=tokens, replicated=True)


class _Step(NamedTuple):
    """Store the cost of a decoding step: temporaries in bytes, bytes read and written, and FLOPs."""

    between: float
    moved: float
    flops: float


def _step(
    model: ModelConfig, weights: Any, cache: Any, *, rows: int, slots: int, ends_at: int, source: int, calls: int,
    tokens: int, rotated: bool,
) -> _Step:  # fmt: skip
    """Return the cost of the passes of one model in a decoding step on one device.

    Args:
        model: Config of the model.
        weights: Abstract parameters, converted for decoding.
        cache: Abstract key-value cache.
        rows: Number of rows.
        slots: Number of tokens per row for which the cache has room.
        ends_at: Number of decoder tokens at the end of the generation.
        source: Number of encoder tokens.
        calls: Number of passes. Each pass reads the weights and the cache.
        tokens: Number of tokens per row that all passes read together. Each of several passes applies the output
            projection to one token per row. A single pass applies the output projection to all tokens.
        rotated: Whether the cache is quantized, and keys and values are rotated.
    """
    used = flops.row(model, ends_at, source, tokens if calls == 1 else calls)
    used -= flops.row(model, ends_at - tokens, source, 0)
    used += tokens * flops.cache_rotation(model) if rotated else 0
    read = {name: part for name, part in weights[0].items() if name != "embed" or model.tied}
    per_token = 2 * 4 * (model.vocab_size + model.heads * slots) + 4 * (2 * model.d_model + 2 * model.d_ff)
    between = float(rows * tokens * per_token)
    return _Step(between, calls * bytes_of([read, weights[1], cache]) + 2 * between, rows * used)
