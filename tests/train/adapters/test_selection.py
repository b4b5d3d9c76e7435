"""Choice of what is trained: which arrays move, by which factor, and when, on a toy model with gradients of one."""

from contextlib import nullcontext
from itertools import pairwise
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmctl.config.errors import RequestError
from llmctl.config.settings import OptimConfig, TrainConfig
from llmctl.model import functional, weights
from llmctl.model.config import ModelConfig
from llmctl.pipeline.stages import finetune
from llmctl.train import task_head
from llmctl.train.adapters import selection
from llmctl.train.adapters.registry import METHODS
from llmctl.train.job import Job, split
from llmctl.train.step import make_step
from llmctl.train.training_state import fresh

LAYERS = 3
MODEL = SimpleNamespace(layers=LAYERS, encoder_layers=0, family="toy")
SGD = OptimConfig(name="sgd", momentum=0.0, learning_rate=1.0, warmup=0, schedule="constant", clip=0, weight_decay=0)


def toy(value):
    """A tree with the names of a decoder's parameters."""
    return {
        "embed": {"tokens": jnp.full((4, 2), value)},
        "decoder": {
            "blocks": {"attn_norm": {"scale": jnp.full((LAYERS, 2), value)},
                       "mlp": {"up": {"kernel": jnp.full((LAYERS, 2, 2), value)}}},
            "norm": {"scale": jnp.full(2, value)},
        },
        "head": {"out": {"kernel": jnp.full((2, 2), value)}},
    }  # fmt: skip


def loss(params, batch, key):
    total = sum(a.sum() for a in weights.arrays(params).values())
    return total, {"loss": total, "weight": jnp.float32(1)}


def states(trained, optim=SGD, steps=1, value=0.0, **changes):
    """Return the parameters before and after each step, and the states."""
    config = finetune.Config(trained=trained, **changes)
    method, params = METHODS[config.method], toy(value)
    fields = selection.job_fields(config, method, MODEL, params)
    fields |= selection.during(config, method, MODEL, params, steps)
    job = Job(params, loss=loss, rows=None, validate=None, **fields)
    step, optimizer = make_step(job, TrainConfig(steps=steps), optim, 0)
    named, fixed = split(job)
    found, step = [fresh(optimizer, optim, named)], jax.jit(step)
    for _ in range(steps):
        found.append(step(found[-1], (fixed, ()), {})[0])
    return [{**fixed, **s["params"]} for s in found], found


def per_layer(a):
    """Return the value of each layer, which all its entries have."""
    a = np.asarray(a).reshape(len(a), -1)
    assert (a == a[:, :1]).all()
    return a[:, 0].tolist()


UP, NORM = "decoder/blocks/mlp/up/kernel", "decoder/blocks/attn_norm/scale"


def test_rates_fall_from_the_head_to_the_embeddings():
    """One step of SGD with a gradient and a rate of 1 moves each entry by minus its factor."""
    after = states({"layer_decay": 0.5, "head_rate": 4.0})[0][1]
    assert per_layer(after[UP]) == per_layer(after[NORM]) == [-0.125, -0.25, -0.5]
    for name, factor in (("embed/tokens", 0.0625), ("decoder/norm/scale", 1.0), ("head/out/kernel", 4.0)):
        np.testing.assert_array_equal(after[name], np.full_like(after[name], -factor))


def test_without_settings_all_rates_are_one():
    after = states({})[0][1]
    assert all((np.asarray(a) == -1).all() for a in after.values())


def test_rates_multiply_those_of_the_method():
    config = finetune.Config(method="lora", lora={"plus_ratio": 16.0}, trained={"layer_decay": 0.5})
    params = {"decoder": {"blocks": {"up": {"kernel": weights.LowRank(*(jnp.ones((2, 3, 3)),) * 3, 1.0)}}}}
    rate = selection.job_fields(config, METHODS["lora"], MODEL, params)["rate"]
    assert rate("decoder/blocks/up/kernel:b").tolist() == [[[4.0]], [[8.0]]]
    assert rate("decoder/blocks/up/kernel:a").tolist() == [[[0.25]], [[0.5]]]


def test_the_last_layers_alone_move_and_weight_decay_moves_nothing_else():
    decays = SGD.model_copy(update={"weight_decay": 0.5})
    (_, after), found = states({"last_layers": 2}, decays, value=1.0)
    assert per_layer(after[UP]) == [1.0, -0.5, -0.5]
    assert per_layer(after[NORM]) == [1.0, 0.0, 0.0]
    np.testing.assert_array_equal(after["embed/tokens"], 1)
    assert "embed/tokens" not in found[0]["params"]  # and it has no optimizer state


def test_patterns_and_the_head_move():
    after = states({"patterns": ["norm"]})[0][1]
    moved = {name for name, a in after.items() if np.asarray(a).any()}
    assert moved == {NORM, "decoder/norm/scale", "head/out/kernel"}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_layers_are_unfrozen_from_the_last_to_the_first(name):
    """Two steps per level. Moments are zero before, and the first update is that of a first step."""
    optim = SGD.model_copy(update={"name": name, "weight_decay": 0.1, "learning_rate": 0.5, "beta2": 0.999})
    params, found = states({"unfreeze_every": 2}, optim, steps=9, value=1.0)
    first_steps = []
    for before, after in pairwise(params):
        moved = [k for k in (0, 1, 2) if per_layer(before[NORM])[k] != per_layer(after[NORM])[k]]
        first_steps.append((bool((before["embed/tokens"] != after["embed/tokens"]).any()), moved))
    layers = [[], [], [2], [2], [1, 2], [1, 2], [0, 1, 2], [0, 1, 2], [0, 1, 2]]
    assert first_steps == [(i == 8, moved) for i, moved in enumerate(layers)]
    for i, state in enumerate(found):
        moments = [a for a in jax.tree.leaves(state["optimizer"]) if a.shape == (LAYERS, 2)]
        still = [k for k in range(LAYERS) if all(not a[k].any() for a in moments)]
        assert still == [k for k in range(LAYERS) if 2 * (LAYERS - k) >= i]
    head = params[1]["decoder/norm/scale"][0] - params[0]["decoder/norm/scale"][0]
    for layer, step in ((2, 2), (1, 4), (0, 6)):
        moved = params[step + 1][NORM][layer, 0] - params[step][NORM][layer, 0]
        np.testing.assert_allclose(moved, head, rtol=1e-5)


def test_without_a_head_the_last_layer_starts():
    config = finetune.Config(task="lm", trained={"unfreeze_every": 0.25})
    params = {k: v for k, v in toy(0.0).items() if k != "head"}
    starts = selection.during(config, METHODS["full"], MODEL, params, 16)["starts"]
    assert starts(UP).ravel().tolist() == [8, 4, 0]
    assert (starts("embed/tokens"), starts("decoder/norm/scale"), starts("extra/shift")) == (12, 0, 0)


LLAMA = ModelConfig.model_validate(
    {"family": "llama", "vocab_size": 32, "d_model": 16, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 4,
     "d_ff": 24, "head": "classify", "labels": 2}
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"trained": {"last_layers": 3}}, "trained.last_layers: 3 of 2 layers"),
        ({"freeze_layers": 3}, "freeze_layers: 3 of 2 layers"),
        ({"trained": {"unfreeze_every": 0.005}}, "trained.unfreeze_every = 0.005: rounds to 0 of 90 steps"),
        ({"method": "head", "trained": {"last_layers": 1}}, "method 'head' trains nothing that it freezes"),
        ({"method": "head", "trained": {"layer_decay": 0.9}}, "trained.layer_decay: method 'head' trains no layer"),
        ({"method": "head", "trained": {"unfreeze_every": 9}}, "trained.unfreeze_every: method 'head' trains no layer"),
        ({"method": "head", "trained": {"patterns": ["norm"]}}, "trained.patterns: not for method 'head', say"),
        ({"trained": {"patterns": ["norm", "nrm"]}}, "trained.patterns: no parameter matches 'nrm'; names are as dec"),
        ({"trained": {"unfreeze_every": 30}}, "first layer would be trained from step 90 on, and the run has 90 steps"),
    ],
)
def test_what_names_nothing_or_does_nothing_is_refused(changes, line):
    config, params = finetune.Config(**changes), functional.abstract(LLAMA)
    with pytest.raises(RequestError, match=line):
        selection.job_fields(config, METHODS[config.method], LLAMA, params)
        selection.during(config, METHODS[config.method], LLAMA, params, 90)


def test_other_refusals():
    headless = {k: v for k, v in functional.abstract(LLAMA).items() if k != "head"}
    with pytest.raises(RequestError, match=r"trained.head_rate: task 'lm' has no head of its own"):
        selection.job_fields(finetune.Config(task="lm", trained={"head_rate": 5.0}), METHODS["full"], LLAMA, headless)
    only_embeddings = finetune.Config(task="lm", trained={"patterns": ["embed"], "last_layers": 1})
    with pytest.raises(RequestError, match=r"trained: nothing is left to train"):
        selection.job_fields(only_embeddings, METHODS["full"], LLAMA, headless)
    with pytest.raises(ValueError, match=r"freeze_layers and trained.last_layers exclude each other"):
        finetune.Config(freeze_layers=1, trained={"last_layers": 1})
    with pytest.raises(ValueError, match=r"optim.spike: not with trained.unfreeze_every, because each unfrozen layer"):
        finetune.Config(optim={"spike": 6.0}, trained={"unfreeze_every": 2})
    for setting, given in (
        ("trained.unfreeze_every", {"trained": {"unfreeze_every": 2}}),
        ("trained.last_layers", {"trained": {"last_layers": 1}}),
        ("freeze_layers", {"freeze_layers": 1}),
    ):
        with pytest.raises(RequestError, match=f"^{setting}: not for method 'adalora', which takes ranks"):
            METHODS["adalora"].check(finetune.Config(method="adalora", **given), None)


@pytest.mark.parametrize(
    ("lora", "freezing", "line"),
    [
        ({"targets": ["q", "embed"]}, {"freeze_layers": 1}, "lora.targets: freeze_layers freezes all of embed; leave"),
        ({"modules_to_save": ["embed"]}, {"trained": {"last_layers": 1}}, "trained.last_layers freezes all of embed"),
        ({"targets": ["q"]}, {"freeze_layers": 2}, "lora.targets: freeze_layers freezes all of q"),
        ({"targets": ["q"], "modules_to_save": ["lm_head", "norm"]}, {"freeze_layers": 1}, ""),
        ({"targets": ["q"]}, {"trained": {"last_layers": 1}}, ""),
        ({"targets": ["embed"]}, {}, ""),
    ],
)
def test_modules_that_are_frozen_as_a_whole_are_refused(lora, freezing, line):
    config = finetune.Config(method="lora", lora=lora, **freezing)
    levels = selection._levels(LLAMA, functional.abstract(LLAMA))
    with pytest.raises(RequestError, match=line) if line else nullcontext():
        selection._check_modules(config, levels)


def test_the_deeper_stack_limits_frozen_layers():
    t5 = ModelConfig.model_validate(
        {"family": "t5", "vocab_size": 32, "d_model": 16, "layers": 2, "encoder_layers": 4, "heads": 4, "kv_heads": 4,
         "head_dim": 4, "d_ff": 24}
    )  # fmt: skip
    params = functional.abstract(t5)
    assert selection.job_fields(finetune.Config(freeze_layers=3), METHODS["full"], t5, params)["frozen_layers"] == 3
    with pytest.raises(RequestError, match="freeze_layers: 5 of 4 layers"):
        selection.job_fields(finetune.Config(freeze_layers=5), METHODS["full"], t5, params)


def test_a_prompt_whose_first_vector_stands_for_the_text_is_noticed():
    first = LLAMA.model_copy(update={"pooling": "first", "prompt_tokens": 3})
    assert task_head.prompt_hint(first).startswith("the first vector of the trained prompt stands for the text")
    for changes in ({"pooling": "mean"}, {"prompt_tokens": 0}, {"head": "tokens"}):
        assert not task_head.prompt_hint(first.model_copy(update=changes))
