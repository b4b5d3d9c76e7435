"""Check that stages export their programs: for every task, and for a stage of one file that `plan` does not know."""

import json
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from llmctl.artifacts import artifact
from llmctl.cli import app
from llmctl.config.errors import RequestError
from llmctl.evaluate.tasks.registry import TASKS
from llmctl.model import flops, functional
from llmctl.model.config import ModelConfig
from llmctl.pipeline import recipe, registry, stages
from llmctl.plan import planner

HEAD = """
[data]
source = "csv"
path = "there/is/no/such.csv"

[[stage]]
kind = "pretrain"
tokenizer = { kind = "bytes" }
model = { family = "llama", d_model = 16, layers = 2, heads = 2, kv_heads = 2, head_dim = 8, d_ff = 32 }
mesh = { data = -1 }
train = { steps = 10, batch_size = 4, seq_len = 16 }
"""
BATCH = {
    "classify": {"label"},
    "multilabel": {"label"},
    "regress": {"label"},
    "tokens": {"targets", "weights"},
    "span": {"types", "among", "first", "last", "start", "end", "example"},
    "embed": {"pair_tokens", "pair_segments", "pair_positions"},
    "lm": {"targets", "weights"},
    "chat": {"targets", "weights"},
    "seq2seq": {"targets", "weights"},
}
"""Arrays of a batch beside tokens, segments and positions."""


def built(text, folder, chosen=(), say=lambda text: None):
    file = folder / "recipe.toml"
    file.write_text(HEAD + text)
    found = planner.programs_of(recipe.read(file), jax.devices()[:1], chosen, say=say)
    return {(stage, program.title): program for stage, program in found}


@pytest.mark.parametrize("task", BATCH)
def test_every_task_is_planned(task, tmp_path):
    """Its train step, the step that is distilled from it, its calibration and its scoring."""
    labels = f'data = {{ label_type = "{TASKS[task].label_type or "class"}" }}'
    found = built(
        f"""
[[stage]]
kind = "finetune"
task = "{task}"
{labels}
train = {{ steps = 10, batch_size = 4, seq_len = 16 }}

[[stage]]
kind = "distill"
teacher = "finetune"
{labels}
train = {{ steps = 10, batch_size = 4, seq_len = 16 }}

[[stage]]
kind = "prune"
method = "wanda"
examples = 8
batch_size = 4
{labels}

[[stage]]
kind = "eval"
of = ["finetune"]
batch_size = 4
{labels}
""",
        tmp_path,
        ["finetune", "prune", "eval"] + ["distill"] * (task != "embed"),
    )
    step = found["finetune", "train step"]
    assert step.model.head == TASKS[task].head
    assert set(step.batch) == {"tokens", "segments", "positions"} | BATCH[task]
    assert step.batch["tokens"].shape == (4, 16)
    if task != "embed":
        assert found["distill", "train step"].batch == step.batch
    assert ("prune", "statistics of a layer") in found
    assert "tokens" in found["eval", "scoring of finetune"].batch


def test_the_search_for_a_budget_is_planned(tmp_path):
    """The loss is computed for every point and candidate; the vocabulary of a known size shrinks the next stage."""
    found = built(
        """
[[stage]]
kind = "prune"
vocabulary = 260
budget = { parameters = 0.7 }
examples = 8
batch_size = 4

[[stage]]
kind = "eval"
batch_size = 4
""",
        tmp_path,
        ["prune", "eval"],
    )
    loss = found["prune", "loss of smaller sizes"]
    # 1 whole, 1 of layers, 1 of heads, 5 of neurons and 4 of channels, and 7 candidates; 2 batches
    assert loss.steps == (1 + 1 + 1 + 5 + 4 + 7) * 2 and loss.trace().jaxpr.eqns
    assert ("prune", "statistics of a layer") in found
    assert found["eval", "scoring of prune"].model.vocab_size == 260


@pytest.mark.parametrize(("phase", "title"), [("decode", "decoding step"), ("prefill", "prefill")])
def test_the_timed_program_of_a_latency_budget_is_planned(phase, title, tmp_path):
    """Nothing is measured, so the next stage gets a model with the same fraction of the FLOPs."""
    text = f"""
[[stage]]
kind = "prune"
budget = {{ latency = 0.7, latency_of = "{phase}", batch_size = 3, context = 8 }}
examples = 8

[[stage]]
kind = "eval"
"""
    found = built(text, tmp_path, ["prune", "eval"])
    timed, after = found["prune", title], found["eval", "scoring of prune"].model
    assert timed.rows == 3 and timed.trace().jaxpr.eqns
    assert 0.6 < flops.flops(after, 16) / flops.flops(timed.model, 16) <= 0.7


def test_the_passes_of_robust_training_are_planned(tmp_path):
    """FreeLB with four steps of R-Drop's two passes costs eight plain steps, and its program can be traced."""
    stage = """
[[stage]]
kind = "finetune"
name = "NAME"
from = "pretrain"
dropout = 0.1
train = { steps = 10, batch_size = 4, seq_len = 16 }
"""
    robust = 'adversarial = { method = "freelb", steps = 4 }\n'
    robust += "regularize = { r_drop = 1.0, class_weights = { rare = 5.0 } }\n"
    text = stage.replace("NAME", "plain") + stage.replace("NAME", "robust") + robust
    found = built(text, tmp_path, ["plain", "robust"])
    plain, robust = (found[name, "train step"] for name in ("plain", "robust"))
    assert robust.flops == 8 * plain.flops
    assert (plain.work.beside, robust.work.beside) == (0, 7 * plain.flops)
    assert robust.trace().jaxpr.eqns


def test_word_labels_are_planned_from_the_command_line(tmp_path, capsys):
    """`plan` once refused every recipe with this task."""
    file = tmp_path / "tags.toml"
    more = '\n[[stage]]\nkind = "finetune"\ntask = "tokens"\ntrain = { steps = 10, batch_size = 4, seq_len = 16 }\n'
    file.write_text(HEAD + more)
    assert app.run(["plan", str(file), "--topology", "h100:1", "--stage", "finetune", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["program"] == "train step"


STAGE = '''
"""Average the parameters of artifacts."""

from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

from llmctl.pipeline.stage import StageConfig


class Config(StageConfig):
    """Average artifacts of one shape."""

    artifact_fields: ClassVar[tuple[str, ...]] = ("of",)

    kind: Literal["average"] = "average"
    of: list[str] = []
    """Artifacts to average."""


def mean():
    import jax

    return jax.jit(lambda trees: jax.tree.map(lambda *parts: sum(parts) / len(parts), *trees))


def run(config, parent, ctx):
    from llmctl.artifacts import artifact
    from llmctl.distributed import mesh

    read = [artifact.load(path, mesh.make(config.mesh)) for path in ctx.siblings.values()]
    ctx.save(config, mean()([a.params for a in read]), read[0].model, parent=read[0].manifest)


def programs(config, base, others, mesh):
    from llmctl.artifacts import abstract_artifact
    from llmctl.model.program import Program

    trees = [a.params for a in others.values()]
    found = Program("average", base.model, mesh, lambda: mean().trace(trees), parameters=trees, steps=1)
    return [found], abstract_artifact.abstract_result(config, base.params, base.model, base=base)
'''


@pytest.fixture
def average(tmp_path, monkeypatch):
    """Add a stage `average` to our own: write its one file with the returned function."""
    folder = tmp_path / "stages"
    shutil.copytree(Path(stages.__path__[0]), folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(registry, "STAGES", folder)
    monkeypatch.setattr(stages, "__path__", [str(folder)])
    yield lambda text: (folder / "average.py").write_text(text)
    sys.modules.pop("llmctl.pipeline.stages.average", None)
    if hasattr(stages, "average"):
        del stages.average


MORE = """
[[stage]]
kind = "average"
of = ["pretrain"]

[[stage]]
kind = "quantize"
"""


@pytest.mark.parametrize("topology", ["cpu:1", "h100:1"])
def test_a_new_stage_of_one_file_is_planned(topology, average, tmp_path, capsys):
    average(STAGE)
    file = tmp_path / "recipe.toml"
    file.write_text(HEAD + MORE)
    words = ["--stage", "average", "--stage", "quantize", "--topology", topology, "--json"]
    assert app.run(["plan", str(file), *words]) == 0
    one, two = json.loads(capsys.readouterr().out)["programs"]
    assert (one["stage"], one["program"], two["stage"]) == ("average", "average", "quantize")
    parameters = one["hbm_bytes"]["parameters"]
    assert one["hbm_bytes"]["total"] >= 2 * parameters  # the average beside what is averaged
    assert two["hbm_bytes"]["parameters"] >= parameters


def test_what_is_planned_is_what_runs(average, tmp_path):
    """The stage's file and its plan share the compiled function."""
    average(STAGE)
    model = ModelConfig(vocab_size=8, d_model=8, layers=1, heads=1, kv_heads=1, head_dim=8, d_ff=8)
    shapes = functional.abstract(model)
    for name, value in (("one", 1.0), ("two", 4.0)):
        params = jax.tree.map(lambda a, v=value: np.full(a.shape, v, np.float32), shapes)
        artifact.save(tmp_path / name, params, model, stage="pretrain", key=name, config={})
    file = tmp_path / "recipe.toml"
    one, two = tmp_path / "one", tmp_path / "two"
    file.write_text(f'run = "{tmp_path}/run"\n[[stage]]\nkind = "average"\nfrom = "{one}"\nof = ["{one}", "{two}"]\n')
    assert app.run(["run", str(file)]) == 0
    left = artifact.load(tmp_path / "run" / "average")
    assert {float(a.max()) for a in jax.tree.leaves(left.params)} == {2.5}
    ((_, program),) = planner.programs_of(recipe.read(file), jax.devices()[:1])
    assert jax.tree.map(lambda a: a.shape, program.trace().out_info) == jax.tree.map(lambda a: a.shape, left.params)


def test_a_stage_without_programs_compiles_nothing_and_leaves_its_parents_shapes(average, tmp_path):
    average(STAGE.partition("def programs")[0])
    said = []
    found = built(MORE, tmp_path, ["average", "quantize"], said.append)
    assert [stage for stage, _ in found] == ["quantize"]
    assert said == ["average: nothing to compile; the stage 'average' exports no programs"]


def test_a_plan_of_nothing_to_compile_is_no_error(average, tmp_path, capsys):
    average(STAGE.partition("def programs")[0])
    file = tmp_path / "recipe.toml"
    file.write_text(HEAD + MORE)
    assert app.run(["plan", str(file), "--stage", "average", "--topology", "cpu:1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"programs": []}


def test_what_starts_from_an_unknown_artifact_is_refused(average, tmp_path):
    """A stage that starts from nothing and exports no programs leaves nothing that is known."""
    text = STAGE.partition("def programs")[0].replace(
        "    artifact_fields", "    starts: ClassVar[bool] = True\n    artifact_fields"
    )
    average(text)
    with pytest.raises(RequestError, match="quantize: cannot be planned: the stage 'average' exports no programs"):
        built(MORE, tmp_path, ["quantize"])


def test_plan_knows_no_stage_by_name():
    kinds = {f'"{kind}"' for kind in registry.stages()}
    for file in Path(planner.__file__).parent.rglob("*.py"):
        assert not [kind for kind in kinds if kind in file.read_text(encoding="utf-8")], file
