"""A recipe's stages planned in their order: each starts from what the one before it would leave."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from llmctl.artifacts import artifact
from llmctl.artifacts.artifact import Artifact
from llmctl.config.base import hint
from llmctl.config.errors import RequestError
from llmctl.config.settings import MeshConfig
from llmctl.distributed import mesh as meshes
from llmctl.pipeline.recipe import Recipe, Step
from llmctl.plan import (
    abstract_artifact,
    compression_programs,
    eval_programs,
    generate_programs,
    modelled,
    roofline,
    training_programs,
)
from llmctl.plan import compile as compiling
from llmctl.plan.hlo import counts as hlo
from llmctl.plan.sizes import bytes_of
from llmctl.plan.topologies import Topology
from llmctl.plan.training_programs import Plan, Program

Found = dict[str, Any]


def plans(
    recipe: Recipe,
    topology: Topology,
    chosen: Sequence[str] = (),
    *,
    tokens: int = 0,
    generate: str = "",
    say: Callable[[str], None] = lambda text: None,
) -> list[Found]:
    """One object a program, in the order of the stages.

    Args:
      recipe: whose stages; only its settings are read, and the manifests of artifacts outside it.
      topology: the chips.
      chosen: names of the stages to plan; all where empty.
      tokens: budget for the chip-hours; 0 takes each stage's own.
      generate: also `generate` by the last language model, as ROWSxPROMPTxNEW.
      say: told what is being done.

    Raises:
      RequestError: no such stage; a mesh or a batch that does not divide.
    """
    built = programs_of(recipe, compiling.devices(topology), chosen, generate, topology.platform)
    out: list[Found] = []
    for name, program in built:  # whatever is refused is refused before anything is compiled
        doing = "lowering" if topology.platform == "cuda" else "compiling"
        say(f"{name}: {doing} the {program.title} for {topology.name}")
        out.append({"stage": name, **one(program, topology, tokens)})
    return out


def programs_of(
    recipe: Recipe, devices: list[Any], chosen: Sequence[str] = (), generate: str = "", platform: str = ""
) -> list[tuple[str, Program]]:
    """The programs of the chosen stages on a mesh of these devices, not compiled, beside their stages' names.

    `platform` is what the devices stand for, where it is not their own. Raises RequestError as `plans`. Stages that are
    not chosen only say what they leave: their mesh need not fit.
    """
    names = [step.name for step in recipe.steps]
    for name in chosen:
        if name not in names:
            raise RequestError(f"--stage {name}: no such stage{hint(name, names)}; there are {', '.join(names)}")
    wants = generate_programs.asked(generate) if generate else None
    made: dict[str, Artifact] = {}
    built: list[tuple[str, Program]] = []
    last = max((names.index(name) for name in chosen), default=len(names) - 1)
    alone = meshes.make(MeshConfig(data=1), devices[:1])
    for step in recipe.steps[: last + 1]:
        wanted = not chosen or step.name in chosen
        mesh = meshes.make(explicit(step.config.mesh, len(devices)), devices) if wanted else alone
        found, left = _plan(step, made, mesh)
        if left:
            made[step.name] = left
        if wanted:
            built += [(step.name, program) for program in found]
    if wants:
        writers = {name: there for name, there in made.items() if there.model.head == "lm"}
        if not writers:
            raise RequestError("--generate: none of these stages leaves a language model")
        name, mesh = list(writers)[-1], meshes.make(explicit(MeshConfig(), len(devices)), devices)
        found = generate_programs.of_generate(writers[name], wants, mesh, platform)
        built += [(f"generate by {name}", program) for program in found]
    return built


def explicit(mesh: Any, devices: int) -> Any:
    """The mesh of a recipe with its defaults said: planned CPU devices are all wanted, unlike those of a laptop."""
    return mesh.model_copy(update={"data": devices}) if mesh == type(mesh)() else mesh


def _plan(step: Step, made: dict[str, Artifact], mesh: Mesh) -> Plan:
    def there(named: str | Path) -> Artifact:
        return abstract_artifact.on(made[named], mesh) if isinstance(named, str) else artifact.abstract(named, mesh)

    base = None if step.parent is None else there(step.parent)
    others = {name: there(named) for name, named in step.others.items()}
    config: Any = step.config
    if config.kind == "pretrain":
        return training_programs.of_pretrain(config, base, mesh)
    if config.kind == "distill":
        return training_programs.of_distill(config, next(iter(others.values())), base, mesh)
    if config.kind == "eval":
        return eval_programs.of_eval(config, others or ({step.name: base} if base else {}), mesh)
    if base is None:
        raise RequestError(f"{step.name}: nothing to start from; name an artifact with `from` (--from)")
    if config.kind == "finetune":
        return training_programs.of_finetune(config, base, mesh)
    return {"prune": compression_programs.of_prune, "quantize": compression_programs.of_quantize}[config.kind](
        config, base, mesh
    )


def one(program: Program, topology: Topology, tokens: int) -> Found:
    """What is known of one program."""
    axes = {axis: int(n) for axis, n in program.mesh.shape.items()}
    found: Found = {
        "program": program.title,
        "topology": topology.name,
        "chips": topology.chips,
        "mesh": axes,
        "rows_per_step": program.rows,
        "seq_len": program.seq_len,
        "tokens_per_step": program.tokens,
        "flops_per_step": program.flops,
    }
    if topology.platform == "cuda":
        modelled.lower(program, "cuda")
        temporaries, counts = modelled.step(program, topology)
        found |= {"compiled": False, "checked": modelled.CHECKED, "compile_seconds": 0.0, "compiler": {}}
        return found | _memory(program, topology, temporaries) | _work(program, topology, counts, axes, tokens)
    done = compiling.compiled(program)
    found |= {"compiled": bool(done.text), "compile_seconds": done.seconds, "compiler": done.says}
    counts = hlo.count(done.text, axes) if done.text else hlo.Counts(0.0, 0.0)
    return found | _memory(program, topology, done) | _work(program, topology, counts, axes, tokens)


def _memory(program: Program, topology: Topology, between: compiling.Compiled | float) -> Found:
    """Bytes of one device: what lies there by arithmetic on the shardings, what comes between by compiler or model.

    On TPUs the compiler says the fullest moment, in all kinds of memory, also the chip's own; the sum of what comes and
    goes is of HBM, and more than is ever there at once. The smaller of the two bounds is taken.
    """
    held: Found = {name: bytes_of(getattr(program, name)) for name in ("parameters", "optimizer", "batch", "cache")}
    lies, refused = sum(held.values()), False
    if isinstance(between, compiling.Compiled):
        refused = bool(between.wants)
        summed = between.arguments + between.outputs + between.temporaries
        peak = min(between.peak or summed, summed) if topology.platform == "tpu" else summed
        total = max(lies, bytes_of(program.beside) + (between.wants or peak))
    else:
        total = lies + int(between)
    held |= {"temporaries": total - lies, "total": total, "capacity": topology.chip.hbm_bytes}
    return {"hbm_bytes": held, "fits": not refused and (not held["capacity"] or total <= held["capacity"])}


def _work(program: Program, topology: Topology, counts: hlo.Counts, axes: dict[str, int], tokens: int) -> Found:
    """Operations, traffic and collectives as counted; time by the roofline."""
    bound = roofline.of(counts, topology, axes, program.dtype) if counts.flops or counts.bytes else None
    budget = (tokens or program.steps * program.tokens) if program.tokens else 0
    seconds = bound.seconds if bound else None
    return {
        "device_flops": counts.flops + counts.kernel_flops,
        "device_flops_by_type": counts.flops_by_type,
        "bytes_moved": counts.bytes,
        "collective_bytes": sum(c.bytes for c in counts.collectives),
        "collectives": [dataclasses.asdict(c) for c in counts.collectives],
        "kernels": counts.kernels,
        "unknown_loops": counts.unknown_loops,
        "step_seconds": seconds,
        "bound": bound.binds if bound else "",
        "mfu": bound.mfu(program.flops, topology, program.dtype) if bound else None,
        "tokens_per_second": program.tokens / seconds if seconds else None,
        "steps": program.steps,
        "token_budget": budget,
        "chip_hours": bound.chip_hours(budget, program.tokens, topology)
        if bound and budget and program.tokens
        else None,
    }
