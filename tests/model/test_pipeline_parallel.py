"""Pipeline parallelism versus the plain scan over layers: losses, gradients, dropout, and runs per stage."""

from collections import Counter

import jax
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from llmctl.artifacts import artifact
from llmctl.compress.quantization.quantize import quantize
from llmctl.config.errors import RequestError
from llmctl.config.settings import MeshConfig, OptimConfig, TrainConfig
from llmctl.data import device_batches
from llmctl.distributed import mesh as meshes
from llmctl.evaluate.tasks.registry import default
from llmctl.model import functional, layerwise, pipeline_parallel, quantized_matmul, weights
from llmctl.model.config import ModelConfig
from llmctl.train import loop, step
from llmctl.train.adapters import lora
from llmctl.train.adapters.settings import LoraConfig
from llmctl.train.checkpoints import Checkpoints

SIZES = {"d_model": 32, "layers": 4, "heads": 4, "kv_heads": 4, "head_dim": 8, "d_ff": 48, "vocab_size": 64}
DECODER = ModelConfig(preset="llama-tiny", **SIZES, dropout=0.1)
PLAIN = DECODER.model_copy(update={"dropout": 0.0})
WINDOWS = ModelConfig(preset="llama-tiny", **SIZES, window=5, window_every=3)
ENCODER = ModelConfig(preset="bert-tiny", **SIZES, max_seq_len=64)
BOTH = ModelConfig(preset="t5-tiny", **SIZES, encoder_layers=2)
NAMES = {"decoder": DECODER, "plain": PLAIN, "windows": WINDOWS, "encoder": ENCODER, "both": BOTH}
TRAIN, OPTIM = TrainConfig(steps=20, batch_size=16), OptimConfig(learning_rate=1e-2)
HYBRID = {"pipeline": 2, "fsdp": 2, "tensor": 2, "data": 1}


def batch_of(model, rows=16, length=12, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, 60, (rows, length + 1)).astype(np.int32)
    segments = (np.arange(length) < rng.integers(4, length, (rows, 1))).astype(np.int32)
    places = np.arange(length, dtype=np.int32) * segments
    batch = {"tokens": tokens[:, :-1], "segments": segments, "positions": places}
    if model.encoder_layers:
        batch |= {f"encoder_{name}": a[::-1] for name, a in batch.items()}
    return batch | {"targets": tokens[:, 1:], "weights": segments.astype(np.float32)}


def curve(model, axes):
    """(losses of 20 steps with AdamW, the state after them)."""
    mesh = meshes.make(MeshConfig(**axes))
    with meshes.use(mesh):
        job = step.Job(loop.initialize(model, 0, mesh), default(model).loss_of(model), rows=None, validate=lambda _: {})
        runs = step.program(job, TRAIN, OPTIM, mesh, 0)
        state, losses = runs.begin(runs.named), []
        for i in range(20):
            state, metrics = runs.step(state, (runs.fixed, ()), device_batches.place(batch_of(model, seed=i % 4), mesh))
            losses.append(float(metrics["loss"]))
    return losses, state


def bytes_on_one(named):
    """What one device holds of the layers' matrices."""
    return sum(
        a.addressable_shards[0].data.nbytes
        for name, a in named.items()
        if name.endswith("kernel") and "/blocks/" in name
    )


CASES = [
    ("decoder", HYBRID),
    ("both", {"pipeline": 2, "data": 2, "tensor": 2}),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            ("encoder", {"pipeline": 2, "data": 4}),
            ("decoder", {"pipeline": 4, "data": 2}),
            ("decoder", {"pipeline": 2, "data": 2, "tensor": 2}),
            ("windows", {"pipeline": 4, "data": 1, "fsdp": 2}),
            ("plain", {"pipeline": 2, "data": 2, "context": 2}),
            ("windows", {"pipeline": 2, "data": 1, "context": 2, "tensor": 2}),
            ("both", {"pipeline": 2, "data": 1, "fsdp": 2, "context": 2}),
        )
    ),
]
ALONE = {}


@pytest.fixture
def uncached():
    """A program from the cache on disk would say nothing of its compilation."""
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)
    yield
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before)


@pytest.mark.parametrize("name, axes", CASES, ids=str)
def test_a_pipeline_follows_one_device(name, axes, uncached, capfd):
    """The decoder with dropout, whose masks are the same in whatever pieces a batch is computed."""
    if name not in ALONE:
        ALONE[name] = curve(NAMES[name], {})
    losses, state = curve(NAMES[name], axes)
    np.testing.assert_allclose(losses, ALONE[name][0], atol=1e-4)
    assert losses[-1] < losses[0] - 0.2
    ways = np.prod([axes.get(axis, 1) for axis in ("pipeline", "fsdp", "context", "tensor")])
    for part in (lambda state: state["params"], lambda state: state["optimizer"][0].mu):
        assert bytes_on_one(part(state)) * ways == bytes_on_one(part(ALONE[name][1]))
    assert "Involuntary full rematerialization" not in capfd.readouterr().err


def scans(jaxpr, around=()):
    """The lengths of every scan with a matrix product in it, and of those around it."""
    for equation in jaxpr.eqns:
        inside = (*around, equation.params["length"]) if equation.primitive.name == "scan" else around
        if equation.primitive.name == "scan" and "dot_general" in str(equation.params["jaxpr"]):
            yield inside
        for inner in jaxprs_in_params(equation.params):
            yield from scans(inner, inside)


@pytest.mark.parametrize("wanted", [1, 4, 0])
def test_a_stage_runs_once_a_microbatch_and_once_a_tick_of_its_bubble(wanted):
    """Scans over 7 layers are those of a stage: M + P - 1 of them forward, as many backward."""
    model = PLAIN.model_copy(update={"layers": 14})
    mesh = meshes.make(MeshConfig(pipeline=2, data=2, fsdp=2))
    loss = default(model).loss_of(model)
    with meshes.use(mesh), pipeline_parallel.use(wanted):
        shapes = jax.eval_shape(lambda: functional.init(model, jax.random.key(0)))
        batch = jax.eval_shape(lambda: batch_of(model, rows=40))
        traced = jax.make_jaxpr(jax.grad(lambda p, b: loss(p, b)[0]))(shapes, batch)
    pieces = {1: 1, 4: 2, 0: 5}[wanted]  # of 10 rows a device
    assert pipeline_parallel.microbatches(40, mesh, wanted) == pieces
    found = Counter(lengths[-2:] for lengths in scans(traced.jaxpr) if lengths[-1] == 7)
    assert found == {(pieces + 1, 7): 2}


def test_rules_for_8_bit_products_reach_the_stages():
    mesh = meshes.make(MeshConfig(pipeline=2, data=4))
    with meshes.use(mesh):
        shapes = jax.eval_shape(lambda: functional.init(PLAIN, jax.random.key(0)))
        batch = jax.eval_shape(lambda: batch_of(PLAIN))

        def traced(rules):
            with quantized_matmul.use(rules):
                return str(
                    jax.make_jaxpr(lambda p, b: default(PLAIN).loss_of(PLAIN)(p, b, jax.random.key(0))[0])(
                        shapes, batch
                    )
                )

        assert "i8[" in traced({"decoder/blocks/mlp/down": "int8"}) and "i8[" not in traced({"encoder/*": "int8"})


def test_weights_of_every_kind_pass_through_stages():
    """Integers, scales and low-rank pairs are sliced like arrays; layers may be recomputed."""
    base = quantize(
        jax.jit(lambda key: functional.init(PLAIN, key))(jax.random.key(0)),
        scheme="int8",
        group=0,
        embeddings=False,
        head=False,
        activations="",
    )
    one, many = meshes.make(MeshConfig()), meshes.make(MeshConfig(pipeline=2, data=2, tensor=2))
    params = lora.attach(PLAIN, base[0], LoraConfig(rank=4, alpha=8.0, targets=["q", "down"]), jax.random.key(1), one)
    found = []
    for mesh, remat in ((one, "none"), (many, "minimal")):
        with meshes.use(mesh):
            placed = jax.device_put(params, functional.shardings(PLAIN, params, mesh))
            pairs = {name: a for name, a in weights.arrays(placed).items() if name in weights.adapter_names(placed)}
            loss = default(PLAIN).loss_of(PLAIN, remat=remat)

            def run(pairs, placed, batch, loss=loss):
                whole = weights.rebuild(placed, weights.arrays(placed) | pairs)
                return loss(whole, batch, jax.random.key(2))[0]

            batch = device_batches.place(batch_of(PLAIN), mesh)
            found.append(jax.jit(jax.value_and_grad(run))(pairs, placed, batch))
    (a, d_a), (b, d_b) = found
    np.testing.assert_allclose(a, b, rtol=1e-6)
    for name in d_a:
        np.testing.assert_allclose(d_a[name], d_b[name], atol=1e-4 * np.abs(d_a[name]).max())


def test_stages_save_what_one_device_loads_and_the_other_way_round(tmp_path):
    one, many = meshes.make(MeshConfig()), meshes.make(MeshConfig(pipeline=4, data=1, tensor=2))
    for source, target in ((one, many), (many, one)):
        params = loop.initialize(DECODER, 0, source)
        folder = tmp_path / str(source.size)
        saved = artifact.save(folder, params, DECODER, stage="pretrain", key="k", config={})
        loaded = artifact.load(folder, target)
        assert saved.digest == loaded.manifest.digest
        jax.tree.map(np.testing.assert_array_equal, params, loaded.params)
        job = step.Job(params, default(DECODER).loss_of(DECODER), rows=None, validate=lambda _: {})
        before = step.program(job, TRAIN, OPTIM, source, 0)
        state = before.begin(before.named)
        shapes = step.program(step.Job(**{**vars(job), "params": loaded.params}), TRAIN, OPTIM, target, 0).state
        with Checkpoints(tmp_path / f"c{source.size}", 1, print) as checkpoints:
            checkpoints.save(1, state, {}, wait=True)
            restored, _ = checkpoints.restore(shapes)
        jax.tree.map(np.testing.assert_array_equal, state, restored)
        kernel = restored["optimizer"][0].mu["decoder/blocks/mlp/up/kernel"]
        assert kernel.sharding == shapes["params"]["decoder/blocks/mlp/up/kernel"].sharding


def test_block_by_block_is_the_pipeline():
    """Calibration and decoding take the layers one by one from where they lie."""
    mesh = meshes.make(MeshConfig(pipeline=2, data=4))
    with meshes.use(mesh):
        params = loop.initialize(PLAIN, 0, mesh)
        batch = device_batches.place(batch_of(PLAIN), mesh)
        whole = jax.jit(lambda p, b: functional.hidden(PLAIN, p, b))(params, batch)

        def walk(params, batch):
            carry = layerwise.embed(PLAIN, params, batch)
            for i in range(PLAIN.layers):
                carry, _ = layerwise.block(PLAIN, "decoder", layerwise.layer_params(params, "decoder", i), carry, i)
            return layerwise.finish(PLAIN, params, "decoder", carry)

        np.testing.assert_allclose(whole, jax.jit(walk)(params, batch), atol=1e-5)


def test_requests_that_do_not_fit():
    mesh = meshes.make(MeshConfig(pipeline=4, data=2))
    with pytest.raises(RequestError, match=r"model: 6 decoder layers do not divide over mesh.pipeline = 4"):
        loop.initialize(DECODER.model_copy(update={"layers": 6}), 0, mesh)
    with pytest.raises(RequestError, match="2 encoder layers do not divide"):
        loop.check(BOTH, TRAIN.model_copy(update={"seq_len": 12}), mesh)
    with pytest.raises(RequestError, match=r"train.microbatches: 3 pieces do not divide the 8 sequences"):
        loop.check(DECODER, TRAIN.model_copy(update={"microbatches": 3}), mesh)


def test_the_log_names_the_bubble():
    mesh = meshes.make(MeshConfig(pipeline=4, data=2))
    assert pipeline_parallel.describe(64, mesh, 0) == [
        "pipeline: 4 stages, 16 microbatches of 4 sequences; idle 15.8% of the time (bubble)"
    ]
    assert pipeline_parallel.describe(64, meshes.make(MeshConfig()), 0) == []
