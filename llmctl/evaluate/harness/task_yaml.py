"""Read the YAML files of tasks of lm-evaluation-harness without running code, and check what these files name.

A file can name Python functions (`!function`), metrics that the harness would load as code, and data on the network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from llmctl.config.errors import RequestError
from llmctl.data import paths


def is_local(name: str) -> bool:
    """Return whether `name` is a YAML file or a folder of YAML files, and not the name of a task."""
    return name.endswith((".yaml", ".yml")) or Path(name).is_dir()


def files(names: Sequence[str]) -> list[Path]:
    """Return the local YAML files among the names of tasks, and all local files that these YAML files read.

    Such files are included YAML files, Python files with functions, and data files.

    Raises:
        RequestError: If a file is missing or damaged.
    """
    listed = [file for name in names if is_local(name) for file in yaml_files(name)]
    found = dict.fromkeys(file for first in listed for file in _chain(first))
    code = [
        file.resolve().parent / f"{name.rpartition('.')[0].replace('.', '/')}.py"
        for file in found
        for name in _functions(file)
    ]
    data = [path for file in listed for table in tables(merged(file)) for path in data_files(file, table).values()]
    return [*found, *(path for path in code if path.is_file()), *(Path(path) for group in data for path in group)]


def yaml_files(name: str) -> list[Path]:
    """Return a YAML file, or all YAML files of a folder.

    Raises:
        RequestError: If the file is missing.
    """
    path = Path(name)
    if path.is_dir():
        return sorted(p for ending in ("*.yaml", "*.yml") for p in path.rglob(ending))
    if not path.is_file():
        raise RequestError(f"harness: no such file: {name!r}")
    return [path]


def check_harmless(first: Path) -> None:
    """Check that a task file and all included files name no Python code.

    Raises:
        RequestError: If a file names a function or a metric outside the harness.
    """
    from lm_eval.api.registry import metric_registry

    refusal = "; lm_eval.allow_code = true runs it (read it first)"
    for file in _chain(first):
        for node in _nodes(file):
            if node.tag.startswith("!"):
                raise RequestError(f"{file}: line {node.start_mark.line + 1} names Python code ({node.tag}){refusal}")
        for table in tables(_plain(file)):  # a group may define tasks
            for metric in _listed(file, table, "metric_list"):
                if metric.get("hf_evaluate") or str(metric.get("metric")) not in metric_registry:
                    raise RequestError(f"{file}: metric {metric.get('metric')!r} would be loaded as code{refusal}")
            if table.get("dataset_path") == "pandas":
                raise RequestError(f"{file}: dataset_path pandas reads pickles, which run code{refusal}")
            if _table(file, table, "dataset_kwargs").get("trust_remote_code"):
                raise RequestError(f"{file}: trust_remote_code runs the code of a data set{refusal}")


def check_offline(file: Path, task: dict[str, Any]) -> None:
    """Check that the data of a task is local.

    The offline mode of the harness does not prevent all requests: its data library asks a server for the size of a
    file.

    Raises:
        RequestError: If a setting of the data is a URL.
    """
    for table in tables(task):
        for value in _parts([table.get("dataset_path"), _table(file, table, "dataset_kwargs")]):
            if isinstance(value, str) and "://" in value:
                raise RequestError(f"{file}: {value!r} is in the network; lm_eval.download = true reads it")


def _chain(file: Path, seen: tuple[Path, ...] = ()) -> list[Path]:
    """Return a YAML file, and all files that it includes, directly or indirectly.

    Raises:
        RequestError: If a file is missing or damaged, or includes itself.
    """
    if file.resolve() in seen:
        raise RequestError(f"{file}: includes itself")
    more = [other for other in _included(file) for other in _chain(other, (*seen, file.resolve()))]
    return [file, *more]


def _included(file: Path) -> list[Path]:
    """Return the files that a YAML file includes directly. Paths are relative to the folder of the file."""
    included = _plain(file).get("include") or []
    names = included if isinstance(included, list) else [included]
    if not all(isinstance(name, str) for name in names):
        raise RequestError(f"{file}: include: must be a path or a list of paths")
    return [file.resolve().parent / name for name in names]


def merged(file: Path) -> dict[str, Any]:
    """Return the content of a YAML file with the content of all included files, as the harness merges them.

    Each function (`!function`) is replaced by None.
    """
    _chain(file)  # refuses a file that includes itself
    found: dict[str, Any] = {}
    for other in _included(file):
        found |= merged(other)
    return found | _plain(file)


def _nodes(file: Path) -> Iterator[Any]:
    """Yield all nodes of a YAML file, before any object is made of them."""
    import yaml

    nodes, seen = [_parsed(file, lambda text: yaml.compose(text, Loader=yaml.SafeLoader))], set[int]()
    while nodes:
        node = nodes.pop()
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        if isinstance(node, yaml.MappingNode):
            nodes += [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            nodes += node.value


def _functions(file: Path) -> list[str]:
    """Return the names of the Python functions in a YAML file, such as "utils.process_docs"."""
    return [node.value for node in _nodes(file) if node.tag == "!function" and isinstance(node.value, str)]


def _plain(file: Path) -> dict[str, Any]:
    """Return the content of a YAML file, in which functions are None.

    Raises:
        RequestError: If the file is not a YAML table.
    """
    import yaml

    class Loader(yaml.SafeLoader):  # it makes no objects
        """Read unknown tags as None."""

    Loader.add_multi_constructor("!", lambda *_: None)
    content = _parsed(file, lambda text: yaml.load(text, Loader=Loader))  # noqa: S506
    if not isinstance(content, dict):
        raise RequestError(f"{file}: must be a table in YAML")
    return content


def _parsed(file: Path, parse: Callable[[str], Any]) -> Any:
    import yaml

    try:
        return parse(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as e:
        raise RequestError(f"{file}: cannot be read as YAML: {' '.join(str(e).split())}") from None


def tables(value: Any) -> Iterator[dict[str, Any]]:
    """Yield all tables inside a value, and the value itself if it is a table. A group may contain the tables of tasks
    and groups.
    """
    return (part for part in _parts(value) if isinstance(part, dict))


def _parts(value: Any) -> Iterator[Any]:
    """Yield a value, and all values inside its lists and tables. Each list or table is read once, because a list in
    YAML may contain itself.
    """
    todo, seen = [value], set[int]()
    while todo:
        part = todo.pop()
        if isinstance(part, (dict, list)):
            if id(part) in seen:
                continue
            seen.add(id(part))
            todo += part.values() if isinstance(part, dict) else part
        yield part


def _table(file: Path, task: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the table `name` of a task's settings. If the task has no such setting, the table is empty."""
    found = task.get(name) or {}
    if not isinstance(found, dict):
        raise RequestError(f"{file}: {name}: must be a table in YAML")
    return found


def _listed(file: Path, task: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """Return the list `name` of a task's settings, whose elements are tables. If the task has no such setting, the list
    is empty.
    """
    found = task.get(name) or []
    if not isinstance(found, list) or not all(isinstance(part, dict) for part in found):
        raise RequestError(f"{file}: {name}: must be a list of tables in YAML")
    return found


def data_files(file: Path, task: dict[str, Any]) -> dict[str, list[str]]:
    """Return the local data files of a task by split. Globs and `pkg:NAME/path` are resolved.

    Raises:
        RequestError: If a path matches no file.
    """
    named = _table(file, task, "dataset_kwargs").get("data_files") or {}
    by_split = named if isinstance(named, dict) else {"train": named}
    found: dict[str, list[str]] = {}
    for split, specs in by_split.items():
        listed = [specs] if isinstance(specs, str) else specs
        if not isinstance(listed, list) or not all(isinstance(spec, str) for spec in listed):
            raise RequestError(f"{file}: data_files: {split}: must be a path or a list of paths")
        if all("://" not in spec for spec in listed):
            found[split] = [str(path) for spec in listed for path in paths.resolve(spec)]
    return found
