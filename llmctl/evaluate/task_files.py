"""Read task files: TOML files that describe a task by its data, prompts, few-shot examples and metrics.

A task file names one of llmctl's tasks, which determines how a model is measured: `choice` by the likelihood of each
choice, `seq2seq` by generated answers, `completions` by perplexity, `embed` by the similarity of texts.

    task = "choice"
    examples = 300

    [data]
    source = "jsonl"
    path = "questions.jsonl"
    test = 1.0
    columns = { prompt = "question", choices = "options", answer = "answer" }
    template = { prompt = "Question: {{ prompt }}\\nAnswer:" }
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, Field

from llmctl.config.base import Config, read_toml
from llmctl.config.errors import RequestError
from llmctl.config.validation import validate
from llmctl.data import splits
from llmctl.data.changed_source import ChangedSource
from llmctl.data.config import DataConfig, Split
from llmctl.data.source import Row, Source
from llmctl.data.splits import Examples
from llmctl.evaluate.metrics.base import METRICS
from llmctl.evaluate.tasks.registry import TASKS
from llmctl.evaluate.tasks.settings import GenerationConfig

ENDING = ".toml"


class ShotsConfig(Config):
    """Configure the few-shot examples: rows with their answers that precede each prompt."""

    added: ClassVar[frozenset[str]] = frozenset()

    count: int = Field(default=0, ge=0)
    """Number of few-shot examples before each prompt."""
    split: Split = "train"
    """Split from which the few-shot examples are taken. The split must differ from the measured split."""
    seed: int = Field(default=0, ge=0)
    """Seed that selects the few-shot examples."""
    separator: str = "\n\n"
    """Text after each few-shot example."""
    answer: str = " "
    """Text between a prompt and each choice, in few-shot examples too. No text is added between a prompt and a
    completion."""


class TaskFile(Config):
    """Configure one task of an evaluation. A task file contains these settings."""

    task: Annotated[str, AfterValidator(TASKS.check), TASKS]
    """Task of llmctl, which determines how a model is measured."""
    data: DataConfig
    """Data of the task."""
    split: Split = "test"
    """Split of the data to measure on."""
    examples: int = Field(default=0, ge=0)
    """Maximum number of examples, sampled by their hash; 0 uses the value of the evaluation."""
    seq_len: int = Field(default=0, ge=0)
    """Tokens per text. 0 uses the value of the evaluation, or else of the artifact's training. For imported models, 0
    uses 512, but at most the model's maximum."""
    shots: ShotsConfig = ShotsConfig()
    """Few-shot examples before each prompt."""
    metrics: list[Annotated[str, AfterValidator(METRICS.check), METRICS]] = []
    """Additional metrics to compute from references and predictions."""
    generation: GenerationConfig = GenerationConfig()
    """Settings for generating answers, for the task `seq2seq`."""


@dataclass(frozen=True)
class LoadedTask:
    """Store the settings of a task file, and the examples on which models are measured."""

    name: str
    """Name of the task in results: the name of its file."""
    config: TaskFile
    examples: Examples
    solved: str
    """Text of the few-shot examples, which precedes each prompt."""

    @property
    def digest(self) -> str:
        """Return the digest of the task's settings and of all texts that the model reads."""
        fields = self.config.model_dump_json(exclude={"examples": True, "data": {"download"}})
        rows = [self.examples.source[int(i)] for i in self.examples.index]
        return hashlib.sha256(repr((fields, self.solved, [sorted(row.items()) for row in rows])).encode()).hexdigest()


def is_file(name: str) -> bool:
    """Return whether the name of a task is the path of a task file."""
    return name.endswith(ENDING)


def read(file: str) -> TaskFile:
    """Read and validate a task file.

    Raises:
        RequestError: If the file is missing, or a setting is invalid.
    """
    return validate(TaskFile, read_toml(file), lambda path: f"{file}: {path}" if path else file)


def load(file: str, limit: int = 0) -> LoadedTask:
    """Read a task file and its data.

    Args:
        file: Path of the task file.
        limit: Maximum number of examples if the file sets none; 0 uses all.

    Raises:
        RequestError: If a file is missing. If a setting is invalid. If the split is empty. If few-shot examples are
            requested for a task without prompts.
    """
    config = read(file)
    task = TASKS[config.task]
    loaded = splits.load(config.data, labels=task.reads_labels, conversations=task.reads_conversations)
    examples = loaded[config.split]
    if not len(examples):
        raise RequestError(f"{file}: the split {config.split!r} has no examples")
    most = config.examples or limit
    examples = examples.sample(most) if most else examples
    solved = ""
    if config.shots.count:
        solved = _solved(file, config, loaded[config.shots.split])
        examples = replace(examples, source=_Prompted(examples.source, solved))
    if "choices" in examples.columns and config.shots.answer:
        examples = replace(examples, source=_Spaced(examples.source, config.shots.answer))
    return LoadedTask(Path(file).stem, config, examples, solved)


def _solved(file: str, config: TaskFile, examples: Examples) -> str:
    """Return the text of the few-shot examples. The examples are ordered by a hash of seed and text. With a larger
    number of few-shot examples, the first examples therefore stay the same.
    """
    shots = config.shots
    if shots.split == config.split:
        raise RequestError(f"{file}: shots.split is the measured split {config.split!r}")
    if not {"completion", "choices"} & {*examples.columns} or "prompt" not in examples.columns:
        raise RequestError(f"{file}: shots need data with prompts, and with completions or choices")
    if len(examples) < shots.count:
        raise RequestError(f"{file}: shots.count = {shots.count}: the {shots.split} split has {len(examples)} examples")
    keys = [hashlib.sha256(b"%d " % shots.seed + digest).digest() for digest in examples.digests.tolist()]
    first = sorted(range(len(examples)), key=keys.__getitem__)[: shots.count]
    parts = []
    for i in first:
        row = examples.source[int(examples.index[i])]
        given = row["completion"] if "completion" in row else shots.answer + row["choices"][row["answer"]]
        parts.append(row["prompt"] + given + shots.separator)
    return "".join(parts)


class _Prompted(ChangedSource):
    """Put a text before each prompt."""

    def __init__(self, source: Source, text: str) -> None:
        super().__init__(source)
        self._text = text

    def changed(self, row: Row) -> Row:
        return {"prompt": self._text + row["prompt"]}


class _Spaced(ChangedSource):
    """Put a text before each choice."""

    def __init__(self, source: Source, text: str) -> None:
        super().__init__(source)
        self._text = text

    def changed(self, row: Row) -> Row:
        return {"choices": tuple(self._text + choice for choice in row["choices"])}


def inputs(names: Sequence[str]) -> list[str]:
    """Return the task files among the names of tasks, and the data files that these task files name.

    Raises:
        RequestError: If a file is missing or invalid.
    """
    files: list[Any] = [name for name in names if is_file(name)]
    return [path for file in files for path in (file, *read(file).data.inputs())]
