"""Parameters as decoding reads them: what is dequantized is named."""

import jax
import jax.numpy as jnp

from llmctl.compress.quantization.quantize import quantize
from llmctl.model import functional
from llmctl.model.config import ModelConfig
from llmctl.model.generate import served


def test_weights_that_a_cpu_dequantizes_are_named():
    """Five matrices of 16 x 16 and two of other formats; integers that other platforms or W8A8 keep are not named."""
    cfg = ModelConfig(family="gpt2", vocab_size=32, d_model=16, layers=2, heads=2, kv_heads=2, head_dim=8, d_ff=16)
    params = functional.init(cfg, jax.random.key(0))
    small, _ = quantize(params, scheme="int8", rules=(("mlp/down", "nf4"), ("mlp/up", "int4")), group=8)
    line = served.dequantized(small, "cpu")
    assert line.startswith("quantized weights (4 in int8, 1 in nf4, 1 in int4) are converted once to 0.0 MB of floats")
    assert served.dequantized(small, "tpu") == served.dequantized(params, "cpu") == ""
    paired, _ = quantize(params, scheme="int8", activations="int8")
    assert served.dequantized(paired, "cpu") == ""
    _, (_, layers) = served.served(cfg, small, "cpu")
    assert sum(a.size for a in jax.tree.leaves(layers[0]) if a.shape == (16, 16) and a.dtype == jnp.float32) == 6 * 256
