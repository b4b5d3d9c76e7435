"""A recipe is wholly understood before anything runs; then only what is due runs."""

import json
import multiprocessing
from pathlib import Path

import pytest

from llmctl.artifacts import artifact, integrity
from llmctl.artifacts.manifest import SPARSE_FORMAT
from llmctl.cli import summary
from llmctl.config.errors import Interrupted, RequestError, WorkError
from llmctl.distributed import locks
from llmctl.pipeline import recipe, runner, stage
from llmctl.pipeline.stages import eval as eval_stage

CHAIN = """
seed = 7
[data]
columns = { text = "t" }
[train]
steps = 20
[[stage]]
kind = "make"
[[stage]]
kind = "change"
sparsity = 0.25
[[stage]]
kind = "change"
name = "again"
from = "make"
train.steps = 5
[[stage]]
kind = "teach"
teacher = "make"
[[stage]]
kind = "score"
"""


@pytest.fixture
def write(tmp_path, fake_stages):
    def written(text: str = CHAIN) -> Path:
        (tmp_path / "r.toml").write_text(text)
        return tmp_path / "r.toml"

    return written


@pytest.fixture
def go(write, tmp_path):
    """Runs the recipe; the names of what ran, and what was said."""

    def gone(text: str = CHAIN, sets=(), only=()):
        said: list[str] = []
        ran = runner.run(recipe.read(write(text), tmp_path / "run", sets), only, said.append)
        return ran, said

    return gone


def refused(path: Path, **options) -> str:
    with pytest.raises(RequestError) as e:
        recipe.read(path, **options)
    assert "\n" not in str(e.value)
    return str(e.value).replace(str(path), "r.toml")


def test_defaults_then_recipe_then_stage_then_set(write):
    got = recipe.read(write(), sets=["stage.2.sparsity=0.75", "stage.teach.train.log_every=9", "seed=8"])
    make, change, again, teach, score = (s.config for s in got.steps)
    assert [s.name for s in got.steps] == ["make", "change", "again", "teach", "score"]
    assert (make.train.steps, again.train.steps, teach.train.log_every, make.seed) == (20, 5, 9, 8)
    assert (change.sparsity, again.sparsity) == (0.25, 0.75)
    assert score.data.columns == {"text": "t"}
    assert (got.name, got.run) == ("r", Path("runs/r"))


def test_a_shared_setting_that_is_set_goes_over_what_stages_say(write):
    got = recipe.read(write(), sets=["train.steps=3"])
    assert {s.config.train.steps for s in got.steps if "train" in type(s.config).model_fields} == {3}


@pytest.mark.parametrize(
    ("shared", "own", "sets", "found"),
    [
        ("steps = 20", "train.epochs = 2", [], [(20, 0), (1000, 2)]),
        ("epochs = 2", "train.steps = 20", [], [(1000, 2), (20, 0)]),
        ("steps = 20", "", ["train.epochs=2"], [(1000, 2), (1000, 2)]),
        ("steps = 20", "train.steps = 30", ["train.epochs=2"], [(1000, 2), (1000, 2)]),
        ("epochs = 2", "train.epochs = 3", ["train.steps=20"], [(20, 0), (20, 0)]),
        ("steps = 20", "train.steps = 30", ["stage.finetune.train.epochs=2"], [(20, 0), (1000, 2)]),
        ("steps = 20", "", ["stage.1.train.epochs=2"], [(20, 0), (1000, 2)]),
        ("steps = 20", "train.steps = 30", ["train.epochs=0"], [(20, 0), (30, 0)]),
    ],
)
def test_epochs_of_a_higher_layer_replace_the_steps_below_and_the_reverse(tmp_path, shared, own, sets, found):
    file = tmp_path / "r.toml"
    file.write_text(f'[train]\n{shared}\n[[stage]]\nkind = "pretrain"\n[[stage]]\nkind = "finetune"\n{own}')
    trains = [s.config.train for s in recipe.read(file, sets=sets).steps]
    assert [(t.steps, t.epochs) for t in trains] == found
    # The same stage alone, with the assignment or a flag.
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / recipe.MANIFEST).touch()
    flags = {"from": str(tmp_path / "base"), "train": {"epochs": 4}}
    (step,) = recipe.single("finetune", flags, tmp_path / "out", file, ["train.steps=7"]).steps
    assert (step.config.train.steps, step.config.train.epochs) == (1000, 4)
    (step,) = recipe.single("finetune", flags | {"train": {}}, tmp_path / "out", file, ["train.steps=7"]).steps
    assert (step.config.train.steps, step.config.train.epochs) == (7, 0)


def test_epochs_beside_steps_in_one_table_are_refused(tmp_path):
    file = tmp_path / "r.toml"
    file.write_text('[train]\nsteps = 20\nepochs = 2\n[[stage]]\nkind = "pretrain"')
    assert "train: epochs and steps exclude each other" in refused(file)


def test_links(write):
    steps = recipe.read(write()).steps
    assert [s.parent for s in steps] == [None, "make", "make", "again", "teach"]
    assert steps[3].others == {"make": "make"}
    assert list(steps[4].others) == ["make", "change", "again", "teach"]


def test_a_stage_default_survives_a_section_given_in_part(write):
    got = recipe.read(write('[[stage]]\nkind = "make"\ntrain.bold = true'))
    assert got.steps[0].config.train.steps == 30


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "r.toml: a recipe needs stages"),
        ("[[stage]]\nname='x'", "r.toml: stage.0.kind: is required; one of change, make, score, teach"),
        ("[[stage]]\nkind='mak'", "r.toml: stage.0.kind: no stage 'mak', did you mean 'make'?"),
        ("[[stage]]\nkind='make'\n[[stage]]\nkind='make'", "r.toml: stage.1.name: 'make' is stage.0 already"),
        ("[[stage]]\nkind='make'\nname='../x'", "r.toml: stage.0.name: must be letters"),
        ("[[stage]]\nkind='change'", "r.toml: stage.0 (change): from: there is no model before this stage"),
        ("[[stage]]\nkind='make'\ntrain.stepps=3", "r.toml: stage.0.train.stepps (make): unknown key, did you mean"),
        ("[[stage]]\nkind='make'\n[[stage]]\nkind='change'\nsparsity=1.5", "stage.1.sparsity (change): must be <= 1"),
        ("[train]\nsteps='x'\n[[stage]]\nkind='make'", "r.toml: train.steps: must be a whole number"),
        (
            "[train]\nstepps=3\n[[stage]]\nkind='make'",
            "r.toml: train.stepps: unknown key, no stage of this recipe has it,",
        ),
        ("teacher='x'\n[[stage]]\nkind='make'", "r.toml: teacher: unknown key, no stage of this recipe has it"),
        ("sparsity=1\n[[stage]]\nkind='make'\n[[stage]]\nkind='change'", "r.toml: sparsity: unknown key, no stage"),
        (
            "[[stage]]\nkind='make'\n[[stage]]\nkind='change'\nfrom='mak'",
            "from: no artifact 'mak', did you mean 'make'?",
        ),
        ("[[stage]]\nkind='make'\n[[stage]]\nkind='teach'\nteacher='nobody'", "(teach): teacher: no artifact 'nobody'"),
        (f"seed = {2**63}\n[[stage]]\nkind='make'", "r.toml: seed: must be < 9223372036854775808"),
        ("run = 3\n[[stage]]\nkind='make'", "r.toml: run: must be a string"),
    ],
)
def test_one_line_for_what_is_wrong(write, text, line):
    assert line in refused(write(text))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("stage.9.sparsity=0.5", "--set stage.9.sparsity=0.5: no stage 9; there are 0 to 4: make, change"),
        ("stage.chnge.sparsity=0.5", "no stage chnge, did you mean 'change'?"),
        ("stage.1=0.5", "say which stage and which key"),
        ("sparsity", "must look like"),
        ("change.sparsity=0.5", "no stage of this recipe has it, did you mean 'stage.change'?"),
        ("stage.1.sparsty=0.5", "r.toml: stage.1.sparsty (change): unknown key, did you mean 'sparsity'?"),
    ],
)
def test_one_line_for_a_wrong_set(write, text, line):
    assert line in refused(write(), sets=[text])


def test_run_skip_and_rerun_what_changed(go):
    assert go()[0] == ["make", "change", "again", "teach", "score"]
    ran, said = go()
    assert ran == [] and all("up to date, skipped" in line for line in said)
    ran, said = go(sets=["stage.teach.train.steps=21"])
    assert ran == ["teach", "score"]
    assert said[3:] == [
        "[4/5] teach from again: changed: train.steps 20 → 21",
        "[5/5] score from teach: teach is made anew",
    ]
    assert go(sets=["stage.teach.train.steps=21", "stage.make.train.log_every=5"])[0] == []


def test_a_changed_parent_changes_what_follows(go):
    go()
    assert go(sets=["stage.again.sparsity=0.9"])[0] == ["again", "teach", "score"]


def test_an_input_file_counts_by_its_content(go, tmp_path):
    file = tmp_path / "x.csv"
    file.write_text("one")
    text = f"[[stage]]\nkind='make'\ndata.path='{file}'"
    assert go(text)[0] == ["make"] and go(text)[0] == []
    file.write_text("another")
    ran, said = go(text)
    assert ran == ["make"] and "its input changed" in said[0]
    file.unlink()
    with pytest.raises(RequestError, match=r"x\.csv: cannot be read: No such file"):
        go(text)


def test_only(go):
    with pytest.raises(RequestError, match=r"change: needs make, which is not up to date \(new\)"):
        go(only=["change"])
    with pytest.raises(RequestError, match="--only mak: no such stage, did you mean 'make'"):
        go(only=["mak"])
    assert go(only=["make"])[0] == ["make"]
    assert go(only=["change"])[0] == ["change"]
    assert go(only=["change"])[0] == []


def test_siblings_reach_the_stage(go, tmp_path):
    go()
    found = json.loads((tmp_path / "run/score/siblings.json").read_text())
    assert {n: Path(p).name for n, p in found.items()} == {n: n for n in ("make", "change", "again", "teach")}


def test_work_survives_an_interruption_and_stale_work_does_not(go, tmp_path):
    text = "[[stage]]\nkind='make'\ntrain.steps={}"
    with pytest.raises(Interrupted):
        go(text.format(13))
    work = tmp_path / "run/.work/make"
    (work / "checkpoint").touch()
    with pytest.raises(Interrupted):
        go(text.format(13))
    assert (work / "checkpoint").exists()
    _, said = go(text.format(12))
    assert any("is discarded" in line for line in said) and not work.exists()


def test_a_stage_that_leaves_nothing_is_an_error(go):
    with pytest.raises(WorkError, match="without leaving its artifact"):
        go("[[stage]]\nkind='make'\ntrain.steps=17")


def test_a_folder_that_is_no_artifact_is_left_alone(go, tmp_path):
    (tmp_path / "run/make").mkdir(parents=True)
    (tmp_path / "run/make/thesis.txt").write_text("years of work")
    with pytest.raises(RequestError, match="is not an artifact; move it away"):
        go()
    assert (tmp_path / "run/make/thesis.txt").exists()


def test_a_damaged_artifact_is_made_again(go, tmp_path):
    go()
    (tmp_path / "run/change/manifest.json").write_text("{")
    ran, said = go()
    assert ran == ["change"] and "cannot be read" in said[1]
    (tmp_path / "run/change/params/array").unlink()
    ran, said = go()
    assert ran == ["change"] and "is damaged" in said[1]


def edit(folder, **fields):
    file = folder / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_an_artifact_that_was_edited_is_not_up_to_date(go, tmp_path):
    go()
    edit(tmp_path / "run/change", labels=["a"])
    ran, said = go()
    damage = "(the manifest's `labels` do not match what was saved)"
    assert ran == ["change"]
    assert said[1] == f"[2/5] change from make: the artifact that is there cannot be read {damage}"
    edit(tmp_path / "run/change", key=artifact.read_manifest(tmp_path / "run/again").key)
    assert go()[0] == ["change"]
    (tmp_path / "run/score/results.json").write_text("[]")
    ran, said = go()
    assert ran == ["score"] and "is damaged (results.json does not match what was saved)" in said[4]
    edit(tmp_path / "run/again", metrics={"loss": 0.0})
    ran, said = go()
    damage = "(the manifest's `metrics` do not match what was saved; its weights are whole)"
    assert ran == [] and said[2].endswith(f"up to date, skipped {damage}")


def test_a_damaged_parent_outside_the_run_is_refused_and_an_older_one_keeps_its_key(go, tmp_path):
    go()
    parent = tmp_path / "run/make"
    one = recipe.single("change", {"from": str(parent)}, tmp_path / "b")
    known, config = artifact.read_manifest(parent), one.steps[0].config
    assert runner.plan(one)[0].key == runner.key(config, f"{known.key}:{known.content}")
    edit(parent, task="x")
    with pytest.raises(RequestError, match=r"make: damaged \(the manifest's `task` does not match .*; remove"):
        runner.plan(one)
    edit(parent, task="", checksums=None)
    assert runner.plan(one)[0].key == runner.key(config, f"{known.key}:{known.digest}")
    _, said = go()
    assert said[0].endswith(f"up to date, skipped ({integrity.OLDER})")


def test_what_a_killed_process_left_is_not_taken_for_an_artifact(go, tmp_path):
    go()
    (tmp_path / "run/make").rename(tmp_path / "run/.make.llmctl-old")
    (tmp_path / "run/.work/make").mkdir(parents=True)
    go()
    assert not (tmp_path / "run/.work/make").exists()
    assert "make" in [a["name"] for a in summary.run(tmp_path / "run")["artifacts"]]
    (tmp_path / "run/.work/change").mkdir(parents=True)  # killed between the artifact and the end
    go()
    assert not (tmp_path / "run/.work/change").exists()


def test_a_stage_never_replaces_what_it_is_made_of(go, tmp_path):
    go()
    made = tmp_path / "run/make"
    with pytest.raises(RequestError, match="would replace what it is made of"):
        recipe.single("change", {"from": str(made)}, made)


def test_a_single_stage_replaces_what_its_kind_made_and_nothing_else(go, tmp_path):
    go()

    def one(kind="change", out="b", **settings):
        parent = {} if kind == "make" else {"from": str(tmp_path / "run/make")}
        return runner.run(recipe.single(kind, parent | settings, tmp_path / out), say=lambda text: None)

    assert one() == ["b"] == one(sparsity=0.125)
    (tmp_path / "b/notes.txt").write_text("of the user")
    with pytest.raises(RequestError, match=r"b: holds 'notes.txt', which llmctl did not write"):
        one(sparsity=0.5)
    (tmp_path / "b/notes.txt").unlink()
    with pytest.raises(RequestError, match=r"b: is an artifact of 'change'; --replace replaces it"):
        one("make")
    assert one("make", replace=True) == ["b"]
    with pytest.raises(RequestError, match=r"is inside the artifact .*b, and is lost when that is made anew"):
        one(out="b/c")


def _hold(path, ready, done):
    with locks.lock(path, str(path.parents[1])):
        ready.set()
        done.wait(60)


def test_two_runs_do_not_collide(go, tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path / "run/.work/run.lock", ready, done))
    other.start()
    try:
        assert ready.wait(60)
        with pytest.raises(RequestError, match=rf"another llmctl \(process {other.pid}\) is at work there"):
            go()
    finally:
        done.set()
        other.join()
    assert go()[0][0] == "make"


def test_a_single_stage_from_a_folder(go, tmp_path):
    go()
    one = recipe.single("change", {"from": str(tmp_path / "run/make"), "sparsity": 0.125}, tmp_path / "b")
    assert runner.run(one, say=lambda text: None) == ["b"]
    assert runner.run(one, say=lambda text: None) == []
    manifest = artifact.read_manifest(tmp_path / "b")
    assert (manifest.name, manifest.parent.name, manifest.config["sparsity"]) == ("b", "make", 0.125)


def test_a_single_stage_takes_settings_of_a_recipe(write, go, tmp_path):
    go()
    start = str(tmp_path / "run/make")
    flags = {"from": start, "train": {"bold": True}}
    (step,) = recipe.single("teach", flags, tmp_path / "run/b", write(), ["train.log_every=3"]).steps
    train = step.config.train
    assert (train.steps, train.bold, train.log_every, step.config.seed) == (20, True, 3, 7)
    assert step.others == {"make": tmp_path / "run/make"}  # found by its name, beside the new artifact
    with pytest.raises(RequestError, match="has 2 change stages, say which with --name"):
        recipe.single("change", {"from": start}, tmp_path / "b", write())
    named = recipe.single("teach", flags | {"name": "b"}, tmp_path / "run/b", write())
    assert named.steps[0].config.teacher == "make"
    with pytest.raises(RequestError, match=r"r\.toml: sed: unknown key, no stage of this recipe has it, did you mean"):
        recipe.single("teach", flags, tmp_path / "run/b", write("sed = 7\n" + CHAIN))
    again = recipe.single("change", {"from": start, "name": "again"}, tmp_path / "b", write())
    assert again.steps[0].config.train.steps == 5


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({"from": "nowhere"}, "change: from: no artifact 'nowhere'"),
        ({}, "change: --from: say which artifact to start from"),
        ({"from": "x", "train": {"steps": 0}}, "--train.steps: must be >= 1, got 0"),
        ({"from": "x", "name": "../y"}, "--name: must be letters, digits"),
    ],
)
def test_one_line_for_a_wrong_flag(fake_stages, tmp_path, flags, line):
    with pytest.raises(RequestError) as e:
        recipe.single("change", flags, tmp_path / "b")
    assert str(e.value).startswith(line)


@pytest.mark.parametrize("out", [".", ".."])
def test_a_folder_is_called_by_its_name(go, tmp_path, monkeypatch, out):
    """It comes into its place by renaming; and its name is that of the scratch folder."""
    go()
    (tmp_path / "run/make/inside").mkdir()
    monkeypatch.chdir(tmp_path / "run/make" if out == "." else tmp_path / "run/make/inside")
    with pytest.raises(RequestError, match=r"--out \.+: say the folder's name, such as .*/make"):
        runner.run(recipe.single("make", {}, out))
    assert (tmp_path / "run/make/inside").exists()


def test_a_folder_without_a_manifest_is_no_artifact(fake_stages, tmp_path):
    with pytest.raises(RequestError, match=r"is not an artifact: it has no manifest\.json"):
        recipe.single("change", {"from": str(tmp_path)}, tmp_path / "b")


def test_a_later_format_is_refused_in_time(go, tmp_path):
    go()
    file = tmp_path / "run/make/manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": SPARSE_FORMAT + 1}))
    one = recipe.single("change", {"from": str(tmp_path / "run/make")}, tmp_path / "b")
    with pytest.raises(RequestError, match="later than this llmctl reads"):
        runner.run(one)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("train", [{"batch_size": 10**9}, {"seq_len": 10**9}, {"batch_size": 10**18}])
def test_a_batch_that_no_memory_holds_is_refused_before_work(monkeypatch, train):
    monkeypatch.setattr(runner.limits, "memory", lambda: 2**33)
    config = stage.load("pretrain").Config(name="base", train=train)
    with pytest.raises(RequestError, match=r"base: a batch of .* tokens would take .* lower batch_size or seq_len"):
        runner._check_batch_memory(recipe.Step(config, Path("base"), None))
    runner._check_batch_memory(recipe.Step(stage.load("pretrain").Config(), Path("base"), None))


def test_the_role_of_an_artifact_is_part_of_the_key():
    """An evaluation that reads the same artifacts in other roles has another result."""
    read = [["a", "1"], ["b", "2"]]
    keys = {
        runner.key(eval_stage.Config(**roles), None, read)
        for roles in ({}, {"against": "a"}, {"against": "b"}, {"draft_of": "a"}, {"draft_of": "b"})
    }
    assert len(keys) == 5
