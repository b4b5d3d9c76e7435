"""`plan --search` and `--fit` over a recipe's own programs."""

import json
import math
from functools import partial

import pytest

from llmctl.cli import app
from llmctl.model import flops
from llmctl.pipeline import recipe
from llmctl.plan import analytic_memory, environment, mesh_search, search, topologies


def test_what_is_found_are_lines_that_plan_the_same(small, capsys, monkeypatch):
    """Two candidates are compiled instead of four: how many are, and in which order, is tested without compiling."""
    monkeypatch.setattr(mesh_search, "search", partial(mesh_search.search, best=2))
    assert app.run(["plan", str(small), "--search", "--topology", "cpu:8", "--stage", "pretrain", "--json"]) == 0
    got = json.loads(capsys.readouterr().out)
    assert (got["topology"], got["chips"]) == ("cpu:8", 8)
    memory = [one["hbm_bytes"] for one in got["front"]]
    assert memory == sorted(memory, reverse=True) and memory
    best = got["front"][-1]
    assert math.prod(best["mesh"].values()) == 8 and best["compiled"]
    sets = [word for line in best["recipe"] for word in ("--set", f"stage.pretrain.{line.replace(' = ', '=', 1)}")]
    assert best["recipe"][1].startswith("train = { steps = 10, batch_size = 8, seq_len = 32")  # all that it said
    assert app.run(["plan", str(small), "--topology", "cpu:8", "--stage", "pretrain", "--json", *sets]) == 0
    assert json.loads(capsys.readouterr().out)["hbm_bytes"]["total"] == best["hbm_bytes"]


def test_the_model_sees_what_a_stage_holds(small):
    """A LoRA trains few parameters beside a whole frozen base; a full finetune holds nothing besides."""
    cpu = topologies.find("cpu:8")
    for sets, frozen in (([], False), (["stage.finetune.method=lora"], True)):
        chosen = recipe.read(small, None, sets)
        setup = search.setup_of(chosen, search.training_step(chosen, "finetune"), cpu)
        total = flops.parameters(setup.model)["total"]
        assert (setup.trained < 0.5) == frozen and (setup.stored > 0) == frozen
        assert analytic_memory.estimate(setup).parameters == pytest.approx(
            4 * total * (1 + setup.trained * frozen), rel=0.02
        )


@pytest.mark.parametrize(
    "words, says",
    [
        (
            ("--search", "--fit", "--topology", "cpu:8"),
            "--topology NAME (such as v5e:16x16 or cpu:1), --chips N or --fit",
        ),
        (("--search", "--topology", "cpu:8", "--stage", "pretain"), "there are pretrain, finetune"),
        (("--fit", "--chip", "v5"), "unknown chip 'v5'"),
        (("--fit", "--generate", "1x8x8"), "leave out --generate"),
        (("--topology", "cpu:8", "--chip", "v5p"), "names its chip"),
        (("--topology", "cpu:8", "--tokens", "-1"), "--tokens"),
        (("--topology", "cpu:8", "--draft", "finetune"), "--draft belongs to --generate"),
        (("--topology", "cpu:8", "--draft-tokens", "2"), "--draft-tokens belongs to --draft"),
        (("--topology", "cpu:8", "--generate", "1x8x8", "--draft", "nothing"), "no such stage"),
        (("--topology", "cpu:8", "--tokens", "inf"), "must be a finite number"),
    ],
)
def test_what_is_refused_is_one_line(small, capsys, words, says):
    assert app.run(["plan", str(small), *words]) == 2
    assert says in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_search_over_gpus_is_the_model_s_and_says_so(small, capsys):
    assert app.run(["plan", str(small), "--search", "--topology", "h100:4", "--stage", "pretrain"]) == 0
    shown = capsys.readouterr().out
    assert "all by the model" in shown and "compiled" not in shown
    lines = [line for line in shown.splitlines() if line.startswith("mesh = { data = ")]
    assert lines and all("tensor = " in line for line in lines)  # which the recipe names: a shared section may


def test_as_many_devices_stand_for_gpus_as_a_fit_may_need(small, monkeypatch):
    """They are settled when JAX is imported, before it is known how many it takes."""
    asked = []
    monkeypatch.setattr(environment, "prepare", asked.append)
    assert app.run(["plan", str(small), "--fit", "--chip", "h100", "--stage", "pretrain", "--json"]) == 0
    assert asked[0].devices == max(t.devices for t in topologies.smallest_first("h100"))


@pytest.mark.slow
def test_the_smallest_slice(small, capsys, monkeypatch):
    """For the TPU compiler: half a megabyte fits one chip."""
    pytest.importorskip("libtpu")
    for name in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
        monkeypatch.setenv(name, "1")
    sets = ["--set", "stage.pretrain.train.seq_len=128"]
    assert app.run(["plan", str(small), "--fit", "--stage", "pretrain", "--json", *sets]) == 0
    got = json.loads(capsys.readouterr().out)
    assert got["topology"] == "v5e:1x1" and got["front"][0]["step_seconds"] > 0
