"""Define the stage `pretrain`, which trains a tokenizer and a language model on raw text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from llmctl.artifacts.workspace import Context
from llmctl.config import checksums
from llmctl.config.errors import RequestError
from llmctl.config.settings import OptimConfig, TrainConfig
from llmctl.data.config import DataConfig, TokenizerConfig
from llmctl.model.config import ModelConfig
from llmctl.pipeline.stage import StageConfig
from llmctl.train import sparsify_settings
from llmctl.train.fake_quantize_settings import FakeQuantizeConfig
from llmctl.train.sparsify_settings import SparsifyConfig

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from llmctl.artifacts.artifact import Artifact
    from llmctl.data.pretraining.lm_corpus import Text
    from llmctl.data.pretraining.objective_rows import Objective
    from llmctl.data.tokenizers.loading import Tokenizer
    from llmctl.pipeline.stage import Programs
    from llmctl.train.learner import Learner


class Config(StageConfig):
    """Train a language model on raw text. If `from` is given, training continues from that artifact."""

    common: ClassVar[tuple[str, ...] | None] = ("objective",)
    added: ClassVar[frozenset[str]] = frozenset({"fake_quantize", "sparsify"})
    starts: ClassVar[bool] = True

    kind: Literal["pretrain"] = "pretrain"
    data: DataConfig = DataConfig()
    """Text to train on."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """Tokenizer to train or to load. If `from` is given, the parent's tokenizer is used."""
    model: ModelConfig = Field(default_factory=lambda: ModelConfig(preset="llama-tiny"))
    """Sizes of the model. The vocabulary size is the tokenizer's. If `from` is given, the parent's sizes are used."""
    packing: Literal["segments", "concat", "fit"] = "segments"
    """Packing of documents into rows. segments: fill rows, split documents at row ends, and mask attention between
    documents. concat: like segments, but without the mask. fit: do not split documents, and pad rows."""
    objective: Literal["", "causal", "masked", "next_sentence", "spans", "prefix", "completions"] = ""
    """Training objective. causal: predict the next token. masked: predict masked tokens. next_sentence: predict masked
    tokens, and predict whether a passage follows another passage. spans: predict removed spans, for encoder-decoders.
    prefix: predict the rest of a text, for encoder-decoders. completions: predict the completion of a prompt, from the
    columns `prompt` and `completion`. By default, the model's architecture determines the objective."""
    rate: float = Field(default=0.15, gt=0, lt=1)
    """Fraction of tokens to predict, if the objective is `masked`, `next_sentence` or `spans`."""
    span: float = Field(default=3.0, ge=1)
    """Mean length of a span in tokens, if the objective is `spans`."""
    whole_words: bool = False
    """Mask whole words instead of single tokens, if the objective is `masked` or `next_sentence`."""
    train: TrainConfig = TrainConfig()
    """Number of steps, batch size and validation."""
    optim: OptimConfig = OptimConfig()
    """Optimizer and schedule."""
    sparsify: SparsifyConfig = SparsifyConfig()
    """Settings of pruning during training."""
    fake_quantize: FakeQuantizeConfig = FakeQuantizeConfig()
    """Settings of quantization-aware training."""

    @model_validator(mode="after")
    def _belongs(self) -> Config:
        sparsify_settings.check(self)
        return self


def run(config: Config, parent: Path | None, ctx: Context) -> None:
    """Train a language model and write its artifact to `ctx.out`."""
    from llmctl.artifacts import artifact
    from llmctl.convert import architectures
    from llmctl.data.pretraining import baselines, next_sentence
    from llmctl.data.pretraining.lm_corpus import Text
    from llmctl.data.row_counts import training_rows, validation_rows
    from llmctl.data.tokenizers import loading
    from llmctl.distributed import mesh, processes
    from llmctl.pipeline import console
    from llmctl.train import learner

    devices = mesh.make(config.mesh)
    base = artifact.load(parent, devices, bases=config.bases) if parent else None
    objective = training_objective(config, base, devices)
    text = Text(config.data, labels=False)
    for line in text.describe():
        console.say(f"{config.title}: {line}")
    words = ctx.work / "tokenizer"
    with processes.process_0_first():  # process 0 trains the tokenizer; the others read it
        done = ctx.work / "tokenizer.done"
        if done.exists() and done.read_text() == checksums.of_json(checksums.of_folder(words)):
            tokens = loading.load(words)
        else:
            wanted = with_sentinels(config.tokenizer, objective, config.train.seq_len)
            tokens = loading.load(base.tokenizer_dir) if base else text.tokenizer(wanted)
            tokens.save(words)
            done.write_text(checksums.of_json(checksums.of_folder(words)))

    cache = ctx.work / "corpus"
    needed = training_rows(config.train)
    model = base.model if base else config.model
    learn = _rows(config, model, objective, text, "train", tokens, cache, shuffle=True, needed=needed)
    unseen = _rows(config, model, objective, text, "validation", tokens, cache, shuffle=False)
    if objective.name == "next_sentence":
        next_sentence.check(learn.labelled)
        console.say(f"{config.title}: {learn.labelled:.0%} of the rows have a next-sentence pair, half of them true")
    blind: dict[str, float] = {}
    if objective.name not in ("causal", "completions"):
        blind = baselines.constant_scores(unseen, validation_rows(config.train), objective.sentinels(tokens))
        console.say(f"{config.title}: baseline that ignores the context: {baselines.describe(blind)}")
    learns = make_learner(config, base, tokens.vocab_size, devices)
    if not base and (line := architectures.notice(learns.model)):
        console.say(f"{config.title}: {line}")
    params, metrics, _ = learner.run(config, ctx, devices, learns, learn, unseen)
    ctx.save(
        config,
        params,
        learns.model,
        parent=base.manifest if base else None,
        pruned=config.sparsify.pruned,
        metrics=metrics | blind | _amount(learn),
        tokenizer_dir=words,
    )


def programs(config: Config, base: Artifact | None, others: dict[str, Artifact], mesh: Mesh) -> Programs:
    """Return (the training step as a program, the artifact of the language model)."""
    from llmctl.artifacts import abstract_artifact
    from llmctl.data.examples import synthetic
    from llmctl.train import learned_scales, programs

    objective = training_objective(config, base, mesh)
    vocab_size = _vocabulary(config, objective)
    learns = programs.abstractly(mesh, lambda b: make_learner(config, b, vocab_size, mesh), base)
    columns = ("prompt", "completion") if objective.name == "completions" else ()
    text = synthetic.SyntheticText(config.data, columns, seq_len=config.train.seq_len)
    rows = _rows(config, learns.model, objective, text, "train", synthetic.TOKENIZER, Path(), shuffle=False)
    params = learned_scales.as_saved(config.fake_quantize, abstract_artifact.masters(learns.params))
    left = abstract_artifact.abstract_result(config, params, learns.model, base=base, pruned=config.sparsify.pruned)
    return [programs.train_step(config, learns, rows, mesh)], left


def _amount(rows: Any) -> dict[str, Any]:
    """Return the number of tokens per epoch and the fraction of positions that are padding.

    Return {} for rows of text pairs, which have no such counts.
    """
    return {"tokens_an_epoch": rows.tokens, "padding": rows.waste} if hasattr(rows, "waste") else {}


def _rows(
    config: Config,
    model: ModelConfig,
    objective: Objective,
    text: Text,
    split: str,
    tokens: Tokenizer,
    cache: Path,
    *,
    shuffle: bool,
    needed: int = 0,
) -> Any:
    """Return the training or validation rows of `split`. The tokens are stored in the folder `cache`."""
    if objective.name == "completions":
        from llmctl.evaluate.tasks.registry import TASKS
        from llmctl.evaluate.tasks.rows import RowSettings

        settings = RowSettings(config.train.seq_len, shuffle, config.seed)
        return TASKS["completions"].stage_rows(model, text, split, tokens, cache, settings, needed)
    return text.rows(
        split, tokens, config.train.seq_len, cache,
        seed=config.seed, packing=config.packing, shuffle=shuffle, needed=needed, objective=objective,
    )  # fmt: skip


def make_learner(config: Config, base: Artifact | None, vocab_size: int, mesh: Mesh) -> Learner:
    """Return a Learner: the initial parameters, the options of training, and the loss of the objective.

    The parameters are the parent's. If there is no parent, a new model with `vocab_size` tokens is initialized.
    """
    from llmctl.evaluate.tasks.registry import default
    from llmctl.train import fake_quantize, learner, loop, sparsify

    if base:
        model, params = base.model, base.params
    else:
        answers = config.model.next_sentence and training_objective(config, None, mesh).name == "next_sentence"
        model = config.model.model_copy(update={"vocab_size": vocab_size, "next_sentence": answers})
        params = loop.initialize(model, config.seed, mesh)
    sparsify.check(config.sparsify, params, base)
    fake_quantize.check(config.fake_quantize, params)
    return learner.Learner(
        model, params, default(model), job_fields={"holds_zeros": base.zeros.__contains__} if base else {}
    )


def training_objective(config: Config, base: Artifact | None, mesh: Mesh) -> Objective:
    """Return the training objective with its settings.

    The config names the objective. If the config names none, the model's architecture determines the objective.

    Raises:
      RequestError: If the model or the mesh does not support the objective.
    """
    from llmctl.data.pretraining import objective_rows
    from llmctl.train import loop

    model = base.model if base else config.model
    if base and (not base.plain or not model.head_kind.vocabulary):
        raise RequestError(
            f"{base.path}: cannot be pretrained further: it is quantized, has low-rank pairs or another head than lm"
        )
    loop.check(model, config.train, mesh)
    name = config.objective or objective_rows.default(model.architecture, model.next_sentence)
    objective_rows.check(name, model.architecture, model.next_sentence)
    return objective_rows.Objective(name, config.rate, config.span, config.whole_words)


def _vocabulary(config: Config, objective: Objective) -> int:
    """Return the vocabulary size of the tokenizer. The size is an estimate if the tokenizer does not exist yet."""
    from llmctl.data.tokenizers import loading
    from llmctl.data.tokenizers.byte_tokenizer import ByteTokenizer

    given = with_sentinels(config.tokenizer, objective, config.train.seq_len)
    if given.path:
        try:
            return loading.load_or_train((), given).vocab_size
        except RequestError:
            return config.model.vocab_size
    return ByteTokenizer.new(given.sentinels).vocab_size if given.kind == "bytes" else given.vocab_size


def with_sentinels(tokenizer: TokenizerConfig, objective: Objective, seq_len: int) -> TokenizerConfig:
    """Return the tokenizer's config with enough sentinel tokens for span corruption.

    The config is returned unchanged in three cases:

    - the objective is not `spans`
    - the tokenizer is loaded from a path
    - the number of sentinels is set
    """
    from llmctl.data.pretraining import span_corruption

    if objective.name != "spans" or tokenizer.path or tokenizer.sentinels:
        return tokenizer
    needed = span_corruption.sizes(seq_len, objective.rate, objective.span)[2]
    # At least T5's 100 if the vocabulary is large, because longer rows in later stages need more sentinels.
    return tokenizer.model_copy(update={"sentinels": max(needed, min(100, tokenizer.vocab_size // 40))})
