"""Prompt tuning: the prompt is before every text that a model reads, is never predicted, and starts as tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmctl.config.errors import RequestError
from llmctl.config.settings import MeshConfig, TrainConfig
from llmctl.data.corpus import tokenize
from llmctl.data.examples.completions import completion_batch
from llmctl.data.pretraining.objective_rows import Objective
from llmctl.data.tokenizers import loading
from llmctl.data.tokenizers.byte_tokenizer import ByteTokenizer
from llmctl.distributed import mesh as meshes
from llmctl.evaluate import sliding_window
from llmctl.model import flops, functional, weights
from llmctl.model.config import ModelConfig
from llmctl.pipeline.stages import finetune
from llmctl.train.adapters.registry import METHODS

METHOD = METHODS["prompt"]
LLAMA = ModelConfig.model_validate(
    {"family": "llama", "vocab_size": 300, "d_model": 8, "layers": 1, "heads": 2, "kv_heads": 2, "head_dim": 4,
     "d_ff": 8}
)  # fmt: skip


def settings(**changes):
    return finetune.Config(method="prompt", **{"prompt": {"tokens": 2}, **changes})


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """The tokenizer of a model with a prompt of two tokens, as an artifact holds it."""
    folder = tmp_path_factory.mktemp("words")
    ByteTokenizer.new().save(folder / "plain")
    made = METHOD.tokenizer_dir(settings(), LLAMA, folder / "plain", folder / "prompted")
    assert METHOD.tokenizer_dir(settings(), LLAMA, made, folder / "again") == made
    loading.load(made).save(folder / "saved")
    return loading.load(folder / "saved")


def test_every_text_begins_with_the_prompt(words):
    bos, eos = words.bos_id, words.eos_id
    assert words.prompt("a") == [300, 301, bos, *words.encode("a")]
    assert words.template.row([7], [8]).tolist() == [300, 301, bos, 7, eos, 8, eos]
    batch = completion_batch([(np.array([5, 6]), np.array([7]))], words, 8)
    assert batch["tokens"][0].tolist()[:6] == [300, 301, bos, 5, 6, 7]
    assert batch["weights"][0].tolist() == [0, 0, 0, 0, 1, 1, 0, 0]  # predicts 7 and the end
    assert words.decode([300, *words.encode("a")]) == "a"


def test_perplexity_reads_the_prompt_and_does_not_score_it(words):
    rows = sliding_window.Rows([[5, 6, 7]], words.begin, 8, 4)
    batch = rows.batch(np.array([0]))
    assert batch["tokens"][0, :5].tolist() == [300, 301, words.bos_id, 5, 6]
    assert batch["weights"][0].tolist() == [0, 0, 1, 1, 1, 0, 0, 0] and rows.scored == 3
    assert batch["targets"][0, 2:5].tolist() == [5, 6, 7]


def test_later_windows_begin_with_the_prompt_too(words):
    rows = sliding_window.Rows([[5, 6, 7, 8, 9]], words.begin, 5, 2, repeated=2)
    batch = rows.batch(np.arange(len(rows)))
    # Inputs are 300 301 bos 5 6 7 8. The second window is [2, 7), whose first two inputs the prompt replaces.
    assert batch["tokens"].tolist() == [[300, 301, words.bos_id, 5, 6], [300, 301, 6, 7, 8]]
    assert batch["targets"][1].tolist() == [5, 6, 7, 8, 9]
    assert batch["weights"].tolist() == [[0, 0, 1, 1, 1], [0, 0, 0, 1, 1]] and rows.scored == 5
    with pytest.raises(ValueError, match=r"stride \(4\) must be at most 3"):
        sliding_window.Rows([[5, 6]], words.begin, 5, 4, repeated=2)


@pytest.mark.parametrize("objective", ["causal", "masked", "prefix"])
def test_packed_rows_without_the_prompt_are_refused(words, objective):
    documents = tokenize(["abc", "de"], words)
    with pytest.raises(RequestError, match=r"packed rows leave out the trained prompt of 2 tokens"):
        Objective(objective).rows(documents, words, 4, seed=0, packing="segments", shuffle=False)


def test_the_prompt_starts_as_tokens_of_the_vocabulary_over_integers_too():
    wide = METHOD.network(settings(), LLAMA)
    params = jax.tree.map(lambda a: jnp.arange(a.size, dtype=jnp.float32).reshape(a.shape), functional.abstract(LLAMA))
    tuned = METHOD.attach(settings(), wide, params, jax.random.key(0), meshes.make(MeshConfig()))
    prompt = np.asarray(tuned["embed"]["prompt"])
    rows = {tuple(row) for row in np.asarray(params["embed"]["tokens"]).tolist()}
    assert prompt.shape == (2, 8) and {tuple(row) for row in prompt.tolist()} <= rows
    trains = METHOD.trains(settings(), wide, tuned)
    assert [n for n in weights.arrays(tuned) if trains(n)] == ["embed/prompt"]
    assert flops.parameters(wide)["total"] == weights.count(tuned) == weights.count(params) + 16
    uniform = settings(prompt={"tokens": 2, "init": "uniform"})
    other = METHOD.attach(uniform, wide, params, jax.random.key(0), meshes.make(MeshConfig()))["embed"]["prompt"]
    assert np.abs(np.asarray(other)).max() <= 0.5


def test_refusals():
    for changes, line in (
        ({"freeze_layers": 1}, "freeze_layers: not for method 'prompt', which trains no layer"),
        ({"trained": {"layer_decay": 0.9}}, r"trained.layer_decay: not for method 'prompt'"),
        ({"train": TrainConfig(seq_len=3)}, r"prompt.tokens = 2: more than half of train.seq_len = 3"),
    ):
        with pytest.raises(RequestError, match=line):
            METHOD.check(settings(**changes), FakeBase())
    with pytest.raises(RequestError, match=r"prompt.tokens = 2: the parent has a trained prompt of 5 tokens"):
        METHOD.network(settings(), LLAMA.model_copy(update={"prompt_tokens": 5}))
    with pytest.raises(RequestError, match="task 'lm' packs texts into rows, which have no beginning"):
        METHOD.check_rows(settings(task="lm"), LLAMA, [{"tokens": np.array([1, 2])}])


class FakeBase:
    """A parent without weights."""

    params: dict = {}
    path = "parent"
