"""AdaLoRA: budget and importance by hand, the allocation of PEFT step by step, and ranks that an artifact stores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmctl.config.errors import RequestError
from llmctl.config.settings import MeshConfig
from llmctl.distributed import mesh as meshes
from llmctl.model import functional, weights
from llmctl.model.config import ModelConfig
from llmctl.pipeline.stages import finetune
from llmctl.train.adapters.registry import METHODS
from llmctl.train.adapters.settings import AdaLoraConfig, LoraConfig
from llmctl.train.rank_budget import Allocator, Budget

TINY = ModelConfig.model_validate(
    {"family": "llama", "vocab_size": 32, "d_model": 16, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 4,
     "d_ff": 24}
)  # fmt: skip


def test_the_budget_falls_by_a_cubic_schedule():
    budget = Budget(first=72, last=8, start=2, settled=10, interval=2)
    assert [int(budget.at(s)) for s in (1, 2, 4, 6, 8, 10, 12)] == [72, 72, 35, 16, 9, 8, 8]


def test_triplets_of_the_highest_importance_are_kept_exactly_within_the_budget():
    """Importance is that of the value plus the means over a's column and b's row; equal ones are cut by their order."""
    path, other = "blocks/q/kernel", "blocks/v/kernel"
    ranks = Allocator({path: (1, 1, 2), other: (1, 1, 2)}, Budget(4, 2, 0, 1, 1), 0.5, 0.5)
    scores = {
        f"{path}:a": jnp.array([[[1.0, 0.0], [3.0, 0.0]]]), f"{path}:b": jnp.array([[[4.0], [1.0]]]),
        f"{path}:e": jnp.array([[[1.0, 0.0]]]),
    }  # fmt: skip
    np.testing.assert_allclose(ranks.importance(scores, path), [[[2 + 4 + 1, 0 + 1 + 0]]])
    scores |= {n.replace("/q/", "/v/"): jnp.zeros_like(a) + 0.5 for n, a in scores.items()}
    for budget, found in ((1, [[True, False], [False, False]]), (2, [[True, False], [True, False]]),
                          (3, [[True, False], [True, True]])):  # fmt: skip
        kept = ranks.choose(scores, jnp.asarray(budget))
        assert [kept[p].reshape(-1).tolist() for p in (path, other)] == found


def pairs_of(rng, shapes):
    return {n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in shapes.items()}


@pytest.mark.filterwarnings("ignore")
def test_ranks_are_allocated_as_peft_allocates_them():
    """The same weights and gradients at every step leave the same singular values, from start to end."""
    theirs, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    steps, rank, sizes = 14, 3, {"q": (5, 4), "v": (5, 6)}

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.v = (torch.nn.Linear(*sizes[n], bias=False) for n in "qv")

    settings = theirs.AdaLoraConfig(
        init_r=rank, target_r=1, lora_alpha=6, tinit=2, tfinal=4, deltaT=3, total_step=steps, target_modules=["q", "v"]
    )
    model = theirs.get_peft_model(torch.nn.Sequential(Block(), Block()), settings)
    path = {n: f"decoder/blocks/attn/{n}/kernel" for n in sizes}
    shapes = {}
    for n, (i, o) in sizes.items():
        shapes |= {f"{path[n]}:a": (2, i, rank), f"{path[n]}:b": (2, rank, o), f"{path[n]}:e": (2, 1, rank)}
    budget = Budget(first=2 * 2 * rank, last=2 * 2, start=2, settled=steps - 4, interval=3)
    ranks = Allocator(dict.fromkeys(path.values(), (2, 1, rank)), budget, 0.85, 0.85)
    rng, update = np.random.default_rng(0), jax.jit(ranks.after_step)
    memory = ranks.memory(pairs_of(rng, shapes))
    zeros = []
    for step in range(1, steps + 1):
        params, gradients = pairs_of(rng, shapes), pairs_of(rng, shapes)
        for n in sizes:
            for layer in (0, 1):
                module = getattr(model.base_model.model[layer], n)
                for part, p in (("a", module.lora_A), ("b", module.lora_B), ("e", module.lora_E)):
                    p["default"].data = torch.tensor(np.asarray(params[f"{path[n]}:{part}"][layer]).T)
                    p["default"].grad = torch.tensor(np.asarray(gradients[f"{path[n]}:{part}"][layer]).T)
        model.base_model.update_and_allocate(step)
        state = update({"params": params, "gradients": gradients, "memory": memory}, step)
        memory = state["memory"]
        for n in sizes:
            for layer in (0, 1):
                expected = getattr(model.base_model.model[layer], n).lora_E["default"].detach().numpy()
                found = state["params"][f"{path[n]}:e"][layer].T
                np.testing.assert_allclose(found, expected, atol=1e-6, err_msg=f"step {step}")
        zeros.append(sum(int((state["params"][f"{path[n]}:e"] == 0).sum()) for n in sizes))
    # Removed at steps 3, 6 and 9, and for good from step 10 on.
    assert zeros[:2] == [0, 0] and 0 < zeros[2] < zeros[5] < zeros[8] <= 8 and zeros[3] == 0
    assert zeros[9:] == [8] * 5


def test_a_skipped_step_delays_the_final_choice():
    path = "decoder/blocks/attn/q/kernel"
    ranks = Allocator({path: (1, 1, 2)}, Budget(2, 1, 0, 3, 10), 0.5, 0.5)
    named = {f"{path}:a": jnp.ones((1, 2, 2)), f"{path}:b": jnp.ones((1, 2, 2)), f"{path}:e": jnp.ones((1, 1, 2))}
    state = {"params": named, "ema": dict(named), "gradients": named, "memory": ranks.memory(named)}
    first = ranks.after_step(state, jnp.asarray(2))
    assert first["params"][f"{path}:e"].all() and not first["memory"]["settled"]
    late = ranks.after_step(first | {"gradients": named}, jnp.asarray(5))  # step 3 was skipped
    assert late["memory"]["settled"] and int((late["params"][f"{path}:e"] != 0).sum()) == 1
    assert int((late["ema"][f"{path}:e"] != 0).sum()) == 1


def test_pairs_store_only_what_is_kept():
    a = jnp.arange(1.0, 13.0).reshape(2, 2, 3)
    b = jnp.arange(1.0, 19.0).reshape(2, 3, 3)
    w = weights.Svd(jnp.zeros((2, 2, 3)), a, b, jnp.array([[[0.0, 2.0, 0.0]], [[3.0, 0.0, -1.0]]]), 0.5)
    kept = w.truncated()
    assert kept.kind == "low_rank" and kept.a.shape == (2, 2, 2) and kept.b.shape == (2, 2, 3)
    assert not kept.a[0, :, 1].any() and not kept.b[0, 1].any()
    np.testing.assert_array_equal(kept.dense(), w.dense())
    empty = weights.Svd(jnp.ones((2, 2, 3)), a, b, jnp.zeros((2, 1, 3)), 0.5)
    assert weights.is_plain(empty.truncated())


def test_the_record_says_how_many_ranks_are_trained_and_what_has_no_meaning():
    config = finetune.Config(method="adalora", lora=LoraConfig(rank=2, targets=["q", "up"]))
    one = meshes.make(MeshConfig())
    method = METHODS["adalora"]
    tuned = jax.eval_shape(lambda p: method.attach(config, TINY, p, jax.random.key(0), one), functional.abstract(TINY))
    trains = method.trains(config, TINY, tuned)
    sizes = sum(a.size for n, a in weights.arrays(tuned).items() if trains(n))
    assert sizes == 2 * 3 * (16 + 1 + 16 + 16 + 1 + 24)
    fields = method.during(config, tuned, 100)
    assert fields["best_from"] == 70
    with pytest.raises(RequestError, match="adalora: 10 first and 95 last steps leave none of 100"):
        method.during(config.model_copy(update={"adalora": AdaLoraConfig(final=95.0)}), tuned, 100)
    with pytest.raises(RequestError, match=r"lora\.rslora: not for method 'adalora'"):
        method.check(config.model_copy(update={"lora": LoraConfig(rslora=True)}), None)


def test_orthogonality_by_hand():
    w = weights.Svd(
        jnp.zeros((1, 2, 2)), jnp.array([[[1.0, 1.0], [0.0, 1.0]]]), 2 * jnp.eye(2)[None], jnp.zeros((1, 1, 2)), 1.0
    )
    np.testing.assert_allclose(weights.orthogonality(w), np.sqrt(3) + np.sqrt(18), rtol=1e-6)
