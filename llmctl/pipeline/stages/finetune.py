"""Define the stage `finetune`, which trains a pretrained model for a task.

The stage trains all parameters, only the last layers, or adapters.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from llmctl.artifacts.workspace import Context
from llmctl.config.registry import Choices
from llmctl.config.settings import OptimConfig, TrainConfig
from llmctl.data.config import DataConfig, Truncate
from llmctl.evaluate.tasks.registry import TASKS, finetuned
from llmctl.evaluate.tasks.settings import ChatConfig, GenerationConfig, PreferenceConfig
from llmctl.pipeline.stage import StageConfig, required
from llmctl.train import finetune_settings
from llmctl.train.adapters.registry import METHODS
from llmctl.train.adapters.settings import (
    AdaLoraConfig,
    HoulsbyConfig,
    LoraConfig,
    PrefixConfig,
    PromptConfig,
    TrainedConfig,
)
from llmctl.train.fake_quantize_settings import FakeQuantizeConfig
from llmctl.train.robust.settings import AdversarialConfig, RegularizeConfig
from llmctl.train.sparsify_settings import SparsifyConfig

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from llmctl.artifacts.artifact import Artifact
    from llmctl.artifacts.manifest import Manifest
    from llmctl.data.pretraining.lm_corpus import Text
    from llmctl.pipeline.stage import Programs


class Config(StageConfig):
    """Train a model on a task's examples, and keep the parameters with the best validation metric."""

    common: ClassVar[tuple[str, ...] | None] = ("task", "method", "merge", "store")
    added: ClassVar[frozenset[str]] = frozenset(
        {
            "adalora", "adversarial", "calibrate", "chat", "generation", "houlsby", "preference", "prompt",
            "prefix", "regularize", "seeds", "sparsify", "store", "trained", "fake_quantize",
        }
    )  # fmt: skip

    kind: Literal["finetune"] = "finetune"
    data: DataConfig = DataConfig()
    """Training examples. The task determines the columns. classify, multilabel, regress: `text`, `label` and, for pairs
    of texts, `pair`. tokens: `tokens`, `tags`. span: `question`, `context`, `answers`. embed: `text`, `pair` and, if
    there are scores, `label`. choice: `prompt`, `choices`, `answer`. preference: `prompt`, `chosen`, `rejected`. chat:
    `messages` and, if the assistant has tools, `tools`. seq2seq: `prompt`, `completion`. lm: `text`, or `prompt` and
    `completion`."""
    task: Annotated[str, AfterValidator(TASKS.check), Choices(finetuned)] = "classify"
    """Task. classify: a class per text. multilabel: a set of classes per text (data.label_type = "set"). regress: a
    number per text (data.label_type = "number"). tokens: a label per word. span: answers as spans of a context. embed:
    vectors that are similar for pairs of texts, or that match given scores. choice: one of several choices per prompt.
    preference: the better of two completions becomes more likely. chat: answers of the assistant in conversations.
    seq2seq: completions of prompts, validated by generation (translation, summarization). lm: language modelling, on
    completions only if the data has completions."""
    method: Annotated[str, AfterValidator(METHODS.check), METHODS] = "full"
    """Parameters to train. full: all. All other methods train the task head and these parameters. lora: low-rank
    adapters. dora: the magnitudes of the matrices, and low-rank adapters of their directions. adalora: low-rank
    adapters that share a budget of ranks. houlsby: bottleneck adapters in the layers. prompt: vectors before every
    text. prefix: keys and values before every text in each layer. ia3: factors of keys, values and inner activations.
    bitfit: biases. head: nothing else."""
    lora: LoraConfig = LoraConfig()
    """Settings of the methods `lora`, `dora` and `adalora`."""
    adalora: AdaLoraConfig = AdaLoraConfig()
    """Settings of the method `adalora`."""
    houlsby: HoulsbyConfig = HoulsbyConfig()
    """Settings of the method `houlsby`."""
    prompt: PromptConfig = PromptConfig()
    """Settings of the method `prompt`."""
    prefix: PrefixConfig = PrefixConfig()
    """Settings of the method `prefix`."""
    merge: bool = True
    """Merge adapters into the matrices after training; false stores the adapters separately. Only for methods with
    adapters."""
    store: Literal["model", "adapter"] = "model"
    """Content of the artifact. model: all parameters. adapter: only the trained parameters, including adapters that are
    not merged. Later commands then also need the base, the artifact from which training started. Commands search for
    the base in the folders next to the adapter. The flag --base gives another folder."""
    freeze_layers: int = Field(default=0, ge=0)
    """Number of layers to freeze, counted from the first layer. The embeddings are frozen too. 0 freezes nothing."""
    trained: TrainedConfig = TrainedConfig()
    """Parameters to train, their learning rates, and the steps at which their training starts."""
    pooling: Literal["", "last", "mean", "first"] = ""
    """Vector of a text to classify or embed: last token, mean, or first token. Default: the mean for the task `embed`
    and for encoder-decoders, otherwise the pooling of the model. After a short pretraining the mean is often better
    than the first token."""
    truncate: Truncate = "tail"
    """Truncation of long texts. tail: remove the end, and keep the beginning. head_tail: remove the middle, and keep
    beginning and end."""
    temperature: float = Field(default=0.05, gt=0)
    """Divisor of the similarities in the contrastive loss, if the task is `embed` and the data has no scores. The loss
    compares the pairs of a batch, or of a microbatch if train.accumulate is above 1."""
    chat: ChatConfig = ChatConfig()
    """Settings of the task `chat`."""
    preference: PreferenceConfig = PreferenceConfig()
    """Settings of the task `preference`."""
    generation: GenerationConfig = GenerationConfig()
    """Settings for generating answers to validation prompts, if the task is `seq2seq`. BLEU, chrF, ROUGE and exact
    match of the answers are computed. train.best_by = "bleu" keeps the parameters with the best BLEU."""
    calibrate: bool = False
    """Divide the logits by a temperature after training, if the task is `classify`. The temperature minimizes the loss
    on the validation examples. Predicted probabilities are then closer to the accuracy. The head's parameters are
    scaled; predicted classes do not change."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout rate."""
    seeds: int = Field(default=1, ge=1)
    """Number of seeds with which to train, one after the other: `seed`, `seed` + 1, and so on. Mean and sample standard
    deviation of the validation metrics are printed. The seed with the best metric is kept."""
    adversarial: AdversarialConfig = AdversarialConfig()
    """Settings of adversarial training."""
    regularize: RegularizeConfig = RegularizeConfig()
    """Settings of regularization, and weights of classes."""
    train: TrainConfig = TrainConfig(steps=500, eval_every=100, eval_batches=1000)
    """Number of steps, batch size and validation."""
    optim: OptimConfig = OptimConfig(learning_rate=3e-4, beta2=0.98)
    """Optimizer and schedule."""
    sparsify: SparsifyConfig = SparsifyConfig()
    """Settings of pruning during training, for the method `full`."""
    fake_quantize: FakeQuantizeConfig = FakeQuantizeConfig()
    """Settings of quantization-aware training, for the method `full`."""

    @model_validator(mode="after")
    def _belongs(self) -> Config:
        finetune_settings.check(self)
        return self


def run(config: Config, parent: Path | None, ctx: Context) -> None:
    """Finetune the parent, with one seed or several, and write the artifact to `ctx.out`."""
    from llmctl.pipeline import console
    from llmctl.train import seeds

    base = required(config, parent)
    if config.seeds == 1:
        _finetune(config, base, ctx)
    else:
        found = seeds.run(config, ctx, lambda own, at: _finetune(own, base, at), partial(_metric, config))
        console.show(seeds.table(found), stderr=True)
    if config.store == "adapter" and ctx.out.resolve().parent != base.resolve().parent:
        console.say(f"{config.title}: its base is not beside it, so commands that read it need --base {base}")


def _metric(config: Config, made: Manifest) -> str:
    """Return the name of the metric that selects the best of several seeds.

    `made` is the manifest of any seed's artifact. Only the class names of the manifest are read. They are the same for
    all seeds.
    """
    return config.train.best_by or TASKS[config.task].best(made.labels)


def _finetune(config: Config, parent: Path, ctx: Context) -> None:
    """Finetune the parent with one seed, and write the artifact to `ctx.out`."""
    import jax

    from llmctl.artifacts import artifact
    from llmctl.data.pretraining.lm_corpus import Text
    from llmctl.data.tokenizers import loading
    from llmctl.distributed import mesh
    from llmctl.model import weights
    from llmctl.model.generate.continuations import end_ids
    from llmctl.pipeline import console
    from llmctl.train import finetuning, learner, task_head
    from llmctl.train.robust.regularize import class_counts
    from llmctl.train.robust.robust_job import check_classes

    devices = mesh.make(config.mesh)
    base = artifact.load(parent, devices, bases=config.bases)
    task = TASKS[config.task]
    own = getattr(config, task.section) if task.section else None
    tokenizer_dir = task.tokenizer_dir(base.tokenizer_dir, own, ctx.work / "tokenizer")
    method = METHODS[config.method]
    tokenizer_dir = method.tokenizer_dir(config, base.model, tokenizer_dir, ctx.work / "prompted")
    tokens = loading.load(tokenizer_dir)
    text = Text(config.data, task.reads_labels, task.reads_conversations)
    labels = _labels(config, text)
    for line in text.describe():
        console.say(f"{config.title}: {line}")
    check_classes(config.regularize, task)
    task.check_training(text.splits["train"])
    counts = class_counts(text.splits["train"]) if config.regularize.class_weights == "balanced" else []
    learns = finetuning.make_learner(config, base, labels, devices, counts)
    for line in task_head.notices(config, base, labels, learns.model):
        console.say(f"{config.title}: {line}")

    learn, unseen = learner.rows_of_splits(config, learns, text, tokens, ctx.work / "corpus")
    learn = learn.balanced() if config.regularize.balance else learn
    method.check_rows(config, learns.model, learn)
    further = task.validator(learns.model, text, tokens, own, config.train, end_ids(tokenizer_dir, tokens))
    params, metrics, held_out = learner.run(config, ctx, devices, learns, learn, unseen, further)
    params = method.finish(config, params)
    if method.merges(config):
        params = jax.jit(weights.merge_adapters)(params)
        if not learns.task.reads_adapters(learns.settings):
            metrics |= {f"validation_{k}": v for k, v in held_out(params).items()}
    if config.calibrate:
        params, found = learner.calibrated(config, learns, params, held_out)
        metrics |= found
    ctx.save(
        config,
        params,
        learns.model,
        parent=base.manifest,
        labels=labels,
        task=config.task,
        fitted=learner.fitted(config, learns, params, held_out),
        generation=_generation(config),
        pruned=config.sparsify.pruned,
        metrics=metrics,
        tokenizer_dir=tokenizer_dir,
        base=base.params if config.store == "adapter" else None,
    )


def programs(config: Config, base: Artifact | None, others: dict[str, Artifact], mesh: Mesh) -> Programs:
    """Return (the programs of finetuning, the finetuned artifact with abstract arrays).

    The programs are the training step and, if validation generates answers, the programs that generate the answers.
    """
    import jax

    from llmctl.artifacts import abstract_artifact
    from llmctl.data.examples import synthetic
    from llmctl.model import functional, weights
    from llmctl.train import finetuning, learned_scales, learner, programs

    base = required(config, base)
    seq_len = config.train.seq_len
    weighed = [*config.regularize.class_weights] if isinstance(config.regularize.class_weights, dict) else []
    names = base.manifest.labels if set(weighed) <= set(base.manifest.labels) else [*weighed, "other"]
    text = synthetic.SyntheticText(config.data, TASKS[config.task].columns, seq_len, names)
    labels = _labels(config, text)
    learns = programs.abstractly(mesh, lambda b: finetuning.make_learner(config, b or base, labels, mesh), base)
    rows = learner.rows_of(config, learns, text, "train", synthetic.TOKENIZER, Path(), shuffle=False)
    merges = METHODS[config.method].merges(config)
    params = abstract_artifact.masters(learns.params, learns.job_fields["trains"])
    params = jax.eval_shape(weights.merge_adapters, params) if merges else params
    params = learned_scales.as_saved(config.fake_quantize, functional.laid_out(learns.model, params, mesh))
    about = {"base": base, "labels": labels, "task": config.task, "generation": _generation(config)}
    about["pruned"] = config.sparsify.pruned
    if config.store == "adapter":
        theirs, trains = weights.arrays(base.params), learns.job_fields["trains"]
        about["stored"] = lambda name: trains(name) or (name not in theirs and ":base" not in name)
    left = abstract_artifact.abstract_result(config, params, learns.model, **about)
    step = programs.train_step(config, learns, rows, mesh)
    generating = []
    if size := min(config.train.batch_size, config.generation.examples):
        sizes = {"seq_len": config.train.seq_len, "batch_size": size, "dtype": config.train.dtype}
        generating = learns.task.generation_programs(learns.model, learns.params, config.generation, mesh, **sizes)
    found = [step, *(programs.beside(step, program) for program in generating)]
    return [replace(program, steps=program.steps * config.seeds) for program in found], left


def _labels(config: Config, text: Text) -> list[str]:
    """Return the names of the classes; empty if the task has no classes."""
    return list(text.classes) if TASKS[config.task].classes else []


def _generation(config: Config) -> dict[str, Any]:
    """Return the settings for generation in validation; empty if the task generates no answers."""
    return config.generation.model_dump() if TASKS[config.task].generates else {}
