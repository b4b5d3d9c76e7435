"""Show how to reproduce a run: a recipe with all settings that matter, commands, digests and versions."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from llmctl.artifacts.manifest import Manifest
from llmctl.cli.report import settings_changes
from llmctl.cli.report.document import Block, Code, Folded, Paragraph, Section, Table, cell
from llmctl.cli.report.run_contents import Contents, Evaluation, Model
from llmctl.config.base import format_toml
from llmctl.config.terminal import HIDDEN
from llmctl.pipeline import stage


def section(contents: Contents) -> Section:
    """Return the section with the recipe, the commands, the digests and the versions."""
    parts: list[Block] = []
    text = recipe(contents)
    if text:
        folder = shlex.quote(f"runs/{contents.folder}")
        commands = [f"llmctl run recipe.toml --run {folder}", f"llmctl verify {folder}", f"llmctl report {folder}"]
        note = "The recipe has the settings of all stages that differ from the defaults. Save it as recipe.toml."
        parts += [Paragraph(note), Code("Recipe", text, "toml"), Code("Commands", "\n".join(commands), "sh")]
    named = [(m.name, m.manifest) for m in contents.models] + [(e.name, e.manifest) for e in contents.evaluations]
    rows = [[cell(name), cell(m.digest), cell(m.content or "–"), cell(m.key)] for name, m in named]
    parts.append(Table("Digests (SHA-256)", ["artifact", "digest of the weights", "content digest", "key"], rows))
    versions = dict.fromkeys((package, v) for _, m in named for package, v in m.versions.items())
    if versions:
        body = [[cell(package), cell(v)] for package, v in versions]
        parts.append(Folded("Versions of packages", [Table("Versions of packages", ["package", "version"], body)]))
    return Section("How to reproduce", parts)


def recipe(contents: Contents) -> str:
    """Return a recipe in TOML that makes the run again; empty if no model of the run was made by a known stage.

    If llmctl's version and the data have not changed, stages have the same keys. `llmctl run` then skips the stages
    that the run already has. Imported models and models outside the run are named in comments.
    """
    kinds, made = stage.kinds(), {m.name: m.manifest for m in contents.models}
    tables: list[str] = []
    for model in contents.models:
        config = model.manifest.config
        if config.get("kind") in kinds:
            tables.append(_table(model, _source(model, made), config))
        else:
            source = _comment(f"{model.manifest.stage} of {config.get('source', 'another source')}")
            tables.append(f"# {_comment(model.name)}: {source}; digest {_comment(model.manifest.digest)}")
    if not any(table.startswith("[[stage]]") for table in tables):
        return ""
    tables += [_table(e, {"of": _measured(e, made)}, e.manifest.config) for e in contents.evaluations]
    return "\n\n".join(tables)


def _source(model: Model, made: Mapping[str, Manifest]) -> dict[str, Any]:
    parent = model.manifest.parent
    if parent is None:
        return {}
    inside = parent.name in made and parent.name != model.name and parent.digest == made[parent.name].digest
    return {"from": parent.name if inside else f"PATH OF {parent.name}"}


def _measured(evaluation: Evaluation, made: Mapping[str, Manifest]) -> list[str]:
    """Return the names of the models that an evaluation measured; an empty list stands for all models of the run."""
    names = [n for n in dict.fromkeys(r["artifact"] for r in evaluation.results) if n in made]
    return [] if names == list(made) else names


def _table(of: Model | Evaluation, extra: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    kind = str(config["kind"]) if "kind" in config else "eval"
    values: dict[str, Any] = {"kind": kind} | ({"name": of.name} if of.name != kind else {})
    values |= {k: v for k, v in extra.items() if v}
    values |= {k: v for k, v in settings_changes.changes(config).items() if k not in values}
    return "\n".join(["[[stage]]", *(line for k, v in values.items() if v is not None for line in _lines(k, v))])


def _lines(name: str, value: Any) -> list[str]:
    """Return the lines of a setting: one line per entry of a table."""
    if not isinstance(value, dict) or not value:
        return [f"{name} = {_toml(value)}"]
    return [f"{name}.{_toml({k: v})[2:-2]}" for k, v in value.items() if v is not None]


def _toml(value: Any) -> str:
    """Format a value as TOML. Invisible characters are written as escapes, which TOML reads back."""
    text = format_toml(_without_none(value))
    return HIDDEN.sub(lambda found: f"\\u{ord(found.group()):04x}", text)


def _without_none(value: Any) -> Any:
    """Return the value without entries that are None, because TOML has no None."""
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return [_without_none(v) for v in value] if isinstance(value, list) else value


def _comment(text: Any) -> str:
    return " ".join(cell(text).text.split())
