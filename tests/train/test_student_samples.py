"""Samples of the student: equal to a search by full passes, on 8 devices as on 1, and bit for bit after a resume."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_distillation as tiny

from llmctl.artifacts import artifact
from llmctl.config.base import keyed
from llmctl.config.errors import RequestError
from llmctl.config.settings import MeshConfig, OptimConfig
from llmctl.data.examples.completions import completion_batch, sequence_batch
from llmctl.data.tokenizers.byte_tokenizer import ByteTokenizer
from llmctl.distributed import mesh as meshes
from llmctl.model import functional, weights
from llmctl.model.generate.sampling import Sampling
from llmctl.pipeline.stages import distill
from llmctl.train import fake_quantize, loop, student_samples
from llmctl.train.job import Job

WORDS, T = ByteTokenizer.new(), 16
PROMPTS = [np.array(WORDS.encode(text)) for text in ("abc", "a long prompt", "z", "")]


def rebuilt(prompt, completion, encoded):
    """Return the row that the row classes build of a prompt and its completion, whose end is already in it."""
    text = [(prompt, np.append(completion, WORDS.eos_id))]
    if not encoded:
        return {name: a[0] for name, a in completion_batch(text, WORDS, T + 1, predict_eos=False).items()}
    return {name: a[0] for name, a in sequence_batch([(prompt, completion)], WORDS, T, T + 1).items()}


@pytest.mark.parametrize("architecture", ["decoder", "encoder_decoder"])
def test_samples_are_the_most_probable_tokens_in_rows_of_the_same_form(architecture):
    """One full pass over the samples finds each token to be the most probable one after those before it.

    Rows end with an end token, after six tokens, or with the row, and are built as from a completion of the data.
    """
    model, encoded = tiny.MODELS[architecture], architecture != "decoder"
    params, ends = functional.init(model, jax.random.key(3)), list(range(0, 264, 2))
    pairs = [(p, np.array([70, 71])) for p in PROMPTS]
    batch = sequence_batch(pairs, WORDS, T, T) if encoded else completion_batch(pairs, WORDS, T)
    batch["weights"][2] = 0  # a row that nothing is learned from

    @jax.jit
    def run(params, batch):
        found = student_samples.sampled(
            model, params, batch, jax.random.key(0), ends=ends, pad=WORDS.pad_id, max_new=6, rules=Sampling()
        )
        return found, functional.lm_logits(model, params, functional.hidden(model, params, found))

    found, logits = run(params, {name: jnp.asarray(a) for name, a in batch.items()})
    made = np.asarray(found["weights"]) > 0
    np.testing.assert_array_equal(np.asarray(logits).argmax(-1)[made], np.asarray(found["targets"])[made])
    for b, prompt in enumerate(PROMPTS):
        row = {name: np.asarray(a[b]) for name, a in found.items()}
        if b == 2:
            want = {name: a[b] for name, a in batch.items()}
        else:
            new = row["targets"][made[b]]
            full = T if encoded else T + 1 - len(WORDS.begin) - len(prompt)
            assert len(new) == min(6, full) or new[-1] in ends
            assert not set(new[:-1].tolist()) & set(ends) and len(new) <= min(6, full)
            want = rebuilt(prompt, new, encoded)
            n = len(new) if encoded else len(WORDS.begin) + len(prompt) + len(new) - 1
            for name in ("tokens", "targets", "weights", "segments", "positions"):
                fill = WORDS.pad_id if name in ("tokens", "targets") else 0
                want[name] = np.where(np.arange(T) < n, want[name][:T], fill)
        for name, a in want.items():
            np.testing.assert_array_equal(row[name], a, err_msg=f"{name} of row {b}")
    assert min(made[b].sum() for b in (0, 1, 3)) < 6  # an end token was met


def settings(folder, **changes):
    given = {"mode": "on_policy", "on_policy_fraction": 0.5, "answers": {"max_new": 4}, "mesh": MeshConfig(), "seed": 1}
    given |= {"data": tiny.data(folder, "prompt", "completion"), "divergence": "reverse", "temperature": 1.0}
    given |= {"train": tiny.TRAIN.model_copy(update={"steps": 6, "checkpoint_every": 2, "log_every": 1})}
    return given | {"optim": OptimConfig(name="sgd", learning_rate=0.05)} | changes


def test_a_resumed_run_samples_the_same_texts(tmp_path, monkeypatch):
    """Some steps have samples and some the data; killed after four steps, the parameters are equal bit for bit."""
    teacher = tiny.made(tmp_path, tiny.MODELS["decoder"])
    student = tiny.made(tmp_path, tiny.MODELS["decoder"], seed=1)
    chosen = [student_samples.is_sampled(1, step, 0.5) for step in range(6)]
    assert any(chosen[4:]) and not all(chosen)
    given, made = settings(tmp_path), []
    sampled = student_samples.sampled
    monkeypatch.setattr(student_samples, "sampled", lambda *a, **k: (made.append(1), sampled(*a, **k))[1])
    whole = tiny.go(tmp_path / "whole", teacher, student, **given)
    assert len(made) == 1  # traced once
    log = loop._Loop.log

    def killed(self, done, *rest):
        if done == 5:
            raise KeyboardInterrupt
        return log(self, done, *rest)

    monkeypatch.setattr(loop._Loop, "log", killed)
    with pytest.raises(KeyboardInterrupt):
        tiny.go(tmp_path / "killed", teacher, student, **given)
    monkeypatch.setattr(loop._Loop, "log", log)
    again = tiny.go(tmp_path / "killed", teacher, student, **given)
    assert tiny.digest(again) == tiny.digest(whole)
    assert again.manifest.metrics["tokens"] == whole.manifest.metrics["tokens"] > 0
    plain = tiny.go(tmp_path / "plain", teacher, student, **given | {"on_policy_fraction": 1e-9})
    assert tiny.digest(plain) != tiny.digest(whole)


def test_the_student_that_samples_is_the_rounded_one(monkeypatch):
    """With fake quantization, the loss reads rounded matrices, so the samples are those of the rounded student."""
    model, quantized = tiny.MODELS["decoder"], {"format": "int4"}
    monkeypatch.setattr(student_samples, "sampled", lambda model, params, *_, **__: params)
    params = functional.init(model, jax.random.key(0))
    job = Job(params=params, loss=lambda *_: None, rows=None, validate=lambda _: {})
    config = distill.Config(teacher="t", mode="on_policy", fake_quantize=quantized)
    samples = student_samples.StudentSamples(config, model, meshes.make(MeshConfig()), [1], 0)
    found = samples.function(job)(weights.flatten(params), {}, np.int32(0))
    want = jax.jit(lambda p: fake_quantize.rounded(config.fake_quantize, p))(params)
    jax.tree.map(np.testing.assert_array_equal, found, want)
    up = "decoder/blocks/mlp/up/kernel"
    assert not np.array_equal(weights.flatten(found)[up], weights.flatten(params)[up])


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["decoder", "encoder_decoder"])
def test_eight_devices_train_on_the_samples_of_one(architecture, tmp_path):
    model = tiny.MODELS[architecture]
    teacher, student = tiny.made(tmp_path, model), tiny.made(tmp_path, model, seed=1)
    given = settings(tmp_path, answers={"max_new": 4, "temperature": 0.0})
    one = tiny.go(tmp_path / "one", teacher, student, **given)
    many = tiny.go(tmp_path / "many", teacher, student, **given | {"mesh": MeshConfig(data=2, fsdp=2, tensor=2)})
    assert tiny.largest_difference(one, many) < 2e-4


def test_the_key_of_a_stage_has_the_temperature_of_the_samples():
    """The default is 1, and 0 samples nothing: two students that need two keys."""
    sampled, greedy = (
        distill.Config(teacher="t", mode="on_policy", answers=answers) for answers in ({}, {"temperature": 0.0})
    )
    assert (sampled.answers.temperature, greedy.answers.temperature) == (1.0, 0.0)
    assert keyed(sampled) != keyed(greedy)
    assert not {"answers"} & keyed(distill.Config(teacher="t", mode="sequence")).keys()


def test_plan_knows_the_samples_of_the_student(tmp_path):
    mesh = meshes.make(MeshConfig())
    teacher, student = (artifact.abstract(tiny.made(tmp_path, tiny.MODELS["decoder"]), mesh) for _ in range(2))
    config = distill.Config(teacher="t", **settings(tmp_path))
    (step, samples), _ = distill.programs(config, student, {"t": teacher}, mesh)
    assert (step.title, samples.title, samples.steps) == ("train step", "samples of the student", 3)
    assert samples.trace().out_info["tokens"].shape == (8, 16) == step.batch["tokens"].shape


@pytest.mark.parametrize(("settings", "line"), [
    ({"cache": "c"}, 'cache: mode = "on_policy" has other texts in every step'),
    ({"hard": 0.2}, 'hard: the samples of mode = "on_policy" have no labels'),
    ({"signals": {"logits": 1.0, "hard": 0.2}}, 'hard: the samples of mode = "on_policy" have no labels'),
    ({"answers": {"beams": 2}}, 'answers.beams: only mode = "sequence" reads it'),
    ({"fake_quantize": {"format": "int4", "scales": "learned"}}, "fake_quantize.scales: mode = .* without learned"),
    ({"mode": "teacher_forced", "on_policy_fraction": 0.5}, 'on_policy_fraction: only mode = "on_policy" reads it'),
])  # fmt: skip
def test_settings_that_do_not_fit_samples(settings, line):
    with pytest.raises(ValueError, match=line):
        distill.Config(**{"teacher": "t", "mode": "on_policy", **settings})


def test_data_and_meshes_that_do_not_fit_samples(tmp_path):
    decoder = tiny.made(tmp_path, tiny.MODELS["decoder"].model_copy(update={"layers": 2}))
    for changes, line in (
        ({"data": tiny.data(tmp_path, "text")}, "the data has no prompts with completions"),
        ({"mesh": MeshConfig(data=4, context=2)}, "generates text, and needs mesh.context = 1"),
        ({"mesh": MeshConfig(data=4, pipeline=2)}, "generates text, and needs mesh.pipeline = 1"),
    ):
        with pytest.raises(RequestError, match=line):
            tiny.go(tmp_path / "run", decoder, decoder, **settings(tmp_path, **changes))
    assert not (tmp_path / "run" / "out").exists() and not any((tmp_path / "run" / "work").iterdir())
