"""Checksums of arrays: by hand, for every type, on any sharding; each changed bit changes them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmctl.train.array_checksums import FACTORS, of_arrays


def weight(position, factor):
    mixed = position * factor % 2**32
    mixed = (mixed ^ mixed >> 15) * 0x2C1B3C6D % 2**32
    return (mixed ^ mixed >> 13) | 1


def test_by_hand():
    words = np.array([[3, 2**32 - 1], [7, 11]], np.uint32)
    expected = [sum(int(v) * weight(i, factor) for i, v in enumerate(words.ravel())) % 2**32 for factor in FACTORS]
    assert of_arrays({"a": jnp.asarray(words)}) == {"['a']": expected}
    assert of_arrays([jnp.asarray(words.view(np.float32))]) == {"[0]": expected}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "int32", "int8", "int4", "bool"])
def test_a_changed_number_and_a_swap_change_the_checksum(dtype):
    values = np.array([0, 1, 1, 0, 1, 0], np.float32)
    # the second and the third have equal sums and equal sums of positions
    found = [values, 1 - values, values[::-1], np.where(np.arange(6) == 2, 0, values)]
    assert len({str(of_arrays([jnp.asarray(v, dtype)])) for v in found}) == len(found)


def test_it_does_not_depend_on_the_sharding():
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
    a = jnp.asarray(np.random.default_rng(0).normal(size=(8, 6)), jnp.float32)
    spread = jax.device_put(a, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x", "y")))
    assert of_arrays([a]) == of_arrays([spread])
