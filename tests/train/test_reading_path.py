"""Count the files of llmctl that one training step runs through: what a reader of the step has to read."""

import sys
import threading
from pathlib import Path

import numpy as np

import llmctl
from llmctl.artifacts.workspace import Context
from llmctl.config.settings import MeshConfig, OptimConfig, TrainConfig
from llmctl.data.corpus import Corpus
from llmctl.data.pretraining.objective_rows import Objective
from llmctl.data.tokenizers.byte_tokenizer import ByteTokenizer
from llmctl.distributed import mesh as meshes
from llmctl.evaluate.tasks.registry import default
from llmctl.model.config import ModelConfig
from llmctl.train import learner, loop
from llmctl.train.fake_quantize_settings import FakeQuantizeConfig
from llmctl.train.sparsify_settings import SparsifyConfig

ROOT = str(Path(llmctl.__file__).parent) + "/"
SIZES = {"d_model": 32, "layers": 1, "heads": 4, "kv_heads": 2, "head_dim": 8, "d_ff": 48}
TRAIN = TrainConfig(steps=6, batch_size=8, seq_len=16, checkpoint_every=100, log_every=100, tensorboard=False)
TRACED, STEADY = 12, 4
"""Most files of a traced and a compiled step together, and of a compiled one. Lower them when a step enters fewer."""


class Settings:
    """The part of a stage's config that the learner reads."""

    train = TRAIN
    sparsify = SparsifyConfig()
    fake_quantize = FakeQuantizeConfig()


def test_a_training_step_runs_through_few_files(tmp_path):
    """A step begins when the loop asks for its batch; the last one writes the log and a checkpoint, and is left out."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 40, 200)
    documents = Corpus(rng.integers(3, 64, lengths.sum()).astype(np.uint16), np.concatenate([[0], np.cumsum(lengths)]))
    tokenizer = ByteTokenizer.new(0)
    model = ModelConfig(preset="llama-tiny", **SIZES, vocab_size=tokenizer.vocab_size)
    rows = Objective("causal").rows(documents, tokenizer, 16, seed=0, packing="segments", shuffle=True)
    mesh = meshes.make(MeshConfig())
    job = learner.job(
        Settings,
        learner.Learner(model, loop.initialize(model, 0, mesh), default(model)),
        rows,
        lambda params: {},
        TRAIN.steps,
    )
    steps = [set() for _ in range(TRAIN.steps + 1)]
    begun = 0

    def called(frame, event, _):
        nonlocal begun
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(ROOT):
            return
        file = code.co_filename.removeprefix(ROOT)
        begun += (file, code.co_name) == ("data/device_batches.py", "__next__")
        steps[begun].add(file)

    before = sys.getprofile()
    threading.setprofile(called)
    sys.setprofile(called)
    try:
        loop.fit(job, TRAIN, OptimConfig(), mesh, Context(tmp_path / "out", tmp_path, "key"), 0, "test")
    finally:
        sys.setprofile(before)
        threading.setprofile(None)
    assert begun == TRAIN.steps
    steady = set().union({"train/loop.py"}, *steps[2:-1])  # the loop is entered once, before the first step
    assert len(steps[1] | steady) <= TRACED, sorted(steps[1] | steady)
    assert len(steady) <= STEADY, sorted(steady)
    assert "data/device_batches.py" in steady
    assert {"train/step.py", "model/transformer.py"} <= steps[1]
