"""Compare every architecture on meshes with one device: packed rows, 20 steps, collectives and compiler warnings."""

import os
import re
import subprocess
import sys
from functools import cache

import jax
import numpy as np
import pytest

from llmctl.config.settings import MeshConfig, OptimConfig, TrainConfig
from llmctl.data import device_batches
from llmctl.distributed import mesh as meshes
from llmctl.evaluate.tasks.registry import default
from llmctl.model.config import ModelConfig
from llmctl.train import loop
from llmctl.train.step import split
from llmctl.train.training_state import fresh

SIZES = {"d_model": 32, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8, "d_ff": 48, "vocab_size": 64}
FAMILIES = {
    "decoder": {"preset": "llama-tiny"},
    "encoder": {"preset": "bert-tiny", "kv_heads": 4, "max_seq_len": 64},
    "encoder_decoder": {"preset": "t5-tiny", "kv_heads": 4},
}
B, T, S = 8, 32, 24
OPTIM = OptimConfig(learning_rate=1e-2)
TRAIN = TrainConfig(steps=20, batch_size=B, seq_len=T)
REMATERIALIZED = "Involuntary full rematerialization"


def batch_of(architecture, step):
    """Return random rows with three documents and padding."""
    rng = np.random.default_rng(step)

    def texts(length):
        part = length // 4
        segments = np.tile(np.repeat([1, 2, 3, 0], part), (B, 1)).astype(np.int32)
        positions = np.tile(np.arange(part), (B, 4)).astype(np.int32)
        return {"tokens": rng.integers(3, 64, (B, length), np.int32), "segments": segments, "positions": positions}

    batch = texts(T)
    batch["targets"] = np.roll(batch["tokens"], 1, axis=1)
    batch["weights"] = ((batch["segments"] > 0) * rng.random((B, T))).astype(np.float32)
    if architecture == "encoder":  # masked language modeling and next-sentence prediction
        batch["places"] = np.sort(np.argsort(rng.random((B, T)), axis=1)[:, :6], axis=1).astype(np.int32)
        batch["types"] = (batch["segments"] > 1).astype(np.int32)
        batch["next_label"] = rng.integers(-1, 2, B, np.int32)
    if architecture == "encoder_decoder":
        batch |= {f"encoder_{name}": a for name, a in texts(S).items()}
    return batch


@cache
def program(architecture, axes):
    """Return (compiled step, initial state, mesh)."""
    mesh = meshes.make(MeshConfig(**dict(axes)))
    cfg = ModelConfig(**{**SIZES, **FAMILIES[architecture]}, dropout=0.0)
    job = loop.Job(
        params=loop.initialize(cfg, 0, mesh), loss=default(cfg).loss_of(cfg), rows=None, validate=lambda _: {}
    )
    step, optimizer = loop.make_step(job, TRAIN, OPTIM, 0)
    named, _ = split(job)
    with meshes.use(mesh):
        lies = loop.state_shardings(optimizer, OPTIM, named, mesh)
        state = jax.jit(lambda n: fresh(optimizer, OPTIM, n), out_shardings=lies)(named)
        lowered = jax.jit(step, out_shardings=(lies, None)).lower(
            state, ({}, ()), device_batches.place(batch_of(architecture, 0), mesh)
        )
        return lowered.compile(), state, mesh


def curve(architecture, axes):
    compiled, state, mesh = program(architecture, axes)
    out = []
    for step in range(TRAIN.steps):
        state, metrics = compiled(state, ({}, ()), device_batches.place(batch_of(architecture, step), mesh))
        out.append([float(metrics[name]) for name in ("loss", "accuracy")])
    return np.asarray(out)


SHARED = (("data", 2), ("context", 2), ("tensor", 2))
CASES = [
    ("decoder", (("data", 1), ("context", 4), ("tensor", 2))),
    pytest.param("encoder", SHARED, marks=pytest.mark.slow),
    pytest.param("encoder_decoder", SHARED, marks=pytest.mark.slow),
    pytest.param("encoder", (("data", 1), ("context", 8)), marks=pytest.mark.slow),
    pytest.param("encoder_decoder", (("data", 1), ("context", 8)), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("architecture, axes", CASES, ids=str)
def test_packed_rows_over_devices_that_share_them(architecture, axes):
    got, want = curve(architecture, axes), curve(architecture, ())
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
    assert np.abs(want[-1, 0] - want[0, 0]) > 1e-2


def test_activations_stay_split_and_keys_travel():
    """Devices of a ring exchange parameters (whole matrices) and key blocks, but never the activations of a row."""
    text = program("decoder", CASES[0][1])[0].as_text()
    moved = re.findall(r"= \(?\w+\[([\d,]*)\][^=\n]* (all-gather|all-to-all|collective-permute)\(", text)
    shapes = {kind: {tuple(map(int, s.split(","))) for s, k in moved if k == kind and s} for _, kind in moved}
    assert "all-to-all" not in shapes
    assert all(len(shape) == 2 for shape in shapes["all-gather"]), shapes
    assert any(len(shape) == 5 for shape in shapes["collective-permute"]), shapes


PROGRAM = """
import sys
sys.path.insert(0, "tests")
from test_meshes import program
for name in ("decoder", "encoder", "encoder_decoder"):
    for axes in ((("data", 2), ("context", 2), ("tensor", 2)), (("data", 2), ("fsdp", 2), ("tensor", 2))):
        program(name, axes)
if len(sys.argv) > 1:  # a gather whose table and indices are split over the same devices
    import jax, numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("a", "b", "c"))
    put = lambda *s: NamedSharding(mesh, P(*s))
    table = jax.ShapeDtypeStruct((64, 32), "float32", sharding=put("c", "b"))
    ids = jax.ShapeDtypeStruct((8, 32), "int32", sharding=put("a", "b"))
    jax.jit(lambda t, i: t[i], out_shardings=put("a", "b", None)).lower(table, ids).compile()
"""


def said_by_the_compiler(*arguments):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        env={**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false", "TF_CPP_MIN_LOG_LEVEL": "1"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stderr


@pytest.mark.slow
def test_the_compiler_rematerializes_nothing_against_its_will():
    said = said_by_the_compiler("and a bad one")  # the bad program shows that the warning would be detected
    assert said.count(REMATERIALIZED) == 1, said
