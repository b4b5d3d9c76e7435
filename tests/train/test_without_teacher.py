"""The same student without a teacher: the training on labels, both curves, tokens, and what is refused."""

import json

import jax
import pytest
import tiny_distillation as tiny

from llmctl.artifacts import artifact
from llmctl.artifacts.workspace import Context
from llmctl.config.errors import RequestError
from llmctl.config.settings import MeshConfig
from llmctl.distributed import mesh as meshes
from llmctl.pipeline.stages import distill, finetune
from llmctl.train import learner as training
from llmctl.train import without_teacher
from llmctl.train.distill_settings import SignalsConfig

ONE = MeshConfig()
TRAIN = tiny.TRAIN.model_copy(update={"steps": 4, "eval_every": 2, "log_every": 2})


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_the_student_without_a_teacher_is_the_finetuned_student(tmp_path, monkeypatch):
    """Its curve is that of `finetune`, and a killed run does not repeat it."""
    teacher = tiny.classifier(tmp_path, "encoder", d_model=24)
    student = tiny.classifier(tmp_path, "encoder", seed=1)
    data = tiny.data(tmp_path, "text", "label")
    given = {"data": data, "train": TRAIN, "mesh": ONE, "dropout": 0.1}
    run, calls = training.run, []

    def killed(config, *rest):
        calls.append(config.title)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run(config, *rest)

    monkeypatch.setattr(training, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        tiny.go(tmp_path / "both", teacher, student, compare_without_teacher=True, **given)
    made = tiny.go(tmp_path / "both", teacher, student, compare_without_teacher=True, **given)
    assert calls == ["distill-without-teacher", "distill", "distill"]

    config = finetune.Config(task="classify", method="full", **given)
    ctx = Context(tmp_path / "tuned" / "out", tmp_path / "tuned" / "work", "key", {})
    ctx.work.mkdir(parents=True)
    config = config.model_copy(update={"optim": tiny.OPTIM})
    finetune.run(config, student, ctx)
    want = artifact.read_manifest(ctx.out).metrics
    found = made.manifest.metrics
    alone = found["without_teacher"]
    for name in ("validation_loss", "validation_accuracy", "tokens", "best_step", "steps"):
        assert alone[name] == want[name], name
    assert alone["validation_loss"] != found["validation_loss"]
    assert [alone["steps"], found["steps"]] == [4, 4]
    assert found["tokens"] == found["teacher_tokens"] == alone["tokens"] > 0

    curves = json.loads((made.path / "curves.json").read_text())
    for name, folder in (("with_teacher", made.path), ("without_teacher", ctx.out)):
        lines = [line for line in metrics_of(folder) if "validation_loss" in line]
        assert [(one["step"], one["validation_loss"]) for one in curves[name]] == [
            (line["step"], line["validation_loss"]) for line in lines
        ]
        assert [one["step"] for one in curves[name]] == [2, 4]
    assert (made.path / "curves.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_the_taught_student_is_the_same_without_the_comparison(tmp_path):
    """Its initial parameters are made again, from an artifact, from new sizes, or from the teacher's layers."""
    teacher = tiny.made(tmp_path, tiny.MODELS["decoder"])
    student = tiny.made(tmp_path, tiny.MODELS["decoder"], seed=1)
    given = {"data": tiny.data(tmp_path, "text"), "train": TRAIN, "mesh": ONE, "signals": {"logits": 1.0, "hidden": {
        "from": 1.0, "to": 0.0}}}  # fmt: skip
    for parent, how in ((student, {}), (None, {"model": tiny.MODELS["decoder"]}), (None, {"student": {"layers": 2}})):
        made = [
            tiny.go(tmp_path / f"{len(how)}-{both}", teacher, parent, compare_without_teacher=both, **given, **how)
            for both in (False, True)
        ]
        assert tiny.digest(made[0]) == tiny.digest(made[1])
        assert made[1].manifest.metrics["without_teacher"]["validation_loss"]


def test_the_temperature_of_a_draft_is_that_of_sampling():
    make = lambda **given: distill.Config(teacher="t", **given)  # noqa: E731
    assert make().temperature == 2.0 and make(divergence="total_variation").temperature == 1.0
    assert make(divergence="total_variation", temperature=2.0).temperature == 2.0
    with pytest.raises(ValueError, match="divergence: no signal reads it"):
        make(divergence="total_variation", signals=SignalsConfig(hidden=1.0))


def test_the_step_at_which_the_taught_student_is_as_good():
    curve = [{"step": n, "validation_accuracy": a} for n, a in ((10, 0.5), (20, 0.8), (30, 0.7))]
    for final, step in ((0.8, 20), (0.5, 10), (0.9, None), (float("nan"), None)):
        found = without_teacher.compared({"validation_accuracy": final}, curve, "accuracy")
        assert found["equal_step"] == step
    line = without_teacher.sentence(found | {"validation_accuracy": 0.9}, {"validation_accuracy": 0.8, "steps": 30})
    assert line == "accuracy 80.00%, without the teacher 90.00%; not as good as that at any validation"
    final = without_teacher.complete([], {"steps": 30, "validation_accuracy": 0.9})  # train.eval_every is 0
    assert without_teacher.compared({"validation_accuracy": 0.8}, final, "accuracy")["equal_step"] == 30
    assert without_teacher.complete(curve, {"steps": 30, "validation_accuracy": 0.8}) == curve


@pytest.mark.parametrize("mode", ["sequence", pytest.param("on_policy", marks=pytest.mark.slow)])
def test_texts_of_a_model_are_not_what_the_other_student_learns(mode, tmp_path):
    """It learns the completions of the data, whether the taught one learns answers or samples; tokens are counted."""
    teacher = tiny.made(tmp_path, tiny.MODELS["decoder"])
    given = {"data": tiny.data(tmp_path, "prompt", "completion"), "train": TRAIN, "mesh": ONE}
    given |= {"mode": mode, "answers": {"max_new": 5}, "compare_without_teacher": True}
    made = tiny.go(tmp_path / "run", teacher, tiny.made(tmp_path, tiny.MODELS["decoder"], seed=1), **given)
    found = made.manifest.metrics
    # Rows of a decoder: the prompt of 1 or 2 bytes, "xy", and an end token as the last target only.
    texts = [len(f"{i}xy") for i in range(60)]
    assert 32 * min(texts) <= found["without_teacher"]["tokens"] <= 32 * (max(texts) + 1)
    if mode == "sequence":
        assert found["teacher_tokens"] == found["answer_tokens"] <= 5 * found["answers"]
    else:
        assert found["teacher_tokens"] == found["tokens"] > found["without_teacher"]["tokens"]


def test_what_is_refused_and_planned(tmp_path):
    teacher = tiny.made(tmp_path, tiny.MODELS["decoder"])
    given = {"mode": "sequence", "compare_without_teacher": True, "mesh": ONE}
    with pytest.raises(RequestError, match="compare_without_teacher: the data has no completions"):
        tiny.go(tmp_path / "run", teacher, teacher, data=tiny.data(tmp_path, "prompt"), **given)
    mesh = meshes.make(ONE)
    abstract = artifact.abstract(teacher, mesh)
    config = distill.Config(teacher="t", data=tiny.data(tmp_path, "text"), train=tiny.TRAIN,
                            compare_without_teacher=True, signals={"logits": 1.0, "hidden": 1.0})  # fmt: skip
    (taught, alone), _ = distill.programs(config, abstract, {"t": abstract}, mesh)
    assert alone.title == without_teacher.TITLE and alone.flops < taught.flops
    assert alone.parameters[3] == () and "extra/hidden" not in alone.parameters[0]
    assert jax.tree.leaves(alone.trace().out_info)
