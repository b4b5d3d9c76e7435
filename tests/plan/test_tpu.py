"""A training step compiled for TPUs that are not there (libtpu): what the counter must find in it."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
import qwix
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import SingleDeviceSharding

from llmctl.config.settings import MeshConfig, OptimConfig, TrainConfig
from llmctl.distributed import mesh as meshes
from llmctl.evaluate.tasks.registry import default
from llmctl.model import attention_kernels, functional
from llmctl.model.config import ModelConfig
from llmctl.model.weights import quantized
from llmctl.model.weights.base import Product
from llmctl.plan import analytic_counts, analytic_setup, topologies
from llmctl.plan.compile import devices
from llmctl.plan.hlo import counts as hlo
from llmctl.train import step, training_state

pytest.importorskip("libtpu")
pytestmark = pytest.mark.slow

MODEL = ModelConfig(
    family="llama", d_model=512, layers=4, heads=4, kv_heads=4, head_dim=128, d_ff=1024, vocab_size=4096, tied=False
)
SIZES = {"data": 1, "fsdp": 4}


@pytest.fixture(scope="module")
def uncached():
    """What a cache of compiled programs keeps of a TPU's can be read with a TPU alone."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module", params=["", "int8"])
def found(request, uncached):
    """(TrainConfig, counts of the compiled step) for 4 chips, matrices in bfloat16 or int8."""
    matmuls = {"mlp/*": request.param} if request.param else {}
    train = TrainConfig(batch_size=4, seq_len=1024, dtype="bfloat16", remat="full", matmuls=matmuls)
    with pytest.MonkeyPatch.context() as env:
        env.setenv("TPU_SKIP_MDS_QUERY", "1")
        env.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        from jax.experimental import topologies as devices

        there = devices.get_topology_desc(**topologies.find("v5e:2x2").arguments).devices
        mesh = meshes.make(MeshConfig(**SIZES), there)
        params = functional.abstract(MODEL)
        lies = functional.shardings(MODEL, params, mesh)
        params = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), params, lies)
        loss = default(MODEL).loss_of(MODEL, dtype=jnp.bfloat16, remat="full")
        job = step.Job(params=params, loss=loss, rows=None, validate=lambda _: {})
        named, fixed = step.split(job)
        fn, made = step.make_step(job, train, OptimConfig(), 0)
        lies = training_state.state_shardings(made, OptimConfig(), named, mesh)
        shapes = jax.eval_shape(partial(training_state.fresh, made, OptimConfig()), named)
        state = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, lies)
        types = dict.fromkeys(("tokens", "targets", "segments", "positions"), jnp.int32) | {"weights": jnp.float32}
        batch = {
            n: jax.ShapeDtypeStruct((4, 1024), t, sharding=meshes.batch_sharding(mesh, 2)) for n, t in types.items()
        }
        with meshes.use(mesh), attention_kernels.use("auto"):
            lowered = jax.jit(fn, donate_argnums=0, out_shardings=(lies, None)).lower(state, (fixed, ()), batch)
        done = lowered.compile()
    return train, hlo.count(done.as_text(), dict(mesh.shape))


def test_operations_are_those_of_the_model(found):
    train, counts = found
    expected = analytic_counts.counts(analytic_setup.of_training(MODEL, train, OptimConfig(), SIZES))
    assert counts.flops == pytest.approx(expected.flops, rel=0.01) and not counts.unknown_loops
    assert counts.kernel_flops == pytest.approx(expected.kernel_flops, rel=0.01)


def test_the_attention_kernel_is_there(found):
    assert {name.split("_")[2] for name in found[1].kernels if name.startswith("splash")} == {"fwd", "dkv", "dq"}


def test_parameters_travel_while_layers_compute(found):
    over = [c for c in found[1].collectives if c.axis == "fsdp" and c.kind in ("all-gather", "collective-permute")]
    assert sum(c.overlapped for c in over) > 0 and sum(c.hidden for c in over) > 0


def test_eight_bits_run_in_eight_bits(found):
    train, counts = found
    assert ("int8" in counts.flops_by_type) == bool(train.matmuls)


@pytest.mark.parametrize(
    "stored, group, activations, share",
    [("int8", None, "", 0.51), ("int8", None, "int8", 0.51), ("int4", None, "", 0.26), ("int4", 128, "", 0.28)],
)
@pytest.mark.parametrize("tokens", [1, 8])
def test_decoding_reads_integers_from_memory(uncached, tokens, stored, group, activations, share):
    """Products of decoding, compiled for a v5e: bytes from HBM against bfloat16, and integers as operands for W8A8."""
    inputs, outputs = 2048, 8192
    x = jax.ShapeDtypeStruct((tokens, inputs), jnp.bfloat16)
    dense = jax.ShapeDtypeStruct((inputs, outputs), jnp.bfloat16)
    tiles = {0: group} if group else None
    array = jax.eval_shape(lambda w: qwix.quantize(w, stored, channelwise_axes=[1], tiled_axes=tiles), dense)
    weight = quantized.Quantized(array, activations)

    def counts(fn, *operands):
        there = SingleDeviceSharding(devices(topologies.find("v5e:1x1"))[0])
        operands = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=there), operands)
        return hlo.count(jax.jit(fn).lower(*operands).compile().as_text(), {})

    found = counts(lambda x, w: w.matmul(x, jnp.bfloat16, Product()), x, weight)
    assert 0.9 * share < found.bytes / counts(jnp.matmul, x, dense).bytes < share
    assert ("int8" in found.flops_by_type) == (activations == "int8" and tokens > 1)
