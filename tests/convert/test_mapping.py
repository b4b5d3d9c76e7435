"""Name-map conversion: separate reads of mesh shards form the whole parameter, fused tensors, and mismatches."""

import jax
import numpy as np
import pytest

from llmctl.config.errors import RequestError
from llmctl.config.settings import MeshConfig
from llmctl.convert import architectures, name_map
from llmctl.convert import hf_folder as folders
from llmctl.convert.importing import placer
from llmctl.convert.lazy_tensors import of_array
from llmctl.model import weights
from llmctl.model.config import ModelConfig


def test_on_a_mesh_every_device_reads_its_own_part(exported, params):
    found = folders.inspect(exported)
    read = []
    put = placer(found.model, MeshConfig(data=2, fsdp=2, tensor=2))

    def place(path, w):
        def noted(index):
            part = w.read(index)
            read.append((path, part.size))
            return part

        return put(path, name_map.Pending(w.shape, w.dtype, noted))

    loaded = weights.flatten(folders.load(found, place))
    for path, expected in weights.flatten(params).items():
        np.testing.assert_array_equal(loaded[path], expected, err_msg=path, strict=True)
    q = loaded["decoder/blocks/attn/q/kernel"]
    assert len(q.sharding.device_set) == 8
    assert {size for path, size in read if path == "decoder/blocks/attn/q/kernel"} == {q.size // 4}
    assert isinstance(q, jax.Array)


def test_parts_of_fused_tensors_by_hand():
    cfg = ModelConfig(
        family="gpt2", vocab_size=5, d_model=4, layers=1, heads=2, kv_heads=2, head_dim=2, d_ff=3, max_seq_len=3,
        norm="layer", activation="gelu_tanh", gated=False, positions="learned", qkv_bias=True, out_bias=True,
        mlp_bias=True,
    )  # fmt: skip
    wanted = name_map.tensor_layouts(cfg, *architectures.of(cfg))
    assert wanted["transformer.h.0.attn.c_attn.weight"].shape == (4, 12)  # [in, out], queries then keys then values
    rng = np.random.default_rng(0)
    arrays = {n: rng.normal(size=j.shape).astype(np.float32) for n, j in wanted.items()}
    tensors = {n: of_array(a) for n, a in arrays.items()}
    flat = weights.flatten(name_map.read(cfg, wanted, tensors, lambda _, w: w.read(())))
    fused = arrays["transformer.h.0.attn.c_attn.weight"]
    np.testing.assert_array_equal(flat["decoder/blocks/attn/k/kernel"][0], fused[:, 4:8])
    np.testing.assert_array_equal(flat["decoder/blocks/attn/v/bias"][0], arrays["transformer.h.0.attn.c_attn.bias"][8:])
    back = name_map.write(jax.tree.map(jax.numpy.asarray, weights.unflatten(flat)), wanted)
    for name, array in arrays.items():
        np.testing.assert_array_equal(back[name].read(), array, err_msg=name, strict=True)


def test_everything_wrong_is_listed_at_once():
    cfg = ModelConfig(preset="llama-tiny", vocab_size=8, layers=1)
    wanted = name_map.tensor_layouts(cfg, *architectures.of(cfg))
    tensors = {n: of_array(np.zeros(j.shape, np.float32)) for n, j in wanted.items()}
    tensors["model.norm.weight"] = of_array(np.zeros(3, np.float32))
    del tensors["model.layers.0.mlp.up_proj.weight"]
    tensors["vision.weight"] = of_array(np.zeros(1, np.float32))
    with pytest.raises(RequestError) as caught:
        name_map.check("here", wanted, tensors)
    said = str(caught.value)
    assert "missing tensors model.layers.0.mlp.up_proj.weight" in said
    assert "not understood: vision.weight" in said
    assert "model.norm.weight is [3], the config says [128]" in said
