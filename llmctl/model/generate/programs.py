"""List the compiled programs of text generation for the cost model of `llmctl plan`: prefill and one decoding step.

The parameters are replicated on all devices, as in `llmctl generate`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from llmctl.config.settings import MeshConfig
from llmctl.distributed import mesh as meshes
from llmctl.model import attention_kernels, flops, functional
from llmctl.model.array_bytes import bytes_of
from llmctl.model.config import ModelConfig
from llmctl.model.generate.decode import Decoder
from llmctl.model.generate.padded_prompts import padded_ends
from llmctl.model.generate.sampling import Sampling, row_keys
from llmctl.model.program import Cost, Pass, Program

DTYPE = "float32"
"""Default dtype of the computation in `llmctl generate`."""


class Request(NamedTuple):
    """Store the sizes of a batch: number of prompts, tokens per prompt, and new tokens per prompt."""

    rows: int
    prompt: int
    new: int


def generation(
    model: ModelConfig,
    weights: functional.Params,
    request: Request,
    mesh: Mesh,
    platform: str = "",
    dtype: str = DTYPE,
    kv_cache: str = "",
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

    Raises:
        ValueError: If the model does not generate text, or if prompt and new tokens exceed its maximum sequence length.
        RequestError: If the model's keys cannot be stored in the format `kv_cache`.
    """
    whole = meshes.replicated(mesh)
    one = meshes.make(MeshConfig(data=1), [mesh.devices.flat[0]])  # nothing is split

    def on_all(tree: Any) -> Any:
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole), tree)

    made: list[Decoder] = []

    def served(params: functional.Params) -> Any:
        made.append(Decoder(model, params, dtype, platform=platform, kv_cache=kv_cache))
        return made[0].weights

    with meshes.use(one):
        params = on_all(jax.eval_shape(served, weights))
    decoder, rules = made[0], Sampling()
    inputs, slots = decoder.inputs([[0] * request.prompt] * request.rows, request.new)
    inputs, ends = on_all(inputs), on_all(padded_ends(()))
    keys = on_all(jax.eval_shape(lambda: row_keys(0, request.rows)))
    first = jax.jit(decoder.first, static_argnames=("slots", "rules"))
    step = jax.jit(decoder.one, static_argnames="rules", donate_argnums=1)

    def prefill() -> Any:
        with meshes.use(one), attention_kernels.use("auto"):
            return first.trace(params, inputs, keys, ends, slots=slots, rules=rules)

    def decode() -> Any:
        with meshes.use(one), attention_kernels.use("auto"):
            return step.trace(params, state, keys, ends, rules=rules)

    with meshes.use(one):
        state = on_all(prefill().out_info)
    reads = model.encoder_layers > 0
    source, begins = (request.prompt, 1) if reads else (0, request.prompt)
    ends_at = begins + request.new
    common: dict[str, Any] = {
        "model": model, "mesh": mesh, "rows": request.rows, "dtype": dtype, "parameters": params,
        "cache": state["cache"],
    }  # fmt: skip
    read = {name: part for name, part in params[0].items() if name != "embed" or model.tied}
    work = Pass(predicted=1 / begins, cached=begins, replicated=True)
    if reads:  # the decoder's first token is negligible beside the encoder's pass
        alone = {"architecture": "encoder", "layers": 0, "vocab_size": 0}
        work = Pass(model.model_copy(update=alone), replicated=True)
    last = flops.row(model, ends_at, source, 1) - flops.row(model, ends_at - 1, source, 0)
    last += flops.cache_rotation(model) if kv_cache else 0
    token = _one_token(model, request.rows, slots, last, [read, params[1], state["cache"]], dtype)
    return [
        Program(
            "prefill", trace=prefill, flops=request.rows * flops.row(model, begins, source, 1),
            tokens=request.rows * request.prompt, seq_len=request.prompt, batch=inputs, work=work, **common,
        ),
        Program(
            "decoding step", trace=decode, flops=request.rows * last, tokens=request.rows, seq_len=ends_at,
            steps=request.new - 1, work=token, **common,
        ),
    ]  # fmt: skip


def _one_token(model: ModelConfig, rows: int, slots: int, flops_per_row: float, read: Any, dtype: str) -> Cost:
    """Return the cost of one decoding step on one device.

    Args:
        model: Config of the model.
        rows: Number of rows.
        slots: Number of tokens per row for which the cache has room.
        flops_per_row: FLOPs per row of the step.
        read: Abstract weights, keys and values that the step reads.
        dtype: Dtype of the computation.
    """
    per_row = 2 * 4 * (model.vocab_size + model.heads * slots) + 4 * (2 * model.d_model + 2 * model.d_ff)
    between = float(rows * per_row)
    return Cost(between, bytes_of(read) + 2 * between, {dtype: rows * flops_per_row})
