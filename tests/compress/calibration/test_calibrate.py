"""The walk equals the scanned model, counts real tokens only, and lets errors through."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmctl.compress.calibration import calibrate, walk_state
from llmctl.compress.calibration.calibrate import Visit, walk
from llmctl.compress.calibration.layer_files import Saved
from llmctl.compress.calibration.layer_stack import LayerStack
from llmctl.compress.calibration.measurements import Measurements
from llmctl.compress.calibration.statistics import Gram, LayerStats, Moments, grams, moments, nothing
from llmctl.compress.calibration.walk_state import WalkState
from llmctl.compress.pruning.pattern import Pattern
from llmctl.compress.pruning.prune import prune_layer
from llmctl.compress.pruning.sparse_method import SparseMethod
from llmctl.compress.quantization.quantize import quantize
from llmctl.compress.quantization.schemes import SCHEMES
from llmctl.config.errors import RequestError
from llmctl.model import functional, task_head
from llmctl.model.config import ModelConfig
from llmctl.model.weights import flatten, unflatten


def test_moments_count_real_tokens_only():
    x = jnp.array([[1.0, -2.0], [3.0, 0.5], [100.0, 100.0]])
    got = Moments.start(2).fold(x, jnp.array([True, True, False]))
    np.testing.assert_allclose(got.squares, [10.0, 4.25])
    assert got.count == 2


def test_gram_by_hand():
    x = jnp.array([[1.0, 2.0, 3.0, 4.0], [9.0, 9.0, 9.0, 9.0], [0.0, 1.0, -1.0, 0.0]])
    got = Gram.start(4, blocks=2).fold(x, jnp.array([True, False, True]))
    np.testing.assert_allclose(got.products, [[[1, 2], [2, 5]], [[10, 12], [12, 16]]])


def test_measuring_equals_the_scan(tiny, params, batches):
    """Statistics of the last layer, recomputed from the scanned model's own forward pass with fewer layers."""
    same, reports = walk(tiny, params, batches, moments, keep=True)
    assert same is params
    assert [(r.stack, r.layer) for r in reports] == [("decoder", 0), ("decoder", 1), ("decoder", 2)]
    assert sorted(reports[0].stats) == [*sorted(f"attn/{n}" for n in "qkvo"), "mlp/down", "mlp/gate", "mlp/up"]
    # The last layer's attention reads the normed output of the first two, which the scan computes as a two-layer model.
    two = tiny.model_copy(update={"layers": 2})
    blocks = jax.tree.map(lambda x: x[:2], params["decoder"]["blocks"])
    scale = params["decoder"]["blocks"]["attn_norm"]["scale"][2]
    front = {**params, "decoder": {"blocks": blocks, "norm": {"scale": scale}}}
    squares = 0.0
    for batch in batches:
        x_BTD = jax.jit(partial(functional.hidden, two))(front, batch)
        squares += jnp.sum(jnp.square(jnp.where(batch["segments"][..., None] > 0, x_BTD, 0.0)), axis=(0, 1))
    np.testing.assert_allclose(reports[2].stats["attn/q"].squares, squares, rtol=1e-5)
    assert reports[2].stats["attn/q"].count == sum((b["segments"] > 0).sum() for b in batches)


def test_changes_propagate_and_reports_say_how_far(tiny, params, batches):
    """Silencing both sublayers of layer 0 makes layer 1 see the embeddings, and its report say error 1."""

    def silence_first(visit):
        layer = visit.layer
        if visit.index:
            return layer
        attn, mlp = layer["attn"], layer["mlp"]
        return {
            **layer,
            "attn": {**attn, "o": jax.tree.map(jnp.zeros_like, attn["o"])},
            "mlp": {**mlp, "down": jax.tree.map(jnp.zeros_like, mlp["down"])},
        }

    kept = flatten(jax.tree.map(np.array, params))
    blocks = jax.tree.map(lambda x: x[1:], params["decoder"]["blocks"])
    tail = {**params, "decoder": {**params["decoder"], "blocks": blocks}}
    changed, reports = walk(tiny, params, batches, moments, silence_first, keep=True)
    assert reports[0].error == pytest.approx(1.0, rel=1e-5)
    assert reports[1].error == reports[2].error == 0.0
    _, direct = walk(tiny.model_copy(update={"layers": 2}), tail, batches, moments, keep=True)
    np.testing.assert_allclose(reports[1].stats["mlp/down"].squares, direct[0].stats["mlp/down"].squares, rtol=1e-5)
    np.testing.assert_allclose(reports[2].influence, direct[1].influence, rtol=1e-4)
    for path, w in flatten(changed).items():
        assert w.shape == kept[path].shape
        if not path.endswith(("o/kernel", "down/kernel")):
            np.testing.assert_array_equal(w, kept[path])


def test_changed_layers_take_the_place_of_the_unchanged(tiny, batches):
    """Of 24 layers no second set is ever there; integers and their scales are put back like floats."""
    deep = tiny.model_copy(update={"layers": 24})
    floats = jax.jit(lambda key: functional.init(deep, key))(jax.random.key(0))
    params = jax.tree.map(jnp.copy, quantize(floats, scheme="int4", group=8)[0])
    kept, blocks = flatten(jax.tree.map(np.array, params)), jax.tree.leaves(params["decoder"]["blocks"])
    before, most = sum(a.nbytes for a in jax.live_arrays()), 0

    def progress(report):
        nonlocal most
        most = max(most, sum(a.nbytes for a in jax.live_arrays()) - before)

    def prune_one(visit):
        method = SparseMethod("magnitude", Pattern(0.5))
        return prune_layer(visit.layer, method=method)[0] if visit.index == 3 else visit.layer

    changed, reports = walk(deep, params, batches, nothing, prune_one, progress=progress)
    assert all(a.is_deleted() for a in blocks)
    assert most < sum(a.nbytes for a in jax.tree.leaves(changed)) / 2
    assert [bool(r.error) for r in reports] == [i == 3 for i in range(24)]
    for path, w in flatten(changed).items():
        same = jax.tree.map(lambda a, b: np.all((np.asarray(a) == b).reshape(len(a), -1), axis=1), w, kept[path])
        expected = np.arange(24) != 3 if path.endswith("kernel") else True
        np.testing.assert_array_equal(jax.tree.leaves(same)[0], expected)


def test_matrices_with_one_input_share_its_statistic(tiny, params, batches):
    """Queries, keys and values read one input, gate and up another; a statistic of another shape is separate."""

    def collect(path, inputs):
        return None if path == "attn/k" else Gram.start(inputs, blocks=2 if path == "attn/v" else 1)

    stats = walk(tiny, params, batches, collect, keep=True)[1][0].stats
    assert isinstance(stats, LayerStats)
    assert stats["mlp/gate"] is stats["mlp/up"]
    assert stats["attn/q"] is not stats["attn/v"]
    assert sorted(stats) == ["attn/o", "attn/q", "attn/v", "mlp/down", "mlp/gate", "mlp/up"]
    assert sorted(stats.without("mlp/up")) == ["attn/o", "attn/q", "attn/v", "mlp/down"]
    assert len(stats.without("attn/k")) == 5
    blocks = [stats["attn/q"].products[0, half, half] for half in (slice(8), slice(8, 16))]
    np.testing.assert_allclose(stats["attn/v"].products, blocks, rtol=1e-5)


def test_memory_holds_the_gram_matrices_of_one_layer(tiny, params, batches):
    """Between batches, in the method and after a changed layer no other set is alive."""
    found, whole = {}, sum(4 * inputs**2 for inputs in (16, 16, 16, 24))  # of q, k, v; o; gate, up; down
    others = jax.live_arrays()  # of other tests; held, so that no new array gets the identity of one

    def look(where):
        new = [a for a in jax.live_arrays() if not any(a is other for other in others)]
        sets = sum(a.nbytes for a in new if a.ndim == 3 and a.shape[0] == 1 and a.shape[1] == a.shape[2])
        found[where] = max(found.get(where, 0.0), sets / whole)

    class Watched(list):
        def __iter__(self):
            for batch in super().__iter__():
                look("batch")
                yield batch

    def change(visit):
        look("method")
        return visit.layer

    walk(tiny, params, Watched(batches), grams, change, progress=lambda report: look("report"))
    assert found == {"batch": 1.0, "method": 1.0, "report": 0.0}


def test_a_type_that_changed_in_some_layers_alone_is_refused():
    blocks = {"up": {"kernel": jnp.arange(24.0).reshape(3, 4, 2)}}
    stack = LayerStack(blocks)
    for i in (0, 2, 2):  # a layer that is put twice counts once
        stack.put(i, {"up": {"kernel": blocks["up"]["kernel"][i].astype(jnp.bfloat16)}})
    with pytest.raises(ValueError, match=r"2 of 3 layers changed the type of \['up/kernel'\]"):
        stack.finish()
    stack.put(1, {"up": {"kernel": blocks["up"]["kernel"][1].astype(jnp.bfloat16)}})
    got = stack.finish()["up"]["kernel"]
    assert got.dtype == jnp.bfloat16 and got.tolist() == np.arange(24.0).reshape(3, 4, 2).tolist()


def test_influence_of_a_silent_layer_is_zero(tiny, params, batches):
    blocks = params["decoder"]["blocks"]
    quiet = {
        **blocks,
        "attn": {**blocks["attn"], "o": {"kernel": blocks["attn"]["o"]["kernel"].at[1].set(0)}},
        "mlp": {**blocks["mlp"], "down": {"kernel": blocks["mlp"]["down"]["kernel"].at[1].set(0)}},
    }
    _, reports = walk(tiny, {**params, "decoder": {**params["decoder"], "blocks": quiet}}, batches, nothing)
    assert reports[1].influence == pytest.approx(0.0, abs=1e-6)
    assert reports[0].influence > 1e-3


def test_both_stacks_of_an_encoder_decoder_are_walked(tiny, make_rows):
    change = {"architecture": "encoder_decoder", "encoder_layers": 2, "layers": 1, "positions": "relative"}
    cfg = ModelConfig.model_validate({**tiny.model_dump(), **change})
    params = jax.jit(lambda key: functional.init(cfg, key))(jax.random.key(1))
    batch = make_rows(cfg, 0)
    batch["encoder_segments"] = np.ones_like(batch["encoder_segments"])
    _, reports = walk(cfg, params, [batch], moments, keep=True)
    assert [(r.stack, r.layer) for r in reports] == [("encoder", 0), ("encoder", 1), ("decoder", 0)]
    stats = reports[2].stats
    # Cross-attention's keys read the encoder's tokens (all real here), its queries the decoder's.
    assert stats["cross/k"].count == 32
    assert stats["cross/q"].count == 28


def test_no_tokens_is_refused(tiny, params):
    empty = {k: np.zeros((1, 4), np.int32) for k in ("tokens", "segments", "positions")}
    with pytest.raises(RequestError, match="no tokens"):
        walk(tiny, params, [empty], moments)


def rounded(visit: Visit) -> dict:
    """Every matrix as integers; the rest stays."""
    flat = flatten(visit.layer)
    for path in (p for p in flat if p.endswith("/kernel")):
        flat[path] = SCHEMES["int8"](flat[path], -2, 0)
    return unflatten(flat)


def test_a_method_may_leave_other_node_types(tiny, params, batches):
    """Matrices that become integers layer by layer are those of the whole tree's rounding; norms keep their memory."""
    whole = flatten(jax.tree.map(jnp.copy, quantize(params, scheme="int8")[0]["decoder"]["blocks"]))
    norm = params["decoder"]["blocks"]["mlp_norm"]["scale"]
    changed, reports = walk(tiny, params, batches, nothing, rounded)
    assert all(0 < r.error < 0.1 for r in reports) and norm.is_deleted()
    got = flatten(changed["decoder"]["blocks"])
    assert jax.tree.structure(got) == jax.tree.structure(whole)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(a, b)


def test_layers_that_end_with_different_types_are_refused(tiny, params, batches):
    with pytest.raises(ValueError, match="layers change different weights"):
        walk(tiny, params, batches, nothing, lambda visit: rounded(visit) if visit.index else visit.layer)


class Killed(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize("stack", ["decoder", "encoder"])
def test_a_killed_walk_goes_on_at_its_layer(tiny, make_rows, tmp_path, stack):
    """Killed in a layer of either stack and run again, the walk visits the rest only, and every bit is the same."""
    change = {"architecture": "encoder_decoder", "encoder_layers": 2, "layers": 3, "positions": "relative"}
    cfg = ModelConfig.model_validate({**tiny.model_dump(), **change})
    params = jax.jit(lambda key: functional.init(cfg, key))(jax.random.key(1))
    batches, visited = [make_rows(cfg, seed) for seed in range(2)], []

    def method(visit, kill=False):
        if kill and (visit.stack, visit.index) == (stack, 1):
            raise Killed
        visited.append((visit.stack, visit.index))
        pruned = prune_layer(visit.layer, visit.stats, method=SparseMethod("wanda", Pattern(0.5)))[0]
        return rounded(replace(visit, layer=pruned))

    def run(kill=False, saved=None):
        own = jax.tree.map(jnp.copy, params)
        return walk(cfg, own, batches, moments, partial(method, kill=kill), saved=saved)

    whole, reports = run()
    saved = Saved(tmp_path / "layers")
    with pytest.raises(Killed):
        run(kill=True, saved=saved)
    (tmp_path / "layers" / "decoder.00002.draft").write_bytes(b"half a layer")
    visited.clear()
    again, repeated = run(saved=saved)
    layers = [("encoder", 0), ("encoder", 1), ("decoder", 0), ("decoder", 1), ("decoder", 2)]
    assert visited == layers[layers.index((stack, 1)) :]
    assert repeated == reports
    assert jax.tree.structure(again) == jax.tree.structure(whole)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("stack", "dtype"), [("decoder", jnp.bfloat16), ("encoder", jnp.float32)])
def test_a_killed_walk_that_only_measures_goes_on_at_its_layer(tiny, make_rows, tmp_path, stack, dtype, monkeypatch):
    """Run again, it measures the layers that are not in the file, and every statistic has the same bits."""
    change = {"architecture": "encoder_decoder", "encoder_layers": 2, "layers": 3, "positions": "relative"}
    cfg = ModelConfig.model_validate({**tiny.model_dump(), **change})
    params = jax.jit(lambda key: functional.init(cfg, key))(jax.random.key(1))
    batches, measured = [make_rows(cfg, seed) for seed in range(2)], []
    passes = calibrate.passes

    def counted(cfg, stack, dtype):
        observe, advance = passes(cfg, stack, dtype)
        return lambda layer, index, *rest: (measured.append((stack, int(index))), observe(layer, index, *rest))[
            1
        ], advance

    monkeypatch.setattr(calibrate, "passes", counted)
    monkeypatch.setattr(walk_state, "SECONDS", 0.0)

    def run(folder, progress=None, batches=batches):
        state = WalkState(Measurements(folder), "inputs")
        return state, walk(cfg, params, batches, moments, keep=True, progress=progress, state=state, dtype=dtype)[1]

    def kill(report):
        if (report.stack, report.layer) == (stack, 1):
            raise Killed

    whole = run(None)[1]
    with pytest.raises(Killed):
        run(tmp_path, kill)
    measured.clear()
    state, again = run(tmp_path)
    layers = [("encoder", 0), ("encoder", 1), ("decoder", 0), ("decoder", 1), ("decoder", 2)]
    assert measured[::2] == layers[layers.index((stack, 1)) + 1 :]
    assert [r.numbers for r in again] == [r.numbers for r in whole]
    for a, b in zip(again, whole, strict=True):
        assert jax.tree.structure(a.stats) == jax.tree.structure(b.stats)
        for x, y in zip(jax.tree.leaves(a.stats), jax.tree.leaves(b.stats), strict=True):
            np.testing.assert_array_equal(x, y)
    joined = [{name: jnp.concatenate([batch[name] for batch in batches]) for name in batches[0]}]
    measured.clear()
    run(tmp_path, batches=joined)  # another mesh may need larger batches
    assert len(measured) == 5
    (tmp_path / "inputs.walk.npz").write_bytes(b"damaged")
    measured.clear()
    run(tmp_path)
    assert len(measured) == 10
    state.drop()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", [{"tied": False}, {"tied": True}, {"head": "classify", "labels": 3}], ids=str)
def test_the_output_head_is_visited(tiny, batches, flags, tmp_path):
    """Its inputs are the final hidden states (or their pooled rows), and a change of it is measured and kept."""
    cfg = ModelConfig.model_validate({**tiny.model_dump(), **flags})
    params = jax.jit(lambda key: functional.init(cfg, key))(jax.random.key(2))

    def halve(visit):
        return jax.tree.map(lambda a: a / 2, visit.layer) if visit.stack == "head" else visit.layer

    own = jax.tree.map(jnp.copy, params)
    changed, reports = walk(cfg, own, batches, moments, halve, head=True, keep=True)
    squares = 0.0
    for batch in batches:
        x_BTD = jax.jit(partial(functional.hidden, cfg))(params, batch)
        real = jnp.asarray(batch["segments"]) > 0
        rows = task_head.pool(x_BTD, batch["segments"], cfg.pooling) if cfg.head == "classify" else x_BTD[real]
        squares += jnp.sum(jnp.square(rows), axis=0)
    path = {"lm": "embed/tokens" if cfg.tied else "lm_head"}.get(cfg.head, "head/out")
    assert list(reports[-1].stats) == [path] and (reports[-1].stack, reports[-1].layer) == ("head", 0)
    np.testing.assert_allclose(reports[-1].stats[path].squares, squares, rtol=1e-4)
    assert reports[-1].error == pytest.approx(0.5 if not (cfg.head == "lm" and cfg.tied) else 0.0, rel=1e-5)
    leaf = {"lm": ("embed", "tokens") if cfg.tied else ("lm_head", "kernel")}.get(cfg.head, ("head", "out", "kernel"))
    before, after = (get(p, leaf) for p in (params, changed))
    np.testing.assert_array_equal(after, before if cfg.head == "lm" and cfg.tied else before / 2)


def get(tree, keys):
    for key in keys:
        tree = tree[key]
    return tree
