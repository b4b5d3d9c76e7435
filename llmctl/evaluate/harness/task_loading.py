"""Load tasks of lm-evaluation-harness by name, or from local YAML files, without running code of the files.

A local file can name Python functions (`!function`) and metrics to load. Such a file is refused, unless the setting
`allow_code` is true. Templates always run in a sandbox of Jinja.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmctl.config.base import hint
from llmctl.config.errors import LlmctlError, RequestError
from llmctl.data import paths
from llmctl.evaluate.harness.settings import HarnessConfig

QUIET = {"TQDM_DISABLE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
SINGLE = {"DISABLE_MULTIPROC": "1"}
"""Environment variable that prevents the harness from forking processes for the bootstrap. JAX's threads do not survive
a fork."""
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1"}


def check_installed() -> None:
    """Check that lm-evaluation-harness is installed.

    Raises:
        RequestError: If the harness is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise RequestError("eval: tasks of lm-evaluation-harness need lm-eval: pip install 'llmctl[eval]'")


def is_local(name: str) -> bool:
    """Return whether `name` is a YAML file or a folder of YAML files, and not the name of a task."""
    return name.endswith((".yaml", ".yml")) or Path(name).is_dir()


def files(names: Sequence[str]) -> list[Path]:
    """Return the local YAML files among the names of tasks, and the local data files that these YAML files name.

    Raises:
        RequestError: If a file is missing, or a folder has no YAML file.
    """
    found = [file for name in names if is_local(name) for file in _yaml_files(name)]
    data = [path for file in found for path in _data_files(_plain(file)).values()]
    return [*found, *(Path(path) for group in data for path in group)]


@contextlib.contextmanager
def environment(settings: HarnessConfig) -> Iterator[None]:
    """Create a context in which the harness runs offline, without progress bars and child processes, and with
    fixed seeds.

    If `settings.download` is set, the harness may use the network.

    Inside the context, templates run in the sandbox. All changes are reverted at the end of the context.
    """
    check_installed()
    wanted = QUIET | SINGLE | ({} if settings.download else OFFLINE)
    before = {name: os.environ.get(name) for name in wanted}
    # Tasks of the harness use the global generators.
    state, state_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    os.environ.update(wanted)
    for name in ("lm_eval", "datasets", "evaluate", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        from jinja2.sandbox import ImmutableSandboxedEnvironment
        from lm_eval import utils

        open_env = utils.env
        sandbox = ImmutableSandboxedEnvironment(
            loader=open_env.loader, undefined=open_env.undefined, keep_trailing_newline=True
        )
        sandbox.filters = open_env.filters
        utils.env = sandbox
        random.seed(0)
        np.random.seed(1234)  # noqa: NPY002
        try:
            yield
        finally:
            utils.env = open_env
    finally:
        random.setstate(state)
        np.random.set_state(state_numpy)  # noqa: NPY002
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def load(names: Sequence[str], settings: HarnessConfig) -> dict[str, Any]:
    """Load tasks, and set the number of their solved examples.

    Call this inside `environment`.

    Args:
        names: Names of tasks, groups or tags of the harness, YAML files, or folders of YAML files.
        settings: Settings of the tasks.

    Returns:
        The dict that `lm_eval.evaluator.evaluate` takes: {"tasks": …, "groups": …}.

    Raises:
        RequestError: If a name is unknown. If a local file may not run. If the data of a task is missing.
    """
    from lm_eval.tasks import TaskManager

    specs = [spec for name in names for spec in (_local(name, settings.allow_code) if is_local(name) else [name])]
    manager = TaskManager(include_defaults=any(isinstance(spec, str) for spec in specs))
    known = manager.all_tasks
    for spec in specs:
        if isinstance(spec, str) and spec not in known:
            raise RequestError(f"harness: no task {spec!r} in lm-evaluation-harness{hint(spec, known)}")
    try:
        found: dict[str, Any] = {**manager.load(specs)}
    except LlmctlError:
        raise
    except Exception as e:  # the harness and its data sets raise many kinds of errors
        more = "" if settings.download else "; lm_eval.download = true downloads missing data"
        raise RequestError(f"harness: {', '.join(names)}: {type(e).__name__}: {e}{more}") from None
    for name, task in found["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False) and not settings.allow_code:
            raise RequestError(f"harness: {name} runs programs that the model writes; lm_eval.allow_code permits it")
        if getattr(task, "MULTIMODAL", False):
            raise RequestError(f"harness: {name} asks about images or sound, and llmctl's models read text")
        own = task.get_config("num_fewshot")
        if own is None or (own != 0 and settings.shots >= 0):
            task.set_config(key="num_fewshot", value=max(settings.shots, 0))
        task.set_fewshot_seed(seed=settings.seed)
    return found


def _local(name: str, allow_code: bool) -> list[dict[str, Any]]:
    """Return the tasks of a YAML file, or of all YAML files of a folder that define a task.

    Raises:
        RequestError: If a file is no task, or may run code and `allow_code` is false.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    out = []
    for file in _yaml_files(name):
        if not allow_code:
            _check_harmless(file)
        task = load_yaml(file, resolve_func=allow_code)
        if not {"task", "group"} & {*task}:
            if file == Path(name):
                raise RequestError(f"{file}: defines neither a task nor a group")
            continue  # a file that others include
        if data := _data_files(task):
            task = {**task, "dataset_kwargs": {**task["dataset_kwargs"], "data_files": data}}
        out.append(task)
    if not out:
        raise RequestError(f"{name}: has no YAML file with a task")
    return out


def _yaml_files(name: str) -> list[Path]:
    path = Path(name)
    if path.is_dir():
        return sorted(p for ending in ("*.yaml", "*.yml") for p in path.rglob(ending))
    if not path.is_file():
        raise RequestError(f"harness: no such file: {name!r}")
    return [path]


def _check_harmless(file: Path, seen: frozenset[Path] = frozenset()) -> None:
    """Check that a task file and all included files name no Python code.

    Raises:
        RequestError: If a file names a function or a metric outside the harness, or is not YAML.
    """
    import yaml
    from lm_eval.api.registry import metric_registry

    refusal = "; lm_eval.allow_code = true runs it (read it first)"
    try:
        root = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, ValueError, yaml.YAMLError) as e:
        raise RequestError(f"{file}: cannot be read as YAML: {' '.join(str(e).split())}") from None
    nodes = [root]
    while nodes:
        node = nodes.pop()
        if node is not None and node.tag.startswith("!"):
            raise RequestError(f"{file}: line {node.start_mark.line + 1} names Python code ({node.tag}){refusal}")
        if isinstance(node, yaml.MappingNode):
            nodes += [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            nodes += node.value
    task = _plain(file)
    for metric in task.get("metric_list") or []:
        if metric.get("hf_evaluate") or metric.get("metric") not in metric_registry:
            raise RequestError(f"{file}: metric {metric.get('metric')!r} would be loaded as code{refusal}")
    if (task.get("dataset_kwargs") or {}).get("trust_remote_code"):
        raise RequestError(f"{file}: trust_remote_code runs the code of a data set{refusal}")
    included = task.get("include") or []
    for more in [included] if isinstance(included, str) else included:
        path = file.parent / more
        if path in seen:
            raise RequestError(f"{path}: includes itself")
        _check_harmless(path, seen | {file})


def _plain(file: Path) -> dict[str, Any]:
    """Return the content of a YAML file, with None in place of each function (`!function`).

    Raises:
        RequestError: If the file is not a YAML table.
    """
    import yaml

    class Loader(yaml.SafeLoader):  # it makes no objects
        """Read unknown tags as None."""

    Loader.add_multi_constructor("!", lambda *_: None)
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), Loader=Loader)  # noqa: S506
    except (OSError, ValueError, yaml.YAMLError) as e:
        raise RequestError(f"{file}: cannot be read as YAML: {' '.join(str(e).split())}") from None
    if not isinstance(content, dict):
        raise RequestError(f"{file}: must be a table in YAML")
    return content


def _data_files(task: dict[str, Any]) -> dict[str, list[str]]:
    """Return the local data files of a task by split. Globs and `pkg:NAME/path` are resolved.

    Raises:
        RequestError: If a path matches no file.
    """
    named = (task.get("dataset_kwargs") or {}).get("data_files") or {}
    by_split = named if isinstance(named, dict) else {"train": named}
    found: dict[str, list[str]] = {}
    for split, specs in by_split.items():
        listed = [specs] if isinstance(specs, str) else list(specs)
        if all("://" not in spec for spec in listed):
            found[split] = [str(path) for spec in listed for path in paths.resolve(spec)]
    return found
