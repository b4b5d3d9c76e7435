"""Products with sharded weights: values and gradients of the plain product, and one all-gather per pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmctl.config.settings import MeshConfig
from llmctl.distributed import mesh as meshes
from llmctl.model import fsdp_matmul
from llmctl.plan.hlo import counts

AXES = ("embed", "mlp")
LAYERS, ROWS, WIDTH = 4, 16, 32


@pytest.fixture(scope="module")
def split():
    """Mesh, input [B, T, D] split over its rows, matrices [L, D, D] split over their inputs."""
    mesh = meshes.make(MeshConfig(data=1, fsdp=8), jax.devices())
    x = jax.random.normal(jax.random.key(0), (ROWS, 8, WIDTH))
    w = jax.random.normal(jax.random.key(1), (LAYERS, WIDTH, WIDTH)) / WIDTH**0.5
    lies = meshes.sharding([None, *AXES], mesh)
    return mesh, jax.device_put(x, meshes.batch_sharding(mesh, 3)), jax.device_put(w, lies)


def loss(product, remat):
    def layer(x, w):
        return jnp.tanh(product(x, w)), None

    return lambda x, w: jnp.sum(jnp.square(jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, w)[0]))


def ours(x, w):
    return fsdp_matmul.matmul(x, w, AXES, jnp.float32)


def test_it_is_the_product(split):
    mesh, x, w = split
    with meshes.use(mesh):
        got = jax.jit(jax.value_and_grad(loss(ours, True), (0, 1)))(x, w)
    alone = jax.jit(jax.value_and_grad(loss(jnp.matmul, False), (0, 1)))(*map(np.asarray, (x, w)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, alone)
    assert got[1][1].sharding.is_equivalent_to(w.sharding, 3)


@pytest.mark.parametrize("remat", [False, True])
def test_every_pass_gathers_a_matrix_once_and_keeps_its_share(split, remat):
    mesh, x, w = split
    with meshes.use(mesh):
        done = jax.jit(jax.grad(loss(ours, remat), 1)).lower(x, w).compile()
    gathers = [c for c in counts.count(done.as_text(), dict(mesh.shape)).collectives if c.kind == "all-gather"]
    assert sum(c.payload for c in gathers) == 2 * w.nbytes
    assert f"[{LAYERS},{WIDTH},{WIDTH}]" not in done.as_text()  # all layers whole


def test_one_device_is_left_alone():
    with meshes.use(meshes.make(MeshConfig(data=1), jax.devices()[:1])):
        assert not fsdp_matmul.splits(AXES)
    with meshes.use(meshes.make(MeshConfig(data=8), jax.devices())):
        assert not fsdp_matmul.splits(AXES)
