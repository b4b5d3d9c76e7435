"""Estimate the memory and operations of programs for chips without a local compiler (GPUs).

Each program is lowered. The bytes of its arrays are computed from shapes and shardings. The analytic model estimates
temporaries, operations, memory traffic and collectives.
"""

from __future__ import annotations

from dataclasses import replace

from llmctl.config.errors import RequestError, WorkError
from llmctl.model import attention_kernels
from llmctl.model.program import Cost, Pass, Program
from llmctl.plan import analytic_counts, analytic_memory, analytic_setup, small_programs
from llmctl.plan.analytic_setup import Setup
from llmctl.plan.hlo.counts import Counts
from llmctl.plan.topologies import Topology

CHECKED = "its lowering for CUDA was checked, with attention in the plain form; no GPU compiler has seen it"


def lower(program: Program, platform: str) -> None:
    """Lower the program for `platform`, without devices of that platform.

    Raises:
      WorkError: If the program uses a feature that the platform lacks.
    """
    try:
        program.trace().lower(lowering_platforms=(platform,))
    except RequestError:
        raise
    except Exception as e:  # JAX raises various types for unsupported operations
        raise WorkError(f"plan: {program.title} does not lower for {platform}: {e}") from e


def setup_of(program: Program, work: Pass) -> Setup:
    """Convert a program that runs the full model (a training step or a forward pass) to the analytic model's input."""
    mesh = {} if work.replicated else {axis: int(n) for axis, n in program.mesh.shape.items()}
    model = work.model or program.model
    return Setup(
        model=model,
        mesh=mesh,
        rows=program.rows,
        seq_len=program.seq_len,
        dtype=program.dtype,
        remat=program.remat,
        accumulate=program.accumulate,
        optimizer=work.optim.name if work.optim else "",
        ema=bool(work.optim and work.optim.ema),
        trained=work.trained,
        fused=analytic_setup.has_kernel(model, work.attention, mesh),
        eight=work.eight,
        beside=work.beside,
        cached=work.cached,
        predicted=work.predicted,
        written=work.written,
    )


def on(setup: Setup, topology: Topology) -> Setup:
    """Return the setup on a topology: `fused` becomes false if the topology has no attention kernel for the shapes.

    `llmctl.model.attention_kernels` defines the shapes that a kernel supports.
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
    """Return estimates for a program, per device: (bytes of temporaries, counts of operations, traffic and
    collectives).
    """
    work = program.work
    if work is None:
        return small_programs.least(program)
    if isinstance(work, Cost):
        return small_programs.described(work)
    if work.layers:
        return small_programs.layers(program, work)
    setup = on(setup_of(program, work), topology)
    own = analytic_memory.entries(setup.model, setup.mesh)
    temporaries = analytic_memory.training(setup, own) if setup.optimizer else analytic_memory.forward(setup, own)
    return temporaries, analytic_counts.counts(setup)
