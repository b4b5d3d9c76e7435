"""Our safetensors reader and writer versus the library's, and every kind of damage."""

import json
import math
import os
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from safetensors import safe_open

from llmctl.config.errors import RequestError
from llmctl.convert import safetensors as ours
from llmctl.convert.lazy_tensors import of_array

ARRAYS = {
    "b": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a": np.arange(5, dtype=ml_dtypes.bfloat16),
    "c": np.array([[1, -2]], np.int8),
    "empty": np.zeros((0, 4), np.float16),
    "turned": np.arange(6, dtype=np.float32).reshape(2, 3).T,
}


def write(path, **more):
    ours.write_file(path, {k: of_array(v) for k, v in (ARRAYS | more).items()})
    return path


def test_the_library_reads_what_we_write_and_we_read_what_it_writes(tmp_path):
    file = write(tmp_path / "ours.safetensors")
    with safe_open(file, "np") as f:
        assert f.metadata() == {"format": "pt"}
        for name in ("b", "c", "empty", "turned"):
            np.testing.assert_array_equal(f.get_tensor(name), ARRAYS[name], strict=True)
        assert f.get_slice("a").get_dtype() == "BF16"
    contiguous = {k: np.ascontiguousarray(v) for k, v in ARRAYS.items() if k != "a"}
    safetensors.numpy.save_file(contiguous, tmp_path / "theirs.safetensors")
    found = ours.read_file(tmp_path / "theirs.safetensors")
    assert found.keys() == contiguous.keys()
    for name, t in found.items():
        np.testing.assert_array_equal(t.read(), contiguous[name], strict=True)
    np.testing.assert_array_equal(ours.read_file(file)["a"].read(), ARRAYS["a"], strict=True)


def test_shards_hold_at_most_their_size_and_their_index_is_read_back(tmp_path):
    arrays = {f"w{i}": np.full((10,), i, np.float32) for i in range(5)}
    files = ours.write_folder(tmp_path, {k: of_array(v) for k, v in arrays.items()}, most=80)
    assert [f.name for f in files] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads((tmp_path / ours.INDEX).read_text())
    assert index["metadata"]["total_size"] == 200
    assert index["weight_map"]["w4"] == files[2].name
    found = ours.read_folder(tmp_path)
    assert {k: t.read()[0] for k, t in found.items()} == {f"w{i}": i for i in range(5)}
    files[1].unlink()
    with pytest.raises(RequestError, match="no such file"):
        ours.read_folder(tmp_path)


def test_one_tensor_is_in_memory_at_a_time(tmp_path):
    alive, most = set(), 0

    def reading(name):
        def read():
            nonlocal most
            array = np.zeros(1000, np.float32)
            alive.add(name)
            most = max(most, len(alive))
            return array

        return read

    lazy = {f"w{i}": ours.Tensor((1000,), np.dtype(np.float32), reading(f"w{i}")) for i in range(4)}
    ours.write_file(tmp_path / "x.safetensors", lazy, wrote=lambda _: alive.clear())
    assert most == 1


@pytest.mark.parametrize("keep", [4, 30, -1])
def test_a_file_that_was_cut_off_is_refused_before_anything_is_read(tmp_path, keep):
    file = write(tmp_path / "x.safetensors")
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(RequestError, match="cut off"):
        ours.read_file(file)


def test_a_damaged_header_is_refused(tmp_path):
    file = tmp_path / "x.safetensors"
    for header in ({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}, {"w": 3}, {"w": {"dtype": "F32"}}):
        text = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 64)
        with pytest.raises(RequestError, match="damaged header"):
            ours.read_file(file)
    text = json.dumps({"w": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 64)
    with pytest.raises(RequestError, match="type F4"):
        ours.read_file(file)


def test_a_pickle_is_refused_with_advice(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(RequestError, match=r"pickle.*safetensors"):
        ours.read_folder(tmp_path)


def test_an_index_cannot_point_outside_its_folder(tmp_path):
    (tmp_path / ours.INDEX).write_text(json.dumps({"weight_map": {"w": "../secret.safetensors"}}))
    with pytest.raises(RequestError, match="damaged index"):
        ours.read_folder(tmp_path)


@pytest.fixture
def both(tmp_path):
    """A folder with shards, their index, and one file with the same tensors."""
    arrays = {f"w{i}": of_array(np.full((10,), i, np.float32)) for i in range(5)}
    ours.write_folder(tmp_path, arrays, most=80)
    ours.write_file(tmp_path / ours.SINGLE, arrays)
    return tmp_path, arrays


def shards_of(folder):
    return sorted(folder.glob("model-*.safetensors"))


@pytest.mark.parametrize("case", ["same", "gone", "one gone", "damaged", "of this file"])
def test_one_file_is_taken_beside_an_index_and_it_is_said(both, case):
    folder, arrays = both
    for file in {"gone": shards_of(folder), "one gone": shards_of(folder)[:1]}.get(case, []):
        file.unlink()
    if case == "damaged":
        (folder / ours.INDEX).write_text("{")
    if case == "of this file":
        (folder / ours.INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(arrays, ours.SINGLE)}))
    said = []
    found = ours.read_folder(folder, said.append)
    assert {k: t.read()[0] for k, t in found.items()} == {f"w{i}": i for i in range(5)}
    why = {
        "same": "hold the same", "gone": "of shards that are not there", "one gone": "of shards that are not there",
        "damaged": "is damaged", "of this file": "is of this file",
    }[case]  # fmt: skip
    assert len(said) == 1 and f"{ours.SINGLE} is taken" in said[0] and why in said[0]


@pytest.mark.parametrize("change", ["value", "shape", "name"])
def test_one_file_and_shards_that_differ_are_refused(both, change):
    folder, arrays = both
    changed = dict(arrays)
    other = {"value": np.full((10,), 9, np.float32), "shape": np.zeros((2, 5), np.float32)}
    changed["extra" if change == "name" else "w3"] = of_array(other.get(change, np.zeros(1, np.float32)))
    ours.write_file(folder / ours.SINGLE, changed)
    with pytest.raises(RequestError, match=r"two different models \(they differ in (w3|extra)\); keep one"):
        ours.read_folder(folder)


def test_a_shard_may_not_be_a_link_out_of_its_folder_or_a_pipe(tmp_path):
    (tmp_path / "model").mkdir()
    write(tmp_path / "secret")
    (tmp_path / "model" / "a.safetensors").symlink_to(tmp_path / "secret")
    (tmp_path / "model" / ours.INDEX).write_text(json.dumps({"weight_map": {"a": "a.safetensors"}}))
    with pytest.raises(RequestError, match=r"a.safetensors: is a link to .*/secret, outside"):
        ours.read_folder(tmp_path / "model")
    (tmp_path / "model" / "a.safetensors").unlink()
    os.mkfifo(tmp_path / "model" / "a.safetensors")
    with pytest.raises(RequestError, match=r"a.safetensors: is a pipe"):
        ours.read_folder(tmp_path / "model")


def _with_header(path, change):
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"b": {"data_offsets": [4, 12]}}, "the values of a and b overlap"),
        ({"a": {"shape": [math.inf]}}, "a size that is no whole number"),
        ({"a": {"shape": [-1, -2]}}, "a size that is no whole number"),
        ({"a": {"data_offsets": [0.0, 8.0]}}, "a size that is no whole number"),
        ({"a": {"shape": [2**200]}}, "more than 128 bits"),
    ],
)
def test_sizes_in_a_header(tmp_path, change, why):
    path = tmp_path / "a.safetensors"
    ours.write_file(path, {n: of_array(np.ones(2, np.float32)) for n in "ab"})
    _with_header(path, lambda header: [header[n].update(fields) for n, fields in change.items()])
    with pytest.raises(RequestError, match=why):
        ours.read_file(path)
