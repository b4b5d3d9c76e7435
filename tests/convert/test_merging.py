"""Adapters that are stored apart: merged, written with their base, and to and from PEFT's format."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from llmctl.artifacts import artifact
from llmctl.compress.quantization.quantize import quantize
from llmctl.config.errors import RequestError
from llmctl.convert import merging
from llmctl.model import functional, weights

Q, DOWN = "decoder/blocks/attn/q/kernel", "decoder/blocks/mlp/down/kernel"


def adapted(params, kind):
    """The parameters with random adapters of one kind around two matrices."""
    rng, flat = np.random.default_rng(3), weights.flatten(params)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape) * 0.1, jnp.float32)

    for path, side in ((Q, "outputs"), (DOWN, "inputs")):
        layers, inputs, outputs = flat[path].shape
        if kind == "scaled":
            shape = (layers, inputs, 1) if side == "inputs" else (layers, 1, outputs)
            flat[path] = weights.Scaled(flat[path], 1 + normal(*shape), side)
        else:
            make = weights.LowRank if kind == "low_rank" else weights.Dora.around
            flat[path] = make(flat[path], normal(layers, inputs, 3), normal(layers, 3, outputs), 2.0)
    return weights.unflatten(flat)


@pytest.fixture(scope="session")
def beside(saved, params, config):
    """beside(kind): an adapter of this kind beside the session's artifact, which contains only its own arrays."""

    def made(kind):
        out = saved.parent / kind
        if not out.exists():
            base = artifact.load(saved)
            about = {"stage": "finetune", "key": kind, "config": {}, "parent": base.manifest, "base": base.params}
            artifact.save(out, adapted(base.params, kind), config, tokenizer_dir=base.tokenizer_dir, **about)
        return out

    return made


@pytest.mark.parametrize("kind", ["low_rank", "dora", "scaled"])
def test_merged_and_apart_give_the_same_logits(kind, beside, config, batch, logits, call, tmp_path):
    code, made, err = call("export", beside(kind), "--to", "artifact", "--merge", "--out", tmp_path / "merged")
    assert code == 0 and made["parity"] < 1e-5, err
    found, apart = artifact.load(tmp_path / "merged"), artifact.load(beside(kind))
    assert found.plain and found.manifest.base is None and found.manifest.name == "merged"
    assert found.manifest.parent.content == apart.manifest.content
    np.testing.assert_allclose(
        logits(config, found.params, batch), logits(config, apart.params, batch), rtol=1e-5, atol=1e-5
    )


def test_an_adapter_with_its_base_is_an_artifact_that_needs_none(beside, call, tmp_path):
    assert call("export", beside("low_rank"), "--to", "artifact", "--out", tmp_path / "whole")[0] == 0
    found, apart = artifact.load(tmp_path / "whole"), artifact.load(beside("low_rank"))
    assert found.manifest.digest == apart.manifest.digest and found.manifest.base is None
    code, made, _ = call("export", tmp_path / "whole", "--to", "peft", "--out", tmp_path / "peft")
    assert code == 0 and made["files"] == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize("kind", ["low_rank", "scaled"])
def test_peft_files_of_an_adapter_come_back_as_an_adapter(kind, beside, saved, call, tmp_path):
    code, made, _ = call("export", beside(kind), "--to", "peft", "--out", tmp_path / "peft")
    assert code == 0 and made["files"] == ["adapter_config.json", "adapter_model.safetensors"]
    common = ("import", tmp_path / "peft", "--base", saved)
    code, small, err = call(*common, "--store", "adapter", "--out", tmp_path / "small")
    assert code == 0, err
    code, whole, _ = call(*common, "--out", tmp_path / "whole")
    assert code == 0 and small["digest"] == whole["digest"] and small["bytes"] < whole["bytes"] / 3
    back, apart = artifact.load(tmp_path / "small", bases=[saved]), artifact.load(beside(kind))
    assert back.manifest.base.stored == apart.manifest.base.stored
    for name, a in weights.arrays(apart.params).items():
        np.testing.assert_allclose(weights.arrays(back.params)[name], a, rtol=1e-6, err_msg=name)
    code, _, err = call(*common, "--merge", "--out", tmp_path / "merged")
    assert code == 0 and artifact.load(tmp_path / "merged").plain, err
    code, _, err = call(*common, "--merge", "--store", "adapter", "--out", tmp_path / "no")
    assert code == 2 and "exclude each other" in err and not (tmp_path / "no").exists()


def test_what_cannot_be_merged_is_refused(beside, saved, config, params, call, tmp_path):
    found = artifact.load(beside("low_rank"))
    integers = quantize(params, scheme="int8", group=0, embeddings=False, head=False, activations="")[0]
    pruned = found.manifest.model_copy(update={"pruned": True, "sparsity": 0.5})
    prompted, bottleneck = (
        dataclasses.replace(found, params=params, manifest=found.manifest.model_copy(update={"model": model}))
        for model in (
            config.model_copy(update={"prompt_tokens": 3}),
            config.model_copy(update={"adapter_size": 4}),
        )
    )
    for wrong, line in (
        (dataclasses.replace(found, params=adapted(integers, "low_rank")), "merging would undo the quantization"),
        (dataclasses.replace(found, manifest=pruned), "pruned to 50% zeros, which merging would fill"),
        (prompted, "has a trained prompt, which no matrix of its base can express"),
        (bottleneck, "has bottleneck adapters, which no matrix of its base can express"),
        (artifact.load(saved), "has no adapter to merge"),
    ):
        with pytest.raises(RequestError, match=line):
            merging.merged(wrong)
    code, _, err = call("export", saved, "--to", "artifact", "--merge", "--out", tmp_path / "no")
    assert code == 2 and "has no adapter to merge" in err and not (tmp_path / "no").exists()
    code, _, err = call("export", beside("low_rank"), "--to", "peft", "--merge", "--out", tmp_path / "no")
    assert code == 2 and "--merge has no meaning for --to peft" in err
    code, _, err = call("import", saved, "--merge", "--out", tmp_path / "no")
    assert code == 2 and "--merge has no meaning" in err
    kept = dataclasses.replace(found, params=adapted(params, "scaled"), manifest=pruned)  # factors keep zeros
    assert not weights.adapted(merging.merged(kept)) and functional.abstract(config)
