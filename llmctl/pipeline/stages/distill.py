"""Define the stage `distill`, which trains a student on a teacher's outputs (Hinton et al., 2015, arXiv:1503.02531).

The stage supports every kind of task head.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from llmctl.artifacts.workspace import Context
from llmctl.config.settings import OptimConfig, TrainConfig
from llmctl.data.config import DataConfig, Truncate
from llmctl.model.config import ModelConfig
from llmctl.pipeline.stage import StageConfig
from llmctl.train import distill_settings, sparsify_settings
from llmctl.train.distill_settings import AnswersConfig, SignalsConfig, StudentConfig, reads_arrays, reads_teacher
from llmctl.train.fake_quantize_settings import FakeQuantizeConfig
from llmctl.train.sparsify_settings import SparsifyConfig

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from llmctl.artifacts.artifact import Artifact
    from llmctl.pipeline.stage import Programs
    from llmctl.train.learner import Learner


class Config(StageConfig):
    """Train a student to match a teacher's outputs. The student is a pruned artifact (`from`) or a new network
    (`model`)."""

    common: ClassVar[tuple[str, ...] | None] = ("teacher", "temperature", "hard")
    unshared: ClassVar[frozenset[str]] = StageConfig.unshared | {"model"}
    artifact_fields: ClassVar[tuple[str, ...]] = ("teacher", "teachers")
    added: ClassVar[frozenset[str]] = frozenset(
        {"fake_quantize", "sparsify", "divergence", "beta", "skew", "top_k", "signals", "layer_map", "hidden_distance"}
        | {"relation_heads", "student", "teachers", "cache", "mode", "answers", "on_policy_fraction"}
        | {"compare_without_teacher"}
    )
    unkeyed: ClassVar[frozenset[str]] = StageConfig.unkeyed | {"cache"}

    kind: Literal["distill"] = "distill"
    teacher: str = ""
    """Artifact whose outputs the student learns. The student is trained for the teacher's task. If the teacher was
    finetuned on preferences, the student learns the teacher's language model. The data then has texts, or prompts and
    completions."""
    teachers: list[str] | None = None
    """Several teachers instead of `teacher`. The student learns the mean of their probabilities. Adapters over one base
    share the arrays of the base."""
    model: ModelConfig | None = None
    """Sizes of a new student, which is used instead of the artifact in `from`."""
    mode: Literal["teacher_forced", "sequence", "on_policy"] = "teacher_forced"
    """Texts on which the student is trained. teacher_forced: the texts of the data. sequence: answers that the teacher
    generates to the prompts of the data. In this mode, if no signals are set, the loss reads only the answers, as
    labels. The student may then have another tokenizer. on_policy: answers that the student generates during training,
    which the teacher scores."""
    answers: AnswersConfig = AnswersConfig()
    """Settings for generating answers, for the modes `sequence` and `on_policy`."""
    on_policy_fraction: float = Field(default=1.0, gt=0, le=1)
    """Fraction of the batches whose completions the student generates in the mode `on_policy`. The other batches have
    the completions of the data."""
    data: DataConfig = DataConfig()
    """Training examples, with the columns that the stage `finetune` needs for the teacher's task."""
    temperature: float = Field(default=2.0, gt=0)
    """Temperature of the teacher's and the student's softmax. Values above 1 make both distributions softer. For the
    divergence total_variation, the default is 1. If the student is a draft, use the temperature at which it will
    sample."""
    hard: float = Field(default=0.1, ge=0, le=1)
    """Weight of the cross-entropy with the labels. The divergence from the teacher has the remaining weight."""
    divergence: Literal["forward", "reverse", "js", "skew", "total_variation"] = "forward"
    """Divergence of the student's distribution q from the teacher's p. forward: KL(p || q). The student learns all
    outputs that are likely under p. reverse: KL(q || p). The student avoids outputs that are unlikely under p. js:
    generalized Jensen-Shannon divergence with `beta`. skew: KL(p || skew * p + (1 - skew) * q).
    total_variation: sum of |p - q| / 2, which makes a student a good draft (`generate --draft`)."""
    beta: float = Field(default=0.5, gt=0, lt=1)
    """Weight of the teacher in the divergence `js`. Near 0, js approaches beta * forward. Near 1, js approaches (1 -
    beta) * reverse."""
    skew: float = Field(default=0.1, gt=0, lt=1)
    """Weight of the teacher in the mixture of the divergence `skew`."""
    top_k: int = Field(default=0, ge=0)
    """Number of the teacher's most probable classes (or tokens) whose probabilities the divergence compares one by one.
    The probabilities of all other classes are summed and compared as one class. 0 compares all classes one by one."""
    signals: SignalsConfig = SignalsConfig()
    """Weights of the losses, such as { logits = 1.0, hidden = 0.5, hard = 0.1 }, instead of `hard`."""
    layer_map: str | list[Any] = "uniform"
    """Pairs of layers that signals.hidden and signals.relations compare. uniform: all student layers, paired with
    evenly spaced teacher layers. last: the last layers. A list of pairs (student layer, teacher layer) counts from 0.
    In an encoder-decoder, these are layers of the decoder."""
    hidden_distance: Literal["mse", "cosine"] = "mse"
    """Distance between student and teacher, for hidden states and embeddings. mse: mean squared difference. cosine: 1 -
    cosine similarity."""
    relation_heads: int = Field(default=0, ge=0)
    """Number of parts into which queries, keys and values are split, for the loss signals.relations. The loss compares
    the relations in each part: similarities of all pairs of tokens, as in MiniLMv2. 0 uses the greatest common divisor
    of the numbers of heads."""
    student: StudentConfig = StudentConfig()
    """Layers of the teacher to copy into a shallower student. The student then starts from neither `from` nor `model`.
    """
    cache: str = ""
    """Folder of the teacher's outputs on the training rows. Missing outputs are computed once and stored. The student
    then trains without the teacher in memory, and so do later students. Language models need `top_k`."""
    truncate: Truncate = "tail"
    """Truncation of long texts. tail: remove the end, and keep the beginning. head_tail: remove the middle, and keep
    beginning and end."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout rate of the student."""
    train: TrainConfig = TrainConfig(steps=500, eval_every=100, eval_batches=1000)
    """Number of steps, batch size and validation."""
    optim: OptimConfig = OptimConfig(learning_rate=3e-4, beta2=0.98)
    """Optimizer and schedule."""
    sparsify: SparsifyConfig = SparsifyConfig()
    """Settings of pruning during training."""
    fake_quantize: FakeQuantizeConfig = FakeQuantizeConfig()
    """Settings of quantization-aware training."""
    compare_without_teacher: bool = False
    """Also train the same student on the labels of the data alone, with the same settings and seed. The artifact then
    has the learning curves (curves.json) and the metrics of both students. Doubles the time of training."""

    @property
    def makes_model(self) -> bool:
        """Return True if the student is a new model, or if it consists of copied layers of the teacher."""
        return self.model is not None or self.student.active

    @model_validator(mode="before")
    @classmethod
    def _temperature_of_a_draft(cls, values: Any) -> Any:
        # A sampled token is accepted with the probability 1 - total variation, at the temperature of sampling.
        if isinstance(values, dict) and values.get("divergence") == "total_variation":
            return {"temperature": 1.0, **values}
        return values

    @field_validator("answers")
    @classmethod
    def _samples_by_default(cls, value: AnswersConfig, info: ValidationInfo) -> AnswersConfig:
        # The temperature becomes a value of the settings, so that the stage's key has it.
        if info.data.get("mode") == "on_policy" and "temperature" not in value.model_fields_set:
            return value.model_copy(update={"temperature": 1.0})
        return value

    @model_validator(mode="after")
    def _has_a_teacher(self) -> Config:
        if not self.teacher and not self.teachers:
            raise ValueError("there is no teacher; name an artifact with `teacher` (--teacher)")
        if self.train.label_smoothing or self.train.z_loss:
            raise ValueError("train.label_smoothing and train.z_loss are for training on labels; set them to 0")
        distill_settings.check(self)
        sparsify_settings.check(self)
        return self


def run(config: Config, parent: Path | None, ctx: Context) -> None:
    """Train the student and write its artifact to `ctx.out`."""
    from llmctl.artifacts import artifact
    from llmctl.data.pretraining.lm_corpus import Text
    from llmctl.data.tokenizers import loading
    from llmctl.distributed import mesh
    from llmctl.evaluate.tasks.registry import distilled
    from llmctl.model.generate.continuations import end_ids
    from llmctl.pipeline import console
    from llmctl.train import distillation, distillation_data, learner, teacher_answers, teacher_cache, without_teacher
    from llmctl.train import teacher_comparison as comparison
    from llmctl.train.signal_schedules import ScheduledRows
    from llmctl.train.student_samples import StudentSamples

    devices = mesh.make(config.mesh)

    def say(line: str) -> None:
        console.say(f"{config.title}: {line}")

    # Loaded apart from the student, even if one is the other's base, because the student's arrays are donated.
    def load() -> list[Artifact]:
        return distillation.load_teachers(list(ctx.siblings.values()), devices, config.bases)

    loaded = reads_arrays(config) or config.student.active
    teachers = load() if loaded else [artifact.abstract(path, devices) for path in ctx.siblings.values()]
    teacher = teachers[0]

    def made() -> tuple[Artifact | None, Learner]:
        begins = teacher if config.student.active else None
        if parent and config.model is None and not begins:
            begins = artifact.load(parent, devices, bases=config.bases)
        return begins, distillation.make_learner(config, teachers, begins, devices)

    student, learns = made()
    words = (student or teacher if config.mode == "sequence" else teacher).tokenizer_dir
    tokens = loading.load(words)
    text = Text(config.data, learns.task.reads_labels, learns.task.reads_conversations)
    for line in text.describe():
        say(line)
    distillation_data.check(config, learns, teacher, text)
    samples = None
    if config.mode == "on_policy":
        samples = StudentSamples.of(config, learns.model, devices, tokens, end_ids(words, tokens))

    answered, labelled = {}, text
    if config.mode == "sequence":
        answers = teacher_answers.TeacherAnswers(config, ctx, teacher, text, devices)
        text = answers.added(lambda: (teachers if loaded else load())[0], say)
        answered = answers.metrics

    learn, unseen = own = learner.rows_of_splits(config, learns, text, tokens, ctx.work / "corpus")
    judged = cached = None
    if config.cache:
        cache = teacher_cache.TeacherCache(config, ctx, learns, teachers, devices, tokens, text)
        learn, unseen = cache.filled(learn, unseen, (lambda: teachers) if loaded else load, say)
        judged, cached = cache.judged, cache.tokens
    alone = {}
    if config.compare_without_teacher:
        if labelled is not text:
            own = learner.rows_of_splits(config, learns, labelled, tokens, ctx.work / "labelled")
        alone = without_teacher.trained(config, ctx, devices, learns, *own)
        student, learns = made()  # the arrays of the first training were donated
    if config.signals.schedules:
        learn = ScheduledRows(learn, config, learner.with_length(config, learn)[0].steps)
    if samples:
        attached = samples.attached
        learns = dataclasses.replace(learns, adapt_job=lambda job, _: attached(job))
    params, metrics, held_out = learner.run(config, ctx, devices, learns, learn, unseen)
    beside = {}
    if reads_teacher(config):
        beside = comparison.compared(config, learns, teachers, params, held_out, judged)
    metrics |= answered
    metrics |= comparison.spent(config, teachers, metrics, cached)
    for line in filter(None, (comparison.sentence(beside), comparison.tokens_line(metrics))):
        say(line)
    files: list[Path] = []
    if alone:
        files, alone = without_teacher.report(config, ctx, learns, metrics, alone, say)
        console.note(without_teacher.table(metrics, alone))
        metrics["without_teacher"] = alone
    origin = student or teacher
    ctx.save(
        config,
        params,
        learns.model,
        parent=origin.manifest,
        labels=teacher.manifest.labels,
        task=distilled(teacher.manifest),
        fitted=learner.fitted(config, learns, params, held_out),
        generation=artifact.generation_settings(teacher.manifest),
        pruned=config.sparsify.pruned or (None if student else False),
        metrics=metrics | beside | distillation.named_teachers(teachers),
        tokenizer_dir=words,
        beside=files,
    )


def programs(config: Config, base: Artifact | None, others: dict[str, Artifact], mesh: Mesh) -> Programs:
    """Return the program of the training step, with student and teacher, and the abstract artifact of the student."""
    from llmctl.artifacts import abstract_artifact, artifact
    from llmctl.data.examples import synthetic
    from llmctl.evaluate.tasks.registry import distilled
    from llmctl.train import distillation, learned_scales, learner, programs, teacher_answers, teacher_outputs
    from llmctl.train import without_teacher as labels_alone
    from llmctl.train.signal_schedules import ScheduledRows
    from llmctl.train.student_samples import StudentSamples

    teachers = list(others.values())
    teacher = teachers[0]
    student = teacher if config.student.active else base if config.model is None else None
    learns = programs.abstractly(mesh, lambda s: distillation.make_learner(config, teachers, s, mesh), student)
    labels = teacher.manifest.labels
    prompts = config.mode != "teacher_forced" and not learns.task.reads_conversations
    columns = ("prompt", "completion") if prompts else learns.task.columns
    text = synthetic.SyntheticText(config.data, columns, config.train.seq_len, labels)
    rows = learner.rows_of(config, learns, text, "train", synthetic.TOKENIZER, Path(), shuffle=False)
    params = learned_scales.as_saved(config.fake_quantize, abstract_artifact.masters(learns.params))
    task, origin = distilled(teacher.manifest), student or teacher
    left = abstract_artifact.abstract_result(
        config, params, learns.model, base=origin, labels=labels, task=task,
        generation=artifact.generation_settings(teacher.manifest),
        pruned=config.sparsify.pruned or (None if student else False),
    )  # fmt: skip
    before = teacher_answers.programs(config, teacher, mesh) if config.mode == "sequence" else []
    plain = rows
    if config.cache:
        stored, rows = teacher_outputs.program(config, learns, teachers, rows, mesh)
        before.append(stored)
    if config.signals.schedules:
        rows = ScheduledRows(rows, config, config.train.steps)
    found = [*before, programs.train_step(config, learns, rows, mesh)]
    if config.compare_without_teacher:
        found.append(programs.train_step(config, labels_alone.learner_of(learns), plain, mesh, labels_alone.TITLE))
    if config.mode == "on_policy":
        samples = StudentSamples.of(config, learns.model, mesh, synthetic.TOKENIZER, ())
        job = learner.job(config, learns, rows, validate=None, steps=config.train.steps)
        found.append(samples.program(job, rows))
    return found, left
