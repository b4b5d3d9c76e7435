"""Measure an artifact on tasks of lm-evaluation-harness, and convert the results of the harness to results of
llmctl.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import numpy as np

from llmctl.artifacts.artifact import Artifact, Manifest
from llmctl.config.base import with_article
from llmctl.config.errors import LlmctlError, RequestError, WorkError
from llmctl.evaluate.harness import task_loading
from llmctl.evaluate.harness.settings import HarnessConfig
from llmctl.evaluate.metrics.classification import Z_95, wilson_interval
from llmctl.evaluate.setup import Setup
from llmctl.model.config import ModelConfig

BOOTSTRAP = 1000
"""Number of resamples for the standard error of a metric that is not a mean."""
NAMES: dict[str, str] = {
    "acc": "accuracy",
    "acc_norm": "accuracy_per_character",
    "acc_bytes": "accuracy_per_byte",
    "perplexity": "document_perplexity",
}
"""Map from metric names of the harness to names of llmctl, for metrics with different names.

The perplexity of the harness is per document, not per token.
"""
PROPORTIONS = ("acc", "acc_norm", "acc_bytes", "exact_match")
"""Names of the metrics whose value per document is 0 or 1. For these metrics, Wilson's interval applies."""


@dataclass(frozen=True)
class HarnessResult:
    """Store the metrics of one task, and a description of the measurement."""

    task: str
    protocol: str
    metrics: dict[str, Any]
    about: dict[str, Any]
    """Digest of the task's definition, versions of the harness and of the task, and number of few-shot examples."""
    examples: list[dict[str, Any]]
    """One record per document: the document's number, and the value of each metric."""
    values: dict[str, np.ndarray] = field(default_factory=dict)
    """Values per document of the metrics that are means over documents."""


def check_model(model: ModelConfig, where: str) -> None:
    """Check that the harness can measure a model.

    Raises:
        RequestError: If the model is no decoder with a language-model head.
    """
    if model.architecture != "decoder" or model.head != "lm":
        kind = f"{with_article(model.architecture)} with the head {model.head!r}"
        raise RequestError(f"{where}: tasks of lm-evaluation-harness need a decoder with the head 'lm', this is {kind}")


def check_contexts(manifests: Mapping[str, Manifest]) -> None:
    """Check that the default context length, which is the maximum sequence length, is equal for all models.

    Raises:
        RequestError: If two models have different maximum sequence lengths.
    """
    lengths = {name: manifest.model.max_seq_len for name, manifest in manifests.items()}
    if len(set(lengths.values())) > 1:
        each = ", ".join(f"{name}: {length:,}" for name, length in lengths.items())
        raise RequestError(f"against: the models have different contexts ({each}); set one with seq_len")


def setup(mesh: Any, manifest: Manifest, path: str, *, seq_len: int, batch_size: int, dtype: str) -> Setup:
    """Return the settings of a measurement. If `seq_len` is 0, the model's maximum sequence length is used.

    Raises:
        RequestError: If `seq_len` exceeds the model's maximum.
    """
    longest = manifest.model.max_seq_len
    if seq_len > longest:
        raise RequestError(f"{path}: seq_len {seq_len} is longer than its longest sequence ({longest})")
    length = seq_len or longest
    return Setup(mesh, length, length, batch_size, "tail", dtype)


class Suite:
    """Load tasks once for an evaluation, and measure artifacts on these tasks.

    Use the class as a context manager. Tasks are loaded before any artifact.
    """

    def __init__(
        self, names: Sequence[str], settings: HarnessConfig, limit: int, *, seq_len: int = 0, dtype: str = "float32"
    ) -> None:
        """Store the names and settings of the tasks to load.

        Args:
            names: Names of tasks, groups or tags of the harness, YAML files, or folders of YAML files.
            settings: Settings of the tasks.
            limit: Number of documents per task, counted from the first document; 0 uses all documents.
            seq_len: Maximum number of tokens that a model reads; 0 uses the maximum sequence length of each model.
            dtype: Dtype of the computation.
        """
        self._names, self._settings, self._limit = list(names), settings, limit
        self._context = {"seq_len": seq_len, "dtype": dtype}
        self._open = contextlib.ExitStack()
        self._loaded: dict[str, Any] = {"tasks": {}, "groups": {}}
        self.definitions: dict[str, str] = {}
        """Digest of each task or group, computed from its settings, its documents and the settings of its prompts."""

    def __enter__(self) -> Suite:
        """Load the tasks.

        Raises:
            RequestError: If the harness is missing, or a task cannot be loaded.
        """
        if not self._names:
            return self
        with self._open:  # closed here only if loading fails
            self._open.enter_context(task_loading.environment(self._settings))
            self._loaded = task_loading.load(self._names, self._settings)
            tasks, context = self._loaded["tasks"], self._context | {"harness": metadata.version("lm_eval")}
            self.definitions = {
                name: definition(task, self._settings, self._limit, context) for name, task in tasks.items()
            }
            for name, group in self._loaded.get("groups", {}).items():
                members = [self.definitions[task.task_name] for task in group.get_all_tasks()]
                self.definitions[name] = _digest([name, members])
            self._open = self._open.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """Revert the changes that `task_loading.environment` made."""
        self._open.close()

    def measure(self, artifact: Artifact, setup: Setup, pending: Collection[str]) -> list[HarnessResult]:
        """Measure an artifact on the tasks `pending`. If a group is pending, all loaded tasks are measured.

        The result of a group is computed from the results of its tasks.

        The random generators are reset for each artifact, so that all artifacts get the same few-shot examples.

        Raises:
            RequestError: If the model cannot do a task.
            WorkError: If the harness fails.
        """
        from lm_eval import evaluator

        from llmctl.evaluate.harness.language_model import ArtifactLM

        chosen = self._loaded
        if not any(name in chosen.get("groups", {}) for name in pending):
            chosen = {"tasks": {n: t for n, t in chosen["tasks"].items() if n in pending}, "groups": {}}
        model, settings = ArtifactLM(artifact, setup), self._settings
        if settings.chat_template and model.chat_template() is None:
            raise RequestError(f"{artifact.path}: lm_eval.chat_template: its tokenizer has no chat template")
        task_loading.seed(chosen["tasks"], settings)
        try:
            found: Any = evaluator.evaluate(
                model,
                chosen,  # pyright: ignore[reportArgumentType]
                limit=self._limit or None,
                bootstrap_iters=BOOTSTRAP,
                system_instruction=settings.system or None,
                apply_chat_template=settings.chat_template,
                fewshot_as_multiturn=settings.chat_template,
                confirm_run_unsafe_code=settings.allow_code,
            )
        except LlmctlError:
            raise
        except Exception as e:  # a task's templates, filters and metrics may raise anything
            raise WorkError(f"lm-evaluation-harness fails on {', '.join(pending)}: {type(e).__name__}: {e}") from None
        said = _protocol(settings, setup, model.truncated)
        return [_result(name, found, said, self.definitions[name]) for name in found["results"] if name in pending]


def _protocol(settings: HarnessConfig, setup: Setup, truncated: int) -> str:
    parts = [f"context {setup.seq_len}", setup.dtype]
    parts += ["chat template"] if settings.chat_template else []
    parts += ["system message"] if settings.system else []
    parts += [f"{truncated} contexts of all tasks without their beginning"] if truncated else []
    return ", ".join(parts)


def _result(name: str, found: dict[str, Any], said: str, digest: str) -> HarnessResult:
    """Convert the harness's results for one task or group to a HarnessResult."""
    values = found["results"][name] | found.get("groups", {}).get(name, {})
    samples = found.get("samples", {}).get(name, [])
    documents = found["n-samples"].get(name, {}).get("effective", values.get("sample_len", 0))
    metrics: dict[str, Any] = {}
    for key, value in values.items():
        metric, _, kept = key.partition(",")
        if not kept or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        ours = f"{NAMES.get(metric, metric)}{'' if kept == 'none' else f',{kept}'}"
        if not math.isfinite(value):
            metrics[ours] = None  # JSON has no infinity
            continue
        metrics[ours] = float(value)
        error = values.get(f"{metric}_stderr,{kept}")
        if isinstance(error, (int, float)) and math.isfinite(error):
            metrics |= _interval(ours, metric, float(value), float(error), documents)
    version, shots = found["versions"].get(name), found["n-shot"].get(name)
    release = metadata.version("lm_eval")
    head = [f"lm-evaluation-harness {release}", f"version {version}", f"{shots}-shot", f"{documents:,} documents"]
    about = {
        "definition": digest,
        "harness_version": release,
        "task_version": version,
        "shots": shots,
        "documents": documents,
    }
    numbers: set[str] = {k for row in samples for k in row["metrics"] if isinstance(row[k], (int, float))}
    examples = [
        {"document": row["doc_id"], "filter": row["filter"]}
        | {NAMES.get(k, k): _finite(row[k]) for k in sorted(numbers)}
        for row in samples
    ]
    return HarnessResult(name, ", ".join([*head, said]), metrics, about, examples, _values(metrics, examples))


def _values(metrics: dict[str, Any], examples: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Return the values per document of the metrics that are means over documents.

    Other metrics are omitted, because it is unknown here how the harness aggregates their values.
    """
    found = {}
    for name, value in metrics.items():
        metric, _, kept = name.partition(",")
        each = np.array([e[metric] for e in examples if metric in e and e["filter"] == (kept or "none")], np.float64)
        if value is not None and len(each) and np.isclose(each.mean(), value, rtol=1e-9):
            found[name] = each
    return found


def _finite(value: Any) -> Any:
    """Return the value, or None if it is NaN or infinite, which JSON cannot store."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _interval(ours: str, metric: str, value: float, error: float, documents: int) -> dict[str, float]:
    """Return the standard error and the 95 % interval of a metric."""
    low, high = value - Z_95 * error, value + Z_95 * error
    if metric in PROPORTIONS:
        low, high = wilson_interval(round(value * documents), documents)
    return {f"{ours}_stderr": error, f"{ours}_low": low, f"{ours}_high": high}


def definition(task: Any, settings: HarnessConfig, limit: int, context: dict[str, Any]) -> str:
    """Return the digest of a task: its settings, its documents, its prompt settings and its `context`.

    `context` has the other values that can change results: sequence length, dtype and version of the harness.

    Two measurements with equal weights and equal digests have equal results.
    """
    told = {k: v for k, v in task.dump_config().items() if k not in ("metadata", "dataset_kwargs")}
    documents = [doc for _, doc in task.doc_iterator(rank=0, limit=limit or None, world_size=1)]
    solved = list(task.fewshot_docs() or []) if task.get_config("num_fewshot") else []
    prompts = settings.model_dump(include={"seed", "chat_template", "system"})
    return _digest([told, getattr(task, "VERSION", None), documents, solved, prompts, context])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
