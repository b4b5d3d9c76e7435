"""Build tiny teachers and students with random parameters, and distill one into the other in a few steps."""

import json

import jax

from llmctl.artifacts import artifact
from llmctl.artifacts.workspace import Context
from llmctl.config.settings import OptimConfig, TrainConfig
from llmctl.data.config import DataConfig
from llmctl.data.tokenizers.byte_tokenizer import ByteTokenizer
from llmctl.model import functional, weights
from llmctl.model.config import ModelConfig
from llmctl.pipeline.stages import distill

SIZES = {"d_model": 16, "layers": 3, "heads": 4, "kv_heads": 4, "head_dim": 4, "d_ff": 24, "max_seq_len": 32}
SIZES |= {"vocab_size": 264}  # those of the byte tokenizer, and a few that a mesh needs
CLASSES = {"head": "classify", "labels": 2, "pooling": "mean"}
MODELS = {
    "decoder": ModelConfig(preset="llama-tiny", **SIZES),
    "encoder": ModelConfig(preset="bert-tiny", **SIZES, next_sentence=False, head_transform=False),
    "encoder_decoder": ModelConfig(preset="t5-tiny", encoder_layers=2, **SIZES),
}
TRAIN = TrainConfig(steps=2, batch_size=8, seq_len=16, eval_every=0, eval_batches=2, tensorboard=False)
OPTIM = OptimConfig(learning_rate=1e-2)


def rows(folder):
    """Write rows with a text, a class, a prompt and a completion, and return the path."""
    file = folder / "rows.jsonl"
    lines = [{"text": f"{i} {'ab'[i % 2] * 5}", "label": "np"[i % 2], "prompt": f"{i}", "completion": "xy"} for i in
             range(60)]  # fmt: skip
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


def data(folder, *columns):
    """Return settings that read the named columns of `rows`."""
    return DataConfig(source="jsonl", path=str(rows(folder)), columns={c: c for c in columns}, test=0, validation=0.3)


def made(folder, model, seed=0, **about):
    """Save a model with random parameters, and return the path of the artifact."""
    ByteTokenizer.new().save(folder / "words")
    params = jax.jit(lambda key: functional.init(model, key))(jax.random.key(seed))
    about = {"stage": "made", "key": f"k{seed}", "config": {"train": {"seq_len": 16}}, **about}
    name = folder / f"made-{len(list(folder.glob('made-*')))}"
    artifact.save(name, params, model, tokenizer_dir=folder / "words", **about)
    return name


def classifier(folder, architecture, seed=0, **sizes):
    """Save a classifier with random parameters, and return the path of the artifact."""
    model = MODELS[architecture].model_copy(update={**CLASSES, "tied": True, **sizes})
    return made(folder, model, seed, labels=["n", "p"], task="classify")


def go(folder, teacher, parent, **settings):
    """Run the stage and return its artifact."""
    siblings = {"teacher": teacher} if not isinstance(teacher, dict) else teacher
    given = {"teacher": "teacher"} if not isinstance(teacher, dict) else {}
    config = distill.Config(**{"train": TRAIN, "optim": OPTIM, **given, **settings})
    ctx = Context(folder / "out", folder / "work", "key", siblings)
    ctx.work.mkdir(parents=True, exist_ok=True)
    distill.run(config, parent, ctx)
    return artifact.load(ctx.out)


def digest(made):
    """Return the digest of an artifact's parameters."""
    return artifact.digest(weights.arrays(made.params))


def largest_difference(one, other):
    """Return the largest absolute difference of two artifacts' parameters."""
    named = weights.arrays(other.params)
    return max(
        float(abs(a - jax.device_put(named[n], a.sharding)).max()) for n, a in weights.arrays(one.params).items()
    )
