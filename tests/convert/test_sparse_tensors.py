"""The sparse formats of compressed-tensors: their layout by hand, and models that come back with the same zeros."""

import json

import ml_dtypes
import numpy as np
import pytest

from llmctl.artifacts import artifact
from llmctl.compress.pruning.pattern import Pattern
from llmctl.compress.pruning.prune import prune_uncalibrated
from llmctl.config.errors import RequestError
from llmctl.convert import safetensors, sparse_tensors
from llmctl.convert.lazy_tensors import of_array
from llmctl.model import weights


def by_hand(parts, shape):
    """The dense layer, bit by bit."""
    values, out = iter(parts["compressed"].reshape(-1)), np.zeros(shape, parts["compressed"].dtype)
    for row in range(shape[0]):
        assert "row_offsets" not in parts or parts["row_offsets"][row] == (out[:row] != 0).sum()
        for column in range(shape[1]):
            if parts["bitmask"][row, column // 8] >> column % 8 & 1:
                out[row, column] = next(values)
    assert next(values, None) is None
    return out


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_layouts_by_hand(dtype):
    rng = np.random.default_rng(0)
    w = rng.integers(1, 9, (5, 12)).astype(dtype)
    rank = np.argsort(rng.random((5, 3, 4)), axis=-1).reshape(5, 12)
    for zero, two_of_four in ((rng.random((5, 12)) < 0.5, False), (rank < 2, True), (rank < 3, True)):
        a = np.where(zero, np.zeros((), dtype), w)
        tensors, settings = sparse_tensors.pack(["m.weight"], {"m.weight": of_array(a), "n": of_array(w)}, ["lm_head"])
        said = settings["sparsity_config"]
        assert said["format"] == ("sparse-24-bitmask" if two_of_four else "sparse-bitmask")
        assert said["sparsity_structure"] == ("2:4" if two_of_four else "unstructured")
        assert said["ignore"] == ["lm_head"] and said["global_sparsity"] == pytest.approx(zero.mean())
        read = {name: t.read() for name, t in tensors.items()}
        assert {name: (t.shape, t.dtype) for name, t in tensors.items()} == {
            name: (a.shape, a.dtype) for name, a in read.items()
        }
        parts = {name.removeprefix("m."): a for name, a in read.items() if name != "n"}
        assert parts.pop("shape").tolist() == ([[5], [12]] if two_of_four else [5, 12])
        np.testing.assert_array_equal(by_hand(parts, (5, 12)), a)
        back = sparse_tensors.unpack("here", said, {name: of_array(a) for name, a in read.items()})
        assert back.keys() == {"m.weight", "n"} and back["m.weight"].read().tobytes() == a.tobytes()


@pytest.mark.parametrize(("change", "why"), [
    (lambda t: t.pop("m.bitmask"), "m.compressed has no m.bitmask"),
    (lambda t: t.update({"m.shape": of_array(np.array([4, 8]))}), "m.shape contradicts m.bitmask"),
    (lambda t: t.update({"m.shape": of_array(np.array([[3], [4], [1]]))}), "m.shape contradicts m.bitmask"),
    (lambda t: t.update({"m.compressed": of_array(np.ones(5))}), "m.bitmask marks 6 weights, and 5 are stored"),
    (lambda t: t.update({"m.bitmask": of_array(np.full((3, 1), 0x82, np.uint8))}), "marks 6 weights, and 6 are"),
])  # fmt: skip
def test_tensors_that_contradict_one_another(change, why):
    tensors = {"m.compressed": np.ones(6), "m.bitmask": np.full((3, 1), 6, np.uint8), "m.shape": np.array([3, 4])}
    tensors = {name: of_array(a) for name, a in tensors.items()}
    assert sparse_tensors.unpack("here", {"format": "sparse-bitmask"}, tensors)["m.weight"].read().sum() == 6
    change(tensors)
    with pytest.raises(RequestError, match=why):
        sparse_tensors.unpack("here", {"format": "sparse-bitmask"}, tensors)["m.weight"].read()
    with pytest.raises(RequestError, match="'marlin-24' is not supported"):
        sparse_tensors.unpack("here", {"format": "marlin-24"}, tensors)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_pruned_models_are_exported_and_imported_with_their_zeros(pattern, save, config, params, call, tmp_path):
    pruned = prune_uncalibrated(params, method="magnitude", pattern=Pattern.parse(pattern, 0.5))
    code, said, err = call("export", save(config, pruned), "--to", "compressed-tensors", "--out", tmp_path / "ct")
    assert code == 0, err
    kind = "sparse-24-bitmask" if pattern == "2:4" else "sparse-bitmask"
    assert said["parity"] == 0 and said["transformers"] is None and f"reads {kind} up to version" in said["proof"]
    assert "export --to hf writes dense weights" in err
    quantization = json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]
    assert quantization["sparsity_config"]["format"] == kind
    stored = safetensors.read_folder(tmp_path / "ct")
    parts = ("compressed", "bitmask") + (("row_offsets",) if pattern != "2:4" else ())
    read = {part: stored[f"model.layers.1.mlp.up_proj.{part}"].read() for part in parts}
    ours = np.asarray(weights.flatten(pruned)["decoder/blocks/mlp/up/kernel"][1]).T
    np.testing.assert_array_equal(by_hand(read, ours.shape), ours)
    assert call("import", tmp_path / "ct", "--out", tmp_path / "back")[0] == 0
    back = artifact.load(tmp_path / "back")
    assert back.manifest.pruned
    for (name, a), b in zip(weights.flatten(pruned).items(), weights.flatten(back.params).values(), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), name
    code, _, err = call("export", save(config, params), "--to", "compressed-tensors", "--out", tmp_path / "no")
    assert code == 2 and "no linear layer is quantized" in err and not (tmp_path / "no").exists()
