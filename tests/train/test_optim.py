"""Optimizers against steps computed by hand in NumPy, layer by layer; schedules at the steps that define them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from llmctl.config.settings import MeshConfig, OptimConfig
from llmctl.distributed import mesh as meshes
from llmctl.train import optim
from llmctl.train.step import average

RATE, DECAY = 0.01, 0.1
KERNEL, BIAS, TABLE = "decoder/blocks/mlp/up/kernel", "decoder/blocks/mlp/up/bias", "embed/tokens"
HEAD = "lm_head/kernel"


@pytest.fixture(scope="module")
def named():
    rng = np.random.default_rng(0)
    shapes = {KERNEL: (3, 130, 140), BIAS: (3, 140), TABLE: (6, 5), HEAD: (5, 6)}
    # Layers of very different size: what treats a stack as one array gives itself away.
    return {n: rng.normal(size=s).astype(np.float32) * (1 + 9 * (n == KERNEL)) for n, s in shapes.items()}


def gradients(named, step):
    rng = np.random.default_rng(step + 1)
    out = {n: rng.normal(size=a.shape).astype(np.float32) for n, a in named.items()}
    out[KERNEL] *= np.array([0.01, 1.0, 10.0], np.float32)[:, None, None]
    return out


def config(name, **changes):
    return OptimConfig(name=name, learning_rate=RATE, schedule="constant", warmup=0, weight_decay=DECAY, **changes)


def run(cfg, named, steps=2):
    """Parameters after `steps` steps."""
    optimizer = optim.build(cfg, 10, named)

    @jax.jit
    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return jax.tree.map(jnp.add, params, updates), state

    params = jax.tree.map(jnp.asarray, named)
    state = jax.jit(optimizer.init)(params)
    for i in range(steps):
        params, state = step(params, state, gradients(named, i))
    return params, state


def decayed(name, w):
    return DECAY * w if name.endswith("kernel") else 0.0


def by_hand(update, named, steps=2):
    """`update(name, gradient, memory, step, weight)` in place of the optimizer, each layer of a stack for itself."""
    out = {}
    for name, a in named.items():
        layers = []
        for i, w in enumerate(a if "/blocks/" in name else a[None]):
            memory: dict = {}
            w = w.astype(np.float64)
            for step in range(steps):
                g = gradients(named, step)[name]
                g = (g[i] if "/blocks/" in name else g).astype(np.float64)
                w = w - RATE * (update(name, g, memory, step, w) + decayed(name, w))
            layers.append(w)
        out[name] = np.stack(layers) if "/blocks/" in name else layers[0]
    return out


def mean_of(memory, key, beta, value):
    memory[key] = beta * memory.get(key, 0.0) + (1 - beta) * value
    return memory[key]


def adamw(name, g, memory, step, w):
    m = mean_of(memory, "m", 0.9, g) / (1 - 0.9 ** (step + 1))
    v = mean_of(memory, "v", 0.95, g * g) / (1 - 0.95 ** (step + 1))
    return m / (np.sqrt(v) + 1e-8)


def sgd(name, g, memory, step, w):
    memory["m"] = 0.95 * memory.get("m", 0.0) + g
    return memory["m"]


def lion(name, g, memory, step, w):
    sign = np.sign(0.9 * memory.get("m", 0.0) + 0.1 * g)
    mean_of(memory, "m", 0.95, g)
    return sign


def adafactor(name, g, memory, step, w):
    beta = 1 - (step + 1.0) ** -0.8
    square = g * g + 1e-30
    if g.ndim == 2 and min(g.shape) >= 128:
        rows = mean_of(memory, "rows", beta, square.mean(1))
        columns = mean_of(memory, "columns", beta, square.mean(0))
        v = np.outer(rows, columns) / rows.mean()
    else:
        v = mean_of(memory, "v", beta, square)
    u = g / np.sqrt(v)
    u = u / max(1.0, np.sqrt((u * u).mean()))
    return u * max(np.sqrt((w * w).mean()), 1e-3)


def muon(name, g, memory, step, w):
    if name != KERNEL:
        return adamw(name, g, memory, step, w)
    m = mean_of(memory, "m", 0.95, g) / (1 - 0.95 ** (step + 1))
    ahead = 0.95 * memory["m"] / (1 - 0.95 ** (step + 2)) + 0.05 * g / (1 - 0.95 ** (step + 1))
    assert m.shape == ahead.shape
    x = ahead / np.linalg.norm(ahead)
    for _ in range(5):  # Newton-Schulz, the quintic of the reference implementation
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return 0.2 * np.sqrt(max(g.shape)) * x


@pytest.mark.parametrize("update", [adamw, sgd, lion, adafactor, muon], ids=lambda f: f.__name__)
def test_steps_are_those_computed_by_hand(named, update):
    got, _ = run(config(update.__name__), named)
    want = by_hand(update, named)
    for name in named:
        moved = np.abs(want[name] - named[name]).max()
        np.testing.assert_allclose(got[name], want[name], rtol=0, atol=2e-4 * moved + 1e-6, err_msg=name)


def test_muon_orthogonalizes_every_layer_for_itself(named):
    got, _ = run(config("muon").model_copy(update={"weight_decay": 0.0}), named, steps=1)
    updates = (named[KERNEL] - np.asarray(got[KERNEL])) / (RATE * 0.2 * 140**0.5)
    singular = np.linalg.svd(updates, compute_uv=False)
    assert singular.shape == (3, 130) and singular.max() < 1.3
    assert np.median(singular, axis=1) == pytest.approx([1, 1, 1], abs=0.35)  # though gradients differ 1000 times


def test_weight_decay_spares_what_is_no_matrix():
    wanted = {KERNEL: True, BIAS: False, TABLE: False, HEAD: True, "decoder/norm/scale": False, f"{KERNEL}:a": True}
    assert {name: optim.decays(name) for name in wanted} == wanted


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "adafactor", "muon"])
def test_state_lies_where_its_parameters_lie_and_gives_the_same_step(named, name):
    mesh = meshes.make(MeshConfig(data=1, fsdp=2, tensor=4))
    specs = {KERNEL: (None, "fsdp", "tensor"), BIAS: (None, "tensor"), TABLE: (), HEAD: ()}
    params = {n: jax.NamedSharding(mesh, PartitionSpec(*s)) for n, s in specs.items()}
    optimizer = optim.build(config(name), 10, named)
    shapes = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, named))
    lies = optim.shardings(jax.eval_shape(optimizer.init, shapes), params, shapes, meshes.replicated(mesh))

    @jax.jit
    def step(p, grads):
        updates, state = optimizer.update(grads, jax.lax.with_sharding_constraint(optimizer.init(p), lies), p)
        return jax.tree.map(jnp.add, p, updates), jax.lax.with_sharding_constraint(state, lies)

    got, state = step(jax.device_put(named, params), jax.device_put(gradients(named, 0), params))
    want, _ = run(config(name), named, steps=1)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)
    whole = {a.shape for a in jax.tree.leaves(state) if a.sharding.is_fully_replicated}
    assert (3, 130, 140) not in whole and not {(3, 130), (3, 140)} & whole
    if name == "adafactor":
        rows = state[0]["3"][0].v_row[KERNEL]  # over outputs: what is left is [layers, inputs]
        assert rows.shape == (3, 130) and rows.sharding.spec == PartitionSpec(None, "fsdp")


@pytest.mark.parametrize(
    "settings, points",
    [
        ({"schedule": "constant"}, {0: 0.1, 9: 1.0, 50: 1.0, 99: 1.0}),
        ({"schedule": "linear"}, {9: 1.0, 10: 1.0, 55: 0.55, 100: 0.1}),
        ({"schedule": "cosine"}, {9: 1.0, 55: 0.55, 100: 0.1}),
        ({"schedule": "rsqrt"}, {4: 0.5, 10: 1.0, 40: 0.5, 90: 1 / 3}),
        ({"schedule": "wsd"}, {9: 1.0, 80: 1.0, 90: 0.55, 100: 0.1}),
        ({"schedule": "wsd", "decay": 45, "final": 0.0}, {55: 1.0, 75: 1 - 20 / 45, 100: 0.0}),
        ({"schedule": "cosine", "warmup": 0}, {0: 1.0, 50: 0.55, 100: 0.1}),
    ],
    ids=str,
)
def test_schedules(settings, points):
    rate = optim.schedule(OptimConfig(**{"learning_rate": 1.0, "warmup": 0.1, "final": 0.1, **settings}), 100)
    assert {step: float(rate(step)) for step in points} == pytest.approx(points, abs=1e-6)


def test_an_average_of_weights_starts_with_them_and_leaves_alone_what_does_not_move():
    old, new = {"a": jnp.asarray([1.0, 0.3])}, {"a": jnp.asarray([2.0, 0.3])}
    got = average(old, new, jnp.asarray(0), 0.99)["a"]  # decay (1 + 1) / (10 + 1)
    assert got[0] == pytest.approx(1 + 9 / 11) and got[1] == old["a"][1]
    got = average(old, new, jnp.asarray(10_000), 0.99)["a"]
    assert got[0] == pytest.approx(1.01)
