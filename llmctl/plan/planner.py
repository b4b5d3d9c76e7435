"""Plan the stages of a recipe in order. Each stage starts from the model that its parent stage would write."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from llmctl.artifacts import abstract_artifact, artifact
from llmctl.artifacts.artifact import Artifact
from llmctl.artifacts.drafts import check_draft
from llmctl.artifacts.manifest import NAME as MANIFEST
from llmctl.config.base import hint
from llmctl.config.errors import RequestError
from llmctl.config.settings import MeshConfig
from llmctl.distributed import mesh as meshes
from llmctl.model.array_bytes import bytes_of
from llmctl.model.generate.programs import Draft, Request, generation
from llmctl.model.generate.speculative import DRAFT_TOKENS
from llmctl.model.program import Program
from llmctl.pipeline import stage
from llmctl.pipeline.recipe import Recipe, Step
from llmctl.plan import compile as compiling
from llmctl.plan import modelled, roofline
from llmctl.plan.hlo import counts as hlo
from llmctl.plan.topologies import Topology

Found = dict[str, Any]
Say = Callable[[str], None]


def plans(
    recipe: Recipe,
    topology: Topology,
    chosen: Sequence[str] = (),
    *,
    tokens: int = 0,
    generate: str = "",
    kv_cache: str = "",
    draft: str = "",
    draft_tokens: int = DRAFT_TOKENS,
    say: Say = lambda text: None,
) -> list[Found]:
    """Plan the programs of the chosen stages, and return one dictionary per program, in the order of the stages.

    A dictionary has the size, memory, operations and time of its program, as `one` returns them.

    Args:
      recipe: the stages. Only the settings of the stages, and the manifests of artifacts outside the recipe, are read.
      topology: the hardware.
      chosen: names of the stages to plan; if empty, all stages are planned.
      tokens: number of training tokens from which chip-hours are computed; 0 means each stage's own number.
      generate: sizes ROWSxPROMPTxNEW of a call of `llmctl generate` with the last stage's language model. The call is
        planned too. If empty, no call is planned.
      kv_cache: format of cached keys and values in the call of `llmctl generate`; if empty, keys and values have the
          dtype of the computation.
      draft: draft of the call of `llmctl generate`: the name of a stage, or the folder of an artifact.
      draft_tokens: number of tokens that the draft proposes per step.
      say: function that prints progress lines.

    Raises:
      RequestError: If a stage does not exist, or a mesh or a batch does not divide evenly.
    """
    built = programs_of(
        recipe, compiling.devices(topology), chosen, generate, topology.platform, say, kv_cache, draft, draft_tokens
    )
    out: list[Found] = []
    for name, program in built:  # all programs are built, so wrong settings are refused before compiling
        doing = "lowering" if topology.platform == "cuda" else "compiling"
        say(f"{name}: {doing} the {program.title} for {topology.name}")
        out.append({"stage": name, **one(program, topology, tokens)})
    return out


def programs_of(
    recipe: Recipe,
    devices: list[Any],
    chosen: Sequence[str] = (),
    generate: str = "",
    platform: str = "",
    say: Say = lambda text: None,
    kv_cache: str = "",
    draft: str = "",
    draft_tokens: int = DRAFT_TOKENS,
) -> list[tuple[str, Program]]:
    """Return the programs of the chosen stages, each with its stage's name. Nothing is compiled.

    From a stage that is not chosen, only the shapes of its resulting model are used. Its mesh is ignored, because this
    mesh may need another number of devices.

    Args:
      recipe, chosen, generate, say, kv_cache, draft, draft_tokens: see `plans`.
      devices: the devices of the mesh.
      platform: the platform to plan for, if it is not the platform of `devices`.

    Raises:
      RequestError: If a stage does not exist, or a mesh or a batch does not divide evenly.
    """
    names = [step.name for step in recipe.steps]
    for name in chosen:
        if name not in names:
            raise RequestError(f"--stage {name}: no such stage{hint(name, names)}; there are {', '.join(names)}")
    request = _request(generate) if generate else None
    made: dict[str, Artifact] = {}
    built: list[tuple[str, Program]] = []
    last = max((names.index(name) for name in chosen), default=len(names) - 1)
    alone = meshes.make(MeshConfig(data=1), devices[:1])
    for step in recipe.steps[: last + 1]:
        wanted = not chosen or step.name in chosen
        mesh = meshes.make(explicit(step.config.mesh, len(devices)), devices) if wanted else alone
        found, left = _stage(step, made, mesh)
        if left:
            made[step.name] = left
        if wanted:
            size = left.manifest.bytes if left else 0
            built += [(step.name, dataclasses.replace(program, artifact_bytes=size)) for program in found]
        if wanted and not found:
            say(f"{step.name}: nothing to compile; the stage {step.config.kind!r} exports no programs")
    if request:
        built += _generation(made, request, kv_cache, draft, draft_tokens, devices, platform)
    return built


def _generation(
    made: dict[str, Artifact],
    request: Request,
    kv_cache: str,
    draft: str,
    draft_tokens: int,
    devices: list[Any],
    platform: str,
) -> list[tuple[str, Program]]:
    """Return the programs of `llmctl generate` for the last stage that would write a language model.

    The stage that writes the draft is not considered.
    """
    writers = {name: there for name, there in made.items() if there.model.head_kind.vocabulary and name != draft}
    if not writers:
        raise RequestError("--generate: none of these stages leaves a language model")
    name, mesh = list(writers)[-1], meshes.make(explicit(MeshConfig(), len(devices)), devices)
    there = writers[name]
    drafted = None
    if draft:
        if draft not in made and not (Path(draft) / MANIFEST).is_file():
            raise RequestError(f"--draft {draft}: no such stage{hint(draft, list(made))}, and no artifact")
        other = made.get(draft) or artifact.abstract(Path(draft), mesh)
        check_draft(f"--draft {draft}", other.manifest, there.manifest, name)
        drafted = Draft(other.model, other.params, draft_tokens)
    try:
        found = generation(there.model, there.params, request, mesh, platform, kv_cache=kv_cache, draft=drafted)
    except ValueError as e:
        raise RequestError(f"--generate: {there.path}: {e}") from None
    return [(f"generate by {name}", program) for program in found]


def _request(text: str) -> Request:
    """Parse ROWSxPROMPTxNEW, and return the generation request.

    Raises:
      RequestError: If the text has another form.
    """
    found = re.fullmatch(r"([1-9][0-9]{0,8})x([1-9][0-9]{0,8})x([1-9][0-9]{0,8})", text)
    if not found:
        raise RequestError(f"--generate {text}: must be prompts x tokens of each x new tokens, such as 8x512x128")
    return Request(*map(int, found.groups()))


def explicit(mesh: MeshConfig, devices: int) -> MeshConfig:
    """Return the mesh config. If it is the default, return a config whose `data` axis has `devices` devices.

    A plan on CPU devices needs this change. Without it, the default mesh would use only the first CPU device.
    """
    return mesh.model_copy(update={"data": devices}) if mesh == type(mesh)() else mesh


def _stage(step: Step, made: dict[str, Artifact], mesh: Mesh) -> stage.Programs:
    """Return a stage's programs and the artifact that the stage would write.

    If a stage declares no programs, the plan assumes that the stage compiles nothing. The artifact then has the
    parent's shapes.
    """

    def there(named: str | Path) -> Artifact:
        if not isinstance(named, str):
            return artifact.abstract(named, mesh)
        if named not in made:
            raise RequestError(f"{step.name}: cannot be planned: the stage {named!r} exports no programs")
        return abstract_artifact.with_shardings(made[named], mesh)

    base = None if step.parent is None else there(step.parent)
    others = {name: there(named) for name, named in step.others.items()}
    programs = getattr(stage.load(step.config.kind), "programs", None)
    if programs:
        return programs(step.config, base, others, mesh)
    return [], base if step.config.produces else None


def one(program: Program, topology: Topology, tokens: int) -> Found:
    """Return the size, memory, operations and time of one program as a dictionary, for `--json`."""
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
        "artifact_bytes": program.artifact_bytes,
        "cache_bytes": program.cache_bytes,
    }
    if topology.platform == "cuda":
        modelled.lower(program, "cuda")
        temporaries, counts = modelled.step(program, topology)
        found |= {"compiled": False, "checked": modelled.CHECKED, "compile_seconds": 0.0, "compiler": {}}
        return found | _memory(program, topology, temporaries) | _work(program, topology, counts, axes, tokens)
    done = compiling.compiled(program)
    found |= {"compiled": bool(done.text), "compile_seconds": done.seconds, "compiler": done.reported_costs}
    counts = hlo.count(done.text, axes) if done.text else hlo.Counts(0.0, 0.0)
    return found | _memory(program, topology, done) | _work(program, topology, counts, axes, tokens)


def _memory(program: Program, topology: Topology, result: compiling.Compiled | float) -> Found:
    """Return the bytes of memory on one device, by class (parameters, optimizer, …).

    The bytes of arguments and of other arrays in memory are computed from shapes and shardings. The compiler or the
    analytic model reports the rest. For TPUs, there are two upper bounds of the total, and the smaller bound is used:

    - The compiler's peak counts all kinds of memory, also on-chip memory.
    - The sum of arguments, results and temporaries counts only HBM. The sum assumes that all these arrays exist at the
      same time.
    """
    held: Found = {name: bytes_of(getattr(program, name)) for name in ("parameters", "optimizer", "batch", "cache")}
    arrays, refused = sum(held.values()), False
    if isinstance(result, compiling.Compiled):
        refused = bool(result.required)
        summed = result.arguments + result.outputs + result.temporaries
        peak = min(result.peak or summed, summed) if topology.platform == "tpu" else summed
        total = max(arrays, bytes_of(program.beside) + (result.required or peak))
    else:
        total = arrays + int(result)
    held |= {"temporaries": total - arrays, "total": total, "capacity": topology.chip.hbm_bytes}
    return {"hbm_bytes": held, "fits": not refused and (not held["capacity"] or total <= held["capacity"])}


def _work(program: Program, topology: Topology, counts: hlo.Counts, axes: dict[str, int], tokens: int) -> Found:
    """Return a dictionary with operations, memory traffic and collectives as counted, and the time by the roofline
    model.
    """
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
