"""Convert a model from another format to an artifact, and compare its outputs with an optional reference."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from llmctl.artifacts import artifact
from llmctl.config import containment
from llmctl.config.errors import RequestError
from llmctl.config.settings import MeshConfig
from llmctl.config.terminal import terminal
from llmctl.convert import (
    gguf,
    lazy_tensors,
    merging,
    name_map,
    parity,
    partial_save,
    peft,
    peft_prefix,
    peft_prompt,
    safetensors,
    text_proof,
    tokenizers,
)
from llmctl.convert import hf_folder as folders
from llmctl.data.tokenizers.prompt_prefix import with_prefix
from llmctl.distributed import mesh as meshes
from llmctl.model import functional, weights
from llmctl.model.config import ModelConfig

REFERENCE = "reference.safetensors"
"""Name of a file in the model's folder with {input_ids, logits}. The imported model must reproduce these logits."""

ADVICE = (
    "llmctl reads all texts in its way from here on, so compare `llmctl eval` on your examples with the figures that "
    "you know; --tokenizer names another tokenizer, and finetuning adapts the model to these tokens"
)
"""Advice that is printed if the imported tokenizer and transformers tokenize texts differently."""


def run(
    source: Path,
    out: Path,
    *,
    dtype: str = "",
    tokenizer: Path | None = None,
    reference: Path | None = None,
    ignore: tuple[str, ...] = (),
    drop: tuple[str, ...] = (),
    name: str = "",
    allow_nonfinite: bool = False,
    replace: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Convert a Hugging Face folder or a GGUF file to the artifact `out`.

    All headers are checked before any tensor is read. Parameters are read and written one at a time. If the process is
    killed, the same call resumes after the last written parameter.

    Args:
        source: The folder or file.
        out: Folder of the artifact. The folder appears only after everything is written.
        dtype: Dtype of the parameters; if empty, the stored dtype (float32 for GGUF).
        tokenizer: Folder or file of a tokenizer that replaces the tokenizer of the source.
        reference: File with logits to reproduce; `reference.safetensors` of the folder by default, if it exists.
        ignore: Keys of config.json that are known to be irrelevant.
        drop: Regular expressions for the names of tensors to omit.
        name: Name of the artifact; by default the name of the folder.
        allow_nonfinite: Whether to import weights that contain NaN or infinity.
        replace: Whether to replace any artifact at `out`. If false, only an imported artifact is replaced.
        say: Function that is called with one line of text per message to the user.

    Returns:
        {"artifact", "family", "parameters", "bytes", "digest", "source", "tokenizer", "parity"}; parity is the largest
        difference from the reference, or None.

    Raises:
        RequestError: If the source is invalid, if `out` contains the source, or if `out` exists and is not an artifact.
            Nothing is written.

    Example:
        >>> import tempfile
        >>> from llmctl.convert import hf_export
        >>> from llmctl.evaluate.tasks.registry import default
        >>> work, cfg = tempfile.TemporaryDirectory(), ModelConfig(preset="llama-tiny", layers=1, vocab_size=64)
        >>> tensors = hf_export.tensors_of(cfg, functional.init(cfg, jax.random.key(0)))
        >>> config = hf_export.config_of(cfg, default(cfg), [], {}, "float32")
        >>> hf_export.save(Path(work.name) / "hf", config, tensors)
        >>> run(Path(work.name) / "hf", Path(work.name) / "artifact")["family"]
        'llama'
        >>> work.cleanup()
    """
    artifact.check_output(out, source, stage="import", replace=replace)
    kind = lazy_tensors.dtype(dtype) if dtype else None
    is_gguf = source.suffix == ".gguf"
    _check_patterns(drop)
    if is_gguf and ignore:
        raise RequestError(f"--ignore: {source} has no config.json with keys to ignore")
    found = gguf.inspect(source, drop) if is_gguf else folders.inspect(source, ignore, drop, say)
    reference = reference or ((source / REFERENCE) if (source / REFERENCE).is_file() else None)
    expected = {k: np.asarray(t.read()) for k, t in safetensors.read_file(reference).items()} if reference else None
    made_of = f"{_key(source, dtype)} {drop} {found.model.model_dump_json()}"
    with contextlib.ExitStack() as closing:
        work = Path(closing.enter_context(tempfile.TemporaryDirectory(prefix="llmctl-")))
        words = work / "tokenizer"
        if is_gguf and not tokenizer:
            tokenizer = gguf.tokenizer(source, work / "found")
        brought = tokenizers.import_tokenizer(
            tokenizer or source, words, found.model, found.config, None if is_gguf else source
        )
        if brought is None and tokenizer:
            raise RequestError(f"--tokenizer {tokenizer}: no tokenizer there")
        if brought is None:
            say(f"{source}: no tokenizer there; the artifact has none (--tokenizer names one)")
        if brought and not tokenizer and (differs := text_proof.tokenization_difference(found.model, source, brought)):
            say(f"{differs}; {ADVICE}")
        stream = closing.enter_context(partial_save.opened(out, made_of))
        if stream.before:
            say(f"{out}: going on after the {len(stream.before)} parameters that were written before")
        if not kind and (differ := name_map.mixed(found.wanted, found.tensors)):
            say(f"{source}: {differ} (--dtype chooses another type)")
        with bar("reading", found.nbytes) as wrote:
            folders.load(found, stream.place(placer(found.model), wrote), kind, wrote)
        stored = stream.finish(shardings(found.model))
        delta = None
        if expected is not None:
            params = weights.unflatten(dict(stored))
            delta = parity.against_reference(found.model, params, expected, str(reference))
            say(f"{reference}: reproduced, largest difference {delta:.2g}")
        manifest = artifact.save(
            out,
            stored,
            found.model,
            stage="import",
            key=hashlib.sha256(
                f"{made_of} {_key(brought, '', tokenizers.unread_files(brought)) if brought else ''}".encode()
            ).hexdigest(),
            config={"source": str(source), "dtype": dtype},
            name=name,
            labels=found.labels,
            task=found.task,
            fitted=found.fitted,
            metrics={"import_parity": delta} if delta is not None else {},
            tokenizer_dir=brought,
            written=stored.folder,
            rounded=found.rounded,
            allow_nonfinite=allow_nonfinite,
        )
    return _report(out, manifest, source, delta)


def _check_patterns(drop: tuple[str, ...]) -> None:
    for pattern in drop:
        try:
            re.compile(pattern)
        except re.error as e:
            raise RequestError(f"--drop {pattern}: not a regular expression ({e}); any text is .*") from None


def _report(out: Path, manifest: artifact.Manifest, source: Path, delta: float | None) -> dict[str, Any]:
    return {
        "artifact": str(out),
        "family": manifest.family,
        "parameters": manifest.parameters,
        "bytes": manifest.bytes,
        "digest": manifest.digest,
        "source": str(source),
        "tokenizer": manifest.tokenizer,
        "parity": delta,
    }


def adapter(
    source: Path,
    base: Path,
    out: Path,
    *,
    store: str = "model",
    merge: bool = False,
    allow_nonfinite: bool = False,
    replace: bool = False,
) -> dict[str, Any]:
    """Create the artifact `out` from a base and an adapter in PEFT's format.

    Args:
        source: Folder of the adapter.
        base: Folder of the base, an artifact.
        out: Folder of the new artifact.
        store: "model" stores all arrays. "adapter" stores only the arrays that the base does not have.
        merge: Whether to merge the adapter into the matrices of the base.
        allow_nonfinite: Whether to import weights that contain NaN or infinity.
        replace: Whether to replace any artifact at `out`. If false, only an imported artifact is replaced.

    Returns:
        The same report as `run`.

    Raises:
        RequestError: If the adapter is of an unsupported kind, or does not fit the base.
    """
    if store not in ("model", "adapter"):
        raise RequestError(f"--store {store}: must be model or adapter")
    if merge and store == "adapter":
        raise RequestError("--merge and --store adapter exclude each other: leave out one of the two")
    artifact.check_output(out, source, base, stage="import", replace=replace)
    containment.check(source)
    found = artifact.load(base)
    words = found.tokenizer_dir if found.tokenizer_dir.is_dir() else None
    with contextlib.ExitStack() as closing:
        if peft_prompt.is_prompt(source):
            model, params = peft_prompt.load(found, source)
            work = Path(closing.enter_context(tempfile.TemporaryDirectory(prefix="llmctl-")))
            ids = range(model.vocab_size, model.vocab_size + model.prompt_tokens)
            words, full = with_prefix(found.tokenizer_dir, work / "tokenizer", ids), []
        elif peft_prefix.is_prefix(source):
            (model, params), full = peft_prefix.load(found, source), []
        else:
            model, params = found.model, peft.load(found, source)
            full = peft.replaced(found, params)
        if merge:
            manifest = found.manifest.model_copy(update={"model": model})
            params = merging.merged(dataclasses.replace(found, manifest=manifest, params=params))
        tree = jax.device_put(params, functional.shardings(model, params, meshes.make(MeshConfig())))
        manifest = artifact.save(
            out,
            tree,
            model,
            stage="import",
            key=hashlib.sha256(f"{_key(source, '')}:{found.manifest.key}{':merged' * merge}".encode()).hexdigest(),
            config={"source": str(source), peft.FULL: full},
            parent=found.manifest,
            labels=found.manifest.labels,
            tokenizer_dir=words,
            base=found.params if store == "adapter" else None,
            allow_nonfinite=allow_nonfinite,
        )
    return _report(out, manifest, source, None)


def placer(cfg: ModelConfig, mesh: MeshConfig | None = None) -> name_map.Place:
    """Return a function that reads a parameter, and places it sharded on the devices of a mesh.

    The shard of each device is read separately. If `mesh` is None, the default mesh is used.
    """
    where = shardings(cfg, mesh)
    return lambda path, w: jax.make_array_from_callback(w.shape, where[path], lambda i: w.read(i or ()))


def shardings(cfg: ModelConfig, mesh: MeshConfig | None = None) -> dict[str, Any]:
    """Return the sharding of every parameter by path. If `mesh` is None, the default mesh is used."""
    return weights.flatten(functional.shardings(cfg, functional.abstract(cfg), meshes.make(mesh or MeshConfig())))


@contextlib.contextmanager
def bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar in bytes on standard error, if standard error is a terminal.

    Yields:
        A function that advances the bar by a number of bytes.
    """
    console = terminal(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda n: progress.advance(task, n)


def _key(source: Path, dtype: str, without: tuple[str, ...] = ()) -> str:
    """Return a hash of the dtype of an import, and of the names and contents of its files.

    Stages that start from the imported model compare this hash to find out whether the model has changed.

    Args:
        source: The imported file, or the folder of the imported files.
        dtype: Dtype of the imported parameters.
        without: Names of files to omit.
    """
    files = [source] if source.is_file() else sorted(p for p in source.iterdir() if p.is_file())
    files = [f for f in files if f.name not in without]
    total = hashlib.sha256(f"import:{dtype}\n".encode())
    for file in files:
        try:
            with file.open("rb") as f:
                total.update(f"{file.name}:{hashlib.file_digest(f, 'sha256').hexdigest()}\n".encode())
        except OSError as e:
            raise RequestError(f"{file}: cannot be read ({e.strerror})") from None
    return total.hexdigest()
