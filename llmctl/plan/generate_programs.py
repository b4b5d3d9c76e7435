"""The programs of `generate`: the prompts' pass that fills the cache, and one step of the loop that follows it.

The command holds the whole model on every device, and so do these.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from llmctl.artifacts.artifact import Artifact
from llmctl.config.errors import RequestError
from llmctl.config.settings import MeshConfig
from llmctl.distributed import mesh as meshes
from llmctl.model import attention_kernels, flops, functional
from llmctl.model.generate.decode import Decoder, padded_ends
from llmctl.model.generate.sampling import Sampling, row_keys
from llmctl.plan import analytic_memory, small_programs
from llmctl.plan.training_programs import Program

DTYPE = "float32"
"""The command's default."""


class Asked(NamedTuple):
    """So many prompts at a time, of so many tokens, and so many new tokens after each."""

    rows: int
    prompt: int
    new: int


def asked(text: str) -> Asked:
    """From ROWSxPROMPTxNEW; raises RequestError for what is not that."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", text)
    if not found:
        raise RequestError(f"--generate {text}: must be prompts x tokens of each x new tokens, such as 8x512x128")
    return Asked(*map(int, found.groups()))


def of_generate(there: Artifact, wants: Asked, mesh: Mesh, platform: str = "") -> list[Program]:
    """Prefill and one decoding step, on devices that may stand for those of another platform.

    Raises RequestError for a model that writes no text, or none so long.
    """
    whole = meshes.replicated(mesh)
    one = meshes.make(MeshConfig(data=1), [mesh.devices.flat[0]])  # the command splits nothing

    def on_all(tree: Any) -> Any:
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole), tree)

    made: list[Decoder] = []

    def served(params: functional.Params) -> Any:
        made.append(Decoder(there.model, params, DTYPE, platform=platform))
        return made[0].weights

    try:
        with meshes.use(one):
            params = on_all(jax.eval_shape(served, there.params))
        decoder, rules = made[0], Sampling()
        inputs, slots = decoder.inputs([[0] * wants.prompt] * wants.rows, wants.new)
    except ValueError as e:
        raise RequestError(f"--generate: {there.path}: {e}") from None
    inputs, ends = on_all(inputs), on_all(padded_ends(()))
    keys = on_all(jax.eval_shape(lambda: row_keys(0, wants.rows)))
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
    model, reads = there.model, there.model.encoder_layers > 0
    source, begins = (wants.prompt, 1) if reads else (0, wants.prompt)
    ends_at = begins + wants.new
    common: dict[str, Any] = {
        "model": model, "mesh": mesh, "rows": wants.rows, "dtype": DTYPE, "parameters": params,
        "cache": state["cache"],
    }  # fmt: skip
    read = {name: part for name, part in params[0].items() if name != "embed" or model.tied}
    pass_ = analytic_memory.Setup(model, {}, wants.rows, begins, DTYPE, predicted=1 / begins, cached=begins)
    if reads:  # the encoder alone, beside whose pass the decoder's first token is nothing
        alone = {"architecture": "encoder", "layers": 0, "vocab_size": 0}
        pass_ = analytic_memory.Setup(model.model_copy(update=alone), {}, wants.rows, source, DTYPE)
    last = flops.row(model, ends_at, source, 1) - flops.row(model, ends_at - 1, source, 0)
    return [
        Program(
            "prefill", trace=prefill, flops=wants.rows * flops.row(model, begins, source, 1),
            tokens=wants.rows * wants.prompt, seq_len=wants.prompt, batch=inputs,
            setup=pass_, **common,
        ),
        Program(
            "decoding step", trace=decode, flops=wants.rows * last,
            tokens=wants.rows, seq_len=ends_at, steps=wants.new - 1,
            guess=small_programs.decoding(
                model, wants.rows, slots, wants.rows * last, analytic_memory.ITEM[DTYPE],
                [read, params[1], state["cache"]],
            ), **common,
        ),
    ]  # fmt: skip
