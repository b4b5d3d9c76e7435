"""Sparse storage: arrays come back bit for bit, files shrink, and damaged positions are refused by name."""

import itertools
import json
import math
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from llmctl.artifacts import abstract_artifact, array_store, artifact, sparse_storage
from llmctl.compress.quantization import quantize
from llmctl.config.errors import RequestError
from llmctl.config.settings import MeshConfig
from llmctl.distributed import mesh as meshes
from llmctl.model import functional, weights
from llmctl.model.config import ModelConfig
from llmctl.pipeline.stage import StageConfig

MODEL = ModelConfig(
    family="llama", vocab_size=32, d_model=256, layers=2, heads=4, kv_heads=2, head_dim=64, d_ff=256, max_seq_len=16
)
DTYPES = [
    np.dtype(t) for t in (np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.int8, ml_dtypes.int4)
]


def zeros(shape, pattern, rng):
    """Where an array is zero: half of all elements, or two of every four inputs."""
    if pattern == "2:4":
        rank = np.argsort(rng.random((*shape[:-2], shape[-2] // 4, 4, shape[-1])), axis=-2)
        return (rank < 2).reshape(shape)
    return rng.random(shape) < 0.5


def by_hand(record, parts, shape):
    """The published layouts, element by element."""
    out = np.zeros(shape, parts["values"].dtype)
    if record["format"] == "bitmask":
        values = iter(parts["values"])
        for n, at in enumerate(itertools.product(*map(range, shape))):
            if parts["bitmask"][n // 8] >> n % 8 & 1:
                out[at] = next(values)
        assert next(values, None) is None
        return out
    *lead, inputs, outputs = shape
    groups = [*lead, inputs // 4, outputs]
    for n, at in enumerate(itertools.product(*map(range, groups))):
        *stack, group, o = at
        nibble = parts["indices"][n // 2] >> 4 * (n % 2) & 15
        for k, index in enumerate((nibble & 3, nibble >> 2)):
            out[(*stack, 4 * group + index, o)] = parts["values"][(*stack, 2 * group + k, o)]
    return out


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_arrays_come_back_bit_for_bit(dtype, pattern):
    rng = np.random.default_rng(0)
    shape = (3, 12, 5)
    dense = rng.choice([-3.0, -0.0, 1.0, 2.0], shape).astype(dtype) if dtype.kind == "f" else None
    dense = rng.integers(1, 8, shape).astype(dtype) if dense is None else dense
    a = np.where(zeros(shape, pattern, rng), np.zeros((), dtype), dense)
    record, parts = sparse_storage.encode(a)
    assert record == ({"format": "2:4"} if pattern == "2:4" else {"format": "bitmask", "values": len(parts["values"])})
    empty = sparse_storage.stored(record, shape, dtype)
    assert {n: (p.shape, p.dtype) for n, p in empty.items()} == {n: (p.shape, p.dtype) for n, p in parts.items()}
    for back in (sparse_storage.decode(record, parts, shape), by_hand(record, parts, shape)):
        assert (back.dtype, back.tobytes()) == (dtype, a.tobytes())
    bits = 4 if dtype == ml_dtypes.int4 else 8 * dtype.itemsize
    assert sparse_storage.size(record, shape, dtype) == math.ceil(180 / 8) + math.ceil(parts["values"].size * bits / 8)


def test_the_smaller_format_is_chosen():
    a = np.arange(1, 65, dtype=np.float32).reshape(8, 8)
    assert sparse_storage.encode(a) is None  # no zeros
    assert sparse_storage.encode(np.where(a > 2, a, 0)) is None  # 2 zeros save 64 bits, as many as the mask has
    assert sparse_storage.encode(np.where(a > 3, a, 0))[0] == {"format": "bitmask", "values": 61}
    few = np.where(np.arange(8)[:, None] % 4 == 0, a, 0)  # one of every four
    assert sparse_storage.encode(few)[0] == {"format": "bitmask", "values": 16}
    negative = np.where(np.arange(8)[:, None] % 4 < 2, a, -np.float32(0))  # -0.0 is a value
    assert sparse_storage.encode(negative) is None
    assert sparse_storage.encode(np.zeros((0, 4), np.float32)) is None


@pytest.mark.parametrize(
    ("record", "change", "why"),
    [
        ({"format": "bitmask"}, lambda p: p["bitmask"].__setitem__(0, p["bitmask"][0] ^ 1), "and 32 are stored"),
        ({"format": "2:4"}, lambda p: p["indices"].__setitem__(0, 0b1111), "two increasing positions"),
        ({"format": "2:4"}, lambda p: p["indices"].__setitem__(0, 0b0001), "two increasing positions"),
    ],
)
def test_positions_that_contradict_the_values(record, change, why):
    a = np.where(np.arange(8)[:, None] % 4 < 2, np.ones((8, 8), np.float32), 0)
    if record["format"] == "bitmask":
        a[[1, 6]] = a[[6, 1]]  # three of the last four
    found, parts = sparse_storage.encode(a)
    assert found["format"] == record["format"]
    change(parts)
    with pytest.raises(ValueError, match=why):
        sparse_storage.decode(found, parts, a.shape)


def test_a_mask_with_bits_behind_the_array():
    a = np.array([[0, 1, 0], [0, 0, 0], [2, 0, 0]], np.float32)
    record, parts = sparse_storage.encode(a)
    parts["bitmask"][1] = 0x80
    parts["bitmask"][0] |= 1
    with pytest.raises(ValueError, match="marks"):
        sparse_storage.decode(record, parts, a.shape)


@pytest.fixture(scope="module")
def pruned():
    """Parameters with half of each matrix at zero, or two of every four inputs (the feed-forward layer)."""
    rng, flat = np.random.default_rng(1), {}
    for path, a in weights.flatten(functional.abstract(MODEL)).items():
        flat[path] = rng.normal(size=a.shape).astype(np.float32)
        if weights.parse(path).place == "block":
            pattern = "2:4" if "mlp" in path else "unstructured"
            flat[path] = np.where(zeros(a.shape, pattern, rng), np.float32(0), flat[path])
    return weights.unflatten(flat)


def save(out, params, **about):
    return artifact.save(out, params, MODEL, stage="test", key="", config={}, **about)


def same_bits(one, other):
    one, other = weights.arrays(one), weights.arrays(other)
    assert one.keys() == other.keys()
    for name, a in one.items():
        a, b = np.asarray(a), np.asarray(other[name])
        assert (a.dtype, a.tobytes()) == (b.dtype, b.tobytes()), name


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
def test_artifacts_load_bit_for_bit_on_every_mesh_and_are_smaller(tmp_path, pruned, kind):
    if kind.startswith("int"):
        params = quantize.quantize(jax.tree.map(jnp.asarray, pruned), scheme=kind)[0]
    else:
        params = jax.tree.map(lambda a: jnp.asarray(a, kind), pruned)
    dense, small = save(tmp_path / "dense", params), save(tmp_path / "small", params, pruned=True, sparse=True)
    assert (dense.format, small.format) == (1, 3) and "storage" not in json.loads(dense.model_dump_json())
    names = weights.value_names(params)
    assert small.storage.keys() == names and small.digest == dense.digest and small.content != dense.content
    formats = {r["format"] for r in small.storage.values()}
    assert formats == ({"bitmask"} if kind == "int4" else {"bitmask", "2:4"})  # int4 rounds a fifth more to zero
    assert small.bytes < 0.96 * dense.bytes
    for mesh in (None, meshes.make(MeshConfig(data=2, fsdp=2, tensor=2))):
        there, back = artifact.load(tmp_path / "dense", mesh), artifact.load(tmp_path / "small", mesh)
        same_bits(there.params, back.params)
        pairs = zip(jax.tree.leaves(there.params), jax.tree.leaves(back.params), strict=True)
        assert all(a.sharding == b.sharding for a, b in pairs)


def test_later_stages_keep_the_format_of_a_pruned_parent(tmp_path, pruned):
    parent = save(tmp_path / "a", pruned, pruned=True, sparse=True)
    child = save(tmp_path / "b", artifact.load(tmp_path / "a").params, parent=parent)
    assert child.storage == parent.storage and child.format == 3
    assert not save(tmp_path / "c", pruned, parent=parent, pruned=False).storage
    # An adapter has dense arrays of its own. What is saved whole from it is stored as its base.
    flat = weights.flatten(artifact.load(tmp_path / "a").params)
    flat["decoder/norm/scale"] += 1
    adapter = save(tmp_path / "e", weights.unflatten(flat), parent=parent, base=artifact.load(tmp_path / "a").params)
    assert adapter.base and adapter.base.sparse and not adapter.storage
    assert save(tmp_path / "f", artifact.load(tmp_path / "e").params, parent=adapter).storage == parent.storage
    dense = save(tmp_path / "g", pruned, pruned=True)
    other = save(tmp_path / "h", weights.unflatten(flat), parent=dense, base=artifact.load(tmp_path / "g").params)
    assert "sparse" not in json.loads(other.model_dump_json())["base"]  # earlier versions read it
    params = artifact.abstract(tmp_path / "e").params
    planned = abstract_artifact.abstract_result(
        StageConfig(kind="test", name="x"), params, MODEL, base=artifact.abstract(tmp_path / "e")
    )
    assert planned.manifest.storage.keys() == parent.storage.keys()
    assert not save(tmp_path / "d", pruned, parent=parent, sparse=False).storage


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ({"format": "bitmask", "values": 10**12}, "is not known for an array of shape"),
        ({"format": "bitmask", "values": 7}, "other shapes than the manifest says"),
        ({"format": "4:8"}, "is not known"),
        ({}, "is not known"),
    ],
)
def test_records_and_masks_that_contradict_the_arrays(tmp_path, pruned, record, why):
    manifest = save(tmp_path / "a", pruned, pruned=True, sparse=True)
    name = next(n for n, r in manifest.storage.items() if r["format"] == "bitmask")
    artifact.write_manifest(tmp_path / "a", manifest.model_copy(update={"storage": {**manifest.storage, name: record}}))
    with pytest.raises(RequestError, match=rf"a: damaged \(.*{why}.*remove this folder") as e:
        artifact.load(tmp_path / "a")
    assert "\n" not in str(e.value)


def test_a_damaged_mask_on_disk_is_named(tmp_path, pruned):
    manifest = save(tmp_path / "a", pruned, pruned=True, sparse=True)
    stored = {path: weights.parts(w) for path, w in weights.flatten(pruned).items()}
    stored, records = sparse_storage.encode_all(stored, weights.value_names(pruned))
    assert records == manifest.storage
    name = next(n for n, r in records.items() if r["format"] == "bitmask")
    stored[name][""]["bitmask"][3] ^= 4
    shutil.rmtree(tmp_path / "a" / "params")
    array_store.write(tmp_path / "a" / "params", stored)
    with pytest.raises(RequestError, match=rf"a: damaged \(params: {name}: its bitmask marks .* are stored\); remove"):
        artifact.load(tmp_path / "a")
    with pytest.raises(RequestError, match="no such array"):
        array_store.sparse_parts(tmp_path, {}, {"nobody": {"format": "2:4"}})


def test_planned_artifacts_count_the_bytes_of_encoded_arrays(pruned):
    params = functional.laid_out(MODEL, functional.abstract(MODEL), meshes.make(MeshConfig()))
    stored, records = sparse_storage.encode_all(
        {path: weights.parts(w) for path, w in weights.flatten(pruned).items()}, weights.value_names(pruned)
    )
    encoded = sum(part.nbytes for part in jax.tree.leaves(stored))
    config = StageConfig(kind="test", name="small")
    planned = abstract_artifact.abstract_result(config, params, MODEL, pruned=True, sparsity=0.5)
    assert planned.manifest.storage.keys() == records.keys()
    assert planned.manifest.bytes == pytest.approx(encoded, rel=0.02)
    later = abstract_artifact.abstract_result(config, params, MODEL, base=planned)
    assert later.manifest.bytes == planned.manifest.bytes
    assert abstract_artifact.abstract_result(config, params, MODEL, base=planned, pruned=False).manifest.storage == {}
