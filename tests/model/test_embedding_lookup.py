"""Sharded embedding tables versus the plain lookup: values, gradients and communication."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmctl.config.settings import MeshConfig
from llmctl.distributed import mesh as meshes
from llmctl.model import embedding_lookup
from llmctl.plan.hlo import counts

B, T, D = 8, 16, 32
MESHES = [
    {"data": 1, "fsdp": 8},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"data": 2, "context": 2, "tensor": 2},
    {"data": 1, "fsdp": 2, "context": 2, "tensor": 2},
]


def compiled(axes, rows, dtype, pull=True):
    """(program of the lookup and its gradient, operands, mesh)."""
    rng = np.random.default_rng(0)
    table = rng.normal(size=(rows, D)).astype(np.float32)
    ids, pulls = rng.integers(0, rows, (B, T), np.int32), rng.normal(size=(B, T, D)).astype(np.float32)
    mesh = meshes.make(MeshConfig(**axes))
    names = (["vocab_in", "embed_in"], ["batch", "seq"], ["batch", "seq", None])
    operands = [jax.device_put(a, meshes.sharding(n, mesh)) for a, n in zip((table, ids, pulls), names, strict=True)]

    def both(table, ids, pulls):
        x, pull = jax.vjp(lambda table: embedding_lookup.take(table, ids, "vocab_in", dtype), table)
        return x, pull(pulls.astype(dtype))[0]

    with meshes.use(mesh):
        lies = (operands[2].sharding, operands[0].sharding)
        return jax.jit(both, out_shardings=lies).lower(*operands).compile(), operands, mesh


@pytest.mark.parametrize("rows", [16, 512], ids=["the table travels", "tokens travel"])
@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_it_is_the_lookup(axes, rows):
    program, operands, mesh = compiled(axes, rows, jnp.float32)
    table, ids, pulls = map(np.asarray, operands)
    want = np.zeros_like(table)
    np.add.at(want, ids, pulls)
    x, d_table = program(*operands)
    np.testing.assert_array_equal(x, table[ids])
    np.testing.assert_allclose(d_table, want, rtol=1e-5, atol=1e-5)
    moved = {c.kind for c in counts.count(program.as_text() or "", dict(mesh.shape)).collectives}
    assert ("all-to-all" in moved) == (rows == 512)


@pytest.mark.parametrize("rows", [16, 512], ids=["the table travels", "tokens travel"])
def test_what_travels(rows):
    """Whichever is less, there and back, in the compute type; tokens bring their indices once."""
    program, _, mesh = compiled(MESHES[0], rows, jnp.float16)  # XLA's CPU backend exchanges bfloat16 as float32
    payload = sum(c.payload for c in counts.count(program.as_text() or "", dict(mesh.shape)).collectives)
    assert payload == (2 * rows * D * 2 if rows == 16 else 2 * B * T // 8 * D * 2 + B * T * 4)


def test_tokens_that_are_not_split_over_the_columns_devices():
    mesh = meshes.make(MeshConfig(data=1, fsdp=8))
    table, ids = jnp.arange(64.0).reshape(4, 16), jnp.array([[3, 1], [0, 0]])
    with meshes.use(mesh):
        x = jax.jit(lambda table: embedding_lookup.take(table, ids, "vocab_in", jnp.float32))(table)
    np.testing.assert_array_equal(x, np.asarray(table)[np.asarray(ids)])
