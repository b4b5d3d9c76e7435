"""The table of latencies, with a clock that computes times from sizes: the predictions are the clock's times."""

import numpy as np
import pytest

from llmctl.compress.calibration.measurements import Measurements
from llmctl.compress.structured_pruning import budget, latency, latency_table, layer_timing
from llmctl.compress.structured_pruning.search_space import Space, with_sizes
from llmctl.config.errors import RequestError
from llmctl.model import functional
from llmctl.model.config import ModelConfig

SIZES = {"vocab_size": 24, "layers": 6, "kv_heads": 4, "head_dim": 4, "d_model": 16, "d_ff": 40, "max_seq_len": 64}
FAMILIES = {
    "llama": {"heads": 8, "family": "llama"},
    "bert": {"heads": 4, "family": "bert"},
    "t5": {"heads": 4, "family": "t5", "encoder_layers": 4},
}


def clock(cfg, phase="decode", *, crooked=False):
    """Return made-up seconds: layers, embeddings and a start; with `crooked`, not linear in the neurons."""
    width = 3 * cfg.heads + 2 * cfg.kv_heads + cfg.d_ff + (cfg.d_ff**2 / 40 if crooked else 0)
    layers = cfg.layers + (5 * cfg.encoder_layers if phase == "prefill" else 0)
    return 1e-6 * (7 + cfg.d_model * (cfg.vocab_size + layers * width))


@pytest.fixture
def timed(monkeypatch):
    """Replace the clock, and return the sizes of all models that were timed."""
    seen = []

    def runner(cfg, copies, timing, dtype, tokens):
        seen.append((cfg, len(copies), tokens))
        return lambda: [clock(cfg, timing.phase) * (1.5 if cfg.layers == 6 else 1.0)] * len(copies)

    monkeypatch.setattr(latency, "runner", runner)
    monkeypatch.setattr(latency_table, "FRACTIONS", (1, 1 / 2))
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_predictions_are_sums_of_layers_and_the_fixed_part(family, timed, tmp_path, monkeypatch):
    """The unpruned model takes 1.5 times the sum, so every prediction is multiplied by 1.5.

    The layers stand for those of a model that no cache holds, so copies of them run in turn.
    """
    monkeypatch.setattr(layer_timing, "CACHED", 0)
    cfg = ModelConfig.model_validate({**SIZES, **FAMILIES[family]})
    phase = "decode" if family == "llama" else "prefill"
    space = Space(cfg, hidden=[16, 4], heads=[4, 1], queries=[2, 1] if family == "llama" else [1])
    timing, saved = latency.timing(cfg, phase, 2, 32), Measurements(tmp_path)
    args = cfg, functional.abstract(cfg), 20, space, timing, "float32", saved
    table, parent = latency_table.measure(*args)
    assert parent == pytest.approx(1.5e6 * clock(cfg, phase)) and table.factor == pytest.approx(1.5)
    rows = {"vocab_size": 20}
    for sizes in ({"layers": 6, "heads": 4, "ffn": 40, "hidden": 16}, {"layers": 1, "heads": 1, "ffn": 1, "hidden": 4},
                  {"layers": 3, "heads": 3, "ffn": 23, "hidden": 11}):  # fmt: skip
        for queries in space.queries:
            model = with_sizes(cfg, **sizes, queries=queries)
            want = 1.5e6 * clock(model.model_copy(update=rows), phase)
            assert table(model) == pytest.approx(want, rel=1e-6), sizes
    copies = {(m.layers, m.encoder_layers): n for m, n, _ in timed if m.vocab_size == layer_timing.TOKENS}
    assert copies == ({(1, 1): 6, (4, 1): 4, (1, 4): 6} if family == "t5" else {(1, 0): 6, (4, 0): 2})
    del timed[:]
    assert latency_table.measure(*args)[0](model) == table(model) and not timed  # an interrupted run measures nothing


def test_a_budget_of_latency_is_filled_with_neurons(timed):
    """The number of neurons is the largest that meets the limit, also where the latency is not linear in it."""
    cfg = ModelConfig.model_validate({**SIZES, **FAMILIES["llama"], "d_ff": 1000})
    for multiple in (1, 7, 2000):
        space = Space(cfg, multiple)
        step = min(multiple, 1000)
        for wanted in np.geomspace(0.3, 1.5, 7) * 1e6 * clock(cfg, crooked=True):
            found = space.filled(6, 4, 16, 2, wanted, lambda m: 1e6 * clock(m, crooked=True))
            each = {n: clock(cfg.model_copy(update={"d_ff": n}), crooked=True) for n in range(step, 1001, step)}
            fits = [n for n, seconds in each.items() if 1e6 * seconds <= wanted]
            assert (found.d_ff if found else None) == (max(fits) if fits else None)
    table, parent = latency_table.measure(
        cfg, functional.abstract(cfg), 24, Space(cfg, hidden=[16], heads=[4]), latency.Timing("decode"), "float32",
        Measurements(None),
    )  # fmt: skip
    smallest = "15 µs is less than one head, neuron and layer allow, which is 1,379 µs"
    with pytest.raises(RequestError, match=f"budget.latency: {smallest}"):
        budget.limit(Space(cfg, hidden=[16], heads=[4]), ("latency", 15 / parent), table, parent)


def test_latencies_never_fall_with_a_size():
    grid = latency_table.Grid([8, 16], [1, 2], [1], [4, 8, 12])
    layers = np.array([[[5.0, 4.0, 9.0], [4.0, 8.0, 8.5]], [[6.0, 1.0, 7.0], [9.0, 9.5, 6.0]]])[None, :, :, None]
    rising = latency_table._rising
    table = latency_table.LatencyTable(grid, rising(np.array([3.0, 2.0]), 1), rising(layers, 4), ("decoder",))
    cfg = ModelConfig.model_validate({**SIZES, **FAMILIES["llama"], "heads": 2, "kv_heads": 2, "layers": 2})
    at = {(d, g, f): table(cfg.model_copy(update={"d_model": d, "kv_heads": g, "heads": g, "d_ff": f}))
          for d in (8, 12, 16) for g in (1, 2) for f in (4, 6, 12)}  # fmt: skip
    assert at[8, 2, 12] == 3 + 2 * 9 and at[8, 2, 6] == 3 + 2 * 6.5 and at[16, 1, 4] == 3 + 2 * 6
    for (d, g, f), value in at.items():
        assert all(value <= other for (e, h, n), other in at.items() if e >= d and h >= g and n >= f)


def test_what_is_timed_fits_the_model():
    cfg = ModelConfig.model_validate({**SIZES, **FAMILIES["llama"]})
    assert latency.timing(cfg, "decode", 2, 64) == latency.Timing("decode", 2, 64 - latency.NEW - 1)
    bert = ModelConfig.model_validate({**SIZES, **FAMILIES["bert"]})
    assert latency.timing(bert, "prefill", 1, 64).context == 64
    with pytest.raises(RequestError, match=r"does not generate text; set budget\.latency_of = 'prefill'"):
        latency.timing(bert, "decode", 1, 64)
    with pytest.raises(ValueError, match=r"batch_size, context: for budget\.latency"):
        budget.BudgetConfig(parameters=0.5, batch_size=2, context=8)


def test_a_model_that_a_cache_holds_generates_several_tokens_per_call(timed, tmp_path):
    """The start of a call takes longer than a small layer, so one token per call would measure the start."""
    cfg = ModelConfig.model_validate({**SIZES, **FAMILIES["llama"]})
    space = Space(cfg, hidden=[16], heads=[4], queries=[2])
    timing = latency.timing(cfg, "decode", 2, 32)
    latency_table.measure(cfg, functional.abstract(cfg), 20, space, timing, "float32", Measurements(tmp_path))
    assert {(copies, tokens) for _, copies, tokens in timed} == {(1, latency.NEW)}
