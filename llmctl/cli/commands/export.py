"""`llmctl export`."""

from pathlib import Path
from typing import Annotated

import typer


def export(
    source: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="An artifact.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to make.")],
    to: Annotated[
        str, typer.Option(help="hf, compressed-tensors (quantized artifacts), peft (low-rank adapters) or gguf.")
    ] = "hf",
    dtype: Annotated[
        str, typer.Option(help="Type of the weights: float32, bfloat16 or float16; as they are by default.")
    ] = "",
    kind: Annotated[str, typer.Option("--type", help="For GGUF: f32, f16, q8_0, q4_0 or q4_1.")] = "f16",
    shard_size: Annotated[float, typer.Option(min=1e-6, help="Largest file of weights, in GB.")] = 5.0,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write an artifact as others load it, read it back and prove that it answers the same."""
    from llmctl.artifacts import atomic
    from llmctl.convert import exporting
    from llmctl.pipeline import console

    atomic.check(out)
    made = exporting.run(source, out, to=to, dtype=dtype, kind=kind, shard_bytes=int(shard_size * 1e9), say=console.say)
    if json:
        console.result(made)
    else:
        console.show(
            f"{made['out']}: {len(made['files'])} files, {made['bytes']:,} bytes, "
            f"answers differ by {made['parity']:.2g} at most"
        )
