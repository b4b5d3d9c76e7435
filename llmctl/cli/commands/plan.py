"""Define the command `llmctl plan`."""

import math
from pathlib import Path
from typing import Annotated, Any, get_args

import typer


def plan(
    recipe_file: Annotated[Path, typer.Argument(metavar="RECIPE", help="TOML recipe; its data are not read.")],
    topology: Annotated[
        str, typer.Option(metavar="NAME", help="Chips to plan for: v5e:16x16, 2*v5p:4x4x4, cpu:8, …")
    ] = "",
    chips: Annotated[int, typer.Option(min=0, help="Instead: number of chips of a slice of --chip.")] = 0,
    chip: Annotated[
        str, typer.Option(help="Chip of --chips and --fit: v4, v5e (the default), v5p, v6e, tpu7x, a100, h100, h200.")
    ] = "",
    stage: Annotated[
        list[str] | None,
        typer.Option(help="Plan only this stage (repeatable)."),
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, as in `llmctl run`."),
    ] = None,
    tokens: Annotated[
        float, typer.Option(min=0, help="Number of tokens for chip-hours; by default those of the stage's steps.")
    ] = 0,
    generate: Annotated[
        str, typer.Option(metavar="ROWSxPROMPTxNEW", help="Also plan `llmctl generate` with the last language model.")
    ] = "",
    kv_cache: Annotated[
        str, typer.Option(metavar="FORMAT", help="With --generate: format of cached keys and values, such as int8.")
    ] = "",
    draft: Annotated[
        str,
        typer.Option(metavar="NAME", help="With --generate: draft of speculative decoding, a stage or an artifact."),
    ] = "",
    draft_tokens: Annotated[
        int | None, typer.Option(min=1, max=64, help="With --draft: number of proposed tokens per step; 4 by default.")
    ] = None,
    search: Annotated[
        bool,
        typer.Option("--search", help="Search for the meshes, remat and accumulation with the least time or memory."),
    ] = False,
    fit: Annotated[
        bool, typer.Option("--fit", help="Find the smallest slice of --chip on which a stage fits.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compile a recipe's stages for chips that are not attached, and report memory, time, and whether the stages fit.

    Planning requires no accelerator, no data and little memory.
    """
    from llmctl.config.errors import RequestError
    from llmctl.config.settings import KVCache
    from llmctl.pipeline import console, recipe
    from llmctl.plan import environment, report, topologies

    if bool(topology) + bool(chips) + fit != 1:
        raise RequestError(
            "plan: say which chips with --topology NAME (such as v5e:16x16 or cpu:1), --chips N or --fit"
        )
    if (search or fit) and len(stage or ()) > 1:
        raise RequestError("plan: --search and --fit look at one stage; name one with --stage")
    if (search or fit) and (generate or tokens):
        raise RequestError("plan: --search and --fit look at one training step; leave out --generate and --tokens")
    if kv_cache not in get_args(KVCache):
        raise RequestError(f"plan: --kv-cache {kv_cache}: must be {', '.join(filter(None, get_args(KVCache)))}")
    if kv_cache and not generate:
        raise RequestError("plan: --kv-cache belongs to --generate; say both")
    if draft and not generate:
        raise RequestError("plan: --draft belongs to --generate; say both")
    if draft_tokens and not draft:
        raise RequestError("plan: --draft-tokens belongs to --draft; say both")
    if chip and topology:
        raise RequestError(f"plan: --topology {topology} names its chip; --chip goes with --chips or --fit")
    if not math.isfinite(tokens):
        raise RequestError(f"plan: --tokens {tokens}: must be a number, such as 2e12")
    chip = chip or "v5e"
    slices = topologies.smallest_first(chip) if fit else []
    target = slices[0] if fit else topologies.find(topology) if topology else topologies.with_chips(chip, chips)
    chosen = recipe.read(recipe_file, None, sets or ())

    environment.prepare(slices[-1] if fit else target)
    from llmctl.pipeline import data_check
    from llmctl.plan import planner

    data_check.check(chosen, stage or (), missing=True)

    if search or fit:
        from llmctl.plan import search as searching

        one = stage[0] if stage else ""
        if fit:
            target, best = searching.fitted(chosen, slices, one, console.say)
            front = [best]
        else:
            front = searching.searched(chosen, target, one, console.say)
        if json:
            console.result(searching.as_json(front, target))
            return
        console.show(searching.table(front, target))
        console.show(searching.lines(front))
        return
    about: dict[str, Any] = {"tokens": int(tokens), "generate": generate, "kv_cache": kv_cache, "draft": draft}
    about |= {"draft_tokens": draft_tokens} if draft_tokens else {}
    found = planner.plans(chosen, target, stage or (), **about, say=console.say)
    if json:
        console.result(report.whole(found))
        return
    for one in found:
        console.show(report.heading(one))
        console.show(report.memory_table(one))
        console.show(report.work_table(one))
    if len(found) > 1:
        console.show(report.summary(found))
    for line in dict.fromkeys(report.facts(one) for one in found):
        console.show(line)
