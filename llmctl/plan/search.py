"""Search for layouts of a recipe's training stage by compiling its programs: `plan --search` and `plan --fit`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llmctl.config.base import format_toml
from llmctl.config.errors import RequestError
from llmctl.config.settings import MeshConfig
from llmctl.model.array_bytes import bytes_of
from llmctl.model.program import Pass
from llmctl.pipeline.recipe import Recipe, Step
from llmctl.plan import analytic_memory, mesh_search, modelled, planner, report
from llmctl.plan import compile as compiling
from llmctl.plan.analytic_setup import Setup
from llmctl.plan.mesh_search import Candidate
from llmctl.plan.topologies import Topology

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

Say = Callable[[str], None]


def searched(recipe: Recipe, topology: Topology, stage: str, say: Say) -> list[Candidate]:
    """Return the Pareto front of step time and memory of a training stage on `topology`, from compiled programs.

    Raises:
      RequestError: If the training stage does not exist, or no layout fits.
    """
    step = training_step(recipe, stage)
    setup = setup_of(recipe, step, topology)
    fit = len(mesh_search.candidates(setup, topology))
    say(f"{step.name}: {fit} ways to run it on {topology.name} fit, by the model")
    found = mesh_search.search(setup, topology, _compiles(recipe, step, topology, say))
    if not found:
        raise RequestError(f"plan: {step.name}: nothing fits {topology.name}; --fit finds the smallest slice that does")
    return [_with_recipe_lines(step, topology, one) for one in found]


def fitted(recipe: Recipe, slices: Sequence[Topology], stage: str, say: Say) -> tuple[Topology, Candidate]:
    """Return the first topology in `slices` on which a training stage fits, and the layout that fits.

    Raises:
      RequestError: If the training stage does not exist, or the stage fits on none of the topologies.
    """
    step = training_step(recipe, stage)
    setup = setup_of(recipe, step, slices[0])
    for topology in slices:
        if found := mesh_search.fit(setup, [topology], _compiles(recipe, step, topology, say)):
            return topology, _with_recipe_lines(step, topology, found[1])
        runs = any(True for _ in mesh_search.meshes(setup, topology.devices))
        why = "does not fit" if runs else f"no mesh divides its batch of {setup.rows} and its sizes over"
        say(f"{step.name}: {why} {topology.name}")
    raise RequestError(f"plan: {step.name}: fits none of {', '.join(t.name for t in slices)}")


def training_step(recipe: Recipe, stage: str) -> Step:
    """Return the named training stage, or the first training stage if no name is given.

    Raises:
      RequestError: If the training stage does not exist.
    """
    found = {step.name: step for step in recipe.steps if hasattr(step.config, "optim")}
    if not found or (stage and stage not in found):
        raise RequestError(
            f"plan: {stage or 'the recipe'}: no stage that trains; there are {', '.join(found) or 'none'}"
        )
    return found[stage] if stage else next(iter(found.values()))


def setup_of(recipe: Recipe, step: Step, topology: Topology) -> Setup:
    """Describe a stage's training step as a Setup, the input of the analytic model.

    The parameters are counted from the arrays of the stage.
    """
    # One device: the mesh is the unknown of the search, and every batch divides by 1.
    alone = _edited(recipe, step, {"data": 1}, {})
    _, program = planner.programs_of(alone, compiling.devices(topology)[:1], [step.name])[-1]
    assert isinstance(program.work, Pass)
    plain = modelled.on(modelled.setup_of(program, program.work), topology)
    own = analytic_memory.entries(program.model, {}).total
    besides = bytes_of(program.parameters) / own - 4.0 * plain.trained * (2 if plain.ema else 1)
    return replace(plain, stored=besides if besides > 0.05 else 0.0)


def _with_recipe_lines(step: Step, topology: Topology, one: Candidate) -> Candidate:
    """Return the candidate with its `recipe`: the lines of TOML that set its mesh and training settings."""
    config: Any = step.config
    changed = config.train.model_copy(update={"remat": one.setup.remat, "accumulate": one.setup.accumulate})
    train = changed.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude_none=True)
    # Axes that the recipe names are written even if they are 1: a shared section would be merged in otherwise.
    named = {name: one.setup.mesh.get(name, config.mesh.dcn) for name in config.mesh.model_fields_set}
    mesh = one.axes | named
    return replace(
        one,
        compiled=topology.platform != "cuda",
        recipe=(f"mesh = {format_toml(mesh)}", f"train = {format_toml(train)}"),
    )


def _edited(recipe: Recipe, step: Step, mesh: Mapping[str, int], train: dict[str, Any]) -> Recipe:
    """Return a copy of the recipe in which one stage has another mesh and other training settings."""
    config: Any = step.config
    update = {"mesh": MeshConfig(**mesh), "train": config.train.model_copy(update=train)}
    new = replace(step, config=config.model_copy(update=update))
    return replace(recipe, steps=tuple(new if other is step else other for other in recipe.steps))


def _compiles(recipe: Recipe, step: Step, topology: Topology, say: Say) -> mesh_search.Compile:
    config: Any = step.config

    def compile_one(setup: Setup) -> tuple[float, float] | None:
        mesh = {**setup.mesh, "dcn": config.mesh.dcn}
        edited = _edited(recipe, step, mesh, {"remat": setup.remat, "accumulate": setup.accumulate})
        axes = " x ".join(f"{axis} {n}" for axis, n in Candidate(setup, 0.0, 0.0).axes.items())
        say(f"{axes}, remat {setup.remat}, accumulate {setup.accumulate}:")
        try:
            found = planner.plans(edited, topology, [step.name], say=say)[-1]
        except RequestError as e:  # the model or the objective does not support this mesh
            say(str(e))
            return None
        seconds, memory = found["step_seconds"], report.size(found["hbm_bytes"]["total"])
        took = f", {report.duration(seconds)} a step" if seconds else ""
        say(f"  {memory}, {'fits' if found['fits'] else 'does not fit'}{took}")
        return (found["hbm_bytes"]["total"], seconds or math.inf) if found["fits"] else None

    return compile_one


def as_json(found: Sequence[Candidate], topology: Topology) -> dict[str, Any]:
    """Return the Pareto front of step time and memory as one JSON object, fastest first."""
    return {
        "topology": topology.name,
        "chips": topology.chips,
        "front": [
            {
                "mesh": dict(c.setup.mesh), "remat": c.setup.remat, "accumulate": c.setup.accumulate,
                "hbm_bytes": c.memory, "step_seconds": c.seconds, "recipe": c.recipe, "compiled": c.compiled,
            }
            for c in found
        ],
    }  # fmt: skip


def table(found: Sequence[Candidate], topology: Topology) -> Table:
    """Return a table of the Pareto front of step time and memory, fastest first."""
    from rich.table import Table

    out = Table(title=f"{topology.name}: step time against memory", title_justify="left")
    compiled = all(c.compiled for c in found)
    out.caption = "memory: compiled; time: its roofline, a bound" if compiled else "all by the model"
    for column in ("", "memory of a device", "step", "tokens/s", "mesh", "remat", "accumulate"):
        out.add_column(column, justify="left" if column in ("mesh", "remat") else "right")
    for n, c in enumerate(found, 1):
        known = math.isfinite(c.seconds)
        speed = f"{c.setup.rows * c.setup.seq_len / c.seconds:,.0f}" if known else ""
        took = report.duration(c.seconds) if known else ""
        mesh = " x ".join(f"{axis} {size}" for axis, size in c.axes.items())
        runs = (mesh, c.setup.remat, str(c.setup.accumulate))
        out.add_row(str(n), report.size(c.memory), took, speed, *runs)
    return out


def lines(found: Sequence[Candidate]) -> Text:
    """Return the TOML lines of each candidate as text to copy.

    The lines replace the stage's settings `mesh` and `train`.
    """
    from rich.text import Text

    texts = (f"# {n}: in place of the stage's mesh and train\n" + "\n".join(c.recipe) for n, c in enumerate(found, 1))
    return Text("\n".join(texts), no_wrap=True, overflow="ignore")
