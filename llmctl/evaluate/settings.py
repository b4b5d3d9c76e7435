"""Define the settings of an evaluation on held-out data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, field_validator

from llmctl.config.base import Config, hint
from llmctl.config.settings import Dtype
from llmctl.data.config import Split
from llmctl.evaluate.bias.settings import BBQConfig, CrowsPairsConfig, IdentitySwapsConfig, StereoSetConfig
from llmctl.evaluate.harm.settings import ContaminationConfig, MemorizationConfig, ToxicityConfig
from llmctl.evaluate.harness.settings import HarnessConfig
from llmctl.evaluate.metrics.base import METRICS
from llmctl.evaluate.probes.registry import PROBES
from llmctl.evaluate.robustness.settings import AttackConfig, RobustnessConfig
from llmctl.evaluate.tasks.registry import TASKS
from llmctl.evaluate.tasks.settings import GenerationConfig


class MeasureConfig(Config):
    """Configure an evaluation: data split, truncation, batches and speed measurement."""

    added: ClassVar[frozenset[str]] = frozenset(
        {"metrics", "tasks", "generation", "harness", "lm_eval", "again", "bootstrap", "yardstick"}
        | {"robustness", "attack"}
        | {"crows_pairs", "stereoset", "bbq", "identity_swaps"}
        | {"toxicity", "memorization", "contamination"}
    )
    unkeyed: ClassVar[frozenset[str]] = frozenset({"again"})

    split: Split = "test"
    """Split of the data to measure on."""
    examples: int = Field(default=0, ge=0)
    """Maximum number of examples, sampled by their hash; 0 uses all."""
    seq_len: int = Field(default=0, ge=0)
    """Number of tokens per text for tasks with a head, or context length for perplexity; 0 uses the value of
    training."""
    truncate: Literal["", "tail", "head_tail"] = ""
    """Truncation of long texts for tasks with a head; empty uses the value of training."""
    stride: int = Field(default=0, ge=0)
    """Number of new tokens per window for perplexity; 0 uses the context length, so that windows do not overlap."""
    batch_size: int = Field(default=32, ge=1)
    """Number of sequences per batch, also for the throughput measurement (at most the number of examples)."""
    dtype: Dtype = "float32"
    """Dtype of the computation."""
    metrics: list[Annotated[str, AfterValidator(METRICS.check), METRICS]] = []
    """Additional metrics to compute from true labels and predictions, such as metrics of installed packages."""
    speed: bool = True
    """Measure latency (batch 1) and throughput of all artifacts in alternation."""
    repeats: int = Field(default=15, ge=1)
    """Maximum number of rounds in the speed measurement. After 3 rounds, it ends when it has taken as long as the
    scoring of the examples."""
    generation: GenerationConfig = GenerationConfig()
    """Settings for generating answers, for the task `seq2seq`."""
    tasks: list[str] = []
    """Tasks to measure each artifact on, such as `masked` and `next_sentence`, probes such as `robustness`, and task
    files (`my_task.toml`) with data of their own. If empty, the task of the artifact's training is used."""
    harness: list[str] = []
    """Tasks of lm-evaluation-harness (extra `eval`) for decoders: names, YAML files, or folders of YAML files. If
    `tasks` is empty, no other task is measured and no data is needed. `examples` limits the number of documents per
    task, from the first document on."""
    lm_eval: HarnessConfig = HarnessConfig()
    """Settings of the tasks in `harness`."""
    robustness: RobustnessConfig = RobustnessConfig()
    """Settings of the probe `robustness`."""
    attack: AttackConfig = AttackConfig()
    """Settings of the probe `attack`."""
    crows_pairs: CrowsPairsConfig = CrowsPairsConfig()
    """Settings of the probe `crows_pairs`."""
    stereoset: StereoSetConfig = StereoSetConfig()
    """Settings of the probe `stereoset`."""
    bbq: BBQConfig = BBQConfig()
    """Settings of the probe `bbq`."""
    identity_swaps: IdentitySwapsConfig = IdentitySwapsConfig()
    """Settings of the probe `identity_swaps`."""
    toxicity: ToxicityConfig = ToxicityConfig()
    """Settings of the probe `toxicity`."""
    memorization: MemorizationConfig = MemorizationConfig()
    """Settings of the probe `memorization`."""
    contamination: ContaminationConfig = ContaminationConfig()
    """Settings of the probe `contamination`."""
    bootstrap: int = Field(default=0, ge=0)
    """Number of bootstrap resamples for 95 % intervals of metrics without another interval, such as macro F1, BLEU and
    correlations; 0 computes none."""
    yardstick: Literal["", "words", "characters"] = ""
    """Terms of a yardstick for classifiers: logistic regression on TF-IDF features, trained on the train split. The
    yardstick is measured on the same examples and becomes a row of the tables. words: words and pairs of words.
    characters: 1 to 3 characters, for languages without spaces. Requires scikit-learn (extra `demo`). By default, no
    yardstick is measured."""
    again: bool = False
    """Score everything again. By default, results in the output folder are kept if the weights and the definition of
    the task are the same."""

    def inputs(self) -> list[str]:
        """Return the paths of local task files, and of the data files that these task files and probes name.

        Raises:
            RequestError: If a file is missing.
        """
        found: list[str] = []
        if self.harness:
            from llmctl.evaluate.harness import task_yaml

            found += [str(path) for path in task_yaml.files(self.harness)]
        if self.files_of_tasks:
            from llmctl.evaluate import task_files

            found += task_files.inputs(self.tasks)
        for probe in (PROBES[name] for name in self.named_probes):
            found += probe.inputs(getattr(self, probe.section, None))
        return found

    @property
    def named_tasks(self) -> list[str]:
        """Return the elements of `tasks` that are names of tasks, not of probes and not paths of task files."""
        return [name for name in self.tasks if not name.endswith(".toml") and name not in PROBES]

    @property
    def named_probes(self) -> list[str]:
        """Return the elements of `tasks` that are names of probes."""
        return [name for name in self.tasks if name in PROBES]

    @property
    def files_of_tasks(self) -> list[str]:
        """Return the elements of `tasks` that are paths of task files."""
        return [name for name in self.tasks if name.endswith(".toml")]

    @property
    def measures_task(self) -> bool:
        """Return whether artifacts are measured on a task with the data of the evaluation. Task files and the harness's
        tasks have their own data.
        """
        return bool(self.named_tasks) or not (self.tasks or self.harness)

    @property
    def reads_training(self) -> bool:
        """Return whether a probe reads the train split of the data."""
        return any(PROBES[name].reads_training for name in self.named_probes)

    @property
    def tasks_on_data(self) -> list[str]:
        """Return the names of the tasks whose columns the evaluation reads from its data.

        The name "" means an artifact's own task. Probes read the columns of the task that their section names in its
        field `task`.
        """
        probes = [probe for probe in map(PROBES.__getitem__, self.named_probes) if probe.reads_data]
        of_probes = [getattr(getattr(self, probe.section, None), "task", "") for probe in probes]
        return [*(self.named_tasks or [""] * self.measures_task), *of_probes]

    @field_validator("tasks")
    @classmethod
    def _known(cls, names: list[str]) -> list[str]:
        known = [*TASKS, *PROBES]
        for name in names:
            if not name.endswith(".toml") and name not in known:
                raise ValueError(f"unknown task {name!r}{hint(name, known)}; known: {', '.join(known)}")
        titles = [Path(name).stem if name.endswith(".toml") else name for name in names]
        if twice := [title for title in titles if titles.count(title) > 1]:
            raise ValueError(f"two tasks are named {twice[0]!r}; results are stored by this name")
        return names
