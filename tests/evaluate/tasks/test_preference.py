"""Preferences: losses and gradients against references, the adapter-free reference model, and the memory of a step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmctl.config.errors import RequestError
from llmctl.data import splits
from llmctl.data.config import DataConfig
from llmctl.data.examples.preferences import PreferenceRows
from llmctl.data.tokenizers.byte_tokenizer import ByteTokenizer
from llmctl.evaluate.tasks.likelihoods import log_likelihood
from llmctl.evaluate.tasks.losses import Options
from llmctl.evaluate.tasks.preference import TASK, pair_loss
from llmctl.evaluate.tasks.registry import TASKS
from llmctl.evaluate.tasks.rows import RowSettings
from llmctl.evaluate.tasks.settings import PreferenceConfig
from llmctl.model import functional, weights
from llmctl.model.config import ModelConfig

SIZES = {"d_model": 16, "layers": 2, "heads": 2, "kv_heads": 2, "head_dim": 8, "d_ff": 24, "vocab_size": 300}
MODELS = {
    "decoder": ModelConfig(preset="llama-tiny", **SIZES),
    "encoder_decoder": ModelConfig(preset="t5-tiny", encoder_layers=1, **SIZES),
}


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    file = tmp_path_factory.mktemp("preferences") / "x.jsonl"
    file.write_text(
        '{"prompt": "why", "chosen": " yes", "rejected": " no way"}\n'
        '{"prompt": "a longer question", "chosen": " a much longer answer", "rejected": " it"}\n'
        '{"prompt": "", "chosen": "x", "rejected": "y"}\n{"prompt": "b", "chosen": "1", "rejected": "22"}\n'
    )
    data = DataConfig(source="jsonl", path=str(file), validation=0, test=0)
    return splits.load(data)["train"]


def adapted(model, b_scale=0.3):
    """Return parameters whose matrices of attention have low-rank pairs that change the function."""
    params = jax.jit(lambda key: functional.init(model, key))(jax.random.key(0))
    pairs = {}
    for number, m in enumerate(weights.matrices(params, "block")):
        a, b = (
            0.3 * jax.random.normal(jax.random.fold_in(jax.random.key(1), 2 * number + k), shape)
            for k, shape in enumerate(((*m.weight.shape[:-1], 2), (*m.weight.shape[:-2], 2, m.weight.shape[-1])))
        )
        pairs[m.path] = weights.LowRank(m.weight, a, b_scale * b, 2.0)  # fmt: skip
    return weights.updated(params, pairs)


def batch_of(model, examples):
    rows = TASK.rows(model, examples, ByteTokenizer.new(), RowSettings(24))
    return {k: jnp.asarray(a) for k, a in rows.batch(np.arange(4)).items()}


def by_hand(settings, gained, tokens, smoothing):
    """Return the mean loss of pairs of (chosen, rejected) log-likelihoods in numpy."""
    losses = []
    for (c, r), (m, n) in zip(gained, tokens, strict=True):
        beta = settings.beta
        if settings.loss == "dpo":
            h = beta * (c - r)
            losses.append((1 - smoothing) * np.log1p(np.exp(-h)) + smoothing * np.log1p(np.exp(h)))
        elif settings.loss == "ipo":
            losses.append((c / m - r / n - 1 / (2 * beta)) ** 2)
        else:
            losses.append(np.log1p(np.exp(-(beta * c / m - beta * r / n - settings.gap))))
    return np.mean(losses)


@pytest.mark.parametrize(("loss", "smoothing"), [("dpo", 0.0), ("dpo", 0.1), ("ipo", 0.0), ("simpo", 0.0)])
def test_losses_by_hand(loss, smoothing):
    settings = PreferenceConfig(loss=loss, beta=0.5, gap=0.7)
    gained, tokens = np.array([[-3.0, -4.5], [-2.0, 1.0], [0.5, 0.5]]), np.array([[3, 2], [4, 1], [2, 5]])
    total, sums = pair_loss(jnp.array(gained.ravel()), jnp.array(tokens.ravel()), jnp.ones(3), settings, smoothing)
    np.testing.assert_allclose(total / sums["weight"], by_hand(settings, gained, tokens, smoothing), rtol=1e-6)
    scaled = 0.5 * (gained if loss == "dpo" else gained / tokens)
    np.testing.assert_allclose(sums["margin"], (scaled[:, 0] - scaled[:, 1]).sum(), rtol=1e-6)
    assert sums["accuracy"] == (scaled[:, 0] > scaled[:, 1]).sum()
    # A row that only fills the batch counts nothing.
    halved, _ = pair_loss(jnp.array(gained.ravel()), jnp.array(tokens.ravel()), jnp.array([1.0, 0, 0]), settings)
    alone, _ = pair_loss(jnp.array(gained[0]), jnp.array(tokens[0]), jnp.ones(1), settings)
    assert halved == alone


@pytest.mark.parametrize(
    ("architecture", "loss"),
    [
        ("decoder", "dpo"),
        ("decoder", "ipo"),
        ("decoder", "simpo"),
        pytest.param("encoder_decoder", "dpo", marks=pytest.mark.slow),
    ],
)
def test_gradients_equal_those_of_the_whole_formula(architecture, loss, examples):
    """The reference keeps all logits, reads no chunks, and holds the reference model as a second tree."""
    model = MODELS[architecture]
    params, batch = adapted(model), batch_of(MODELS[architecture], examples)
    settings = PreferenceConfig(loss=loss)

    def likelihoods(params):
        found = []
        for prefix in ("", "pair_"):
            own = {k.removeprefix(prefix): a for k, a in batch.items() if k.startswith("pair_") == bool(prefix)}
            logits = functional.lm_logits(model, params, functional.hidden(model, params, own))
            log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), own["targets"][..., None], -1)[..., 0]
            found.append(((log_p * own["weights"]).sum(-1), own["weights"].sum(-1)))
        return jnp.stack([f[0] for f in found], -1), jnp.stack([f[1] for f in found], -1)

    base = weights.without_adapters(params)

    def whole(params):
        (policy, tokens), reference = likelihoods(params), 0.0 if loss == "simpo" else likelihoods(base)[0]
        gained = policy - reference
        return pair_loss(gained.reshape(-1), tokens.reshape(-1), jnp.ones(len(policy)), settings)[0]

    own = TASK.loss_of(model, settings=settings)
    (total, sums), got = jax.jit(jax.value_and_grad(own, has_aux=True))(params, batch)
    want_total, want = jax.jit(jax.value_and_grad(whole))(params)
    np.testing.assert_allclose(total, want_total, rtol=1e-5)
    names = weights.adapter_names(params) if loss != "simpo" else weights.arrays(params)
    got, want = weights.arrays(got), weights.arrays(want)
    # Frozen arrays also carry the reference's gradient in the formula above, so only adapters compare.
    for name in names:
        np.testing.assert_allclose(got[name], want[name], rtol=2e-4, atol=2e-6, err_msg=name)
    assert sums["weight"] == 4


def test_without_adapters_trained_the_model_is_its_own_reference(examples):
    model = MODELS["decoder"]
    batch, params = batch_of(model, examples), adapted(model, b_scale=0.0)
    total, sums = jax.jit(TASK.loss_of(model, settings=PreferenceConfig()))(params, batch)
    np.testing.assert_allclose(total / 4, np.log(2), rtol=1e-6)
    assert sums["margin"] == 0 and sums["accuracy"] == 0
    with pytest.raises(ValueError, match="no adapters"):
        TASK.loss_of(model, settings=PreferenceConfig())(weights.without_adapters(params), batch)


def test_the_reference_reads_no_perturbed_embeddings(examples):
    model = MODELS["decoder"]
    batch, params = batch_of(model, examples), adapted(model, b_scale=0.0)
    shape = (2 * batch["tokens"].shape[0], batch["tokens"].shape[1], model.d_model)
    loss = TASK.loss_of(model, settings=PreferenceConfig())

    offset = jax.random.normal(jax.random.key(3), shape)
    total, _ = jax.jit(loss)(params, batch | {"embedding_offset": offset})
    # Without trained adapters the clean loss is log 2 per pair; a perturbed policy differs from the clean reference.
    assert abs(float(total) / 4 - np.log(2)) > 1e-4


def test_a_small_step_raises_the_margin_as_the_gradient_predicts(examples):
    model = MODELS["decoder"]
    batch, params = batch_of(model, examples), adapted(model)
    loss = jax.jit(jax.value_and_grad(TASK.loss_of(model, settings=PreferenceConfig()), has_aux=True))
    (before, sums), gradient = loss(params, batch)
    trained, named, slopes = weights.adapter_names(params), weights.arrays(params), weights.arrays(gradient)
    rate = 1e-3
    moved = named | {n: named[n] - rate * slopes[n] for n in trained}
    (after, later), _ = loss(weights.rebuild(params, moved), batch)
    predicted = rate * sum(float(jnp.vdot(slopes[n], slopes[n])) for n in trained)
    np.testing.assert_allclose(before - after, predicted, rtol=0.05)
    assert later["margin"] > sums["margin"]


def test_log_likelihood_counts_weighted_targets(examples):
    model = MODELS["decoder"]
    params = jax.jit(lambda key: functional.init(model, key))(jax.random.key(0))
    batch = {k: a for k, a in batch_of(model, examples).items() if not k.startswith("pair_")}
    x = functional.hidden(model, params, batch)
    log_p = jax.nn.log_softmax(functional.lm_logits(model, params, x))
    want = [
        sum(float(log_p[b, t, batch["targets"][b, t]]) for t in np.flatnonzero(batch["weights"][b])) for b in range(4)
    ]
    np.testing.assert_allclose(log_likelihood(model, params, x, batch, jnp.float32), want, rtol=1e-5)


def test_both_rows_read_the_same_prompt(examples):
    tokenizer = ByteTokenizer.new()
    row = PreferenceRows(examples, tokenizer, 24, shuffle=False)[1]
    begins = [int(np.flatnonzero(row[p + "weights"])[0]) for p in ("", "pair_")]
    prompts = [row[p + "tokens"][: b + 1].tolist() for p, b in zip(("", "pair_"), begins, strict=True)]
    assert prompts[0] == prompts[1] and tokenizer.decode(prompts[0]).endswith("on")
    said = row["targets"][row["weights"] > 0].tolist()
    assert tokenizer.decode(said) == " a much longer answer" and said[-1] == tokenizer.eos_id


def test_a_step_needs_no_more_memory_than_the_same_rows_in_supervised_training():
    """The pass of the reference keeps nothing, so the peak is that of a supervised step on the rows of both."""
    model = MODELS["decoder"].model_copy(update={"layers": 6, "d_model": 64, "d_ff": 172})
    params = jax.eval_shape(lambda: adapted(model))
    named, names = weights.arrays(params), weights.adapter_names(params)

    def row(rows):
        kinds = {"tokens": "int32", "targets": "int32", "segments": "int32", "positions": "int32", "weights": "float32"}
        return {k: jax.ShapeDtypeStruct((rows, 128), dtype) for k, dtype in kinds.items()}

    def peak(task, batch, **settings):
        loss = task.loss_of(model, remat="minimal", **settings)

        def total(trained, params, batch):
            return loss(weights.rebuild(params, weights.arrays(params) | trained), batch, jax.random.key(0))[0]

        step = jax.jit(jax.grad(total)).lower({n: named[n] for n in names}, params, batch)
        return step.compile().memory_analysis().temp_size_in_bytes

    pairs = row(8) | {f"pair_{k}": a for k, a in row(8).items()}
    supervised = peak(TASKS["completions"], row(16))
    assert peak(TASK, pairs, settings=PreferenceConfig()) <= 1.15 * supervised


def test_what_does_not_fit():
    with pytest.raises(RequestError, match="compares the model with itself without adapters; use method"):
        TASK.check_method(False, Options(settings=PreferenceConfig()))
    TASK.check_method(False, Options(settings=PreferenceConfig(loss="simpo")))
    with pytest.raises(RequestError, match="label_smoothing: not for"):
        TASK.check_method(True, Options(label_smoothing=0.1, settings=PreferenceConfig(loss="ipo")))
