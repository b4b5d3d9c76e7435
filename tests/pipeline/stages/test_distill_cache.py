"""distill with stored outputs: equal to the loaded teacher, resumed after a kill, and refused if wrong."""

import json
import shutil

import jax
import numpy as np
import pytest
import tiny_distillation as tiny

from llmctl.artifacts import artifact
from llmctl.config.errors import RequestError
from llmctl.config.settings import MeshConfig, OptimConfig
from llmctl.data import teacher_records
from llmctl.distributed import mesh as meshes
from llmctl.model import weights
from llmctl.pipeline.stages import distill
from llmctl.train import distillation, teacher_cache

ONE = MeshConfig()
KINDS = {
    "decoder": ("decoder", ("text",)),
    "masked": ("encoder", ("text",)),
    "completions": ("encoder_decoder", ("prompt", "completion")),
    "classes": ("encoder", ("text", "label")),
}


def settings(folder, columns, **changes):
    """Return the settings of a short run. Plain SGD does not amplify gradients that are only noise."""
    train = tiny.TRAIN.model_copy(update={"steps": 8, **changes.pop("train", {})})
    given = {"data": tiny.data(folder, *columns), "train": train, "mesh": ONE, "hard": 0.2, "top_k": 8}
    return given | {"optim": OptimConfig(name="sgd", learning_rate=0.05)} | changes


def teachers(folder, architecture, columns):
    """Save a teacher of another width and a student, and return both."""
    wide, model = {"d_model": 24, "layers": 2}, tiny.MODELS[architecture]
    if "label" in columns:
        return tiny.classifier(folder, architecture, **wide), tiny.classifier(folder, architecture, seed=1)
    return tiny.made(folder, model.model_copy(update=wide)), tiny.made(folder, model, seed=1)


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def same(one, other, atol=1e-6):
    named = weights.arrays(other.params)
    for name, a in weights.arrays(one.params).items():
        np.testing.assert_allclose(a, named[name], atol=atol, err_msg=name)


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS])
def test_a_cached_teacher_teaches_as_a_loaded_one(kind, tmp_path, monkeypatch):
    """Parameters, agreement and retained accuracy are equal; a second student does not load the teacher.

    Eight steps read more than one epoch of examples; another seed and batch size need no new outputs of examples.
    """
    architecture, columns = KINDS[kind]
    teacher, student = teachers(tmp_path, architecture, columns)
    given = settings(tmp_path, columns, divergence="js", beta=0.3)
    online = tiny.go(tmp_path / "online", teacher, student, **given)
    given["cache"] = str(tmp_path / "cache")
    cached = tiny.go(tmp_path / "cached", teacher, student, **given)
    same(cached, online)
    metrics = [{k: v for k, v in made.manifest.metrics.items() if "seconds" not in k} for made in (cached, online)]
    metrics[1].pop("validation_acceptance", None)  # needs all probabilities of the teacher
    read = [made.pop("teacher_tokens") for made in metrics]
    assert 0 < read[0] <= read[1] == metrics[1]["tokens"]  # an example is stored once, for several epochs
    for name, value in metrics[1].items():
        assert metrics[0][name] == (pytest.approx(value, abs=1e-5) if isinstance(value, float) else value), name
    files = contents(tmp_path / "cache")
    monkeypatch.setattr(distillation, "load_teachers", lambda *_: pytest.fail("the teacher is loaded"))
    if columns == ("text",):  # packed rows differ in every epoch, so 16 rows more are needed for 2 steps more
        with pytest.raises(RequestError, match=r"was written with seed = 0, not 1"):
            tiny.go(tmp_path / "seed", teacher, student, seed=1, **given)
        shorter = given | {"train": given["train"].model_copy(update={"steps": 4, "batch_size": 16})}
        again = tiny.go(tmp_path / "again", teacher, student, **shorter)
        del shorter["cache"]
    else:
        again = tiny.go(tmp_path / "again", teacher, student, **given | {"seed": 1})
    assert contents(tmp_path / "cache") == files and again.manifest.metrics["steps"] in (4, 8)


class Filled(Exception):
    """The cache is complete, and training would begin."""


@pytest.fixture
def untrained(monkeypatch):
    """Stop each run when training would begin."""

    def stop(*_):
        raise Filled

    monkeypatch.setattr("llmctl.train.learner.run", stop)


def fill(folder, teacher, student, **given):
    with pytest.raises(Filled):
        tiny.go(folder / "run", teacher, student, **given)


def test_a_killed_cache_goes_on_at_its_file(tmp_path, monkeypatch, untrained):
    """Killed between two files, and inside one, the result is byte for byte that of one run."""
    teacher, student = teachers(tmp_path, "decoder", ("text",))
    monkeypatch.setattr(teacher_cache, "SHARD_ROWS", 16)
    given = settings(tmp_path, ("text",), train={"batch_size": 8})
    fill(tmp_path, teacher, student, cache=str(tmp_path / "whole"), **given)
    whole = contents(tmp_path / "whole")
    assert sum(name.startswith("train") and name.endswith(".json") for name in whole) == 4
    described = json.loads(whole["train-00001.json"])
    assert 16 < described["tokens"] <= 16 * 16
    assert described["numbers"] == list(range(16, 32)) and described["bytes"] == len(whole["train-00001.arrayrecord"])
    add = teacher_records.Records.add

    def killed(self, numbers, records, tokens):
        if numbers[0] == 32:
            (self.folder / "train-00002.arrayrecord").write_bytes(b"a part of it")
            raise KeyboardInterrupt
        add(self, numbers, records, tokens)

    monkeypatch.setattr(teacher_records.Records, "add", killed)
    given["cache"] = str(tmp_path / "killed")
    with pytest.raises(KeyboardInterrupt):
        tiny.go(tmp_path / "run", teacher, student, **given)
    assert len(list((tmp_path / "killed").glob("train-*.json"))) == 2
    began = []
    monkeypatch.setattr(
        teacher_records.Records, "add", lambda self, n, *rest: (began.append(n[0]), add(self, n, *rest))
    )
    fill(tmp_path, teacher, student, **given)
    assert contents(tmp_path / "killed") == whole and began[:2] == [32, 48]
    longer = given | {"train": given["train"].model_copy(update={"steps": 9})}
    fill(tmp_path, teacher, student, **longer)  # 8 rows more
    assert began[3:] == [64] and contents(tmp_path / "killed").items() > whole.items()


def test_a_cache_of_something_else_is_refused(tmp_path, untrained):
    """One line says what differs; the files stay as they are."""
    teacher, student = teachers(tmp_path, "encoder", ("text", "label"))
    given = settings(tmp_path, ("text", "label"), cache=str(tmp_path / "cache"))
    fill(tmp_path, teacher, student, **given)
    before = contents(tmp_path / "cache")
    fill(tmp_path, teacher, student, **given | {"divergence": "reverse", "seed": 3, "hard": 0.9})  # the same outputs
    train = given["train"].model_copy(update={"seq_len": 12})
    for changes, line in (
        ({"temperature": 1.0}, r"cache: .* was written with temperature = 2.0, not 1.0; choose another folder"),
        ({"top_k": 4}, r"with top_k = 8, not 4"),
        ({"train": train}, r"with train.seq_len = 16, not 12"),
        ({"truncate": "head_tail"}, r"with truncate = tail, not head_tail"),
        ({"data": given["data"].model_copy(update={"validation": 0.4})}, r"cache: .* holds outputs for other data"),
    ):
        with pytest.raises(RequestError, match=line):
            tiny.go(tmp_path / "run", teacher, student, **given | changes)
    with pytest.raises(RequestError, match="holds outputs for another teacher"):
        tiny.go(tmp_path / "run", tiny.classifier(tmp_path, "encoder", seed=5), student, **given)
    note = teacher_records.read(tmp_path / "cache")
    teacher_records.write(tmp_path / "cache", note.model_copy(update={"made_for": note.made_for | {"tokenizer": "x"}}))
    with pytest.raises(RequestError, match="holds outputs for another tokenizer"):
        tiny.go(tmp_path / "run", teacher, student, **given)
    teacher_records.write(tmp_path / "cache", note)
    assert contents(tmp_path / "cache") == before
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("mine")
    with pytest.raises(RequestError, match="is there already, with something else"):
        tiny.go(tmp_path / "run", teacher, student, **given | {"cache": str(other)})
    assert [p.name for p in other.iterdir()] == ["mine.txt"]
    with pytest.raises(RequestError, match=r"cache .*/out/c: is lost when the artifact .*/out is saved"):
        tiny.go(tmp_path / "run", teacher, student, **given | {"cache": str(tmp_path / "run" / "out" / "c")})
    language = tiny.made(tmp_path, tiny.MODELS["encoder"])
    with pytest.raises(RequestError, match="cache: stores the most probable tokens only; set top_k"):
        tiny.go(tmp_path / "run", language, language, **given | {"top_k": 0, "data": tiny.data(tmp_path, "text")})
    file = tmp_path / "rows.jsonl"  # for the same texts with other labels the outputs serve, and the accuracy does not
    file.write_text(file.read_text().replace('"p"', '"n"', 25))
    fill(tmp_path, teacher, student, **given)
    after = contents(tmp_path / "cache")
    assert {name for name in after if after[name] != before[name]} == {"cache.json"}
    was, now = (json.loads(files["cache.json"])["judged"]["values"]["accuracy"] for files in (before, after))
    assert now != was


@pytest.mark.parametrize(("signals", "line"), [
    ({"logits": 1.0, "hidden": 0.5}, "cache: stores outputs, and signals.hidden compares layers"),
    ({"hard": 1.0}, "cache: no signal reads the teacher's outputs; set signals.logits"),
])  # fmt: skip
def test_signals_that_a_cache_does_not_have(signals, line):
    with pytest.raises(ValueError, match=line):
        distill.Config(teacher="t", cache="c", signals=signals)


def test_plan_knows_the_pass_of_the_teacher_and_the_size_of_the_cache(tmp_path):
    """Per token 8 ids of 2 bytes, 8 floats and 1 float; the step reads them, and no parameters of the teacher."""
    mesh = meshes.make(ONE)
    teacher, student = (artifact.abstract(a, mesh) for a in teachers(tmp_path, "decoder", ("text",)))
    config = distill.Config(teacher="t", cache="c", top_k=8, data=tiny.data(tmp_path, "text"), train=tiny.TRAIN)
    (outputs, step), _ = distill.programs(config, student, {"t": teacher}, mesh)
    assert outputs.cache_bytes == 2 * 8 * (8 + 16 * (8 * (2 + 4) + 4)) and outputs.steps == 2
    assert outputs.trace().out_info["teacher_ids"].shape == (8, 16, 8) == step.batch["teacher_ids"].shape
    assert step.parameters[3] == () and len(jax.tree.leaves(outputs.parameters)) == len(jax.tree.leaves(teacher.params))
    step.trace()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["decoder", "classes"])
def test_eight_devices_write_and_read_what_one_does(kind, tmp_path):
    """Outputs that 8 devices computed serve a run on one device, and the other way round."""
    architecture, columns = KINDS[kind]
    teacher, student = teachers(tmp_path, architecture, columns)
    given = settings(tmp_path, columns)
    many = given | {"mesh": MeshConfig(data=2, fsdp=2, tensor=2)}
    one = tiny.go(tmp_path / "one", teacher, student, cache=str(tmp_path / "of-one"), **given)
    same(tiny.go(tmp_path / "8", teacher, student, cache=str(tmp_path / "of-8"), **many), one, atol=2e-4)
    shutil.copytree(tmp_path / "of-8", tmp_path / "copy")
    same(tiny.go(tmp_path / "both", teacher, student, cache=str(tmp_path / "copy"), **given), one, atol=2e-4)
    assert contents(tmp_path / "copy") == contents(tmp_path / "of-8")
