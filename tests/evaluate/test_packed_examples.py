"""Packed rows of several texts: the outputs of each text alone, few compilations, little padding, continuation."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from llmctl.config.errors import WorkError
from llmctl.config.settings import MeshConfig
from llmctl.data.examples.labelled import padded
from llmctl.distributed import mesh as meshes
from llmctl.evaluate import packed_examples
from llmctl.evaluate.batch_sizes import balanced
from llmctl.evaluate.setup import Setup, answers
from llmctl.evaluate.tasks.classify import TASK
from llmctl.evaluate.tasks.registry import TASKS
from llmctl.model import functional
from llmctl.model.config import ModelConfig
from llmctl.model.head_kinds import HEAD_KINDS

SIZES = {"d_model": 16, "layers": 2, "heads": 2, "kv_heads": 2, "head_dim": 8, "d_ff": 24, "vocab_size": 40}
MODELS = {
    "first": ModelConfig(preset="bert-tiny", head="classify", labels=3, next_sentence=False, **SIZES),
    "last": ModelConfig(preset="llama-tiny", head="classify", labels=3, pooling="last", **SIZES),
    "mean": ModelConfig(preset="llama-tiny", head="classify", labels=3, pooling="mean", **SIZES),
}


class Texts:
    """Rows of random texts with labels, and with types if `pairs`."""

    def __init__(self, lengths, width, pairs=False):
        rng = np.random.default_rng(0)
        self.texts, self.width, self.pairs = [rng.integers(3, 40, n) for n in lengths], width, pairs

    def __len__(self):
        return len(self.texts)

    def batch(self, rows_B):
        found = padded([self.texts[i] for i in rows_B], self.width, 0) | {"label": rows_B % 3}
        return found | ({"types": found["segments"] * (found["positions"] > 4)} if self.pairs else {})


def setup(batch_size, seq_len, **axes):
    return Setup(meshes.make(MeshConfig(**axes)), seq_len, seq_len, batch_size, "tail", "float32")


def saved(model, tmp_path=None):
    params = jax.jit(lambda key: functional.init(model, key))(jax.random.key(0))
    params = jax.tree.map(lambda w: w * 3 if w.ndim > 1 else w, params)
    manifest = SimpleNamespace(content="digest", digest="")
    return SimpleNamespace(model=model, params=params, manifest=manifest, path=SimpleNamespace(name="a"))


@pytest.mark.parametrize("name", sorted(TASKS))
def test_a_task_that_packs_texts_has_a_head_with_one_output_per_text(name):
    kind = HEAD_KINDS[TASKS[name].head]
    assert not (TASKS[name].packs and (kind.per_token or kind.vocabulary))


@pytest.mark.parametrize("name", MODELS)
def test_outputs_equal_those_of_each_text_alone_in_the_order_of_the_examples(name):
    model, rows = MODELS[name], Texts([5, 40, 9, 17, 3, 60, 22, 8, 31, 2], 64, pairs=name == "first")
    there, settings = saved(model), setup(2, 64, **({"data": 4, "fsdp": 2} if name == "first" else {}))
    with meshes.use(settings.mesh):
        alone = [y for _, y in answers(TASK.scorer(model, "float32"), there.params, rows, settings)]
        packed = list(packed_examples.outputs(packed_examples.step(model, "float32"), there, rows, settings))
    np.testing.assert_allclose(np.concatenate([y for _, y in packed]), np.concatenate(alone), atol=2e-5)
    assert np.concatenate([b["label"] for b, _ in packed]).tolist() == [i % 3 for i in range(10)]


def test_a_large_split_is_one_compilation_with_little_padding():
    """33,000 texts with lengths like those of reviews, of which 128 tokens are read; only the shapes are computed."""
    lengths = np.minimum(np.random.default_rng(1).lognormal(4, 0.8, 33_000).astype(int) + 3, 128)
    packed = packed_examples.PackedExamples(Texts(lengths, 128), MODELS["first"])
    size = balanced(setup(32, 128).mesh, 32 * 128 // packed.length, len(packed))
    slots = -(-len(packed) // size) * size * packed.length
    assert packed.tokens / slots > 0.97
    assert {a.shape for rows in (np.arange(5), np.arange(5) + 50) for a in packed.batch(rows).values()} == {
        (5, packed.length), (5, packed._count)
    }  # fmt: skip
    for longest in (200, 128, 16, 3):  # all texts have the same length
        packed = packed_examples.PackedExamples(Texts([longest] * 90, longest), MODELS["first"])
        assert packed.tokens / len(packed) / packed.length > 0.85


def test_an_evaluation_compiles_its_step_once(caplog):
    model, there = MODELS["last"], saved(MODELS["last"])
    step, settings = packed_examples.step(model, "float32"), setup(2, 64)
    with meshes.use(settings.mesh):
        for seed in (0, 1):
            lengths = np.random.default_rng(seed).integers(3, 64, 300)
            list(packed_examples.outputs(step, there, Texts(lengths, 64), settings))
    assert step._cache_size() == 1


def test_an_interrupted_measurement_continues(tmp_path, monkeypatch):
    model, there, rows, settings = MODELS["last"], saved(MODELS["last"]), Texts([30] * 12, 64), setup(1, 32)
    step, calls = packed_examples.step(model, "float32"), []
    want = np.concatenate([y for _, y in packed_examples.outputs(step, there, rows, settings)])
    monkeypatch.setattr(packed_examples, "SAVE_SECONDS", 0)

    def interrupted(params, batch):
        calls.append(len(batch["tokens"]))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(params, batch)

    with pytest.raises(KeyboardInterrupt):
        list(packed_examples.outputs(interrupted, there, rows, settings, tmp_path))
    assert len(list(tmp_path.iterdir())) == 1
    other = saved(model)
    other.manifest.content = "other weights"
    got = list(packed_examples.outputs(interrupted, there, rows, settings, tmp_path))
    np.testing.assert_allclose(np.concatenate([y for _, y in got]), want, atol=1e-6)
    batches = -(-len(packed_examples.PackedExamples(rows, model)) // calls[0])
    assert len(calls) == batches + 1 and not list(tmp_path.iterdir())
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        list(packed_examples.outputs(interrupted, there, rows, settings, tmp_path))
    calls[:] = [0] * 9
    list(packed_examples.outputs(interrupted, other, rows, settings, tmp_path))
    assert len(calls) == 9 + batches  # outputs of other weights are not used


def test_a_number_that_is_not_finite_ends_the_evaluation_with_the_name_of_the_layer():
    there, settings = saved(MODELS["first"]), setup(2, 64)
    blocks = there.params["encoder"]["blocks"]
    blocks["attn"]["o"]["kernel"] = blocks["attn"]["o"]["kernel"].at[1, 0, 0].set(np.inf)
    rows = Texts([5, 7], 64)
    for found in (
        packed_examples.outputs(packed_examples.step(there.model, "float32"), there, rows, settings),
        type(TASK).outputs(SimpleNamespace(packs=False, reads=TASK.reads, model_inputs=TASK.model_inputs), there, rows,
                           settings, TASK.scorer(there.model, "float32")),
    ):  # fmt: skip
        with pytest.raises(WorkError, match=r"first layer with such outputs is layer 1 of the encoder"):
            list(found)
