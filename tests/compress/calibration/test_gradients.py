"""Sums over batches of the loss's gradient equal those of `jax.grad` by hand, and scores read them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmctl.compress.calibration import gradients
from llmctl.compress.programs import Walk
from llmctl.compress.pruning.pattern import Pattern
from llmctl.compress.pruning.prune import prune
from llmctl.compress.pruning.scores import SCORES
from llmctl.compress.pruning.sparse_method import SparseMethod
from llmctl.compress.quantization.quantize import quantize
from llmctl.config.errors import RequestError
from llmctl.config.settings import MeshConfig
from llmctl.distributed import mesh as meshes
from llmctl.evaluate.tasks.registry import default
from llmctl.model import functional, weights
from llmctl.model.array_bytes import bytes_of
from llmctl.model.weights import dense, flatten

PATH = "decoder/blocks/attn/q/kernel"


@pytest.fixture(scope="module")
def targets(batches):
    """The batches with the next token as target, where there is one."""
    return [
        b | {"targets": np.roll(b["tokens"], -1, 1), "weights": (b["segments"] > 0) * np.float32(1)} for b in batches
    ]


def by_hand(tiny, params, batch):
    """The gradient of the summed cross-entropy, written with plain logits."""

    def loss(params):
        logits = functional.lm_logits(tiny, params, functional.hidden(tiny, params, batch))
        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], axis=-1)[..., 0]
        return -jnp.sum(log_p * batch["weights"])

    return flatten(jax.jit(jax.grad(loss))(params))


def test_sums_over_batches_equal_jax_grad(tiny, params, targets):
    got = gradients.accumulate(default(tiny), tiny, params, targets, ("sum", "absolute", "square"))
    each = [by_hand(tiny, params, batch) for batch in targets]
    assert set(got) == {p for p in each[0] if "/blocks/" in p and p.endswith("/kernel")}
    for path, sums in got.items():
        g = [np.asarray(grads[path], np.float64) for grads in each]
        scale = np.abs(g).max()
        np.testing.assert_allclose(sums["sum"] / scale, sum(g) / scale, atol=1e-5)
        np.testing.assert_allclose(sums["absolute"] / scale, sum(map(np.abs, g)) / scale, atol=1e-5)
        np.testing.assert_allclose(sums["square"] / scale**2, sum(map(np.square, g)) / scale**2, atol=1e-5)


def test_scores_are_the_change_of_the_loss(tiny, params, targets):
    """Taylor is the sum over batches of |w g|, Fisher of (w g)^2; both choose what those choose."""
    got = gradients.accumulate(default(tiny), tiny, params, targets, ("absolute", "square"))
    layer = gradients.of_layer(got, "decoder", 1)["attn/q"]
    w = np.asarray(params["decoder"]["blocks"]["attn"]["q"]["kernel"][1], np.float64)
    g = [np.asarray(by_hand(tiny, params, batch)[PATH][1], np.float64) for batch in targets]
    for method, want in (("taylor", sum(np.abs(w * x) for x in g)), ("fisher", sum(np.square(w * x) for x in g))):
        score = SCORES[method].calculate_scores(jnp.asarray(w, jnp.float32), None, layer, jax.random.key(0))
        np.testing.assert_allclose(score, want, rtol=1e-3, atol=1e-5 * want.max())
        kept = np.asarray(prune(jnp.asarray(w, jnp.float32), None, layer, method=method, pattern=Pattern(0.25)) != 0)
        assert kept.sum() == 0.75 * w.size and want[~kept].max() <= want[kept].min() * 1.001


def test_gradients_of_integers_are_those_of_their_values(tiny, params, targets):
    integers, _ = quantize(params, scheme="int8")
    values = jax.tree.map(dense, integers, is_leaf=lambda w: not isinstance(w, dict))
    got, want = (
        gradients.accumulate(default(tiny), tiny, p, targets[:1], ("sum",))[PATH]["sum"] for p in (integers, values)
    )
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


def test_batches_without_targets_are_refused(tiny, params, targets):
    silent = [targets[0] | {"weights": np.zeros_like(targets[0]["weights"])}]
    with pytest.raises(RequestError, match="no labels or targets"):
        gradients.accumulate(default(tiny), tiny, params, silent, ("sum",))


def test_random_scores_depend_on_the_key_alone():
    w = jax.random.normal(jax.random.key(0), (8, 4))
    cut = partial(prune, w, method="random", pattern=Pattern(0.5))
    one, again, other = (np.asarray(cut(key=jax.random.key(k)) != 0) for k in (1, 1, 2))
    assert np.array_equal(one, again) and not np.array_equal(one, other) and one.sum() == 16


@pytest.mark.parametrize(("dtype", "copies"), [("float32", 0), ("bfloat16", 2)])
def test_the_plan_counts_the_copies_of_other_types(dtype, copies, tiny, targets):
    """A float32 matrix is an argument itself; one of another type is copied, here to twice its size."""
    devices = meshes.make(MeshConfig())

    def like(a):
        return jax.ShapeDtypeStruct(a.shape, dtype)

    params = functional.laid_out(tiny, jax.tree.map(like, functional.abstract(tiny)), devices)
    batch = {k: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=None) for k, a in targets[0].items()}
    method = SparseMethod("taylor", Pattern(0.5))
    found = Walk(batch, 1, "float32", default(tiny), devices, params).gradients(tiny, params, method)
    matrices = bytes_of({m.path: m.weight for m in weights.matrices(params, "block")})
    assert bytes_of(found.parameters) == bytes_of(params) + copies * matrices
    assert bytes_of(found.beside) == (matrices if copies else 0)
