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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmctl.config.base import hint
from llmctl.config.errors import LlmctlError, RequestError
from llmctl.evaluate.harness import task_yaml
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
        seed({}, settings)
        try:
            yield
        finally:
            utils.env = open_env
    finally:
        random.setstate(state)
        np.random.set_state(state_numpy)  # noqa: NPY002
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def seed(tasks: Mapping[str, Any], settings: HarnessConfig) -> None:
    """Reset the random generators that tasks may use: the generator of each task, and the global generators of Python
    and NumPy.
    """
    random.seed(0)
    np.random.seed(1234)  # noqa: NPY002
    for task in tasks.values():
        task.set_fewshot_seed(seed=settings.seed)


def load(names: Sequence[str], settings: HarnessConfig) -> dict[str, Any]:
    """Load tasks, and set the number of their few-shot examples.

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

    try:
        specs = [spec for name in names for spec in (_local(name, settings) if task_yaml.is_local(name) else [name])]
        manager = TaskManager(include_defaults=any(isinstance(spec, str) for spec in specs))
        known = manager.all_tasks
        for spec in specs:
            if isinstance(spec, str) and spec not in known:
                raise RequestError(f"harness: no task {spec!r} in lm-evaluation-harness{hint(spec, known)}")
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
    return found


def _local(name: str, settings: HarnessConfig) -> list[dict[str, Any]]:
    """Return the tasks of a YAML file, or of all YAML files of a folder that define a task.

    Raises:
        RequestError: If a file is no task. If a file may run code, or names data on the network, and the settings do
            not permit this.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    out = []
    for file in task_yaml.yaml_files(name):
        plain = task_yaml.merged(file)
        if not settings.allow_code:
            task_yaml.check_harmless(file)
        if not settings.download:
            task_yaml.check_offline(file, plain)
        task = load_yaml(file, resolve_func=settings.allow_code)
        if not {"task", "group"} & {*task}:
            if file == Path(name):
                raise RequestError(f"{file}: defines neither a task nor a group")
            continue  # a file that others include
        for table in task_yaml.tables(task):
            if data := task_yaml.data_files(file, table):
                table["dataset_kwargs"] = {**table["dataset_kwargs"], "data_files": data}
        out.append(task)
    if not out:
        raise RequestError(f"{name}: has no YAML file with a task")
    return out
