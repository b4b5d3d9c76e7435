"""The model of memory and work, against shapes that JAX traces and programs that XLA compiled for fake devices."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from llmctl.config.settings import MeshConfig, OptimConfig, TrainConfig
from llmctl.distributed import mesh as meshes
from llmctl.evaluate.tasks.registry import default
from llmctl.model import functional
from llmctl.model.chunked_loss import CHUNK_BYTES
from llmctl.model.config import ModelConfig
from llmctl.plan import analytic_counts, analytic_memory, analytic_setup, modelled, topologies
from llmctl.plan.hlo import counts
from llmctl.train import step, training_state

MODEL = ModelConfig(
    family="llama", d_model=128, layers=3, heads=4, kv_heads=2, head_dim=32, d_ff=384, vocab_size=512, tied=False
)
MODELS = {
    "llama": MODEL,
    "tied": MODEL.model_copy(update={"tied": True}),
    "bert": ModelConfig(family="bert", architecture="encoder", d_model=512, head_dim=128, d_ff=1024, vocab_size=512),
    "t5": ModelConfig(family="t5", architecture="encoder_decoder", encoder_layers=2, layers=3, vocab_size=512),
}
SPLIT = {"data": 1, "fsdp": 4, "tensor": 2}
REMATS = ("full", "qkv", "minimal", "none")


def setup(model=MODEL, mesh=SPLIT, optim="adamw", **train):
    train = {"batch_size": 8, "seq_len": 64, "dtype": "bfloat16", "remat": "full", **train}
    return analytic_setup.of_training(model, TrainConfig(**train), OptimConfig(name=optim), mesh)


def abstract(model, mesh):
    shapes = functional.abstract(model)
    lies = functional.shardings(model, shapes, mesh)
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, lies)


def size(a):
    total = jnp.dtype(a.dtype).itemsize
    for n in a.sharding.shard_shape(a.shape):
        total *= n
    return total


@pytest.mark.parametrize(
    "name, optimizer",
    [*((name, "adamw") for name in MODELS), *(("llama", o) for o in ("sgd", "lion", "adafactor", "muon"))],
)
def test_the_state_is_what_the_step_holds(name, optimizer):
    """Parameters to 2 % (norms and biases, which the model takes as whole everywhere), the optimizer likewise."""
    model, mesh = MODELS[name], meshes.make(MeshConfig(**SPLIT), jax.devices())
    config = OptimConfig(name=optimizer)
    params = abstract(model, mesh)
    job = step.Job(params=params, loss=default(model).loss_of(model), rows=None, validate=lambda _: {})
    named, _ = step.split(job)
    _, made = step.make_step(job, TrainConfig(), config, 0)
    lies = training_state.state_shardings(made, config, named, mesh)
    shapes = jax.eval_shape(partial(training_state.fresh, made, config), named)
    state = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, lies)
    found = analytic_memory.estimate(setup(model, optim=optimizer))
    assert found.parameters == pytest.approx(sum(map(size, jax.tree.leaves(state["params"]))), rel=0.02)
    held = sum(map(size, jax.tree.leaves(state["optimizer"])))
    # Adafactor's few statistics are split over some axes only
    assert found.optimizer == pytest.approx(held, rel=0.5 if optimizer == "adafactor" else 0.02)


@pytest.mark.parametrize("remat", ["full", "minimal"])
def test_what_is_saved_is_what_the_scan_hands_on(remat):
    """Of every layer, in the traced gradient: the arrays that the forward scan stacks."""
    batch, length = 2, 64
    rows = {n: jax.ShapeDtypeStruct((batch, length), jnp.int32) for n in ("tokens", "targets", "segments", "positions")}
    rows["weights"] = jax.ShapeDtypeStruct((batch, length), jnp.float32)
    loss = default(MODEL).loss_of(MODEL, dtype=jnp.bfloat16, remat=remat)
    traced = jax.make_jaxpr(jax.grad(lambda p, b: loss(p, b, jax.random.key(0))[0]))(functional.abstract(MODEL), rows)
    scan = next(e for e in traced.jaxpr.eqns if e.primitive.name == "scan" and e.params["length"] == MODEL.layers)
    step = scan.params["jaxpr"]  # a carry leaves the scan as it leaves a step; what is stacked gains an axis
    pairs = zip(scan.outvars, step.out_avals, strict=True)
    stacked = [whole.aval for whole, one in pairs if whole.aval.ndim == one.ndim + 1]
    by_trace = sum(a.size * a.dtype.itemsize for a in stacked) / MODEL.layers
    one = replace(setup(mesh={}, batch_size=batch, seq_len=length, remat=remat), fused=False)
    assert analytic_memory.saved(one) == by_trace


def compiled(remat, mesh_sizes, accumulate=1):
    mesh = meshes.make(MeshConfig(**mesh_sizes), jax.devices())
    train = TrainConfig(batch_size=8, seq_len=64, remat=remat, accumulate=accumulate)
    job = step.Job(
        params=abstract(MODEL, mesh), loss=default(MODEL).loss_of(MODEL, remat=remat), rows=None, validate=lambda _: {}
    )
    named, fixed = step.split(job)
    fn, made = step.make_step(job, train, OptimConfig(), 0)
    lies = training_state.state_shardings(made, OptimConfig(), named, mesh)
    shapes = jax.eval_shape(partial(training_state.fresh, made, OptimConfig()), named)
    state = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, lies)
    types = dict.fromkeys(("tokens", "targets", "segments", "positions"), jnp.int32) | {"weights": jnp.float32}
    batch = {n: jax.ShapeDtypeStruct((8, 64), t, sharding=meshes.batch_sharding(mesh, 2)) for n, t in types.items()}
    with meshes.use(mesh):
        done = jax.jit(fn, donate_argnums=0, out_shardings=(lies, None)).lower(state, (fixed, ()), batch).compile()
    return counts.count(done.as_text(), dict(mesh.shape))


@pytest.mark.parametrize("remat, mesh", [("full", SPLIT), ("minimal", {"data": 8}), ("qkv", {"data": 8})])
def test_operations_are_those_of_the_compiled_step(remat, mesh):
    """A whole training step on 8 fake devices, recomputation and plain attention included."""
    one = replace(setup(mesh=mesh, dtype="float32", remat=remat), fused=False)
    assert analytic_counts.counts(one).flops == pytest.approx(compiled(remat, mesh).flops, rel=0.01)


def test_recomputation_and_accumulation_save_memory():
    sizes = [analytic_memory.estimate(setup(remat=r)).temporaries for r in ("none", "minimal", "full")]
    assert sizes[0] > sizes[1] > sizes[2]
    whole, pieces = (analytic_memory.estimate(setup(remat="minimal", batch_size=32, accumulate=n)) for n in (1, 4))
    assert pieces.temporaries < whole.temporaries and pieces.parameters == whole.parameters


def test_gradients_of_microbatches_are_summed_in_arrays_of_their_own():
    """Four microbatches of the size of one batch: its activations, and the gradients twice."""
    one, four = (setup(batch_size=8 * n, accumulate=n) for n in (1, 4))
    own = analytic_memory.entries(MODEL, SPLIT)
    apart = analytic_memory.estimate(four).temporaries - analytic_memory.estimate(one).temporaries
    assert apart == pytest.approx(4 * (own.layers + own.table + own.head))
    # the state is read and written once a step, the sums three times a microbatch
    moved = 4 * analytic_counts.counts(one).bytes - 3 * 32 * own.total + 4 * 12 * own.total
    assert analytic_counts.counts(four).bytes == pytest.approx(moved)


def test_matrices_that_recomputation_gathered_wait_for_the_gradients():
    """Wider than the activations of a layer, they are what its backward pass has most of."""
    small = {"batch_size": 8, "seq_len": 2, "mesh": {"fsdp": 8}}
    layer, ff = 128 * 32 * 2 * 6 + 3 * 128 * 384, 128 * 384
    sizes = {
        r: analytic_memory.gathered(setup(remat=r, **small), analytic_memory.entries(MODEL, {"fsdp": 8}))
        for r in REMATS
    }
    assert sizes == {"full": 2 * layer, "qkv": 2 * (layer - 128 * 32 * 8), "minimal": 2 * ff, "none": 2 * ff}
    assert analytic_memory.gathered(setup(mesh={"data": 8}), analytic_memory.entries(MODEL, {"data": 8})) == 0


def test_logits_are_those_of_a_chunk():
    """Of rows of 64 tokens and a vocabulary of 512: all of them, a full chunk, a token of every row, none."""
    assert analytic_memory.logits(setup(mesh={})) == 4 * 8 * 64 * 512
    assert analytic_memory.logits(setup(mesh={}, batch_size=512)) == CHUNK_BYTES
    assert analytic_memory.logits(setup(mesh={}, batch_size=2**14)) == 4 * 2**14 * 512
    assert analytic_memory.logits(setup(MODEL.model_copy(update={"head": "classify"}), mesh={})) == 0


def test_a_batch_is_split_over_its_sequences_too():
    assert analytic_memory.estimate(setup(mesh={"data": 2, "context": 2})).batch == 5 * 4 * 8 * 64 / 4


@pytest.mark.parametrize(
    "chips, seq_len, dtype, head_dim, fused",
    [
        ("v5e:1x1", 128, "float32", 32, True), ("v5e:1x1", 160, "bfloat16", 32, False),  # whole blocks of 128
        ("h100:1", 160, "bfloat16", 32, True), ("h100:1", 160, "float32", 32, False),
        ("h100:1", 160, "bfloat16", 256, True), ("a100:1", 160, "bfloat16", 256, False),
        ("cpu:1", 128, "bfloat16", 32, False),
    ],
)  # fmt: skip
def test_attention_is_the_kernel_of_the_chips(chips, seq_len, dtype, head_dim, fused):
    one = setup(MODEL.model_copy(update={"head_dim": head_dim}), seq_len=seq_len, dtype=dtype)
    assert modelled.on(one, topologies.find(chips)).fused == fused


def test_a_mesh_divides_what_it_should():
    alone, split = analytic_memory.entries(MODEL, {}), analytic_memory.entries(MODEL, SPLIT)
    assert (split.layers, split.table, split.head) == (alone.layers / 8, alone.table / 8, alone.head / 8)
    assert split.rest == alone.rest
    assert analytic_memory.entries(MODEL, {"pipeline": 3}).layers == alone.layers / 3


def test_other_stages():
    lora = replace(setup(), trained=0.01, stored=0.5)
    full = analytic_memory.estimate(setup())
    assert analytic_memory.estimate(lora).optimizer == pytest.approx(0.01 * full.optimizer)
    assert analytic_memory.estimate(lora).parameters < 0.2 * full.parameters
    taught = replace(setup(), stored=4.0, beside=8e9)
    assert analytic_memory.estimate(taught).parameters == pytest.approx(2 * full.parameters)
    assert analytic_counts.counts(taught).flops == analytic_counts.counts(setup()).flops + 1e9
    reads = replace(setup(mesh={"tensor": 2}), optimizer="", stored=2.0, cached=100)
    found = analytic_memory.estimate(reads)
    assert found.optimizer == 0 and found.cache == 8 * 100 * 2 * 3 * 2 * 32 * 2 / 2
    walk = replace(setup(mesh={}), optimizer="", hessians=True)
    assert analytic_memory.estimate(walk).cache == 4 * (5 * 128**2 + 128**2 + 384**2)


def test_collectives_of_fsdp_by_hand():
    one = setup(mesh={"fsdp": 8}, remat="full")
    found = {(c.kind, c.axis): c for c in analytic_counts.counts(one).collectives}
    matrices = 3 * (128 * 32 * 2 * 6 + 3 * 128 * 384)
    assert found["reduce-scatter", "fsdp"].bytes == 2 * matrices * 7 / 8
    assert ("all-reduce", "data") not in found
    gathered = 2 * 2 * matrices + 2 * 128 * 512  # forward and backward, which recomputes with the same; the projection
    assert sum(c.payload for c in analytic_counts.counts(one).collectives if c.kind == "all-gather") == gathered


@pytest.mark.parametrize("mesh, wide", [({"data": 2, "fsdp": 4}, 2), ({"data": 2, "tensor": 2}, 4)])
def test_gradients_are_summed_over_data_in_the_compute_type(mesh, wide):
    """Those of the layers for each of two microbatches, the table's once; as the TPU compiler has it."""
    one = setup(mesh=mesh, batch_size=16, accumulate=2)
    own = analytic_memory.entries(MODEL, mesh)
    sent = [c.payload for c in analytic_counts.counts(one).collectives if (c.kind, c.axis) == ("all-reduce", "data")]
    head = [] if "fsdp" in mesh else [2 * 2 * own.head]  # over fsdp too where there is one
    assert sent == [2 * 2 * own.layers, wide * own.table, *head]


@pytest.mark.parametrize("remat, turns", [("none", 16), ("minimal", 16), ("qkv", 19), ("full", 19)])
def test_keys_and_values_go_around_the_ring(remat, turns):
    """Of 4 devices: 4 turns forward, 12 backward, 3 again; as the TPU compiler has it."""
    one = setup(mesh={"context": 4}, remat=remat)
    keys = 2 * 2 * 32 * 8 * 64 / 4 * 2  # of 2 heads, in bfloat16
    found = [c.payload for c in analytic_counts.counts(one).collectives if c.kind == "collective-permute"]
    assert found == [turns * 3 * keys]
