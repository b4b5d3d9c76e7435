"""(IA)^3, BitFit and the head alone: what they train, how factors merge, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix

from llmctl.config.errors import RequestError
from llmctl.config.settings import MeshConfig
from llmctl.distributed import mesh as meshes
from llmctl.model import functional, weights
from llmctl.model.config import ModelConfig
from llmctl.pipeline.stages import finetune
from llmctl.train import optim
from llmctl.train.adapters.registry import METHODS, stray

SIZES = {"vocab_size": 32, "d_model": 16, "layers": 2, "heads": 4, "kv_heads": 4, "head_dim": 4, "d_ff": 24}
HEAD = {"head": "classify", "labels": 3, "next_sentence": False, "head_transform": False}
BERT = ModelConfig.model_validate({"family": "bert", **SIZES, **HEAD, "max_seq_len": 16})
LLAMA = ModelConfig.model_validate({"family": "llama", **SIZES})


def trained(method, cfg, params):
    trains = METHODS[method].trains(finetune.Config(method=method), cfg, params)
    return {name for name in weights.arrays(params) if trains(name)}


def test_factors_of_outputs_scale_the_bias_and_those_of_inputs_do_not():
    kernel, bias = jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([10.0, 20.0])
    x = jnp.array([[1.0, -1.0]])
    outputs = weights.Scaled(kernel, jnp.array([[2.0, 0.5]]), "outputs")
    inputs = weights.Scaled(kernel, jnp.array([[2.0], [0.5]]), "inputs")
    np.testing.assert_allclose(weights.matmul(x, outputs, jnp.float32), [[-4, -1]])
    np.testing.assert_allclose(weights.matmul(x, inputs, jnp.float32), [[0.5, 2]])
    for w, merged, shift in ((outputs, [[2, 1], [6, 2]], [20, 10]), (inputs, [[2, 4], [1.5, 2]], [10, 20])):
        np.testing.assert_allclose(weights.bias(w, bias, jnp.float32), shift)
        tree = weights.merge_adapters({"attn": {"k": {"kernel": w, "bias": bias}}})["attn"]["k"]
        np.testing.assert_allclose(tree["kernel"], merged)
        np.testing.assert_allclose(tree["bias"], shift)


def test_ia3_adds_factors_of_keys_values_and_inner_activations_over_integers_too():
    params = functional.abstract(BERT)
    config, one = finetune.Config(method="ia3"), meshes.make(MeshConfig())

    def attach(params):
        down = "encoder/blocks/mlp/down/kernel"
        stored = qwix.quantize(weights.flatten(params)[down], "int8", channelwise_axes=[0, 2])
        integers = weights.updated(params, {down: weights.Quantized(stored)})
        return METHODS["ia3"].attach(config, BERT, integers, jax.random.key(0), one)

    tuned = jax.eval_shape(attach, params)
    names = trained("ia3", BERT, tuned)
    factors = {n: weights.arrays(tuned)[n].shape for n in names if not weights.parse(n).task_head}
    assert factors == {
        "encoder/blocks/attn/k/kernel:factor": (2, 1, 16),
        "encoder/blocks/attn/v/kernel:factor": (2, 1, 16),
        "encoder/blocks/mlp/down/kernel:factor": (2, 24, 1),
    }
    assert weights.arrays(tuned)["encoder/blocks/mlp/down/kernel:base.qvalue"].dtype == jnp.int8
    assert not any(optim.decays(n) for n in factors) and optim.decays("encoder/blocks/attn/k/kernel:a")


def test_bitfit_trains_biases_and_the_head():
    params = functional.abstract(BERT)
    names = trained("bitfit", BERT, params)
    assert {n for n in names if not n.startswith("head/")} == {
        n for n in weights.arrays(params) if n.endswith("/bias") and not n.startswith("head/")
    }
    assert {"encoder/blocks/attn_norm/bias", "embed/norm/bias", "head/out/kernel"} <= names
    with pytest.raises(RequestError, match=r"method = 'bitfit': .* the layers of family 'llama' have none"):
        trained("bitfit", LLAMA, functional.abstract(LLAMA))


def test_the_head_alone():
    names = trained("head", BERT, functional.abstract(BERT))
    assert names and all(n.startswith("head/") for n in names)
    with pytest.raises(RequestError, match="method = 'head': task 'classify' has no head of its own"):
        trained("head", LLAMA, functional.abstract(LLAMA))


def test_settings_of_other_methods_are_refused():
    assert stray("ia3", {"merge", "task"}) == ""
    assert stray("bitfit", {"merge"}).startswith("merge: not for method 'bitfit', say method = 'lora' or")
    assert stray("ia3", {"lora"}) == "lora: not for method 'ia3', say method = 'lora' or 'dora' or 'adalora'"
