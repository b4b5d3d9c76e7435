"""Train a tiny language model on rows that count up, in a few steps: parts of tests of the training loop."""

import json

import numpy as np

from llmctl.artifacts import artifact
from llmctl.artifacts.workspace import Context
from llmctl.config.settings import OptimConfig, TrainConfig
from llmctl.evaluate.tasks.registry import default
from llmctl.model import weights
from llmctl.model.config import ModelConfig
from llmctl.train import loop
from llmctl.train.validation import Validation

SIZES = {"d_model": 32, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8, "d_ff": 48, "vocab_size": 64}
MODEL = ModelConfig(preset="llama-tiny", **SIZES, dropout=0.1)
TRAIN = TrainConfig(steps=12, batch_size=8, seq_len=16, checkpoint_every=4, log_every=1, tensorboard=False)
OPTIM = OptimConfig(learning_rate=1e-2)


class Rows:
    """Row i counts up from i: learnable, and a pure function of i."""

    def __init__(self, weight=1.0, at=lambda step: None):
        self.weight, self.at = weight, at

    def __len__(self):
        return 64

    def batch(self, rows_B):
        self.at(int(rows_B[0]) // TRAIN.batch_size)
        tokens = (rows_B[:, None] + np.arange(17)) % 61 + 3
        ones = np.ones((len(rows_B), 16), np.int32)
        return {
            "tokens": tokens[:, :-1].astype(np.int32),
            "targets": tokens[:, 1:].astype(np.int32),
            "weights": ones.astype(np.float32) * self.weight,
            "segments": ones,
            "positions": np.arange(16, dtype=np.int32) * ones,
        }


def job_of(mesh, model=MODEL, rows=None, **changes):
    held_out = Validation(default(model).loss_of(model), Rows(), 8, 2, mesh)
    params = changes.pop("params", None) or loop.initialize(model, 0, mesh)
    return loop.Job(
        params=params, loss=default(model).loss_of(model), rows=rows or Rows(), validate=held_out, **changes
    )


def fit(tmp_path, mesh, job=None, config=TRAIN):
    return loop.fit(job or job_of(mesh), config, OPTIM, mesh, Context(tmp_path / "out", tmp_path, "key"), 0, "test")


def losses(tmp_path, name="loss"):
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


def digest(params):
    return artifact.digest(weights.arrays(params))
