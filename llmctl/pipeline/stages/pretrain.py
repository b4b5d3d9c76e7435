"""`pretrain`: a tokenizer and a language model from raw text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from llmctl.artifacts.workspace import Context
from llmctl.config.errors import RequestError
from llmctl.config.settings import OptimConfig, TrainConfig
from llmctl.data.config import DataConfig, TokenizerConfig
from llmctl.model.config import ModelConfig
from llmctl.pipeline.stage import StageConfig

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from llmctl.artifacts.artifact import Artifact
    from llmctl.data.pretraining.lm_corpus import Text
    from llmctl.data.pretraining.objective_rows import Objective
    from llmctl.data.tokenizers.loading import Tokenizer
    from llmctl.pipeline.stage import Programs
    from llmctl.train.learner import Learner


class Config(StageConfig):
    """Self-supervised training on raw text; with `from`, training goes on from that artifact on other text."""

    common: ClassVar[tuple[str, ...] | None] = ("objective", "packing")
    starts: ClassVar[bool] = True

    kind: Literal["pretrain"] = "pretrain"
    data: DataConfig = DataConfig()
    """The corpus."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """The tokenizer to train or to take; with `from`, the parent's is used."""
    model: ModelConfig = Field(default_factory=lambda: ModelConfig(preset="llama-tiny"))
    """The network, whose vocabulary is the tokenizer's; with `from`, it is the parent's."""
    packing: Literal["segments", "concat", "fit"] = "segments"
    """How documents share rows: cut at row ends, cut and attended across, or put whole with padding."""
    objective: Literal["", "causal", "masked", "next_sentence", "spans", "prefix"] = ""
    """What is predicted: the next token; masked tokens, alone or with whether a passage follows another
    (next_sentence); by a decoder beside an encoder dropped spans, or the rest of a text (prefix). Empty takes what the
    network is for."""
    rate: float = Field(default=0.15, gt=0, lt=1)
    """Objectives masked, next_sentence and spans: fraction of the tokens to predict."""
    span: float = Field(default=3.0, ge=1)
    """Objective spans: mean length of a span, in tokens."""
    whole_words: bool = False
    """Objectives masked and next_sentence: choose words rather than tokens."""
    train: TrainConfig = TrainConfig()
    """Length of the run and its batches."""
    optim: OptimConfig = OptimConfig()
    """Optimizer and schedule."""


def run(config: Config, parent: Path | None, ctx: Context) -> None:
    """Trains and leaves a language model in `ctx.out`."""
    from llmctl.artifacts import artifact
    from llmctl.data.device_batches import training_rows, validation_rows
    from llmctl.data.pretraining import baselines, next_sentence
    from llmctl.data.pretraining.lm_corpus import Text
    from llmctl.data.tokenizers import loading
    from llmctl.distributed import mesh, processes
    from llmctl.pipeline import console
    from llmctl.train import learner

    devices = mesh.make(config.mesh)
    base = artifact.load(parent, devices) if parent else None
    objective = aim(config, base, devices)
    text = Text(config.data)
    words = ctx.work / "tokenizer"
    with processes.in_turn():  # the first process trains it
        if (ctx.work / "tokenizer.done").exists():
            tokens = loading.load(words)
        else:
            wanted = with_sentinels(config.tokenizer, objective, config.train.seq_len)
            tokens = loading.load(base.tokenizer_dir) if base else text.tokenizer(wanted)
            tokens.save(words)
            (ctx.work / "tokenizer.done").touch()

    cache = ctx.work / "corpus"
    needed = training_rows(config.train)
    learn = _rows(config, objective, text, "train", tokens, cache, shuffle=True, needed=needed)
    unseen = _rows(config, objective, text, "validation", tokens, cache, shuffle=False)
    if objective.name == "next_sentence":
        next_sentence.check(learn.labelled)
        console.say(f"{config.title}: {learn.labelled:.0%} of the rows have a next-sentence pair, half of them true")
    blind: dict[str, float] = {}
    if objective.name != "causal":
        blind = baselines.guesses(unseen, validation_rows(config.train), objective.sentinels(tokens))
        console.say(f"{config.title}: knowing nothing of the context {baselines.describe(blind)}")
    learns = make_learner(config, base, tokens.vocab_size, devices)
    params, metrics, _ = learner.run(config, ctx, devices, learns, learn, unseen)
    ctx.leave(
        config,
        params,
        learns.model,
        parent=base.manifest if base else None,
        metrics=metrics | blind | {"tokens_an_epoch": learn.tokens, "padding": learn.waste},
        tokenizer_dir=words,
    )


def programs(config: Config, base: Artifact | None, others: dict[str, Artifact], mesh: Mesh) -> Programs:
    """Return the train step, and the language model that it leaves."""
    from llmctl.artifacts import abstract_artifact
    from llmctl.data.examples import made_up
    from llmctl.train import programs

    objective = aim(config, base, mesh)
    vocab_size = _vocabulary(config, objective)
    learns = programs.abstractly(mesh, lambda b: make_learner(config, b, vocab_size, mesh), base)
    text = made_up.MadeUp(config.data, seq_len=config.train.seq_len)
    rows = _rows(config, objective, text, "train", made_up.TOKENIZER, Path(), shuffle=False)
    params = abstract_artifact.masters(learns.params)
    left = abstract_artifact.left(config, params, learns.model, base=base)
    return [programs.train_step(config, learns, rows, mesh)], left


def _rows(
    config: Config,
    objective: Objective,
    text: Text,
    split: str,
    tokens: Tokenizer,
    cache: Path,
    *,
    shuffle: bool,
    needed: int = 0,
) -> Any:
    """Return the rows of a split; `cache` keeps its tokens."""
    return text.rows(
        split, tokens, config.train.seq_len, cache,
        seed=config.seed, packing=config.packing, shuffle=shuffle, needed=needed, objective=objective,
    )  # fmt: skip


def make_learner(config: Config, base: Artifact | None, vocab_size: int, mesh: Mesh) -> Learner:
    """What is trained: the parent, or a fresh network over `vocab_size` tokens."""
    from llmctl.train import learner, loop

    if base:
        model, params = base.model, base.params
    else:
        answers = config.model.next_sentence and aim(config, None, mesh).name == "next_sentence"
        model = config.model.model_copy(update={"vocab_size": vocab_size, "next_sentence": answers})
        params = loop.initialize(model, config.seed, mesh)
    return learner.Learner(model, params, how={"holds_zeros": base.zeros.__contains__} if base else {})


def aim(config: Config, base: Artifact | None, mesh: Mesh) -> Objective:
    """What the network is to learn. Raises RequestError where it cannot, or not on this mesh."""
    from llmctl.data.pretraining import objective_rows
    from llmctl.train import loop

    model = base.model if base else config.model
    if base and (not base.plain or model.head != "lm"):
        raise RequestError(
            f"{base.path}: cannot be pretrained further: it is quantized, has low-rank pairs or another head than lm"
        )
    loop.check(model, config.train, mesh)
    name = config.objective or objective_rows.default(model.architecture, model.next_sentence)
    objective_rows.check(name, model.architecture, model.next_sentence)
    return objective_rows.Objective(name, config.rate, config.span, config.whole_words)


def _vocabulary(config: Config, objective: Objective) -> int:
    """Return the vocabulary size of the tokenizer, as far as it is known before the tokenizer exists."""
    from llmctl.data.tokenizers import loading
    from llmctl.data.tokenizers.byte_tokenizer import ByteTokenizer

    given = with_sentinels(config.tokenizer, objective, config.train.seq_len)
    if given.path:
        try:
            return loading.obtain((), given).vocab_size
        except RequestError:
            return config.model.vocab_size
    return ByteTokenizer.new(given.sentinels).vocab_size if given.kind == "bytes" else given.vocab_size


def with_sentinels(tokenizer: TokenizerConfig, objective: Objective, seq_len: int) -> TokenizerConfig:
    """The sentinels that span corruption needs, where a tokenizer is trained and nobody said how many."""
    from llmctl.data.pretraining import span_corruption

    if objective.name != "spans" or tokenizer.path or tokenizer.sentinels:
        return tokenizer
    needed = span_corruption.sizes(seq_len, objective.rate, objective.span)[2]
    # T5's hundred where the vocabulary is large: longer rows later need more of them
    return tokenizer.model_copy(update={"sentinels": max(needed, min(100, tokenizer.vocab_size // 40))})
