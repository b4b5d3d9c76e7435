"""Define the command `llmctl import`."""

from pathlib import Path
from typing import Annotated

import typer


def import_(
    source: Annotated[
        Path, typer.Argument(metavar="DIR", help="Hugging Face folder, GGUF file, or folder with a PEFT adapter.")
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the new artifact.")],
    dtype: Annotated[
        str, typer.Option(help="Type of the weights: float32, bfloat16 or float16; as stored by default.")
    ] = "",
    base: Annotated[Path | None, typer.Option(metavar="DIR", help="Artifact that an adapter belongs to.")] = None,
    store: Annotated[
        str, typer.Option(help="With an adapter: arrays of the artifact, model (all) or adapter (not those of --base).")
    ] = "model",
    merge: Annotated[
        bool, typer.Option("--merge", help="With an adapter: merge it into the matrices of --base.")
    ] = False,
    tokenizer: Annotated[Path | None, typer.Option(help="Folder or file of another tokenizer.")] = None,
    reference: Annotated[
        Path | None,
        typer.Option(help="Safetensors file with input_ids and logits to reproduce; reference.safetensors by default."),
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(metavar="KEY", help="Key of config.json to ignore (repeatable).")
    ] = None,
    drop: Annotated[
        list[str] | None, typer.Option(metavar="REGEX", help="Tensors to omit, by their full name (repeatable).")
    ] = None,
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="Import weights that hold NaN or infinity.")
    ] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Replace an artifact that was not imported.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Convert a published model to an artifact. Unknown settings and tensors are errors; none is dropped silently."""
    from llmctl.artifacts import atomic
    from llmctl.config.errors import RequestError
    from llmctl.convert import importing, peft
    from llmctl.pipeline import console

    atomic.check(out)
    if source.is_dir() and peft.is_adapter(source):
        if base is None:
            raise RequestError(f"{source}: is an adapter; --base names the artifact that it belongs to")
        if dtype or tokenizer or reference or ignore or drop:
            raise RequestError(f"{source}: is an adapter, for which only --base, --store and --merge have a meaning")
        made = importing.adapter(
            source, base, out, store=store, merge=merge, allow_nonfinite=allow_nonfinite, replace=replace
        )
    elif base is not None or merge or store != "model":
        flag = "--base" if base is not None else "--merge" if merge else "--store"
        raise RequestError(f"{source}: is not an adapter, so {flag} has no meaning")
    else:
        made = importing.run(
            source,
            out,
            dtype=dtype,
            tokenizer=tokenizer,
            reference=reference,
            ignore=tuple(ignore or ()),
            drop=tuple(drop or ()),
            allow_nonfinite=allow_nonfinite,
            replace=replace,
            say=console.say,
        )
    if json:
        console.result(made)
    else:
        console.show(f"{made['artifact']}: {made['family']}, {made['parameters']:,} parameters, {made['digest'][:12]}")
