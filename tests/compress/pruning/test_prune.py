"""Masks by hand, and Wanda's reason to exist: less error at the layer's output than magnitude on uneven inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix

from llmctl.compress.calibration.calibrate import walk
from llmctl.compress.calibration.statistics import Moments, moments
from llmctl.compress.pruning import global_threshold
from llmctl.compress.pruning.masks import mask
from llmctl.compress.pruning.pattern import Pattern
from llmctl.compress.pruning.prune import apply, check, prune, prune_layer, prune_uncalibrated, scored, sparsity
from llmctl.compress.pruning.scores import SCORES, Score
from llmctl.compress.pruning.sparse_method import Allocation, SparseMethod
from llmctl.config.errors import RequestError
from llmctl.model.weights import LowRank, Quantized, dense, flatten

W = jnp.array([[1.0, -5.0], [-2.0, 6.0], [3.0, 7.0], [-4.0, 0.5]])  # [in 4, out 2]
STATS = Moments(jnp.array([16.0, 1.0, 0.0, 4.0]), jnp.array(1.0))  # norms 4, 1, 0, 2


def kept(w) -> list[list[int]]:
    return (np.asarray(dense(w)) != 0).astype(int).tolist()


def test_magnitude_compares_within_the_matrix():
    # |W| sorted: 0.5 1 2 3 | 4 5 6 7
    got = prune(W, None, method="magnitude", pattern=Pattern(0.5))
    assert kept(got) == [[0, 1], [0, 1], [0, 1], [1, 0]]
    np.testing.assert_array_equal(got, np.where(kept(got), W, 0))


def test_wanda_compares_within_each_output():
    # |W| * norms: output 0: 4 2 0 8; output 1: 20 6 0 1
    assert kept(prune(W, STATS, method="wanda", pattern=Pattern(0.5))) == [[1, 1], [0, 1], [0, 0], [1, 0]]
    assert kept(prune(W, STATS, method="wanda", pattern=Pattern(0.25))) == [[1, 1], [1, 1], [0, 0], [1, 1]]


def test_ria_compares_shares_of_inputs_and_of_outputs():
    # Sums of |W|: inputs 6 8 10 4.5, outputs 10 18.5; norms 4 1 0 2.
    # (|W| / input's sum + |W| / output's sum) * sqrt(norm):
    # 0.533 2.207 | 0.45 1.074 | 0 0 | 1.823 0.195
    assert kept(prune(W, STATS, method="ria", pattern=Pattern(0.5))) == [[1, 1], [0, 1], [0, 0], [1, 0]]
    assert kept(prune(W, STATS, method="ria", pattern=Pattern(0.75))) == [[0, 1], [0, 0], [0, 0], [1, 0]]


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize(("method", "per"), [("magnitude", "matrix"), ("wanda", "output"), ("ria", "matrix")])
def test_masks_equal_a_numpy_reference(method, per, pattern):
    """The authors' formulas in float64, on inputs of uneven sizes."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 24)) * np.exp(rng.normal(size=24))
    w = rng.normal(size=(24, 10)).astype(np.float32)
    stats, size = Moments.start(24).fold(jnp.asarray(x, jnp.float32), jnp.ones(200, bool)), np.abs(w.astype(float))
    norms = np.sqrt((x**2).sum(axis=0))[:, None]
    relative = size / size.sum(axis=0) + size / size.sum(axis=1, keepdims=True)
    score = {"magnitude": size, "wanda": size * norms, "ria": relative * norms**0.5}[method]
    if pattern == "2:4":
        groups = score.reshape(6, 4, 10)
        expected = (groups > np.sort(groups, axis=1)[:, 1:2]).reshape(24, 10)
    else:
        flat = score if per == "output" else score.reshape(-1, 1)
        expected = (flat > np.sort(flat, axis=0)[len(flat) // 2 - 1]).reshape(24, 10)
    assert kept(prune(jnp.asarray(w), stats, method=method, pattern=Pattern.parse(pattern, 0.5))) == expected.tolist()


def test_two_of_four_runs_along_the_inputs():
    two_four, one_two = Pattern.parse("2:4", 0.5), Pattern.parse("1:2", 0.5)
    assert kept(prune(W, None, method="magnitude", pattern=two_four)) == [[0, 0], [0, 1], [1, 1], [1, 0]]
    assert kept(prune(W, None, method="magnitude", pattern=one_two)) == [[0, 0], [1, 1], [0, 1], [1, 0]]
    assert kept(prune(W, STATS, method="wanda", pattern=Pattern.parse("1:4", 0.5))) == [[0, 1], [0, 0], [0, 0], [1, 0]]


def test_equal_scores_do_not_change_the_count():
    got = mask(jnp.ones((10, 3)), Pattern(0.3), "output")
    np.testing.assert_array_equal(got.sum(axis=0), [7, 7, 7])
    assert mask(jnp.zeros((10, 3)), Pattern(0.5), "matrix").sum() == 15


@pytest.mark.parametrize("method", SCORES.names())
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_zeros_stay_zeros(method, pattern):
    w = jax.random.normal(jax.random.key(0), (16, 6))
    stats = Moments(jax.random.uniform(jax.random.key(1), (16,)), jnp.array(1.0))
    sums = dict.fromkeys(("sum", "absolute", "square"), jax.random.uniform(jax.random.key(2), w.shape))
    once = prune(w, stats, sums, method=method, pattern=Pattern(0.5))
    twice = prune(once, stats, sums, jax.random.key(3), method=method, pattern=Pattern.parse(pattern, 0.75))
    assert not np.any((np.asarray(once) == 0) & (np.asarray(twice) != 0))
    assert np.mean(np.asarray(once) == 0) == 0.5


def test_zeros_come_before_negative_scores_and_before_dead_inputs(monkeypatch):
    """Half of W is zero already, and each score is below that of the zeros: pruning half changes nothing."""
    sparse = jnp.where(jnp.array([[1, 1], [0, 1], [1, 0], [0, 0]]), W, 0)
    signed = Score(lambda weights_IO, statistics, gradients, key: -jnp.abs(weights_IO) - 1)
    monkeypatch.setattr(SCORES, "own", {**SCORES.own, "signed": signed})
    np.testing.assert_array_equal(prune(sparse, method="signed", pattern=Pattern(0.5)), sparse)
    # One more of eight: the largest, whose score is the lowest of the others.
    assert kept(prune(sparse, method="signed", pattern=Pattern(0.625))) == [[1, 1], [0, 0], [1, 0], [0, 0]]
    dead = Moments(jnp.array([0.0, 1.0, 4.0, 1.0]), jnp.array(1.0))  # the first input is always 0
    np.testing.assert_array_equal(prune(sparse, dead, method="wanda", pattern=Pattern(0.5)), sparse)


def test_a_quantized_weight_keeps_its_integers():
    q = Quantized(qwix.quantize(W, "int8", channelwise_axes=[1]))
    got = prune(q, None, method="magnitude", pattern=Pattern(0.5))
    assert isinstance(got, Quantized) and got.array.qvalue.dtype == jnp.int8
    assert kept(got) == kept(prune(W, None, method="magnitude", pattern=Pattern(0.5)))
    np.testing.assert_array_equal(got.array.qvalue, np.where(kept(got), q.array.qvalue, 0))


def test_wanda_beats_magnitude_at_the_layers_output():
    """Inputs that are correlated and of very different sizes, as a language model's are."""
    k1, k2, k3, k4 = jax.random.split(jax.random.key(0), 4)
    sizes = jnp.exp(1.5 * jax.random.normal(k1, (64,)))
    x = (jax.random.normal(k2, (512, 64)) @ (jnp.eye(64) + 0.2 * jax.random.normal(k3, (64, 64)))) * sizes
    w = jax.random.normal(k4, (64, 32))
    stats = Moments.start(64).fold(x, jnp.ones(512, bool))
    for pattern in (Pattern(0.5), Pattern(0.7), Pattern.parse("2:4", 0.5)):
        methods = ("magnitude", "wanda")
        error = {m: float(jnp.linalg.norm(x @ (w - prune(w, stats, method=m, pattern=pattern)))) for m in methods}
        assert error["wanda"] < 0.8 * error["magnitude"]


def test_the_walk_prunes_every_matrix_of_every_layer(tiny, params, batches):
    pattern = Pattern.parse("2:4", 0.5)

    def change(visit):
        return prune_layer(visit.layer, visit.stats, method=SparseMethod("wanda", pattern))[0]

    before = flatten(jax.tree.map(np.array, params))
    pruned, reports = walk(tiny, params, batches, moments, change)
    assert sparsity(pruned) == 0.5
    for path, w in flatten(pruned).items():
        if path.endswith("kernel"):
            groups = np.asarray(w).reshape(3, -1, 4, w.shape[-1])
            np.testing.assert_array_equal((groups != 0).sum(axis=2), 2)
        else:
            np.testing.assert_array_equal(w, before[path])
    assert all(0 < r.error < 1 for r in reports)


def test_without_data_each_layer_is_pruned_for_itself(params):
    got = flatten(prune_uncalibrated(params, method="magnitude", pattern=Pattern(0.25)))
    for path, w in flatten(params).items():
        if "/blocks/" not in path or not path.endswith("kernel"):
            assert got[path] is w
            continue
        for one, whole in zip(got[path], w, strict=True):
            assert np.array_equal(one, prune(whole, None, method="magnitude", pattern=Pattern(0.25)))


@pytest.mark.parametrize(("text", "fraction", "message"), [
    ("4:2", 0.5, "N < M"), ("0:4", 0.5, "N < M"), ("block", 0.5, "not known"), ("2:", 0.5, "not known"),
    ("unstructured", 1.5, "outside"), ("unstructured", 0.0, "outside"),
])  # fmt: skip
def test_bad_patterns(text, fraction, message):
    with pytest.raises(RequestError, match=message):
        Pattern.parse(text, fraction)


def test_what_does_not_divide_is_named():
    params = {"decoder": {"blocks": {"attn": {"q": {"kernel": jnp.ones((2, 6, 4))}}}}}
    with pytest.raises(RequestError, match=r"2:4 does not divide the 6 inputs of decoder/blocks/attn/q/kernel"):
        check(params, SparseMethod("magnitude", Pattern.parse("2:4", 0.5)))


def test_low_rank_updates_are_refused():
    with pytest.raises(RequestError, match="merge"):
        apply(LowRank(W, jnp.ones((4, 1)), jnp.ones((1, 2)), 1.0), jnp.ones((4, 2), bool))


def test_a_sparsity_that_rounds_to_no_weight():
    params = {"decoder": {"blocks": {"attn": {"q": {"kernel": jnp.ones((2, 8, 4))}}}}}
    check(params, SparseMethod("magnitude", Pattern(1 / 32)))
    check(params, SparseMethod("wanda", Pattern(1 / 8)))
    with pytest.raises(RequestError, match=r"sparsity 1e-09 rounds to no weight of 32; say at least 0.031"):
        check(params, SparseMethod("sparsegpt", Pattern(1e-9)))
    with pytest.raises(RequestError, match=r"rounds to no weight of 8; say at least 0.12"):
        check(params, SparseMethod("wanda", Pattern(1 / 32)))


def in_blocks(a, rows, columns, reduce):
    """One number per block, block by block."""
    inputs, outputs = a.shape
    return np.array(
        [[reduce(a[i : i + rows, o : o + columns]) for o in range(0, outputs, columns)] for i in range(0, inputs, rows)]
    )


@pytest.mark.parametrize("shape", [(8, 1), (1, 5), (4, 2), (24, 1)], ids=str)
@pytest.mark.parametrize(("method", "per"), [("magnitude", "matrix"), ("wanda", "output")])
def test_block_masks_equal_a_numpy_reference(method, per, shape):
    """The blocks with the lowest sums go, within the matrix, or within each block of outputs. Integers keep theirs."""
    rng = np.random.default_rng(0)
    w, squares = rng.normal(size=(24, 10)).astype(np.float32), rng.random(24).astype(np.float32)
    score = np.abs(w) * (np.sqrt(squares)[:, None] if method == "wanda" else 1)
    total = in_blocks(score, *shape, np.sum)
    flat = total if per == "output" else total.reshape(-1, 1)
    count = round(0.4 * len(flat))
    gone = (np.argsort(np.argsort(flat, axis=0, kind="stable"), axis=0) < count).reshape(total.shape)
    expected = np.kron(~gone, np.ones(shape, bool))
    pattern = Pattern.parse(f"{shape[0]}x{shape[1]}", 0.4)
    assert pattern.count(24, 10, per) == gone.sum()
    stats = Moments(jnp.asarray(squares), jnp.array(1.0))
    assert kept(prune(jnp.asarray(w), stats, method=method, pattern=pattern)) == expected.tolist()
    q = Quantized(qwix.quantize(jnp.asarray(w), "int8", channelwise_axes=[1]))
    got = prune(q, stats, method=method, pattern=pattern)
    blocks = in_blocks(np.asarray(got.array.qvalue), *shape, np.any)
    np.testing.assert_array_equal(got.array.qvalue, np.where(np.kron(blocks, np.ones(shape, bool)), q.array.qvalue, 0))
    assert (~blocks).sum() == gone.sum()


@pytest.mark.parametrize(("method", "per"), [("magnitude", "matrix"), ("wanda", "output")])
def test_blocks_of_zeros_stay_and_count(method, per):
    """A block counts as zero only if all of its weights are; single zeros have no score."""
    rng = np.random.default_rng(1)
    w = rng.normal(size=(16, 6)).astype(np.float32)
    w[:8, 0] = w[4:8, 1] = w[0, 2] = 0
    layer = {"attn": {"q": {"kernel": jnp.asarray(w)}}}
    stats = {"attn/q": Moments(jnp.ones(16), jnp.array(1.0))}
    pattern = Pattern.parse("4x1", 0.25)
    new, notes = prune_layer(layer, stats, method=SparseMethod(method, pattern))
    got = np.asarray(new["attn"]["q"]["kernel"])
    zero = in_blocks(got == 0, 4, 1, np.all)
    assert zero.sum() == 6 and zero[:2, 0].all() and zero[1, 1] and not np.any((w == 0) & (got != 0))
    assert per == "matrix" or (zero.sum(axis=0) <= [2, 1, 1, 1, 1, 1]).all()
    assert notes["attn/q"]["zeros"] == 4 * 6 + (got[0, 2] == 0 and not zero[0, 2])
    assert sparsity({"decoder": {"blocks": {"q": {"kernel": got[None]}}}}, pattern) == 0.25


def test_blocks_that_do_not_divide_or_round_to_none():
    params = {"decoder": {"blocks": {"attn": {"q": {"kernel": jnp.ones((2, 8, 6))}}}}}
    check(params, SparseMethod("magnitude", Pattern.parse("4x2", 0.5)))
    with pytest.raises(RequestError, match=r"4x4 does not divide the 8 inputs and 6 outputs of decoder/blocks/attn/q/"):
        check(params, SparseMethod("magnitude", Pattern.parse("4x4", 0.5)))
    with pytest.raises(RequestError, match=r"sparsity 0.2 rounds to no block of 2; say at least 0.5"):
        check(params, SparseMethod("wanda", Pattern.parse("4x2", 0.2)))
    for text in ("1x1", "0x4", "4x", "axb", "4x4x4", "-1x4"):
        with pytest.raises(RequestError, match='such as "128x1"'):
            Pattern.parse(text, 0.5)
    with pytest.raises(RequestError, match="outside"):
        Pattern.parse("4x1", 1.0)


def test_one_threshold_for_all_matrices():
    """As many weights go as round(sparsity * all), those with the lowest scores of the model; zeros stay and count."""
    rng = np.random.default_rng(2)
    blocks = {n: rng.normal(size=(3, 8, o)).astype(np.float32) * s for n, o, s in (("q", 6, 1.0), ("up", 4, 2.0))}
    blocks["up"][1, :, 0] = 0
    params = {"decoder": {"blocks": {n: {"kernel": jnp.asarray(a)} for n, a in blocks.items()}}}
    for text, (rows, columns) in (("unstructured", (1, 1)), ("4x2", (4, 2))):
        method = SparseMethod("magnitude", Pattern.parse(text, 0.4), allocation=Allocation("global"))
        counts = global_threshold.counts(lambda method=method: scored(params, method), 0.4)
        new = prune_uncalibrated(params, method="magnitude", pattern=method.pattern, counts=counts)["decoder"]["blocks"]
        scores = {n: np.stack([in_blocks(np.abs(w), rows, columns, np.sum) for w in a]) for n, a in blocks.items()}
        every = np.sort(np.concatenate([s.ravel() for s in scores.values()]))
        last = every[round(0.4 * every.size) - 1]
        for n, a in blocks.items():
            expected = np.kron(scores[n] > last, np.ones((1, rows, columns), bool)) * a
            np.testing.assert_array_equal(new[n]["kernel"], expected)
        assert sum(sum(c.values()) for c in counts.values()) == round(0.4 * every.size)


@pytest.mark.parametrize("sparsity", [0.01, 0.3, 0.5, 0.999])
def test_the_threshold_is_exact_with_ties_and_infinities(sparsity):
    rng = np.random.default_rng(0)
    decimals = 1 if sparsity == 0.5 else 6
    places = [(("decoder", i), m) for i in (0, 1) for m in "ab"]
    found = [(*at, rng.normal(size=(13, 7)).round(decimals).astype(np.float32)) for at in places]
    found[1][2][:3] = -np.inf
    got = [n for one in global_threshold.counts(lambda: found, sparsity).values() for n in one.values()]
    order = np.argsort(np.concatenate([s.ravel() for _, _, s in found]), kind="stable")
    lowest = order[: round(sparsity * 4 * 91)]
    assert got == np.bincount(lowest // 91, minlength=4).tolist()
