"""Define the command `llmctl generate`."""

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from llmctl.cli.settings_flags import with_settings
from llmctl.config.base import with_article
from llmctl.config.errors import RequestError
from llmctl.config.settings import KVCache
from llmctl.config.text_input import check_unicode
from llmctl.evaluate.harm.settings import FilterConfig


@with_settings("filter", FilterConfig)
def generate(
    artifact_dir: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="Artifact of a language model.")],
    adapter: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR",
            help="Adapter of ARTIFACT (repeatable). Several answer each prompt in turn. Prompts on standard input are "
            "answered by the first, or the one that a line /adapter NAME selects.",
        ),
    ] = None,
    base: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Base of an adapter, if it is not next to the adapter.")
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Text to continue (repeatable).")] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            help='File with one prompt per line (.jsonl: a text, or an object with "prompt"); with --chat, '
            "a JSON list of messages, or an object with messages and tools."
        ),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Answer one message per line, in the tokenizer's chat template.")
    ] = False,
    system: Annotated[str, typer.Option(help="With --chat: system message.")] = "",
    max_new: Annotated[int, typer.Option(min=1, help="Maximum number of new tokens.")] = 128,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Sampling temperature; 0 selects the most likely token.")
    ] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Sample from the k most likely tokens; 0 from all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample from the most likely tokens with this total probability.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Minimum probability, as a fraction of the most likely token's.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Penalty of repeated tokens; 1 is none.")] = 1.0,
    beams: Annotated[int, typer.Option(min=1, help="Number of beams of a beam search; 1 searches none.")] = 1,
    length_penalty: Annotated[
        float, typer.Option(help="Beams: divide an answer's score by its length to this power.")
    ] = 1.0,
    early_stopping: Annotated[
        str,
        typer.Option(
            help="Beams: stop with enough finished answers at once (yes), if a better one is unlikely (no), or "
            "if none is possible (never)."
        ),
    ] = "no",
    stop: Annotated[list[str] | None, typer.Option(help="Stop before this text (repeatable).")] = None,
    seed: Annotated[int, typer.Option(min=-(2**63), max=2**63 - 1, help="Seed of sampling.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Number of prompts per batch.")] = 8,
    dtype: Annotated[str, typer.Option(help="Compute type: float32 or bfloat16.")] = "float32",
    kv_cache: Annotated[
        str,
        typer.Option(
            metavar="FORMAT", help="Format of cached keys and values: int8, fp8_e4m3 or int4; by default the dtype."
        ),
    ] = "",
    draft: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Small artifact with the same tokenizer that proposes tokens, which ARTIFACT verifies (speculative "
            "decoding). The text is that of ARTIFACT alone.",
        ),
    ] = None,
    draft_tokens: Annotated[
        int | None, typer.Option(min=1, max=64, help="With --draft: number of proposed tokens per step; 4 by default.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    filter_settings: FilterConfig = FilterConfig(),
) -> None:
    """Continue text, chat, or fill masks. Prompts come from flags, a file, or lines of standard input.

    An encoder-decoder answers prompts. An encoder replaces every <mask> by the most likely word. With --filter.words or
    --filter.classifier, the complete answer is checked before it is printed.
    """
    if dtype not in ("float32", "bfloat16"):
        raise RequestError(f"--dtype {dtype}: must be float32 or bfloat16")
    if kv_cache not in get_args(KVCache):
        raise RequestError(f"--kv-cache {kv_cache}: must be {', '.join(filter(None, get_args(KVCache)))}")
    if (prompt and chat) or (system and not chat):
        raise RequestError(
            "--system belongs to --chat, and --prompt does not: turns come from standard input or --file"
        )
    texts = None if chat else _texts(prompt or [], file)

    from llmctl.artifacts import adapters
    from llmctl.artifacts.drafts import check_draft
    from llmctl.artifacts.manifest_file import read_manifest
    from llmctl.cli import generation, named_models
    from llmctl.model.generate.beam import Beams
    from llmctl.model.generate.chat import read_conversation
    from llmctl.model.generate.sampling import Sampling
    from llmctl.model.generate.speculative import DRAFT_TOKENS

    try:
        rules = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
        width = Beams(beams, length_penalty, early_stopping)
    except ValueError as e:
        raise RequestError(str(e)) from None
    if base and adapter:
        raise RequestError(f"--base {base}: with --adapter, {artifact_dir} is the base; leave out one of the two")
    bases = [artifact_dir] if adapter else [base] if base else []
    adapters.check_bases(adapter or [artifact_dir], bases)
    manifests = {path: read_manifest(path) for path in (artifact_dir, *(adapter or ()))}
    for path, manifest in manifests.items():
        if not manifest.model.head_kind.vocabulary:
            kind = with_article(manifest.model.architecture)
            raise RequestError(f"{path}: is {kind} with the head {manifest.model.head!r}; it cannot generate")
        if path != artifact_dir and not manifest.base:
            raise RequestError(f"--adapter {path}: is no adapter; name it in the place of {artifact_dir}")
    model = manifests[artifact_dir].model
    if beams == 1 and width != Beams(1):
        raise RequestError("--length-penalty and --early-stopping are for a search; say --beams, 2 or more")
    if model.architecture == "encoder" and len(adapter or ()) > 1:
        raise RequestError(f"--adapter: {artifact_dir} fills masks, which one adapter does; name one")
    if model.architecture == "encoder" and (rules != Sampling(top_k=top_k) or stop):
        raise RequestError(f"{artifact_dir}: fills masks, and neither draws nor stops; of the rules it takes --top-k")
    if beams > 1 and (rules != Sampling() or chat or model.architecture == "encoder"):
        raise RequestError("--beams: a search for the likeliest answer neither draws, nor chats, nor fills masks")
    if model.architecture != "encoder" and not temperature and Sampling(0.0, top_k, top_p, min_p) != Sampling():
        raise RequestError("--top-k, --top-p and --min-p narrow what is drawn from; say --temperature, such as 1")
    if chat and model.architecture != "decoder":
        raise RequestError(
            f"--chat: {artifact_dir} is {with_article(model.architecture)}, and a conversation needs a decoder"
        )
    if model.architecture == "encoder" and kv_cache:
        raise RequestError(f"--kv-cache {kv_cache}: {artifact_dir} fills masks, and caches no keys; leave it out")
    if draft:
        if len(adapter or ()) > 1:
            raise RequestError(f"--draft {draft}: proposes tokens for one model; name one --adapter")
        if beams > 1:
            raise RequestError(f"--draft {draft}: speeds up one continuation, and --beams search many; leave out one")
        answers = (adapter or [artifact_dir])[0]
        check_draft(f"--draft {draft}", read_manifest(draft), manifests[answers], str(answers))
    elif draft_tokens:
        raise RequestError(f"--draft-tokens {draft_tokens}: is for a draft; name one with --draft")
    if filter_settings.active and model.architecture == "encoder":
        raise RequestError(f"--filter: {artifact_dir} fills masks, and the filter checks answers; leave it out")
    if filter_settings.active and filter_settings.action == "resample" and not temperature:
        raise RequestError(
            "--filter.action resample: the same text comes again unless it is sampled; say --temperature"
        )
    output_filter = _filter(filter_settings)
    drafted = named_models.Draft(draft, draft_tokens or DRAFT_TOKENS) if draft else None
    models = named_models.load_models(artifact_dir, adapter or [], bases, dtype, kv_cache, drafted)
    if model.architecture == "encoder":
        generation.fill(models, texts or _stdin(), top_k or 5, json)
        return
    common: dict[str, Any] = {"max_new": max_new, "sampling": rules, "seed": seed, "stops": stop or ()}
    common["output_filter"] = output_filter
    if chat:
        tools, turns = None, ([{"role": "user", "content": line}] for line in _stdin())
        if file:
            messages, tools = read_conversation(file)
            turns = [messages]
        generation.chat(models, turns, system, json, tools, **common)
        return
    batches = _batches(texts, batch_size) if texts else ([line] for line in _stdin())
    generation.continue_texts(models, batches, texts is None, json, width=width, **common)


def _filter(settings: FilterConfig) -> Any:
    """Return the output filter, or None if the settings name no list and no classifier."""
    if not settings.active:
        return None
    from llmctl.evaluate.harm.output_filter import OutputFilter

    return OutputFilter(settings, "--filter")


def _stdin() -> Iterator[str]:
    """Yield the lines of standard input that are not blank. A byte order mark is skipped.

    Raises:
      RequestError: If a line is not UTF-8 text.
    """
    lines = enumerate(sys.stdin, 1)
    number = 1
    try:
        for number, line in lines:
            if line.strip():
                yield check_unicode(line.removeprefix("\ufeff") if number == 1 else line, _at(number)).rstrip("\n")
    except UnicodeDecodeError as e:
        raise RequestError(f"{_at(number)} or later: not UTF-8 text ({e.reason}); convert it first") from None


def _at(number: int) -> str:
    return f"standard input, line {number}"


def _batches(texts: list[str], size: int) -> Iterator[list[str]]:
    texts_left = iter(texts)
    return iter(lambda: list(itertools.islice(texts_left, size)), [])


def _texts(prompts: list[str], file: Path | None) -> list[str] | None:
    """Return the prompts of the flags and of the file. If neither is given, return None, so that the caller reads
    standard input.

    Raises:
      RequestError: If the file cannot be read, or has no prompt.
    """
    if file is None:
        return prompts or None
    from llmctl.data import prompt_files

    found = [*prompts, *prompt_files.read(file, "--file")]
    if not found:
        raise RequestError(f"{file}: holds no prompt")
    return found
