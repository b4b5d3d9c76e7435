"""Read and write `manifest.json`, and compare an artifact's fields and files with the checksums in it.

`llmctl.artifacts.manifest` defines the content of the file.

Example:
  >>> manifest = read_manifest(folder)
  >>> len(manifest.content), sorted(manifest.checksums.record.fields)[:3]
  (64, ['bits', 'bytes', 'config'])
  >>> damaged_fields(folder, "record"), damaged_files(folder, manifest, "content")
  ({}, {})
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from llmctl.artifacts.manifest import CONTENT, NAME, SPARSE_FORMAT, TOKENIZER, Checksums, Digest, Manifest
from llmctl.config import checksums, containment
from llmctl.config.errors import RequestError
from llmctl.config.text_input import parse_json

Part = Literal["content", "record"]
ADVICE = "remove this folder and run the stage that made it again"
"""Advice for a damaged artifact. The folder must be removed first, because a recipe skips stages whose artifact exists,
without checking the arrays."""


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Write a manifest into a folder, with checksums of its fields and of the files in the folder.

    Call this last, in one process. The folder `params/` is omitted, because the arrays have their own digest.

    Returns:
        The manifest with its checksums.
    """
    values = json.loads(manifest.model_dump_json(exclude={"checksums"}))
    words = {name: value for name, value in values.items() if name not in CONTENT}
    summed = Checksums(
        content=Digest.over({name: values[name] for name in CONTENT if name in values}, _content_files(folder)),
        record=Digest.over(words, _record_files(folder)),
    )
    whole = manifest.model_copy(update={"checksums": summed})
    (folder / NAME).write_text(whole.model_dump_json(indent=1), encoding="utf-8")
    return whole


def read_manifest(path: Path) -> Manifest:
    """Read the manifest of the artifact at `path`, and check the content digest of its fields.

    Raises:
        RequestError: If the manifest is missing or damaged. If its format is later than `SPARSE_FORMAT`. If a link in
            the folder leads out of the folder.
    """
    content = _raw(path)
    try:
        if wrong := _field_differences(content, "content"):
            raise RequestError(f"{path}: damaged ({listed(wrong.values())}); {ADVICE}")
        manifest = Manifest.model_validate(content)
        if manifest.base and not manifest.checksums:  # chains of bases end, because a digest cannot contain itself
            raise ValueError("an adapter without checksums")
        return manifest
    except (ValueError, KeyError, TypeError) as e:
        raise _damaged(path, e) from e


def damaged_fields(path: Path, part: Part) -> dict[str, str]:
    """Find the fields of a manifest that differ from their checksums.

    Args:
        path: Folder of the artifact.
        part: "content" for the fields that can change predictions, "record" for the others.

    Returns:
        {name of the field: message} for the fields that differ.

    Raises:
        RequestError: If the manifest cannot be parsed.
    """
    content = _raw(path)
    try:
        return _field_differences(content, part)
    except (ValueError, KeyError, TypeError) as e:
        raise _damaged(path, e) from e


def damaged_files(path: Path, manifest: Manifest, part: Part) -> dict[str, str]:
    """Find the files of an artifact, outside `params/`, that differ from their checksums.

    Args:
        path: Folder of the artifact.
        manifest: Manifest of the artifact.
        part: "content" for the tokenizer's files, "record" for the files next to the manifest, such as logs.

    Returns:
        {relative path: message} for the files that differ.
    """
    summed = manifest.checksums
    if part == "content":
        inner = {n.partition("/")[2]: c for n, c in summed.content.files.items()} if summed else None
        wrong = {} if inner is None else checksums.differing(path / TOKENIZER, inner)
        return {f"{TOKENIZER}/{n}": f"{TOKENIZER}/{n} {what}" for n, what in wrong.items()} or _tokenizer_difference(
            path, manifest
        )
    found = {}
    for name, checksum in summed.record.files.items() if summed else ():
        if not (path / name).is_file():
            found[name] = f"{name} is missing"
        elif checksums.of_file(path / name) != checksum:
            found[name] = f"{name} does not match what was saved"
    return found


def listed(clauses: Iterable[str]) -> str:
    """Join strings with commas. If there are more than three strings, " and N more" replaces the others."""
    found = list(clauses)
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")


def _tokenizer_difference(path: Path, manifest: Manifest) -> dict[str, str]:
    """Compare the digest that the tokenizer's folder declares with the tokenizer digest in the manifest.

    Returns:
        {name of the tokenizer's folder: message} if the digests differ or the folder's description is damaged, else {}.
    """
    from llmctl.data.tokenizers.base import DESCRIPTOR

    if not manifest.tokenizer:
        return {}
    try:
        digest = str(parse_json((path / TOKENIZER / DESCRIPTOR).read_bytes())["digest"])
    except (OSError, ValueError, KeyError, TypeError):
        return {TOKENIZER: f"{TOKENIZER}/{DESCRIPTOR} is missing or damaged"}
    if digest == manifest.tokenizer:
        return {}
    return {TOKENIZER: f"the tokenizer is another ({digest[:12]}) than the model's ({manifest.tokenizer[:12]})"}


def _raw(path: Path) -> dict[str, Any]:
    file = Path(path) / NAME
    if not file.is_file():
        raise RequestError(f"{path}: not an artifact (it has no manifest.json); name a folder that a stage wrote")
    containment.check(path)
    try:
        content = parse_json(file.read_bytes())
        version = content["format"]
    except (ValueError, KeyError, TypeError) as e:
        raise _damaged(path, e) from e
    if isinstance(version, int) and version > SPARSE_FORMAT:
        raise RequestError(
            f"{path}: artifact format {version} is later than this llmctl reads ({SPARSE_FORMAT}); upgrade llmctl"
        )
    return content


def _field_differences(content: dict[str, Any], part: Part) -> dict[str, str]:
    """Find the fields of manifest.json that differ from their checksums.

    Fields that the file lacks are ignored, even if they have a default in this version.

    Args:
        content: Parsed manifest.json.
        part: "content" for the fields that can change predictions, "record" for the others.

    Returns:
        {name of the field: message} for the fields that differ.

    Raises:
        ValueError: If the checksums are not in the expected format.
    """
    if content.get("checksums") is None:
        return {}
    try:
        summed = Checksums.model_validate(content["checksums"])
    except ValidationError as e:
        raise ValueError(f"checksums: {e.errors()[0]['loc']}: {e.errors()[0]['msg']}") from None
    own: Digest = getattr(summed, part)
    here = {name: checksums.of_json(value) for name, value in content.items()}
    wrong = {n: _differs(n) for n, checksum in own.fields.items() if here.get(n) != checksum}
    if part == "content":
        known = own.fields.keys() | summed.record.fields.keys()
        wrong |= {n: f"the manifest's `{n}` was not saved with it" for n in CONTENT if n in content and n not in known}
    return wrong or ({} if own.is_consistent else {"checksums": _differs("checksums")})


def _differs(name: str) -> str:
    return f"the manifest's `{name}` {'do' if name.endswith('s') else 'does'} not match what was saved"


def _content_files(folder: Path) -> dict[str, str]:
    return {f"{TOKENIZER}/{name}": c for name, c in checksums.of_folder(folder / TOKENIZER).items()}


def _record_files(folder: Path) -> dict[str, str]:
    """Return the checksums of the files next to the manifest, by name: logs and evaluation results."""
    there = sorted(p for p in folder.iterdir() if p.is_file() and p.name != NAME and not p.name.startswith("."))
    return {p.name: checksums.of_file(p) for p in there}


def _damaged(path: Path, e: Exception) -> RequestError:
    reason = f"{e.errors()[0]['loc']}: {e.errors()[0]['msg']}" if isinstance(e, ValidationError) else str(e)
    reason = " ".join(reason.split())[:200]
    return RequestError(f"{Path(path) / NAME}: damaged manifest ({reason}); run the stage that made it again")
