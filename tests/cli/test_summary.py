"""The closing table of a run shows how good every artifact is, whatever its task."""

import json
import shutil

import jax
import jax.numpy as jnp
import pytest

from llmctl.artifacts import artifact
from llmctl.cli import model_sizes, summary
from llmctl.config.errors import RequestError
from llmctl.model import functional
from llmctl.model.config import ModelConfig

ENTRY = {
    "name": "a",
    "stage": "finetune",
    "parent": None,
    "parameters": 1,
    "bytes": 3,
    "weight_bytes": 4,
    "sparsity": 0.0,
    "bits": 32.0,
}


def shown(*metrics):
    """The columns of the table: heading -> cells."""
    columns = summary.table([{**ENTRY, "metrics": m} for m in metrics], "t").columns
    return {str(c.header): list(c.cells) for c in columns}


@pytest.mark.parametrize(("measured", "title", "cell"), [
    ({"accuracy": 0.8196}, "accuracy", "81.96%"),
    ({"exact_match": 0.5, "answer_f1": 0.625}, "exact match", "50.00%"),
    ({"recall_at_1": 0.25}, "recall@1", "25.00%"),
    ({"rmse": 1.25, "pearson": 0.5}, "RMSE", "1.25"),
    ({"spearman": 0.5}, "Spearman", "0.500"),
    ({"entity_f1": 0.5}, "entity F1", "0.5000"),
    ({"token_accuracy": 0.125}, "token accuracy", "12.50%"),
])  # fmt: skip
def test_every_task_shows_its_quality_beside_its_speed(measured, title, cell):
    found = shown({**measured, "examples_per_second": 3.0})
    assert found[title] == [cell] and found["examples/s"] == ["3"]


@pytest.mark.parametrize("metrics", [None, [1], "x", 5])
def test_results_whose_metrics_are_no_object(tmp_path, metrics):
    one = {"artifact": "a", "digest": "d", "task": "t", "protocol": "p", "metrics": metrics}
    (tmp_path / "results.json").write_text(json.dumps([one]))
    with pytest.raises(RequestError, match=r"results\.json: damaged \(the metrics of 'a' are no object\)"):
        summary.results(tmp_path)


def test_results_of_other_programs_and_damaged_neighbors_do_not_matter(tmp_path):
    """A benchmark's results.json beside the artifact once made every stage end with exit 2, after its work."""
    mine, model = tmp_path / "mine", ModelConfig(preset="llama-tiny", vocab_size=8, layers=1)
    params = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), functional.abstract(model))
    artifact.save(mine, params, model, stage="pretrain", key="k", config={})
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "results.json").write_text('{"arguments": {}, "dense": {"perplexity": 1.0}}')
    shutil.copytree(mine, tmp_path / "eval")
    (tmp_path / "eval" / "results.json").write_text("[")
    assert summary.one(mine)["name"] == "mine"
    (mine / "results.json").write_text("[")
    with pytest.raises(RequestError, match=r"mine/results\.json: damaged"):
        summary.one(mine)


@pytest.mark.parametrize("text", ["stage = 5", "stage = [5]", "model = 5"])
def test_a_model_in_a_file_without_one(tmp_path, text):
    (tmp_path / "m.toml").write_text(text)
    with pytest.raises(RequestError, match=r"m\.toml: .*unknown key"):
        model_sizes.model(str(tmp_path / "m.toml"))


def test_validation_is_shown_as_long_as_no_eval_has_measured():
    found = shown({"validation_loss": 0.5, "validation_accuracy": 0.75, "steps": 3})
    assert [*found][-2:] == ["val. accuracy", "val. loss"]
    found = shown({"validation_loss": 0.5}, {"validation_loss": 0.25, "rmse": 1.0})
    assert found["RMSE"] == ["", "1"] and "val. loss" not in found
