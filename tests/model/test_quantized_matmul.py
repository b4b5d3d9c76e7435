"""8-bit training products versus qwix, versus rounding by hand, and in the step of a complete model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from qwix._src.core.dot_general_qt import DotGeneralQtConfig, dot_general_qt

from llmctl.config.errors import RequestError
from llmctl.config.settings import MeshConfig, OptimConfig, TrainConfig
from llmctl.distributed import mesh as meshes
from llmctl.evaluate.tasks.registry import default
from llmctl.model import functional
from llmctl.model import quantized_matmul as tm
from llmctl.model.config import ModelConfig
from llmctl.train.step import Job, make_step, split
from llmctl.train.training_state import fresh

DIMS = (((1,), (0,)), ((), ()))


@pytest.fixture(scope="module")
def operands():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(24, 40)).astype(np.float32) * np.exp(rng.normal(size=(24, 1))).astype(np.float32)
    return x, rng.normal(size=(40, 16)).astype(np.float32), rng.normal(size=(24, 16)).astype(np.float32)


def both_ways(product, x, w, d_y):
    y, pull = jax.vjp(product, x, w)
    return y, *pull(d_y.astype(y.dtype))


@pytest.mark.parametrize("kind", tm.TYPES)
def test_as_qwix_trains(operands, kind):
    operand, gradient = tm.TYPES[kind]
    config = DotGeneralQtConfig(
        lhs_qtype=operand, rhs_qtype=operand, dlhs_grad_qtype=gradient, drhs_grad_qtype=gradient
    )
    got = both_ways(lambda x, w: tm.matmul(x, w, kind), *operands)
    want = both_ways(lambda x, w: dot_general_qt(x, w, DIMS, config), *operands)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


def round_int8(a, axis):
    scale = np.abs(a).max(axis, keepdims=True) / 127.5  # the largest value fills the bucket of 127 to its end
    return np.clip(np.round(a / scale), -127, 127) * scale


def positive_top(a, axis):
    """The largest entry lies at the end of its bucket; made positive, it is 127 on whichever side rounding puts it."""
    top = np.abs(a) == np.abs(a).max(axis, keepdims=True)
    return np.where(top, np.abs(a), a)


def test_int8_forward_by_hand(operands):
    x, w = positive_top(operands[0], 1), positive_top(operands[1], 0)
    y = tm.matmul(x, w, "int8")
    np.testing.assert_allclose(y, round_int8(x, 1) @ round_int8(w, 0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind, most", [("int8", 0.02), ("fp8", 0.1)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_errors_are_those_of_rounding(operands, kind, most, dtype):
    x, w, d_y = (jnp.asarray(a, dtype) for a in operands)
    got = both_ways(lambda x, w: tm.matmul(x, w, kind), x, w, d_y)
    want = both_ways(jnp.matmul, *operands)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype
        assert np.linalg.norm(np.asarray(a, np.float32) - b) < most * np.linalg.norm(b)


@pytest.mark.parametrize("kind", tm.TYPES)
def test_no_gradient_stays_none(operands, kind):
    x, w, d_y = operands
    x = x.copy()
    x[3] = 0
    y, d_x, d_w = both_ways(lambda x, w: tm.matmul(x, w, kind), x, w, d_y * 0)
    assert not y[3].any() and not d_x.any() and not d_w.any()


def test_rules():
    with tm.use({"attn/q": "fp8", "attn/*": "int8", "decoder/blocks/mlp/up": "fp8"}):
        found = {p: tm.kind_of(f"decoder/blocks/{p}") for p in ("attn/q", "attn/o", "mlp/up", "mlp/down")}
        assert found == {"attn/q": "fp8", "attn/o": "int8", "mlp/up": "fp8", "mlp/down": ""}
        assert tm.kind_of("encoder/blocks/mlp/up") == "" and tm.kind_of("head/out") == ""
    assert tm.kind_of("decoder/blocks/attn/q") == ""
    tm.check({"*": "int8"}, ["decoder/blocks/attn/q/kernel"])
    with pytest.raises(RequestError, match="no plain matrix matches 'mpl/\\*'; there are decoder/blocks/mlp/up"):
        tm.check({"mpl/*": "int8"}, ["decoder/blocks/mlp/up/kernel", "head/out/kernel"])


def test_a_model_trains_in_8_bits_and_is_judged_in_full(operands):
    cfg = ModelConfig(
        preset="llama-tiny", d_model=16, layers=2, heads=2, kv_heads=2, head_dim=8, d_ff=24, vocab_size=32
    )
    params = jax.jit(lambda key: functional.init(cfg, key))(jax.random.key(0))
    tokens = np.arange(64, dtype=np.int32).reshape(4, 16) % 29 + 3
    ones = np.ones_like(tokens)
    positions = np.arange(16, dtype=np.int32) * ones
    batch = {
        "tokens": tokens,
        "targets": (tokens + 1) % 32,
        "weights": ones * 1.0,
        "segments": ones,
        "positions": positions,
    }
    job = Job(params=params, loss=default(cfg).loss_of(cfg, remat="full"), rows=None, validate=lambda _: {})
    optim, found = OptimConfig(warmup=0), {}
    for name, rules in {"plain": {}, "mlp": {"mlp/*": "int8"}, "all": {"*": "int8"}, "fp8": {"*": "fp8"}}.items():
        step, optimizer = make_step(job, TrainConfig(matmuls=rules), optim, 0)
        state = fresh(optimizer, optim, split(job)[0])
        step = jax.jit(step)
        state, first = step(state, ({}, ()), batch)
        for _ in range(4):
            state, metrics = step(state, ({}, ()), batch)
        found[name] = float(first["gradient_norm"])
        assert metrics["loss"] < first["loss"], name
        text = str(jax.make_jaxpr(step)(state, ({}, ()), batch))
        assert ("i8[" in text) == (name in ("mlp", "all")) and ("f8_e5m2[" in text) == (name == "fp8"), name
    assert len(set(found.values())) == 4 and np.ptp(list(found.values())) < 0.05 * found["plain"]
    with tm.use({"*": "int8"}):
        looked_on = functional.hidden(cfg, params, batch)
    np.testing.assert_array_equal(looked_on, functional.hidden(cfg, params, batch))


def test_a_mesh_rounds_as_one_device_does(operands):
    """Scales are taken over whole rows and columns, whoever holds their parts."""
    mesh = meshes.make(MeshConfig(data=2, fsdp=2, tensor=2))
    x, w, _ = operands
    x, w = positive_top(x, 1), positive_top(w, 0)
    rows, matrix = NamedSharding(mesh, P(("data", "fsdp"))), NamedSharding(mesh, P("fsdp", "tensor"))
    product = jax.jit(lambda x, w: tm.matmul(x, w, "int8"))
    np.testing.assert_allclose(product(jax.device_put(x, rows), jax.device_put(w, matrix)), product(x, w), rtol=1e-5)
