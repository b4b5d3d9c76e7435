"""A budget: sizes against counts of parameters, estimates by hand, and the search against uniform ratios."""

import jax
import numpy as np
import optax
import pytest
import qwix

from llmctl.compress.calibration.calibration_loss import loss_program
from llmctl.compress.structured_pruning import budget, budget_scan, channel_choice, stored_bytes, structured
from llmctl.compress.structured_pruning.budget_scan import Scan
from llmctl.compress.structured_pruning.search_space import Space, with_sizes
from llmctl.compress.structured_pruning.shrink import drop_layers
from llmctl.compress.structured_pruning.structured_method import StructuredMethod
from llmctl.config.errors import RequestError
from llmctl.evaluate.tasks.registry import default
from llmctl.model import flops, functional, weights
from llmctl.model.array_bytes import bytes_of
from llmctl.model.config import ModelConfig

BIG = ModelConfig(preset="smollm2-135m")
COUNT = budget.size_of("parameters", 512)
SPACE = Space(BIG)


@pytest.mark.parametrize(("kind", "amount"), [("parameters", 0.5), ("parameters", 60e6), ("flops", 0.4)])
def test_candidates_meet_the_budget_and_none_is_larger(kind, amount):
    size = budget.size_of(kind, 512)
    wanted = budget.limit(SPACE, (kind, amount), size)
    found = budget.candidates(SPACE, wanted, size, {})
    assert len(found) > 100
    for c in found[:: len(found) // 20]:
        assert 0.99 * wanted <= c.size <= wanted and c.size == size(c.model)
        ModelConfig.model_validate(c.model.model_dump())
    even = SPACE.uniform(wanted, size)
    assert 0.99 * wanted <= size(even) <= wanted
    assert even.heads == 3 * even.kv_heads


def test_uniform_ratios_keep_about_the_same_of_everything():
    wanted = budget.limit(SPACE, ("parameters", 0.5), COUNT)
    even = SPACE.uniform(wanted, COUNT)
    shares = [getattr(even, f) / getattr(BIG, f) for f in ("layers", "d_ff", "d_model")]
    assert max(shares) - min(shares) < 0.15


def test_estimates_are_interpolated_and_never_fall():
    cfg = BIG.model_copy(update={"layers": 8, "kv_heads": 2, "heads": 2, "d_ff": 100, "d_model": 64})
    curves = {"layers": {6: 0.2, 4: 0.1, 2: 1.0}, "ffn": {50: 0.4}}
    for update, want in (
        ({}, 0.0), ({"layers": 7}, 0.1), ({"layers": 4}, 0.2), ({"layers": 3}, 0.6), ({"d_ff": 75}, 0.2),
        ({"layers": 7, "d_ff": 50}, 0.5), ({"d_model": 8}, 0.0),
    ):  # fmt: skip
        assert budget.estimate(cfg, cfg.model_copy(update=update), curves) == pytest.approx(want)


def test_budgets_that_cannot_be():
    least = COUNT(with_sizes(BIG, layers=1, heads=1, ffn=1, hidden=144))
    for asked, message in (
        (("parameters", 10.0), f"is less than one head, neuron and layer allow, which is {least:,.0f}"),
        (("parameters", 1e12), "but the artifact has only .*; nothing to remove"),
        (("flops", 0.0001), "budget.flops: .* is less than one head"),
    ):
        with pytest.raises(RequestError, match=message):
            budget.limit(SPACE, asked, budget.size_of(asked[0], 512))
    with pytest.raises(ValueError, match="parameters and flops: say one"):
        budget.BudgetConfig(parameters=0.5, flops=0.5)


@pytest.mark.parametrize("multiple", [100, 128])
def test_hidden_widths_are_multiples(multiple):
    """Neither number divides the present width, 576."""
    space = Space(BIG, multiple)
    wanted = budget.limit(space, ("parameters", 0.3), COUNT)
    widths = {c.model.d_model for c in budget.candidates(space, wanted, COUNT, {})} - {BIG.d_model}
    assert widths and all(n % multiple == 0 for n in widths)
    assert all(n % multiple == 0 for n in space.points()["hidden"])


def test_a_budget_below_one_multiple_of_neurons_is_refused_before_anything_is_measured():
    """With 1,000 neurons the smallest model is larger than the budget, which one neuron would meet."""
    asked, coarse = ("parameters", 0.056), Space(BIG, 1000)
    least = COUNT(with_sizes(BIG, layers=1, heads=1, ffn=1000, hidden=576))
    assert budget.limit(SPACE, asked, COUNT) < least
    with pytest.raises(RequestError, match=f"one head, 1,000 neurons and one layer allow, which is {least:,.0f}"):
        budget.limit(coarse, asked, COUNT)
    wanted = budget.limit(coarse, ("parameters", float(least)), COUNT)
    assert [c.model.d_ff for c in budget.candidates(coarse, wanted, COUNT, {})] == [1000]


def test_a_space_is_restricted_to_what_can_be_made():
    def check(model):
        if model.kv_heads % 3 or model.d_ff % 6 or model.d_model != BIG.d_model:
            raise RequestError("no")

    space = Space(BIG, 2).restricted(check, tries=4)
    assert (space.heads, space.hidden, space.multiple, len(space.layers)) == ([3], [576], 6, 30)
    with pytest.raises(RequestError, match="no"):
        Space(BIG, 2).restricted(check, tries=2)
    assert Space(BIG).restricted(lambda model: None, each=False) == SPACE


def test_query_heads_go_within_groups_or_with_them():
    """SmolLM2 has 3 groups of 3 query heads; the estimates of both kinds are added, and every group keeps the same."""
    wanted = budget.limit(SPACE, ("parameters", 0.5), COUNT)
    within, both = Space(BIG, heads=[3], queries=[3, 2, 1]), Space(BIG, queries=[3, 2, 1])
    shapes = {}
    for name, space in (("groups", SPACE), ("queries", within), ("both", both)):
        found = budget.candidates(space, wanted, COUNT, {})
        shapes[name] = {(c.model.heads, c.model.kv_heads) for c in found}
        assert all(0.99 * wanted <= c.size <= wanted for c in found)
        assert ("queries" in space.points()) == (name != "groups")
    assert shapes["groups"] <= {(9, 3), (6, 2), (3, 1)} and shapes["queries"] <= {(9, 3), (6, 3), (3, 3)}
    assert shapes["groups"] | shapes["queries"] < shapes["both"] and (2, 1) in shapes["both"]
    model = with_sizes(BIG, layers=30, heads=2, ffn=1536, hidden=576, queries=1)
    curves = {"heads": {2: 0.5, 1: 1.0}, "queries": {1: 0.25}}
    assert budget.estimate(BIG, model, curves) == pytest.approx(0.75)
    assert within.uniform(wanted, COUNT).kv_heads == 3


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_bytes_are_those_of_the_arrays(family):
    """Integers, scales, tables and norms of another dtype follow the sizes, as arrays of the smaller config do."""
    cfg = ModelConfig.model_validate({
        "family": family, "vocab_size": 16, "d_model": 16, "layers": 3, "heads": 8 if family == "llama" else 4,
        "kv_heads": 4, "head_dim": 4, "d_ff": 24, "max_seq_len": 8,
        "encoder_layers": 2 if family == "t5" else 0,
    })  # fmt: skip

    def stored(model):
        """Return abstract parameters: int8 matrices with a scale per output, everything else in bfloat16."""
        flat = {p: a.update(dtype="bfloat16") for p, a in weights.flatten(functional.abstract(model)).items()}
        for m in weights.matrices(weights.unflatten(flat), "block"):
            scale = m.weight.update(shape=(m.weight.shape[0], 1, m.weight.shape[2]))
            array = qwix.QArray(m.weight.update(dtype="int8"), scale, qtype="int8")
            flat[m.path] = weights.Quantized(array)
        return weights.unflatten(flat)

    count = stored_bytes.counter(cfg, stored(cfg))
    for sizes in (
        {},
        {"layers": 2},
        {"heads": 1},
        {"heads": 2, "queries": 1},
        {"ffn": 7},
        {"hidden": 10},
        {"layers": 1, "heads": 3, "hidden": 8},
    ):
        model = with_sizes(cfg, **{"layers": 3, "heads": 4, "ffn": 24, "hidden": 16} | sizes)
        assert count(model) == bytes_of(stored(model)), sizes


def test_the_measured_loss_of_fewer_layers_is_that_of_the_pruned_post_norm_model():
    """A removed layer's norms must not act, so the norms differ from the identity here."""
    cfg = ModelConfig.model_validate({
        "family": "bert", "vocab_size": 16, "d_model": 8, "layers": 2, "heads": 2, "kv_heads": 2, "head_dim": 4,
        "d_ff": 8, "max_seq_len": 8,
    })  # fmt: skip
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda a: a + rng.normal(0, 0.5, a.shape).astype(np.float32), functional.init(cfg, jax.random.key(0))
    )
    tokens, ones = rng.integers(0, 16, (2, 8), dtype=np.int32), np.ones((2, 8), np.int32)
    places = np.tile(np.arange(8, dtype=np.int32), (2, 1))
    batch = {"tokens": tokens, "segments": ones, "positions": places, "types": 0 * ones, "targets": tokens}
    batch["weights"] = ones.astype(np.float32)
    task = default(cfg)
    scan = budget_scan.measure(Scan(cfg, params, [batch], task, "float32"), StructuredMethod("magnitude"))
    target = with_sizes(cfg, layers=1, heads=2, ffn=8, hidden=8)
    model, new = drop_layers(cfg, params, structured.kept_layers(cfg, target, scan.influence))
    total, weight = np.asarray(loss_program(task, model, "float32")(new, batch))
    assert scan.loss(target) == pytest.approx(total / weight, rel=1e-5)


@pytest.mark.slow
def test_a_searched_budget_beats_uniform_ratios():
    """A small model learns to copy a token seen two places before; its layers and heads matter unevenly."""
    cfg = ModelConfig.model_validate({
        "family": "llama", "vocab_size": 16, "d_model": 16, "layers": 4, "heads": 4, "kv_heads": 4, "head_dim": 4,
        "d_ff": 32,
    })  # fmt: skip
    rng = np.random.default_rng(0)

    def batch(rows):
        tokens = rng.integers(0, 16, (rows, 16), dtype=np.int32)
        ones = np.ones_like(tokens)
        weights = (np.arange(16) >= 2) * ones.astype(np.float32)
        positions = np.tile(np.arange(16, dtype=np.int32), (rows, 1))
        targets = np.roll(tokens, 2, 1)
        return {"tokens": tokens, "segments": ones, "positions": positions, "targets": targets, "weights": weights}

    task = default(cfg)
    params = jax.jit(lambda key: functional.init(cfg, key))(jax.random.key(0))
    optimizer, loss = optax.adam(5e-3), task.loss_of(cfg)

    @jax.jit
    def train(params, state, batch):
        def mean(p):
            total, found = loss(p, batch)
            return total / found["weight"]

        value, grads = jax.value_and_grad(mean)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state, value = optimizer.init(params), 0.0
    for _ in range(400):
        params, state, value = train(params, state, batch(32))
    assert value < 0.5, value
    batches = [batch(16) for _ in range(2)]
    space = Space(cfg)
    wanted = budget.limit(space, ("parameters", 0.5), COUNT)
    scan = budget_scan.measure(Scan(cfg, params, batches, task, "float32"), StructuredMethod("activation"))
    found, curves = budget_scan.choose(scan, space, wanted, COUNT)
    assert set(curves) == {"layers", "heads", "ffn", "hidden"} and 0.99 * wanted <= found[0].size <= wanted
    assert [c.measured for c in found] == sorted(c.measured for c in found)

    def pruned(target):
        """Return the loss of the model that is pruned by the importance that the search measured."""
        kept = structured.kept_layers(cfg, target, scan.influence)
        known = {"decoder": [scan.scores["decoder"][i] for i in kept["decoder"]]}
        model, new = drop_layers(cfg, jax.tree.map(jax.numpy.copy, params), kept)
        method = StructuredMethod("activation")
        if model.d_model != target.d_model:
            width, known_D = target.d_model, scan.channels_D
            model, new, _ = channel_choice.prune_channels(model, new, batches, width, method, known_D=known_D)
        if structured.narrower(model, target):
            model, new, _ = structured.prune_widths(model, new, batches, target, method=method, known=known)
        assert flops.parameters(model)["total"] == sum(a.size for a in jax.tree.leaves(new))
        held = np.array([np.asarray(loss_program(task, model, "float32")(new, b)) for b in batches])
        return float(held[:, 0].sum() / held[:, 1].sum())

    base, even = scan.loss(cfg), space.uniform(wanted, COUNT)
    assert pruned(found[0].model) == pytest.approx(base + found[0].measured, rel=1e-4)
    assert found[0].measured < next(c.measured for c in found if c.model == even) - 0.1
