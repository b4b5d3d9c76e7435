"""`pretrain`: a tokenizer and a language model from raw text."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from llmctl.config import keyed
from llmctl.data import DataConfig, TokenizerConfig
from llmctl.model import ModelConfig
from llmctl.settings import OptimConfig, TrainConfig
from llmctl.stages import Context, StageConfig


class Config(StageConfig):
    """Self-supervised training on raw text; with `from`, training goes on from that artifact on other text."""

    starts: ClassVar[bool] = True

    kind: Literal["pretrain"] = "pretrain"
    data: DataConfig = DataConfig()
    """The corpus."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """The tokenizer to train or to take; with `from`, the parent's is used."""
    model: ModelConfig = Field(default_factory=lambda: ModelConfig(preset="llama-tiny"))
    """The network; its vocabulary is the tokenizer's."""
    packing: Literal["segments", "concat", "fit"] = "segments"
    """How documents share rows: cut at row ends, cut and attended across, or put whole with padding."""
    train: TrainConfig = TrainConfig()
    """Length of the run and its batches."""
    optim: OptimConfig = OptimConfig()
    """Optimizer and schedule."""


def run(config: Config, parent: Path | None, ctx: Context) -> None:
    """Trains and leaves a language model in `ctx.out`."""
    import jax.numpy as jnp

    from llmctl import artifact, mesh, train
    from llmctl.data import tokenizer
    from llmctl.data.language import Text
    from llmctl.model import cost
    from llmctl.model.loss import loss_of
    from llmctl.validation import Validation

    devices = mesh.make(config.mesh)
    base = artifact.load(parent, devices) if parent else None
    text = Text(config.data)
    words = ctx.work / "tokenizer"
    if base:
        tokens = tokenizer.load(base.tokenizer_dir)
        tokens.save(words)
    elif (ctx.work / "tokenizer.done").exists():
        tokens = tokenizer.load(words)
    else:
        tokens = text.tokenizer(config.tokenizer)
        tokens.save(words)
        (ctx.work / "tokenizer.done").touch()
    model = base.model if base else config.model.model_copy(update={"vocab_size": tokens.vocab_size})

    def rows(split: str, shuffle: bool, needed: int = 0) -> Any:
        return text.rows(
            split, tokens, config.train.seq_len, ctx.work / "corpus",
            seed=config.seed, packing=config.packing, shuffle=shuffle, needed=needed,
        )  # fmt: skip

    learn = rows("train", True, config.train.steps * config.train.batch_size)
    params = base.params if base else train.initialize(model, config.seed, devices)
    dtype = jnp.dtype(config.train.dtype)
    held_out = Validation(
        loss_of(model, dtype=dtype),
        rows("validation", False),
        config.train.batch_size,
        config.train.eval_batches,
        devices,
    )
    job = train.Job(
        params=params,
        loss=loss_of(
            model,
            dtype=dtype,
            remat=config.train.remat,
            label_smoothing=config.train.label_smoothing,
            z_loss=config.train.z_loss,
        ),
        flops=3 * cost.flops(model, config.train.seq_len),
        rows=learn,
        validate=held_out,
        holds_zeros=train.pruned(base),
    )
    params, metrics = train.fit(job, config.train, config.optim, devices, ctx, config.seed, config.name or config.kind)
    artifact.save(
        ctx.out,
        params,
        model,
        stage=config.kind,
        key=ctx.key,
        config=keyed(config),
        parent=base.manifest if base else None,
        metrics=metrics | {"tokens_an_epoch": learn.tokens, "padding": learn.waste},
        tokenizer_dir=words,
        log=ctx.work / "log.jsonl",
    )
