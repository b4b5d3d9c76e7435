"""Programs for chips whose compiler is not at hand (GPUs): lowered for their platform, memory and work by the model.

What lies in memory is arithmetic on shapes and shardings; temporaries, operations, traffic and collectives are the
analytic model's.
"""

from __future__ import annotations

from dataclasses import replace

from llmctl.errors import RequestError, WorkError
from llmctl.plan import analytic, work
from llmctl.plan.analytic import Setup
from llmctl.plan.hlo import Counts
from llmctl.plan.programs import Program

CHECKED = "its lowering for CUDA was checked, with attention in the plain form; no GPU compiler has seen it"


def lower(program: Program, platform: str) -> None:
    """Lowers the program as for devices of `platform`. Raises WorkError where that fails."""
    try:
        program.trace().lower(lowering_platforms=(platform,))
    except RequestError:
        raise
    except Exception as e:  # JAX has no one type for what a platform cannot do
        raise WorkError(f"plan: {program.title} does not lower for {platform}: {e}") from e


def on_gpu(setup: Setup) -> Setup:
    """The same step with the attention that a GPU of Ampere or later runs: cuDNN's where it can, else the plain form.

    `llmctl.model.flash` chooses so.
    """
    model = setup.model
    can = setup.dtype == "bfloat16" and not model.attn_softcap and model.head_dim <= 128 and not model.head_dim % 8
    return replace(setup, fused=setup.fused and can and not setup.seq_len % 2)


def step(program: Program) -> tuple[float, Counts]:
    """(bytes of temporaries, operations, traffic and collectives) of one device."""
    if program.guess:
        return program.guess
    assert program.setup, f"{program.title}: nothing models it"
    setup = on_gpu(program.setup)
    own = analytic.entries(setup.model, setup.mesh)
    temporaries = analytic.training(setup, own) if setup.optimizer else analytic.forward(setup, own)
    return temporaries, work.counts(setup)
