"""Attributions versus torch: integrated gradients by a plain sum of many steps, rollout from `output_attentions`."""

import numpy as np
import pytest
import torch

from llmctl.evaluate.attribution.explain import Explainer
from llmctl.evaluate.attribution.settings import AttributionConfig

ROWS = [{"text": "a fine film"}, {"text": "of words"}]
TOLERANCE = 1e-3
STEPS = 1000
CASES = [
    ("encoder", "zero", ""),
    ("decoder", "zero", ""),
    ("decoder", "pad", "so"),
    ("encoder_decoder", "pad", "so"),
]


def theirs(reference, explainer, one, at=None):
    """The output of transformers for one row, at the embeddings `at` of the described tokens."""
    arrays = {k: torch.tensor(v.astype(np.int64))[None] for k, v in one.arrays.items()}
    name = explainer.model.architecture
    ids = arrays["encoder_tokens" if name == "encoder_decoder" else "tokens"]
    embedded = reference.get_input_embeddings()(ids) if at is None else at
    if name == "encoder":
        return reference(inputs_embeds=embedded, output_attentions=True)
    more = {"decoder_input_ids": arrays["tokens"].expand(len(embedded), -1)} if name == "encoder_decoder" else {}
    return reference(inputs_embeds=embedded, output_attentions=True, **more)


def scalar(explainer, one, target, logits):
    """The explained output [B] of logits [B, C], or [B, T, V]."""
    if explainer.model.architecture == "encoder":
        others = torch.cat([logits[:, :target], logits[:, target + 1 :]], 1)
        return logits[:, target] - torch.logsumexp(others, 1)
    log_p = torch.log_softmax(logits, -1)
    return sum(log_p[:, at, token] for at, token in zip(one.arrays["at"], one.arrays["targets"], strict=True))


@pytest.mark.parametrize(("name", "baseline", "completion"), CASES)
def test_gradients_are_those_of_torch(models, references, name, baseline, completion):
    reference = references(name)
    config = AttributionConfig(baseline=baseline, tolerance=TOLERANCE)
    explainer = Explainer(models(name), config)
    rows = [row | ({"completion": completion} if completion else {}) for row in ROWS]
    found = explainer(rows)
    times = Explainer(models(name), AttributionConfig(method="gradient_input", baseline=baseline))(rows)
    for (one, target, _), mine, product in zip(explainer.inputs(rows), found, times, strict=True):
        ids = one.arrays["encoder_tokens" if name == "encoder_decoder" else "tokens"].astype(np.int64)
        table = reference.get_input_embeddings().weight.detach()
        e = table[torch.tensor(ids)]
        base = table[reference.config.pad_token_id] if baseline == "pad" else torch.zeros(16)
        direction = (e - base) * torch.tensor(one.explained)[:, None]

        def gradient(alpha, e=e, one=one, target=target, direction=direction):
            at = (e - (1 - alpha[:, None, None]) * direction).requires_grad_()
            y = scalar(explainer, one, target, theirs(reference, explainer, one, at).logits)
            return y.detach().numpy(), torch.autograd.grad(y.sum(), at)[0].detach()

        # The substitution alpha = t^3 puts more steps near the baseline, where the gradient changes fast.
        t = (torch.arange(STEPS) + 0.5) / STEPS
        summed = sum((gradient(p**3)[1] * (3 * p**2)[:, None, None]).sum(0) for p in t.split(250)) / STEPS
        expected = (summed * direction).sum(-1).numpy()
        y, slope = gradient(torch.tensor([0.0, 1.0]))
        np.testing.assert_allclose([mine.baseline, mine.output], y, atol=2e-5)
        scale = abs(expected).max()
        np.testing.assert_allclose(mine.values_T, expected, atol=2 * TOLERANCE * scale)
        gap, change = abs(mine.values_T.sum() - (y[1] - y[0])), max(abs(y[1] - y[0]), 1e-3 * abs(y).max())
        assert gap <= TOLERANCE * change + 1e-6 and mine.error <= TOLERANCE
        np.testing.assert_allclose(product.values_T, (slope[1] * direction).sum(-1), rtol=2e-5, atol=2e-5)


def rolled(layers):
    """The product of the layers' mixtures of attention [H, T, T] and residual connection."""
    out = np.eye(layers[0].shape[-1])
    for attention in layers:
        out = (0.5 * attention[0].mean(0).numpy() + 0.5 * np.eye(len(out))) @ out
    return out


@pytest.mark.parametrize("name", ["encoder", "decoder", "encoder_decoder"])
def test_rollout_is_that_of_the_attentions_of_transformers(models, references, name):
    explainer = Explainer(models(name), AttributionConfig(method="rollout"))
    rows = [ROWS[0], ROWS[1] | {"completion": "so"}]
    for (one, _, _), mine in zip(explainer.inputs(rows), explainer(rows), strict=True):
        with torch.no_grad():
            made = theirs(references(name), explainer, one)
        if name == "encoder":
            expected = rolled(made.attentions)[0]
        elif name == "decoder":
            expected = rolled(made.attentions)[one.arrays["at"]].mean(0)
        else:
            memory, own = rolled(made.encoder_attentions), np.eye(len(one.arrays["tokens"]))
            source = np.zeros((len(own), len(memory)))
            for self_attention, cross in zip(made.decoder_attentions, made.cross_attentions, strict=True):
                mixture = 0.5 * self_attention[0].mean(0).numpy() + 0.5 * np.eye(len(own))
                own, source = mixture @ own, mixture @ source
                own, source = 0.5 * own, 0.5 * source + 0.5 * cross[0].mean(0).numpy() @ memory
            np.testing.assert_allclose(own.sum(1) + source.sum(1), 1, atol=1e-6)
            expected = source[one.arrays["at"]].mean(0)
        np.testing.assert_allclose(mine.values_T, expected, atol=1e-5)
        assert mine.values_T.min() >= 0
        if name != "encoder_decoder":
            assert mine.values_T.sum() == pytest.approx(1, abs=1e-5)
