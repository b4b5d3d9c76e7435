"""distill: signals, divergences and students from the teacher, for each architecture; what it refuses."""

import json

import jax
import numpy as np
import pytest
import tiny_distillation as tiny

from llmctl.artifacts import artifact
from llmctl.compress.quantization.quantize import quantize
from llmctl.config.errors import RequestError
from llmctl.config.settings import MeshConfig, OptimConfig
from llmctl.distributed import mesh as meshes
from llmctl.model import functional, weights
from llmctl.model.config import ModelConfig
from llmctl.pipeline.stages import distill
from llmctl.train import distillation, loop

SIGNALS = {"logits": 1.0, "hard": 0.1, "hidden": 0.5, "relations": 0.3, "embeddings": 0.2}
WIDER = {"d_model": 24, "layers": 4}
ONE = MeshConfig()  # one device on a CPU


def logged(made):
    lines = [json.loads(line) for line in (made.path / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "hidden" in line]


def train(**changes):
    return tiny.TRAIN.model_copy(update={"steps": 4, "checkpoint_every": 2, "log_every": 1, **changes})


@pytest.mark.parametrize("architecture", ["decoder", pytest.param("encoder_decoder", marks=pytest.mark.slow)])
def test_language_models_learn_from_all_signals(architecture, tmp_path):
    """A student of another width learns from outputs, states, relations and embeddings, with js of the top tokens."""
    model = tiny.MODELS[architecture]
    teacher = tiny.made(tmp_path, model.model_copy(update=WIDER))
    student = tiny.made(tmp_path, model, seed=1)
    made = tiny.go(
        tmp_path / "run", teacher, student, data=tiny.data(tmp_path, "prompt", "completion"), signals=SIGNALS, mesh=ONE,
        divergence="js", beta=0.3, top_k=8, train=train(),
    )  # fmt: skip
    steps = logged(made)
    assert len(steps) == 4 and steps[-1]["hidden"] < steps[0]["hidden"]
    assert all(
        np.isfinite([line[n] for n in ("hidden", "relations", "embeddings", "divergence")]).all() for line in steps
    )
    assert (made.model.d_model, made.model.layers) == (16, 3)


@pytest.mark.slow
def test_eight_devices_and_a_resumed_run_equal_one_run(tmp_path, monkeypatch):
    """A classifier that learns from all signals has the same parameters on 8 devices, and bit for bit after a kill."""
    teacher = tiny.classifier(tmp_path, "encoder", **WIDER)
    student = tiny.classifier(tmp_path, "encoder", seed=1)
    settings = {"data": tiny.data(tmp_path, "text", "label"), "signals": SIGNALS, "train": train(), "dropout": 0.1}
    settings["optim"] = OptimConfig(name="sgd", learning_rate=0.05)  # Adam would amplify gradients that are only noise
    one = tiny.go(tmp_path / "one", teacher, student, mesh=ONE, **settings)
    many = tiny.go(tmp_path / "many", teacher, student, mesh=MeshConfig(data=2, fsdp=2, tensor=2), **settings)
    named = weights.arrays(many.params)
    for name, a in weights.arrays(one.params).items():
        np.testing.assert_allclose(a, named[name], atol=2e-4, err_msg=name)
    log = loop._Loop.log

    def killed(self, done, *rest):
        if done == 3:
            raise KeyboardInterrupt
        return log(self, done, *rest)

    monkeypatch.setattr(loop._Loop, "log", killed)
    with pytest.raises(KeyboardInterrupt):
        tiny.go(tmp_path / "killed", teacher, student, mesh=ONE, **settings)
    monkeypatch.undo()
    again = tiny.go(tmp_path / "killed", teacher, student, mesh=ONE, **settings)
    assert tiny.digest(again) == tiny.digest(one)
    found, best = one.manifest.metrics, one.manifest.metrics["teacher_accuracy"]
    assert found["validation_retained"] == pytest.approx(found["validation_accuracy"] / best)
    assert 0 <= found["validation_agreement"] <= 1


def test_the_loss_is_the_weighted_sum_of_its_parts(tmp_path):
    """The loss with signals equals that on the outputs plus weight * mean of each inner loss * number of targets."""
    teacher = artifact.load(tiny.classifier(tmp_path, "decoder", **WIDER))
    student = artifact.load(tiny.classifier(tmp_path, "decoder", seed=1))
    mesh = meshes.make(MeshConfig())
    batch = functional.example_batch(student.model, 2, 5)
    batch = {n: a + 1 for n, a in batch.items()} | {"label": jax.numpy.array([0, 1])}
    key, found = jax.random.key(0), {}
    for name, weights_of in {
        "outputs": {"logits": 0.7, "hard": 0.2},
        "all": {**SIGNALS, "logits": 0.7, "hard": 0.2},
    }.items():
        config = distill.Config(teacher="t", signals=weights_of, train=tiny.TRAIN)
        learns = distillation.make_learner(config, [teacher], student, mesh)
        extra = learns.step_fields(learns.params, 1)
        found[name] = jax.jit(learns.loss)(learns.params, batch, key, teacher.params, **extra)
    (outputs, plain), (total, sums) = found["outputs"], found["all"]
    parts = sum(SIGNALS[name] * float(sums[name]) for name in ("hidden", "relations", "embeddings"))
    np.testing.assert_allclose(total, float(outputs) + parts, rtol=1e-5)
    assert float(plain["kl"]) == pytest.approx(float(sums["kl"]), rel=1e-5) and float(sums["weight"]) == 2


def test_a_student_that_is_its_teacher_agrees_with_it(tmp_path, capsys):
    """A copy of all layers that hardly learns keeps all of the teacher's accuracy, and the log has a line about it."""
    teacher = tiny.classifier(tmp_path, "encoder")
    still = OptimConfig(learning_rate=1e-30, weight_decay=0.0)
    made = tiny.go(
        tmp_path / "run", teacher, None, student={"layers": 3}, optim=still, data=tiny.data(tmp_path, "text", "label")
    )
    assert made.manifest.metrics["validation_agreement"] == made.manifest.metrics["validation_retained"] == 1.0
    assert "agrees with the teacher on 100.0%" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("architecture", ["encoder", pytest.param("encoder_decoder", marks=pytest.mark.slow)])
def test_a_student_copies_layers_of_its_teacher(architecture, tmp_path):
    """At a learning rate of almost 0, the student's layers are those of the map, and all else is the teacher's.

    All signals are used. The widths are equal, so there are no projections.
    """
    teacher = artifact.load(tiny.made(tmp_path, tiny.MODELS[architecture]))
    settings = {"data": tiny.data(tmp_path, "text"), "optim": OptimConfig(learning_rate=1e-30, weight_decay=0.0)}
    settings["signals"] = SIGNALS
    if architecture == "encoder_decoder":
        settings["data"] = tiny.data(tmp_path, "prompt", "completion")
    given = {"layer_map": [0, 1]} if architecture == "encoder_decoder" else {"layers": 2}
    made = tiny.go(tmp_path / "run", teacher.path, None, student=given, **settings)
    assert made.model.layers == 2 and made.manifest.parent.digest == teacher.manifest.digest
    kept = {"encoder": [0, 1], "decoder": [0, 1]}
    before = weights.arrays(teacher.params)
    for name, a in weights.arrays(made.params).items():
        stack = name.split("/")[0]
        want = before[name][np.array(kept[stack])] if "/blocks/" in name else before[name]
        np.testing.assert_allclose(a, want, rtol=0, atol=1e-28, err_msg=name)


def test_plan_knows_the_projections_and_a_student_that_copies_layers(tmp_path):
    """The described training step has the shapes of the job: projections in its state, and the copied layers."""
    mesh = meshes.make(ONE)
    teacher = artifact.abstract(tiny.classifier(tmp_path, "encoder", **WIDER), mesh)
    student = artifact.abstract(tiny.classifier(tmp_path, "encoder"), mesh)
    settings = {"teacher": "t", "data": tiny.data(tmp_path, "text", "label"), "train": tiny.TRAIN}
    config = distill.Config(**settings, signals=SIGNALS)
    (step,), left = distill.programs(config, student, {"t": teacher}, mesh)
    assert step.parameters[0]["extra/hidden"].shape == (3, 16, 24) and left.model == student.model
    assert step.parameters[0]["extra/embeddings"].shape == (16, 24)
    step.trace()
    config = distill.Config(**settings, student={"layers": 2})
    (step,), left = distill.programs(config, None, {"t": teacher}, mesh)
    assert left.model.layers == 2 and left.model.d_model == 24
    step.trace()


def test_a_teacher_of_preferences_teaches_its_language_model(tmp_path):
    """The student learns the probabilities of tokens, from prompts and completions, and is no model of preferences."""
    teacher = tiny.made(tmp_path, tiny.MODELS["decoder"], task="preference")
    student = tiny.made(tmp_path, tiny.MODELS["decoder"], seed=1)
    made = tiny.go(tmp_path / "run", teacher, student, data=tiny.data(tmp_path, "prompt", "completion"), mesh=ONE)
    assert made.manifest.task == "lm"


def test_teachers_over_one_base_share_its_integers(tmp_path):
    """Two adapters over a quantized base: its arrays are in memory once, as integers, and the student learns."""
    base = artifact.load(tiny.made(tmp_path, tiny.MODELS["decoder"]))
    small = quantize(base.params, scheme="int8", group=0, embeddings=False, head=False, activations="")[0]
    about = {"key": "k", "tokenizer_dir": base.tokenizer_dir, "config": {"train": {"seq_len": 16}}}
    parent = artifact.save(tmp_path / "base", small, base.model, stage="quantize", **about)
    for seed, name in enumerate(("one", "two")):
        flat, path = weights.flatten(small), "decoder/blocks/attn/q/kernel"
        a, b = (jax.random.normal(jax.random.key(seed), (3, *shape)) for shape in ((16, 2), (2, 16)))
        params = weights.unflatten(flat | {path: weights.LowRank(flat[path], a, b, 0.5)})
        artifact.save(tmp_path / name, params, base.model, stage="finetune", parent=parent, base=small, **about)
    paths = {name: tmp_path / name for name in ("one", "base", "two")}
    alive = {id(a) for a in jax.live_arrays()}
    loaded = distillation.load_teachers(list(paths.values()), meshes.make(ONE), ())
    new = sum(a.nbytes for a in jax.live_arrays() if id(a) not in alive)
    assert new == sum(a.nbytes for a in jax.tree.leaves(small)) + 2 * 4 * 3 * 2 * (16 * 2)
    assert [t.path.name for t in loaded] == list(paths)
    found = weights.arrays(loaded[0].params)
    assert {a.dtype.name for a in found.values()} == {"int8", "float32"}
    student = tiny.made(tmp_path, tiny.MODELS["decoder"], seed=1)
    made = tiny.go(tmp_path / "run", paths, student, teachers=list(paths), data=tiny.data(tmp_path, "text"))
    assert len(made.manifest.metrics["teachers"]) == 3


TASKS = {
    "tokens": {"head": "tokens", "labels": 2, "head_bias": True},
    "span": {"head": "span", "labels": 0, "head_bias": True},
    "regress": {"head": "regress", "labels": 1, "pooling": "mean"},
    "multilabel": {"head": "classify", "labels": 2, "pooling": "mean"},
    "embed": {"head": "embed", "labels": 0, "pooling": "mean"},
    "choice": {"head": "choice", "labels": 0, "pooling": "mean"},
}


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_a_step_with_all_signals_of_a_quantized_teacher(task, tmp_path):
    """The step is traced, and not compiled: losses on inner layers read rows of every form, and integers stay so."""
    mesh, cfg = meshes.make(ONE), tiny.MODELS["encoder"].model_copy(update=TASKS[task])
    labels = ["a", "b"] if TASKS[task]["labels"] == 2 else []
    about = {"labels": labels, "task": task}
    student = artifact.abstract(tiny.made(tmp_path, cfg, **about), mesh)
    wide = artifact.load(tiny.made(tmp_path, cfg.model_copy(update=WIDER), **about))
    small = quantize(wide.params, scheme="int8", group=0, embeddings=False, head=False, activations="")[0]
    about |= {
        "stage": "quantize",
        "key": "k",
        "config": {"train": {"seq_len": 16}},
        "tokenizer_dir": wide.tokenizer_dir,
    }
    artifact.save(tmp_path / "small", small, wide.model, **about)
    data = {"source": "jsonl", "path": str(tiny.rows(tmp_path))}
    data |= {"label_type": {"regress": "number", "multilabel": "set"}.get(task, "class")}
    config = distill.Config(teacher="t", signals=SIGNALS, data=data, train=tiny.TRAIN)
    (step,), _ = distill.programs(config, student, {"t": artifact.abstract(tmp_path / "small", mesh)}, mesh)
    assert "extra/hidden" in step.trace().out_info[0]["params"]
    assert any(a.dtype == "int8" for a in jax.tree.leaves(step.parameters[3]))


@pytest.mark.parametrize(("settings", "line"), [
    ({"beta": 0.3}, "beta is for divergence = 'js'"),
    ({"skew": 0.3, "divergence": "js"}, "skew is for divergence = 'skew'"),
    ({"hard": 0.3, "signals": {"logits": 1.0}}, "hard and signals exclude each other"),
    ({"signals": {"hidden": 0.0}}, "all signals have the weight 0"),
    ({"layer_map": "last"}, "layer_map: no signal reads it"),
    ({"top_k": 5, "signals": {"hidden": 1.0}}, "top_k: no signal reads it; set signals.logits"),
    ({"relation_heads": 2, "signals": {"hidden": 1.0}}, "relation_heads: no signal reads it"),
    ({"signals": {"hidden": 1.0}, "layer_map": [[0, -1]]}, "layer_map: .* are not pairs of layers"),
    ({"signals": {"hidden": 1.0}, "layer_map": "first"}, "'first' is not uniform, last or a list of pairs"),
    ({"teachers": ["a", "b"]}, "teacher and teachers exclude each other"),
    ({"teacher": "", "teachers": ["a", "a"]}, "name an artifact twice"),
    ({"teacher": "", "teachers": ["a", "b"], "signals": {"hidden": 1.0}}, "compares layers of one teacher"),
    ({"student": {"layers": 2, "layer_map": "last"}}, "'last' is not every_other, first"),
    ({"student": {"layers": 2}, "model": ModelConfig(preset="llama-tiny")}, "student and model exclude each other"),
    ({"student": {"layer_map": "first"}}, "set layers, the number"),
    ({"student": {"layer_map": [2, 1]}}, "are not ascending indices"),
    ({"student": {"layer_map": [0, 1], "layers": 3}}, "leave out layers"),
])  # fmt: skip
def test_settings_that_contradict_one_another(settings, line):
    with pytest.raises(ValueError, match=line):
        distill.Config(**{"teacher": "t", **settings})


def test_requests_that_do_not_fit_the_models_are_refused(tmp_path):
    teacher = tiny.classifier(tmp_path, "decoder", layers=4)
    data = tiny.data(tmp_path, "text", "label")
    hidden = {"signals": {"hidden": 1.0}}
    for settings, line in (
        ({**hidden, "layer_map": [[0, 4]]}, "layer_map: the teacher has no layer 4; its layers are 0 to 3"),
        ({**hidden, "layer_map": [[4, 1]]}, "layer_map: the student has no layer 4"),
        ({**hidden, "mesh": MeshConfig(data=4, pipeline=2)}, r"signals.hidden: needs mesh.pipeline = 1"),
        ({"signals": {"relations": 1.0}, "relation_heads": 3}, "relation_heads = 3: does not divide"),
        ({"student": {"layers": 5}}, "student: the decoder of .* has 4 layers"),
    ):
        with pytest.raises(RequestError, match=line):
            tiny.go(tmp_path / "run", teacher, teacher, data=data, **settings)
    assert not (tmp_path / "run" / "out").exists()
    model = tiny.MODELS["decoder"].model_copy(update={"head": "regress", "labels": 1, "pooling": "mean"})
    number = tiny.made(tmp_path, model, task="regress")
    with pytest.raises(RequestError, match="divergence: the teacher predicts numbers"):
        numbers = data.model_copy(update={"label_type": "number"})
        tiny.go(tmp_path / "run", number, number, data=numbers, divergence="reverse")
    other = tiny.classifier(tmp_path, "encoder")
    with pytest.raises(RequestError, match=r"teachers: .* differs from .* in architecture"):
        tiny.go(tmp_path / "run", {"a": teacher, "b": other}, teacher, teachers=["a", "b"], data=data)
