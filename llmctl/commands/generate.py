"""`llmctl generate`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmctl import console
from llmctl.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from llmctl.artifact import Manifest
    from llmctl.filling import Filler


def generate(
    artifact_dir: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="A language model.")],
    prompt: Annotated[list[str] | None, typer.Option(help="Text to continue; several make a batch.")] = None,
    file: Annotated[Path | None, typer.Option(help="A file with one prompt a line.")] = None,
    max_new: Annotated[int, typer.Option(min=1, help="New tokens at most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token every time.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Draw from the k likeliest tokens; 0 from all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that together reach this.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Draw from tokens this fraction as likely as the likeliest.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 lowers what was said before.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text (repeatable).")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts continued at a time.")] = 8,
    dtype: Annotated[str, typer.Option(help="Compute type: float32 or bfloat16.")] = "float32",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Continue text, or fill its masks: prompts from flags, a file, or line by line from standard input.

    An encoder-decoder answers prompts; an encoder fills every <mask> with the likeliest word.
    """
    prompts = [*(prompt or []), *(_lines(file) if file else [])]
    if dtype not in ("float32", "bfloat16"):
        raise RequestError(f"--dtype {dtype}: must be float32 or bfloat16")
    interactive = not prompts and not file
    if file and not prompts:
        raise RequestError(f"{file}: holds no prompt")

    from llmctl.artifact import load, read_manifest
    from llmctl.data import tokenizer as tokenizers
    from llmctl.filling import Filler
    from llmctl.generation import Speed, begin, continue_rows
    from llmctl.model.decode import Decoder
    from llmctl.model.sampling import Sampling

    try:
        rules = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    except ValueError as e:
        raise RequestError(str(e)) from None
    model = read_manifest(artifact_dir).model
    if model.head != "lm":
        raise RequestError(
            f"{artifact_dir}: is a {model.architecture} with the head {model.head!r}; it cannot generate"
        )
    loaded = load(artifact_dir)
    words = tokenizers.load(loaded.tokenizer_dir)
    if model.architecture == "encoder":
        filler = Filler(model, loaded.params, words, dtype)
        texts = (line.rstrip("\n") for line in sys.stdin if line.strip()) if interactive else prompts
        _fill(filler, texts, top_k or 5, loaded.manifest if json else None)
        return
    encoded = model.architecture == "encoder_decoder"
    decoder = Decoder(model, loaded.params, dtype, start=words.pad_id)
    speed, done = Speed(), []
    batches: Iterable[list[str]] = (
        ([line.rstrip("\n")] for line in sys.stdin if line.strip())
        if interactive
        else (prompts[i : i + batch_size] for i in range(0, len(prompts), batch_size))
    )
    for batch in batches:
        live = len(batch) == 1 and not json
        if live and not interactive and not encoded:
            _write(batch[0])
        rows = begin(words, batch, stop or (), encoded=encoded)
        for new in continue_rows(decoder, words, rows, max_new, sampling=rules, seed=seed, speed=speed):
            if live:
                _write(new[0])
        if live:
            _write("\n")
        elif not json:
            _write("".join(f"{'' if encoded else r.prompt}{r.text}\n" for r in rows))
        done += [{"prompt": r.prompt, "text": r.text, "tokens": len(r.ids), "ended": r.ended} for r in rows]
    rate = speed.tokens_per_second
    if json:
        digest = loaded.manifest.digest
        console.result({"artifact": loaded.manifest.name, "digest": digest, "results": done, "tokens_per_second": rate})
    else:
        console.say(f"{speed.tokens} tokens" + (f", {rate:.1f} tokens/s" if rate else ""))


def _fill(filler: "Filler", texts: "Iterable[str]", k: int, manifest: "Manifest | None") -> None:
    """Prints every text with its masks filled; with a manifest one JSON object with the `k` likeliest tokens a mask."""
    done = []
    for text in texts:
        for filled in filler.fill([text], k):
            masks = [[{"token": token, "probability": p} for token, p in mask] for mask in filled.masks]
            done.append({"prompt": filled.prompt, "text": filled.text, "masks": masks})
            if not manifest:
                _write(filled.text + "\n")
                console.say("\n".join("  " + ", ".join(f"{t} {p:.0%}" for t, p in mask) for mask in filled.masks))
    if manifest:
        console.result({"artifact": manifest.name, "digest": manifest.digest, "results": done})


def _write(text: str) -> None:
    """Straight to stdout: what a model says is not markup."""
    sys.stdout.write(text)
    sys.stdout.flush()


def _lines(file: Path) -> list[str]:
    try:
        return [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except FileNotFoundError:
        raise RequestError(f"--file {file}: no such file") from None
    except (OSError, UnicodeDecodeError) as e:
        raise RequestError(f"--file {file}: cannot be read ({e})") from None
