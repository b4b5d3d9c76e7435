"""Programs for chips whose compiler is not at hand (GPUs): lowered for their platform, memory and work by the model.

What lies in memory is arithmetic on shapes and shardings; temporaries, operations, traffic and collectives are the
analytic model's.
"""

from __future__ import annotations

from dataclasses import replace

from llmctl.config.errors import RequestError, WorkError
from llmctl.model import attention_kernels
from llmctl.plan import analytic_counts, analytic_memory
from llmctl.plan.analytic_memory import Setup
from llmctl.plan.hlo.counts import Counts
from llmctl.plan.topologies import Topology
from llmctl.plan.training_programs import Program

CHECKED = "its lowering for CUDA was checked, with attention in the plain form; no GPU compiler has seen it"


def lower(program: Program, platform: str) -> None:
    """Lowers the program as for devices of `platform`. Raises WorkError where that fails."""
    try:
        program.trace().lower(lowering_platforms=(platform,))
    except RequestError:
        raise
    except Exception as e:  # JAX has no one type for what a platform cannot do
        raise WorkError(f"plan: {program.title} does not lower for {platform}: {e}") from e


def on(setup: Setup, topology: Topology) -> Setup:
    """The same step with the attention of these chips: their kernel where it can, else the plain form.

    `llmctl.model.attention_kernels` chooses so.
    """
    model, kernel = setup.model, False
    if topology.platform == "tpu":
        kernel = not setup.seq_len % attention_kernels.LANES
    elif topology.platform == "cuda":
        widest = 128 if topology.chip.name == "a100" else 256
        kernel = setup.dtype == "bfloat16" and not model.attn_softcap and not setup.seq_len % 2
        kernel = kernel and model.head_dim <= widest and not model.head_dim % 8
    return replace(setup, fused=setup.fused and kernel)


def step(program: Program, topology: Topology) -> tuple[float, Counts]:
    """(bytes of temporaries, operations, traffic and collectives) of one device."""
    if program.guess:
        return program.guess
    assert program.setup, f"{program.title}: nothing models it"
    setup = on(program.setup, topology)
    own = analytic_memory.entries(setup.model, setup.mesh)
    temporaries = analytic_memory.training(setup, own) if setup.optimizer else analytic_memory.forward(setup, own)
    return temporaries, analytic_counts.counts(setup)
