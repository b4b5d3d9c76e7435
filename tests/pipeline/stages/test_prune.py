"""The prune stage: what it writes loads, has the shapes or the zeros it claims, and bad requests write nothing."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import ValidationError

from llmctl.artifacts import artifact
from llmctl.artifacts.workspace import Context
from llmctl.cli import app
from llmctl.compress.pruning import allocation, prune, sparsegpt
from llmctl.compress.structured_pruning import budget_scan, latency, latency_table, measured_walk, sizes, structured
from llmctl.config.base import keyed
from llmctl.config.errors import RequestError
from llmctl.config.settings import MeshConfig
from llmctl.data.config import DataConfig
from llmctl.data.tokenizers import loading
from llmctl.distributed import mesh as meshes
from llmctl.model import weights
from llmctl.model.config import ModelConfig
from llmctl.pipeline.stages import prune as stage
from llmctl.pipeline.stages import quantize
from llmctl.train import run_log


def run(artifacts, tmp_path, parent, **settings):
    (tmp_path / "work").mkdir(exist_ok=True, parents=True)
    ctx = Context(tmp_path / "out", tmp_path / "work", "key")
    stage.run(stage.Config(**settings), artifacts / parent, ctx)
    return artifact.load(ctx.out)


def test_structured_pruning_of_a_classifier(artifacts, tmp_path, reviews):
    made = run(artifacts, tmp_path, "classifier", heads=0.5, ffn=0.5, layers=1 / 3, data=reviews, examples=40)
    model, manifest = made.model, made.manifest
    assert (model.layers, model.heads, model.kv_heads, model.d_ff, model.head) == (2, 2, 1, 12, "classify")
    before = artifact.load(artifacts / "classifier")
    assert manifest.parameters == weights.count(made.params) < before.manifest.parameters
    assert manifest.metrics["parameters_before"] == before.manifest.parameters
    assert manifest.labels == ["neg", "pos"]
    assert manifest.parent is not None and manifest.parent.digest == before.manifest.digest
    np.testing.assert_array_equal(made.params["head"]["out"]["kernel"], before.params["head"]["out"]["kernel"])
    kept = manifest.metrics["layers_kept"]["decoder"]
    assert len(kept) == 2 and len(manifest.metrics["layer_error"]["decoder"]) == 2
    norm = made.params["decoder"]["blocks"]["mlp_norm"]["scale"]
    np.testing.assert_array_equal(norm, before.params["decoder"]["blocks"]["mlp_norm"]["scale"][jnp.array(kept)])
    assert (made.path / "log.jsonl").read_text().count("\n") == 3 + 2  # a line a layer of each walk


def test_structured_pruning_reports_layers_sizes_and_times(artifacts, tmp_path, reviews, capsys):
    settings = {"keep_layers": 2, "remove_ffn": 0.5, "latency": True, "plot": True, "data": reviews, "examples": 16}
    made = run(artifacts, tmp_path, "lm", **settings)
    found, base = made.manifest.metrics, artifact.read_manifest(artifacts / "lm")
    before, after = found["sizes"]["before"], found["sizes"]["after"]
    assert (before["parameters"], after["parameters"]) == (base.parameters, made.manifest.parameters)
    assert (before["bytes"], after["bytes"]) == (base.weight_bytes, made.manifest.weight_bytes)
    assert before["flops_per_token"] > after["flops_per_token"] and after["decode_seconds"] > 0
    assert sum(layer["kept"] for layer in found["structured_layers"]) == 2
    assert (made.path / "importance.png").stat().st_size > 1000
    said = capsys.readouterr().err
    assert "removed" in said and "layers after pruning" in said and "flops per token" in said


def test_importance_by_gradients_and_repair(artifacts, tmp_path, reviews):
    """Repair makes the error of the layers smaller, and what is kept and how important it was is in the metrics."""
    settings = {"heads": 0.5, "ffn": 0.5, "data": reviews, "examples": 20, "importance": "taylor", "keep_hidden": 12}
    cut, repaired = (
        run(artifacts, tmp_path / str(repair), "classifier", repair=repair, **settings) for repair in (False, True)
    )
    errors = [made.manifest.metrics["layer_error"]["decoder"] for made in (cut, repaired)]
    assert sum(errors[1]) < sum(errors[0])
    assert len(repaired.manifest.metrics["channels"]["kept"]) == repaired.model.d_model == 12
    units = repaired.manifest.metrics["units"]
    assert [u["kept"]["mlp/neurons"] for u in units] == [
        sorted(np.argsort(-np.array(u["importance"]["mlp/neurons"]), kind="stable")[:12].tolist()) for u in units
    ]


def test_a_budget_is_met_and_its_candidates_are_kept(artifacts, tmp_path, reviews, capsys):
    settings = {"data": reviews, "examples": 20, "importance": "activation", "repair": True, "multiple": 2}
    made = run(artifacts, tmp_path, "lm", budget={"parameters": 0.6}, **settings)
    manifest, before = made.manifest, artifact.read_manifest(artifacts / "lm")
    assert 0.99 * 0.6 * before.parameters <= manifest.parameters <= 0.6 * before.parameters
    found = manifest.metrics["budget"]
    assert found["size"] == manifest.parameters == found["candidates"][0]["size"]
    losses = [c["measured"] for c in found["candidates"]]
    assert losses == sorted(losses) and set(found["losses"]) == {"layers", "heads", "ffn", "hidden"}
    assert "candidates" in capsys.readouterr().err


def test_a_killed_search_measures_nothing_twice(artifacts, tmp_path, reviews, monkeypatch):
    """Killed at a loss, and again at a layer of the pruning, it goes on at both; the log counts every step once."""
    settings = {"data": reviews, "examples": 16, "budget": {"bytes": 0.7}, "repair": True}
    whole = run(artifacts, tmp_path / "whole", "lm", **settings)
    loss, disable, calls = budget_scan.Scan._measured, structured.disable, []

    def kill(name, real, *kills):
        def killed(*args, **how):
            calls.append(name)
            if calls.count(name) in kills:
                raise KeyboardInterrupt
            return real(*args, **how)

        return killed

    monkeypatch.setattr(budget_scan.Scan, "_measured", kill("loss", loss, 12))
    monkeypatch.setattr(structured, "disable", kill("disable", disable, 3))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(artifacts, tmp_path / "killed", "lm", **settings)
        monkeypatch.setattr(measured_walk, "walk", None)  # the importance is not measured again
    made = run(artifacts, tmp_path / "killed", "lm", **settings)
    log = (made.path / "log.jsonl").read_text()
    assert log.count("calibration_loss") == calls.count("loss") - 1
    assert made.manifest.digest == whole.manifest.digest and made.manifest.metrics == whole.manifest.metrics


def test_a_budget_of_latency_is_met_by_the_table(artifacts, tmp_path, reviews, monkeypatch, capsys):
    """The clock counts sizes. A resumed run reads the table; the pruned model then seems 30 % too slow."""
    timed, before = [], artifact.load(artifacts / "lm").model

    def seconds(cfg):
        return 1e-6 * (cfg.vocab_size + cfg.layers * cfg.d_model * (cfg.d_ff + 2 * cfg.heads))

    def runner(cfg, copies, timing, dtype, tokens):
        timed.append(cfg)
        return lambda: [seconds(cfg) * (1.3 if len(timed) == 2 and cfg != before else 1.0)]

    monkeypatch.setattr(latency, "runner", runner)
    monkeypatch.setattr(latency_table, "FRACTIONS", (1,))
    settings = {"data": reviews, "examples": 16, "budget": {"latency": 0.6, "batch_size": 3}}
    with monkeypatch.context() as killed, pytest.raises(ZeroDivisionError):
        killed.setattr(budget_scan, "measure", lambda *args: 1 / 0)
        run(artifacts, tmp_path, "lm", **settings)
    del timed[:]
    found = run(artifacts, tmp_path, "lm", **settings).manifest.metrics["budget"]
    limit, own = 0.6 * 1e6 * seconds(before), found["latency"]
    assert len(timed) == 2  # only the comparison at the end
    assert found["limit"] == pytest.approx(limit) and 0.99 * limit <= found["size"] <= limit
    assert (own["of"], own["batch_size"], own["context"]) == ("decode", 3, 32)
    assert own["predicted_seconds"] == pytest.approx(found["size"] / 1e6) == pytest.approx(seconds(timed[1]))
    assert own["after_seconds"] == pytest.approx(1.3 * own["predicted_seconds"]) and not own["met"]
    said = capsys.readouterr().err
    assert "latency (decode, 3 x 32 tokens):" in said and "warning: latency" in said and "10% above" in said


def test_budgets_of_latency_that_no_model_has(artifacts, tmp_path, reviews):
    for parent, budget, message in (
        ("encoder", {"latency": 0.5}, "set budget.latency_of = 'prefill'"),
        ("lm", {"latency": 0.5, "context": 1000}, "budget.context: 1,000 tokens, but"),
    ):
        with pytest.raises(RequestError, match=message):
            run(artifacts, tmp_path, parent, budget=budget, data=reviews)
        assert not (tmp_path / "out").exists()


def test_the_progress_of_a_search_ends_at_its_total(artifacts, tmp_path, reviews, capsys, monkeypatch):
    monkeypatch.setattr(
        run_log.Reporter.__init__, "__kwdefaults__", {**run_log.Reporter.__init__.__kwdefaults__, "every": 0}
    )
    for number, settings in enumerate(({"budget": {"parameters": 0.6}}, {"remove_layers": 0.3, "remove_hidden": 0.5})):
        made = run(artifacts, tmp_path / str(number), "lm", data=reviews, examples=16, **settings)
        steps = [tuple(map(int, s)) for s in re.findall(r"step (\d+)/(\d+)", capsys.readouterr().err)]
        assert [at for at, _ in steps] == list(range(1, len(steps) + 1)) and steps[-1][0] == steps[-1][1]
        assert all(at <= total for at, total in steps)
        assert (made.path / "log.jsonl").read_text().count("\n") == len(steps)


def test_a_search_may_remove_queries_within_groups(artifacts, tmp_path, reviews):
    """Every candidate keeps both key/value heads; a model with one query head per group is refused."""
    settings = {"data": reviews, "examples": 16, "heads_by": "queries", "budget": {"flops": 0.5}}
    made = run(artifacts, tmp_path, "lm", **settings)
    found = made.manifest.metrics["budget"]
    assert made.model.kv_heads == 2 and set(found["losses"]) == {"layers", "heads", "ffn", "hidden", "queries"}
    assert found["losses"]["heads"] == {} and list(found["losses"]["queries"]) == ["1"]
    assert {c["heads"] for c in found["candidates"]} <= {2, 4}
    with pytest.raises(RequestError, match="each key/value head has one query head"):
        run(artifacts, tmp_path / "bert", "encoder", **settings)


def test_what_a_weight_does_not_allow_is_refused_before_the_search(artifacts, tmp_path, reviews, monkeypatch):
    """Groups of inputs cannot be broken up, and a mesh takes equal parts; the search leaves such sizes out."""
    monkeypatch.setattr(budget_scan, "measure", None)
    settings = {"budget": {"parameters": 0.6}, "data": reviews, "examples": 16}
    quantize.run(quantize.Config(group=8), artifacts / "lm", Context(tmp_path / "int8", tmp_path / "work", "key"))
    with pytest.raises(RequestError, match="mlp/down/kernel is quantized in groups of 8 along what would be cut"):
        run(tmp_path, tmp_path, "int8", **settings)
    base = artifact.load(artifacts / "lm")
    config = stage.Config(**settings, mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    devices = meshes.make(config.mesh)
    space, _, _ = sizes.search(config, base, base.params, ("parameters", 0.6), config.structure, devices, 300)
    assert (space.heads, space.multiple, space.hidden) == ([2], 2, [16, 14, 12, 10, 8, 6, 4])


def test_a_budget_of_bytes_is_that_of_the_arrays(artifacts, tmp_path, reviews):
    quantize.run(quantize.Config(), artifacts / "lm", Context(tmp_path / "int8", tmp_path / "work", "key"))
    made = run(tmp_path, tmp_path, "int8", budget={"bytes": 0.8}, data=reviews, examples=16)
    assert made.manifest.metrics["budget"]["size"] == made.manifest.weight_bytes


@pytest.fixture
def few_words(tmp_path):
    file = tmp_path / "few.csv"
    file.write_text(
        "text,label\n" + "".join(f"{word} warm cold {i},pos\n" for i, word in enumerate(("fine", "dull") * 9))
    )
    return DataConfig(source="csv", path=str(file), validation=0.2, test=0.2)


@pytest.mark.parametrize(
    ("parent", "asked"), [("lm", "unused"), ("encoder", "unused"), ("lm", 288), ("classifier", 296)]
)
def test_tokens_that_the_data_lacks_go(artifacts, tmp_path, few_words, parent, asked, capsys):
    """All splits are read. The corpus is the same after encoding and decoding, also if the width changes too."""
    more = {"remove_hidden": 0.5, "examples": 4} if parent == "classifier" else {}
    made = run(artifacts, tmp_path, parent, vocabulary=asked, data=few_words, **more)
    old, new = (loading.load(path) for path in (artifacts / parent / "tokenizer", made.path / "tokenizer"))
    about, manifest = made.manifest.metrics["vocabulary"], made.manifest
    assert about["after"] == new.vocab_size == made.model.vocab_size == len(made.params["embed"]["tokens"]) < 300
    assert manifest.tokenizer == new.digest and manifest.parameters < about["before"] * 16 + manifest.parameters
    assert isinstance(asked, str) or about["after"] == asked
    texts = [line.rpartition(",")[0] for line in Path(few_words.path).read_text().splitlines()[1:]]
    before, after = old.encode_batch(texts), new.encode_batch(texts)
    assert [new.decode(ids) for ids in after] == [old.decode(ids) for ids in before] == texts
    assert about["tokens_before"] == sum(map(len, before)) and about["tokens_after"] == sum(map(len, after))
    if asked == "unused":
        assert about["tokens_before"] == about["tokens_after"]
        rows = [old._sp.piece_to_id(new.piece(i)) for i in range(new.vocab_size)]
        table = artifact.load(artifacts / parent).params["embed"]["tokens"]
        np.testing.assert_array_equal(made.params["embed"]["tokens"], np.asarray(table)[rows])
    assert f"vocabulary: 300 → {about['after']} tokens" in capsys.readouterr().err


def test_vocabularies_that_cannot_shrink_write_nothing(artifacts, tmp_path, reviews, few_words):
    for data, asked, message in (
        (few_words, 300, "300 to keep, but the artifact has 300 tokens"),
        (few_words, 100, "100 to keep, but the special tokens and bytes alone are"),
        (few_words, 280, "280 to keep, but special tokens, bytes and the characters of the data are 28"),
        (few_words, 291, "embed/tokens: vocab_in of size 291 is not divisible"),
    ):
        mesh = MeshConfig(tensor=2) if asked == 291 else MeshConfig()
        with pytest.raises(RequestError, match=message):
            run(artifacts, tmp_path, "lm", vocabulary=asked, data=data, mesh=mesh)
        assert not (tmp_path / "out").exists()
    run(artifacts, tmp_path / "small", "lm", vocabulary="unused", data=reviews)
    with pytest.raises(RequestError, match="the data uses all 291 tokens; nothing to remove"):
        run(tmp_path / "small", tmp_path / "again", "out", vocabulary="unused", data=reviews)


def test_a_sparse_parent_with_a_padded_table_loses_tokens(artifacts, tmp_path, few_words):
    """A number counts the tokenizer's tokens, not rows. Rows without a token go; zeros and their storage stay."""
    run(artifacts, tmp_path / "made", "lm", method="magnitude", pattern="2:4", store="sparse")
    base = artifact.load(tmp_path / "made" / "out")
    table = jnp.pad(base.params["embed"]["tokens"], ((0, 20), (0, 0)))
    artifact.save(
        tmp_path / "padded", {**base.params, "embed": {"tokens": table}},
        base.model.model_copy(update={"vocab_size": 320}), stage="prune", key="k", config={},
        tokenizer_dir=base.tokenizer_dir, parent=base.manifest,
    )  # fmt: skip
    with pytest.raises(RequestError, match=r"310 to keep, but .*padded has 300 tokens"):
        run(tmp_path, tmp_path, "padded", vocabulary=310, data=few_words)
    assert not (tmp_path / "out").exists()
    made = run(tmp_path, tmp_path, "padded", vocabulary="unused", data=few_words)
    assert made.model.vocab_size < 300 and made.manifest.sparsity == base.manifest.sparsity == 0.5
    assert made.manifest.storage == base.manifest.storage
    jax.tree.map(np.testing.assert_array_equal, made.params["decoder"], base.params["decoder"])


def test_a_vocabulary_and_a_budget_go_together(artifacts, tmp_path, few_words):
    """The budget is a fraction of the unpruned model, and counts the smaller table."""
    made = run(artifacts, tmp_path, "lm", vocabulary=290, budget={"parameters": 0.6}, data=few_words, examples=4)
    before = artifact.read_manifest(artifacts / "lm").parameters
    found = made.manifest.metrics["budget"]
    assert found["size"] == made.manifest.parameters and found["limit"] == pytest.approx(0.6 * before)
    assert made.model.vocab_size == 290 and 0.99 * 0.6 * before <= found["size"] <= 0.6 * before


def test_budgets_below_the_smallest_model_write_nothing(artifacts, tmp_path, reviews):
    for amount, message in ((10.0, "less than one head, neuron and layer allow"), (1e9, "nothing to remove")):
        with pytest.raises(RequestError, match=message):
            run(artifacts, tmp_path, "lm", budget={"parameters": amount}, data=reviews)
    assert not (tmp_path / "out").exists()


def test_repair_is_refused_over_zeros_and_integers(artifacts, tmp_path, reviews):
    run(artifacts, tmp_path, "lm", method="magnitude")
    (tmp_path / "out").rename(tmp_path / "sparse")
    settings = {"ffn": 0.5, "repair": True, "data": reviews}
    with pytest.raises(RequestError, match=r"is pruned \(50.0% zeros\), and repair would fill the zeros"):
        run(tmp_path, tmp_path, "sparse", **settings)
    quantize.run(quantize.Config(), artifacts / "lm", Context(tmp_path / "int8", tmp_path / "work", "key"))
    with pytest.raises(RequestError, match="attn/k/kernel is quantized, and repair gives other values"):
        run(tmp_path, tmp_path, "int8", **settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("settings", "share"), [
    ({"method": "wanda", "sparsity": 0.25}, 0.25), ({"method": "wanda", "pattern": "2:4"}, 0.5),
    ({"method": "magnitude", "sparsity": 0.75}, 0.75), ({"method": "magnitude", "pattern": "1:8"}, 0.875),
    ({"method": "sparsegpt", "sparsity": 0.25}, 0.25), ({"method": "sparsegpt", "pattern": "2:4"}, 0.5),
])  # fmt: skip
def test_zeros_are_counted(artifacts, tmp_path, reviews, settings, share):
    made = run(artifacts, tmp_path, "lm", data=reviews, examples=40, **settings)
    assert made.manifest.metrics["block_sparsity"] == made.manifest.sparsity == share
    assert made.manifest.parameters == artifact.read_manifest(artifacts / "lm").parameters


@pytest.mark.parametrize("parent", ["lm", "encoder"])
def test_sparse_storage_holds_the_same_model_and_lasts(artifacts, tmp_path, reviews, parent):
    """Later stages read it on any mesh, and what they leave is stored in the same way."""
    settings = {"method": "magnitude", "pattern": "2:4"}
    dense = run(artifacts, tmp_path / "dense", parent, **settings).manifest
    small = run(artifacts, tmp_path, parent, **settings, store="sparse").manifest
    assert small.digest == dense.digest and small.weights == dense.weights and small.format == 3
    assert all(record == {"format": "2:4"} for record in small.storage.values()) and not dense.storage
    assert small.storage.keys() == {
        m.path for m in weights.matrices(artifact.abstract(tmp_path / "out").params, "block")
    }
    for mesh in (MeshConfig(), MeshConfig(fsdp=4, tensor=2)):
        quantize.run(quantize.Config(mesh=mesh), tmp_path / "out", Context(tmp_path / "int8", tmp_path, "key"))
        made = artifact.load(tmp_path / "int8").manifest
        assert {name.removesuffix(":qvalue") for name in made.storage} == small.storage.keys()


@pytest.mark.parametrize(("parent", "settings", "least"), [
    ("lm", {"method": "magnitude", "pattern": "4x1", "allocation": "global", "repair": True}, 0.5),
    pytest.param("encoder", {"method": "wanda", "pattern": "4x2"}, 0.5, marks=pytest.mark.slow),
    ("classifier", {"method": "fisher", "allocation": "global", "sparsity": 0.3}, 0.3),
    pytest.param("lm", {"method": "sparsegpt", "pattern": "8x1"}, 0.5, marks=pytest.mark.slow),
])  # fmt: skip
def test_blocks_and_one_threshold(artifacts, tmp_path, reviews, parent, settings, least):
    """The sparsity of the model is exact; 8 devices choose the same zeros."""
    one = run(artifacts, tmp_path / "one", parent, data=reviews, examples=24, **settings)
    assert one.manifest.metrics["block_sparsity"] == pytest.approx(least, abs=1e-3)
    if settings.get("allocation"):
        assert len({layer["sparsity"] for layer in one.manifest.metrics["pruned_layers"]}) > 1
    many = run(
        artifacts, tmp_path / "many", parent, data=reviews, examples=24, mesh=MeshConfig(data=2, fsdp=2, tensor=2),
        **settings,
    )  # fmt: skip
    different = total = 0
    for a, b in zip(*(weights.flatten(m.params).values() for m in (one, many)), strict=True):
        different, total = different + np.sum((np.asarray(a) != 0) != (np.asarray(b) != 0)), total + a.size
    assert different <= (0.001 * total if settings["method"] == "fisher" else 0)


@pytest.mark.parametrize(("method", "axes"), [
    ("wanda", {"data": 2, "fsdp": 2, "tensor": 2}),
    pytest.param("wanda", {"data": 2, "context": 2, "tensor": 2}, marks=pytest.mark.slow),
    ("sparsegpt", {"data": 2, "fsdp": 2, "tensor": 2}),
], ids=str)  # fmt: skip
def test_eight_devices_choose_what_one_chooses(artifacts, tmp_path, reviews, method, axes):
    settings = {"method": method, "repair": method == "sparsegpt", "data": reviews, "examples": 40}
    one = run(artifacts, tmp_path / "one", "lm", **settings)
    many = run(artifacts, tmp_path / "many", "lm", **settings, mesh=MeshConfig(**axes))
    for a, b in zip(*(weights.flatten(m.params).values() for m in (one, many)), strict=True):
        np.testing.assert_array_equal(np.asarray(a) != 0, np.asarray(b) != 0)


def test_sparsegpt_has_less_error_than_wanda_and_refuses_integers(artifacts, tmp_path, reviews):
    """The error of every matrix is recorded; integers cannot store the changed weights."""
    common = {"data": reviews, "examples": 40, "pattern": "2:4"}
    wanda = run(artifacts, tmp_path / "wanda", "classifier", method="wanda", **common).manifest.metrics
    solved = run(artifacts, tmp_path / "solved", "classifier", method="sparsegpt", **common).manifest.metrics
    layer = solved["pruned_layers"][0]
    assert layer["stack"] == "decoder" and layer["layer"] == 0 and layer["sparsity"] == 0.5
    assert layer["error"] == solved["layer_error"]["decoder"][0] < wanda["layer_error"]["decoder"][0]
    found = layer["matrices"]["mlp/down"]
    assert found["shape"] == [24, 16] and found["zeros"] == 192 and 0 < found["error"] < 1 and "fallback" not in found
    quantize.run(quantize.Config(), artifacts / "lm", Context(tmp_path / "int8", tmp_path, "key"))
    for settings, name in (
        ({"method": "sparsegpt"}, "method 'sparsegpt'"),
        ({"method": "ria", "repair": True}, "repair"),
    ):
        with pytest.raises(RequestError, match=rf"attn/k/kernel is quantized, and {name} gives other values"):
            run(tmp_path, tmp_path, "int8", data=reviews, examples=20, **settings)


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_repair_lowers_the_error_of_every_matrix(artifacts, tmp_path, reviews, method):
    common = {"data": reviews, "examples": 40, "method": method}
    plain = run(artifacts, tmp_path / "plain", "lm", **common)
    made = run(artifacts, tmp_path / "made", "lm", **common, repair=True)
    assert made.manifest.sparsity == plain.manifest.sparsity == 0.5
    for layer in made.manifest.metrics["pruned_layers"]:
        for found in layer["matrices"].values():
            assert found["error"] < found["error_before_repair"]
    first, repaired = (weights.layer_of(a.params["decoder"]["blocks"]["attn"]["q"]["kernel"], 0) for a in (plain, made))
    np.testing.assert_array_equal(np.asarray(first) == 0, np.asarray(repaired) == 0)
    assert not np.array_equal(first, repaired)


@pytest.mark.parametrize(("parent", "method", "allocation"), [
    ("encoder", "wanda", "owl"), ("lm", "taylor", "sensitivity"),
])  # fmt: skip
def test_allocations_keep_the_total(artifacts, tmp_path, reviews, parent, method, allocation):
    """Layers differ by no more than twice the spread, and the zeros of all are those that were asked for."""
    settings = {"data": reviews, "examples": 20, "sparsity": 0.4, "method": method, "allocation": allocation}
    made = run(artifacts, tmp_path, parent, **settings, spread=0.1)
    layers = made.manifest.metrics["pruned_layers"]
    shares = [layer["sparsity"] for layer in layers]
    matrices = [found for layer in layers for found in layer["matrices"].values()]
    assert sum(m["zeros"] for m in matrices) == round(0.4 * sum(np.prod(m["shape"]) for m in matrices))
    assert 0.01 < max(shares) - min(shares) < 0.2 + 1e-3
    assert made.manifest.metrics["block_sparsity"] == pytest.approx(0.4, abs=1 / (3 * 16 * 24))
    assert (made.path / "log.jsonl").read_text().count("\n") == 3 + 3  # a line per layer of each walk


def test_a_fallback_is_named(artifacts, tmp_path, reviews, monkeypatch, capsys):
    solve = sparsegpt.prune
    monkeypatch.setattr(sparsegpt, "prune", lambda *args, **settings: solve(*args, **settings)._replace(attempts=1))
    made = run(artifacts, tmp_path, "lm", method="sparsegpt", data=reviews, examples=20, damping=0.02)
    assert made.manifest.metrics["pruned_layers"][2]["matrices"]["mlp/up"]["fallback"] == "damping 0.2"
    assert "decoder layer 2, mlp/up: fell back to damping 0.2" in capsys.readouterr().err


def test_integers_stay_integers(artifacts, tmp_path, reviews):
    ctx = Context(tmp_path / "int8", tmp_path, "key")
    quantize.run(quantize.Config(), artifacts / "lm", ctx)
    made = run(tmp_path, tmp_path, "int8", method="wanda", data=reviews, examples=20)
    assert made.manifest.seq_len == artifact.read_manifest(artifacts / "lm").seq_len == 32  # its lineage tells it
    assert made.manifest.bits == artifact.read_manifest(tmp_path / "int8").bits
    assert made.manifest.sparsity >= 0.5


def test_low_rank_pairs_are_merged(artifacts, tmp_path, reviews, capsys):
    base = artifact.load(artifacts / "lm")
    flat = weights.flatten(base.params)
    path = "decoder/blocks/attn/q/kernel"
    a, b = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(((3, 16, 2), (3, 2, 32))))
    flat[path] = weights.LowRank(flat[path], a, b, 0.5)
    artifact.save(
        tmp_path / "lora", weights.unflatten(flat), base.model, stage="finetune", key="k", config={},
        tokenizer_dir=base.tokenizer_dir,
    )  # fmt: skip
    made = run(tmp_path, tmp_path, "lora", method="magnitude", data=reviews)
    got, want = made.params["decoder"]["blocks"]["attn"]["q"]["kernel"], weights.dense(flat[path])
    np.testing.assert_allclose(got, np.where(np.asarray(got) != 0, want, 0), rtol=1e-5)
    assert "merges the low-rank pairs" in capsys.readouterr().err


@pytest.mark.parametrize(("settings", "message"), [
    ({"heads": 0.5, "sparsity": 0.5}, "sparsity: not for method 'structured'"),
    ({"method": "wanda", "ffn": 0.5}, "ffn: not for method 'wanda'"),
    ({"method": "wanda", "damping": 0.1}, "damping: not for method 'wanda'; set method to 'sparsegpt'"),
    ({"method": "sparsegpt", "damping": 0.0}, "greater than 0"),
    ({"method": "wanda", "allocation": "owl", "pattern": "2:4"}, "'owl' is for unstructured pruning; pattern 2:4"),
    ({"method": "wanda", "allocation": "owl", "sparsity": 0.05}, "spread 0.08 is too large for sparsity 0.05"),
    ({"method": "wanda", "allocation": "owl", "sparsity": 0.9}, "too large for sparsity 0.9; say less than 0.05"),
    ({"method": "wanda", "allocation": "sensitivity", "spread": 0.1, "sparsity": 0.9}, "too large .* less than 0.1"),
    ({"method": "wanda", "allocation": "owl", "pattern": "8x1"}, "with pattern 8x1, set allocation to 'uniform' or"),
    ({"method": "magnitude", "allocation": "global", "pattern": "2:4"}, "'global' is for unstructured pruning"),
    ({"method": "magnitude", "allocation": "global", "spread": 0.1}, "spread: not for allocation 'global'"),
    ({"method": "wanda", "allocation": "global"}, "those of 'wanda' are comparable within a matrix only; set"),
    ({"method": "sparsegpt", "allocation": "global"}, "one of magnitude, taylor, fisher, random"),
    ({"method": "wanda", "spread": 0.1}, "spread: not for allocation 'uniform'; set allocation to 'owl' or 'sens"),
    ({"method": "wanda", "allocation": "sensitivity", "outlier": 3.0}, "outlier: not for allocation 'sensitivity'"),
    ({"layers": 2, "allocation": "owl"}, "allocation: not for method 'structured'"),
    ({"layers": 2, "store": "sparse"}, "store: not for method 'structured'"),
    ({"layers": 2, "repair": True, "importance": "random"}, "importance, repair: for heads, ffn and hidden; layers"),
    ({"method": "wanda", "importance": "random"}, "importance: not for method 'wanda'; set method to 'structured'"),
    ({"heads": 2, "importance": "wanda"}, "'contribution', 'activation', 'taylor', 'magnitude' or 'random'"),
    ({}, "a budget, or at least one of heads, ffn, layers, hidden and vocabulary"),
    ({"ffn": 0.5, "budget": {"parameters": 0.5}}, "budget chooses the sizes; leave out ffn, or budget"),
    ({"heads_by": "both", "heads": 2}, "heads_by 'both' is for a budget"),
    ({"budget": {"bytes": 0.5, "flops": 0.5}}, "bytes and flops: say one of them"),
    ({"method": "wanda", "budget": {"parameters": 0.5}}, "budget: not for method 'wanda'"),
    ({"method": "wanda", "sparsity": 1.5}, "less than 1"),
    ({"method": "magnitude", "pattern": "4:2"}, "N < M"),
    ({"method": "wanda", "sparsity": 0.6, "pattern": "2:4"}, "contradicts pattern 2:4, which has 0.5"),
])  # fmt: skip
def test_settings_that_contradict_one_another(settings, message):
    with pytest.raises(ValidationError, match=message):
        stage.Config(**settings)


def test_what_to_keep_and_what_to_remove_have_a_setting_each():
    """Three quarters removed and three kept read alike in the short form; the keys are those of the short form."""
    for explicit, short in (
        ({"keep_layers": 3}, {"layers": 3}),
        ({"remove_layers": 0.75}, {"layers": 0.75}),
        ({"keep_heads": 2, "remove_ffn": 0.5}, {"heads": 2, "ffn": 0.5}),
    ):
        assert keyed(stage.Config(**explicit)) == keyed(stage.Config(**short))
    assert "keep_layers" not in keyed(stage.Config(layers=3))
    for wrong, message in (
        ({"keep_layers": 2, "layers": 0.5}, "layers and keep_layers: say one"),
        ({"keep_layers": 0.75}, "keep_layers"),
        ({"remove_layers": 3}, "remove_layers"),
        ({"method": "wanda", "keep_ffn": 2}, "ffn: not for method 'wanda'"),
        # What the type would convert was left out silently when another part was cut.
        ({"heads": 2, "keep_layers": 2.0}, "keep_layers\n.*valid integer"),
        ({"heads": 2, "keep_layers": "2"}, "keep_layers\n.*valid integer"),
        ({"heads": 2, "keep_ffn": True}, "keep_ffn\n.*valid integer"),
        ({"layers": 2, "remove_heads": "0.5"}, "remove_heads\n.*valid number"),
        ({"layers": 2, "remove_heads": True}, "remove_heads\n.*valid number"),
    ):
        with pytest.raises(ValidationError, match=message):
            stage.Config(**wrong)


def test_structured_pruning_says_what_it_did():
    before, after = ModelConfig(preset="llama-tiny", layers=4), ModelConfig(preset="llama-tiny", layers=1, d_ff=64)
    config = stage.Config(layers=0.75, keep_ffn=64)
    d_ff = before.d_ff
    assert sizes.describe(config, before, after) == (
        f"remove_layers = 0.75: layers 4 → 1; keep_ffn = 64: ffn {d_ff} → 64"
    )
    both = before.model_copy(update={"encoder_layers": 6})
    one = after.model_copy(update={"encoder_layers": 2})
    assert sizes.describe(stage.Config(layers=0.75), both, one) == "remove_layers = 0.75: layers 4 → 1, encoder 6 → 2"


def test_requests_that_cannot_be_met_write_nothing(artifacts, tmp_path, reviews):
    cases = [
        (
            {"method": "magnitude", "pattern": "2:5"},
            r"2:5 does not divide the 16 inputs of decoder/blocks/attn/k/kernel",
        ),
        ({"heads": 3}, "multiple of 2"),
        ({"ffn": 0.5}, "path"),
        (
            {"ffn": 0.5, "examples": 1000, "data": reviews},
            "examples: 1,000 calibration examples are more",
        ),
        ({"ffn": 0.5, "seq_len": 128, "data": reviews}, "128 is longer than its longest sequence .64."),
        ({"ffn": 23, "mesh": MeshConfig(tensor=2), "data": reviews}, "mlp of size 23 is not divisible"),
    ]
    for settings, message in cases:
        with pytest.raises(RequestError, match=message):
            run(artifacts, tmp_path, "lm", **settings)
        assert not (tmp_path / "out").exists()
    run(artifacts, tmp_path, "lm", method="magnitude")
    (tmp_path / "out").rename(tmp_path / "sparse")
    with pytest.raises(RequestError, match=r"50.0% zeros already; sparsity 0.4 changes nothing"):
        run(tmp_path, tmp_path, "sparse", method="magnitude", sparsity=0.4)


@pytest.mark.parametrize(("parent", "method"), [("lm", "taylor"), ("classifier", "fisher"), ("lm", "random")])
def test_scores_that_read_gradients_or_nothing(artifacts, tmp_path, reviews, parent, method):
    made = run(artifacts, tmp_path, parent, data=reviews, examples=20, method=method, sparsity=0.25)
    assert made.manifest.metrics["block_sparsity"] == 0.25
    assert ("layer_error" in made.manifest.metrics) == (method != "random")


def test_gradients_need_the_labels_of_the_artifact(artifacts, tmp_path, reviews):
    other = reviews.model_copy(update={"columns": {"text": "text", "label": "text"}})
    with pytest.raises(RequestError, match="are not those of"):
        run(artifacts, tmp_path, "classifier", data=other, examples=20, method="taylor")


@pytest.mark.parametrize(("method", "repair"), [("wanda", False), ("sparsegpt", True)])
def test_a_killed_stage_goes_on_at_its_layer(artifacts, tmp_path, reviews, monkeypatch, method, repair):
    """Of three layers the first is done when the stage is killed; run again, it prunes the others to the same bits."""
    settings = {"method": method, "repair": repair, "data": reviews, "examples": 20}
    whole = run(artifacts, tmp_path / "whole", "lm", **settings)
    prune_layer, pruned = prune.prune_layer, []

    def killed(layer, *args, at, **how):
        pruned.append(at[2])
        if len(pruned) == 2:
            raise KeyboardInterrupt
        return prune_layer(layer, *args, at=at, **how)

    monkeypatch.setattr(prune, "prune_layer", killed)
    with pytest.raises(KeyboardInterrupt):
        run(artifacts, tmp_path / "killed", "lm", **settings)
    made = run(artifacts, tmp_path / "killed", "lm", **settings)
    assert pruned == [0, 1, 1, 2]
    assert made.manifest.digest == whole.manifest.digest
    assert made.manifest.metrics == whole.manifest.metrics
    assert (made.path / "log.jsonl").read_text().count("\n") == 3


def test_a_killed_allocation_measures_no_layer_twice(artifacts, tmp_path, reviews, monkeypatch):
    """Killed in the scan of the second layer, then in the pruning of the second layer, it goes on at both."""
    settings = {"method": "wanda", "allocation": "sensitivity", "data": reviews, "examples": 20}
    whole = run(artifacts, tmp_path / "whole", "lm", **settings)
    prune_layer, pruned, kills = prune.prune_layer, [], {5, 13}  # 3 sparsities per scanned layer, 1 per pruned layer

    def killed(layer, *args, at, **how):
        pruned.append(at[2])
        if len(pruned) in kills:
            raise KeyboardInterrupt
        return prune_layer(layer, *args, at=at, **how)

    monkeypatch.setattr(prune, "prune_layer", killed)
    for _ in kills:
        with pytest.raises(KeyboardInterrupt):
            run(artifacts, tmp_path / "killed", "lm", **settings)
    monkeypatch.setattr(allocation, "walk", None)  # the inputs are not measured again
    made = run(artifacts, tmp_path / "killed", "lm", **settings)
    assert pruned == [0, 0, 0, 1, 1, *(1, 1, 1, 2, 2, 2, 0, 1), *(1, 2)]
    assert made.manifest.digest == whole.manifest.digest


def test_unknown_methods_are_named_with_what_was_meant():
    with pytest.raises(ValidationError, match=r"unknown method 'wand', did you mean 'wanda'\?; known: structured, "):
        stage.Config(method="wand")


@pytest.mark.parametrize(
    "words", [("prune", "--method", "magnitude", "--sparsity", "0.5"), ("quantize", "--bits", "4")]
)
def test_a_method_that_reads_no_data_needs_none(words, artifacts, tmp_path):
    command, *settings = words
    assert app.run([command, str(artifacts / "classifier"), "--out", str(tmp_path / "small"), *settings]) == 0
