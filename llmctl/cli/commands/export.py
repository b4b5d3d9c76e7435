"""Define the command `llmctl export`."""

from pathlib import Path
from typing import Annotated

import typer


def export(
    source: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="Artifact to export.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="New folder for the exported files.")],
    base: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Base of an adapter, if it is not next to the adapter.")
    ] = None,
    to: Annotated[
        str,
        typer.Option(
            help="Format: hf, compressed-tensors (quantized or pruned), peft (adapters), gguf, "
            "artifact (adapter and base)."
        ),
    ] = "hf",
    dtype: Annotated[
        str, typer.Option(help="Type of the weights: float32, bfloat16 or float16; unchanged by default.")
    ] = "",
    kind: Annotated[
        str, typer.Option("--type", help="GGUF type: f32, f16, q8_0, q6_k, q5_0, q5_1, q4_0 or q4_1.")
    ] = "f16",
    shard_size: Annotated[float, typer.Option(min=1e-6, help="Maximum size of a weight file in GB.")] = 5.0,
    merge: Annotated[
        bool, typer.Option("--merge", help="With --to artifact: merge the adapter into the matrices of its base.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Export an artifact for other libraries, read the export back, and check that the outputs are the same."""
    from llmctl.artifacts import adapters, atomic
    from llmctl.convert import exporting
    from llmctl.pipeline import console

    atomic.check(out)
    bases = [base] if base else []
    adapters.check_bases([source], bases)
    common = {"dtype": dtype, "shard_bytes": int(shard_size * 1e9), "bases": bases, "merge": merge}
    made = exporting.run(source, out, to=to, kind=kind.lower(), say=console.say, **common)
    if json:
        console.result(made)
    else:
        console.show(
            f"{made['out']}: {len(made['files'])} files, {made['bytes']:,} bytes, "
            f"answers differ by {max(made['parity'], made['transformers'] or 0):.2g} at most ({made['proof']})"
        )
