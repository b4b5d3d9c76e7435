"""Attacks on a tiny trained classifier: they lower its accuracy more than random substitutions of equal budget."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import qwix

from llmctl.artifacts import artifact
from llmctl.config.errors import RequestError
from llmctl.config.settings import MeshConfig
from llmctl.data import splits
from llmctl.data.config import DataConfig, TokenizerConfig
from llmctl.data.tokenizers import loading
from llmctl.distributed import mesh as meshes
from llmctl.evaluate import programs
from llmctl.evaluate.predict import Predictor
from llmctl.evaluate.probes.registry import PROBES
from llmctl.evaluate.robustness import token_attack, word_attack
from llmctl.evaluate.robustness.outcome import Outcome
from llmctl.evaluate.robustness.settings import AttackConfig
from llmctl.evaluate.settings import MeasureConfig
from llmctl.evaluate.setup import Held, Setup
from llmctl.evaluate.tasks.registry import TASKS
from llmctl.evaluate.tasks.rows import RowSettings
from llmctl.model import functional, weights
from llmctl.model.config import ModelConfig

GOOD, BAD = ("fine", "grand", "bright", "warm", "lovely"), ("poor", "grey", "dull", "cold", "awful")
PLAIN = ("the", "story", "of", "a", "man", "who", "walks", "home", "with", "his", "dog", "and", "sings")
LENGTH = 40
PROBE = PROBES["attack"]
FAMILIES = {
    "decoder": {"preset": "llama-tiny"},
    "encoder": {"preset": "bert-tiny", "pooler": False, "head_transform": False, "next_sentence": False},
    "t5": {"preset": "t5-tiny", "architecture": "encoder", "encoder_layers": 0},
}


def text(rng, label):
    """Three words of the label's side, one of the other side, and plain words."""
    own, other = (BAD, GOOD)[:: 1 - 2 * label]
    return " ".join(rng.permutation([*rng.choice(own, 3), *rng.choice(other, 1), *rng.choice(PLAIN, 9)]))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A data set, and a function that trains a classifier of a family on it."""
    folder = tmp_path_factory.mktemp("attack")
    rng = np.random.default_rng(0)
    lines = [f"{text(rng, i % 2)},{('neg', 'pos')[i % 2]}" for i in range(320)]
    (folder / "data.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    found = splits.load(DataConfig(source="csv", path=str(folder / "data.csv"), test=0.4))
    words = loading.train(found["train"].texts(), TokenizerConfig(vocab_size=300))
    words.save(folder / "words")
    task, made = TASKS["classify"], {}

    def train(family):
        if family in made:
            return made[family]
        cfg = ModelConfig(
            d_model=16, layers=1, heads=2, kv_heads=2, head_dim=8, d_ff=24, max_seq_len=48, pooling="mean",
            vocab_size=words.vocab_size, head="classify", labels=2, **FAMILIES[family],
        )  # fmt: skip
        params = jax.jit(lambda key: functional.init(cfg, key))(jax.random.key(0))
        rows = task.rows(cfg, found["train"], words, RowSettings(LENGTH))
        batch = {k: jnp.array(a) for k, a in rows.batch(np.arange(len(rows))).items()}
        loss, adam = task.loss_of(cfg), optax.adam(1e-2)

        @jax.jit
        def fit(params):
            def step(carry, _):
                params, state = carry
                grads = jax.grad(lambda p: loss(p, batch)[0] / len(rows))(params)
                updates, state = adam.update(grads, state)
                return (optax.apply_updates(params, updates), state), None

            return jax.lax.scan(step, (params, adam.init(params)), length=100)[0][0]

        artifact.save(
            folder / family, fit(params), cfg, stage="finetune", task="classify", labels=["neg", "pos"], key="k",
            config={"train": {"seq_len": LENGTH}}, tokenizer_dir=folder / "words",
        )  # fmt: skip
        made[family] = artifact.load(folder / family, meshes.make(MeshConfig()))
        return made[family]

    return SimpleNamespace(model=train, held=Held(found["test"], "test", folder / "corpus"), folder=folder, words=words)


def setup():
    return Setup(meshes.make(MeshConfig()), LENGTH, LENGTH, 32, "tail", "float32")


@pytest.fixture(scope="module")
def synonyms(trained):
    """Each word of a side has synonyms of both sides, and each plain word has plain ones."""
    file = trained.folder / "synonyms.txt"
    file.write_text("\n".join([", ".join([*GOOD, *BAD]), ", ".join(PLAIN)]))
    return str(file)


@pytest.mark.parametrize("family", FAMILIES)
def test_attacks_lower_accuracy_more_than_random_substitutions_of_equal_budget(trained, synonyms, family):
    settings = AttackConfig(budget=0.2, examples=100, synonyms=synonyms)
    measured = PROBE.measure(trained.model(family), trained.held, setup(), settings)
    found = measured.metrics
    assert found["accuracy"] > 0.85 and found["examples"] == 100
    for attack, random in (("hotflip", "random_tokens"), ("textfooler", "random_words")):
        a, r = (found[f"accuracy_under_{name}"] for name in (attack, random))
        assert found[f"accuracy_under_{attack}_high"] < found[f"accuracy_under_{random}_low"], (a, r)
        for name in (attack, random):
            edits, attacked = measured.values[f"edits_under_{name}"].T
            assert attacked.sum() == measured.values["accuracy"].sum() and edits[attacked == 0].sum() == 0
            limit = 0.2 * (LENGTH if "token" in name or name == "hotflip" else 13)
            assert 1 <= found[f"edits_under_{name}"] <= limit and edits.max() <= limit
    assert "at most 20% of the tokens and words substituted, seed 0" in measured.protocol
    # Each written text deceives the classifier, as `predict` sees it; token ids need not survive a second tokenization.
    records = [r for r in measured.written or () if r["attack"] in ("textfooler", "random_words")]
    p = Predictor(trained.model(family), 8).predictions([{"text": r["text"]} for r in records])
    said = [("neg", "pos")[int(np.argmax(each))] for each in p]
    assert records and all(s != r["label"] for s, r in zip(said, records, strict=True))
    if family == "t5":
        assert PROBE.measure(trained.model(family), trained.held, setup(), settings).metrics == found


def test_hotflip_selects_the_largest_product_of_gradient_and_difference(trained):
    """The reference differentiates the loss by the table, with one row per position, and tries every substitution."""
    model = trained.model("decoder")
    cfg, params, task = model.model, model.params, TASKS["classify"]
    rows = task.rows(cfg, trained.held.examples, trained.words, RowSettings(LENGTH, shuffle=False))
    batch = {k: a for k, a in rows.batch(np.arange(4)).items() if k in task.reads}
    label = np.array([0, 1, 0, 1])
    table, small = np.array(params["embed"]["tokens"]), cfg.model_copy(update={"vocab_size": LENGTH})
    allowed = token_attack.attackable(trained.words, len(table))
    assert not allowed[list(trained.words.special_ids.values())].any() and allowed.sum() > 20
    open_BT = (batch["segments"] > 0) & allowed[batch["tokens"]]
    open_BT[3] = False
    flip = token_attack.flipper(cfg, "float32")
    found = np.array(flip(params, batch, label, open_BT, allowed))
    assert found[3, 0] == -1
    for b in range(3):
        one = {k: a[b : b + 1] for k, a in batch.items()}

        def loss(rows_TD, one=one, b=b):
            own = {**params, "embed": {**params["embed"], "tokens": rows_TD}}
            there = one | {"tokens": np.arange(LENGTH)[None]}
            y = functional.outputs(small, own, functional.hidden(small, own, there), there, "float32")
            return -jax.nn.log_softmax(y)[0, label[b]]

        gradient_TD = np.array(jax.jit(jax.grad(loss))(table[one["tokens"][0]]))
        rise_TV = gradient_TD @ table.T - (gradient_TD * table[one["tokens"][0]]).sum(-1, keepdims=True)
        rise_TV[:, ~allowed] = -np.inf
        rise_TV[~open_BT[b]] = -np.inf
        rise_TV[np.arange(LENGTH), one["tokens"][0]] = -np.inf
        assert tuple(found[b]) == np.unravel_index(rise_TV.argmax(), rise_TV.shape)
    near = np.array(token_attack.flipper(cfg, "float32", 0.3)(params, batch, label, open_BT, allowed))
    unit = table / np.linalg.norm(table, axis=-1, keepdims=True)
    for b in range(3):
        assert near[b, 0] == -1 or unit[near[b, 1]] @ unit[batch["tokens"][b, near[b, 0]]] >= 0.3
    none = np.array(token_attack.flipper(cfg, "float32", 0.999)(params, batch, label, open_BT, allowed))
    assert (none[:, 0] == -1).all()


def test_quantized_activations_do_not_hide_the_gradient(trained):
    """An int8 classifier with int8 activations: the substitutions are those of the same weights with exact inputs."""
    model = trained.model("decoder")
    rows = TASKS["classify"].rows(model.model, trained.held.examples, trained.words, RowSettings(LENGTH, shuffle=False))
    batch = {k: a for k, a in rows.batch(np.arange(8)).items() if k in TASKS["classify"].reads}
    table = model.params["embed"]["tokens"]
    allowed = token_attack.attackable(trained.words, len(table))
    flat = weights.flatten(model.params)
    kernels = {path for path in flat if "/blocks/" in path and path.endswith("kernel")}
    exact, rounded = (
        {p: weights.Quantized(qwix.quantize(w, "int8", channelwise_axes=[0, 2]), kind) if p in kernels else w
         for p, w in flat.items()}
        for kind in ("", "int8")
    )  # fmt: skip
    flip = token_attack.flipper(model.model, "float32")
    inputs = batch, np.zeros(8, int), (batch["segments"] > 0) & allowed[batch["tokens"]], allowed
    a, b = (np.array(flip(weights.unflatten(tree), *inputs)) for tree in (exact, rounded))
    assert len(kernels) == 7 and (a[:, 0] >= 0).all() and (a == b).all()


def test_textfooler_takes_the_most_important_word_and_the_first_synonym_that_deceives():
    """A linear classifier of words, whose probabilities are known by hand."""
    weights = {"good": 2.0, "nice": 1.0, "ok": -0.5, "meh": -1.5, "bad": -3.0, "film": 0.1, "movie": 0.3}

    def predict(rows):
        z = np.array([sum(weights.get(w, 0.0) for w in row["text"].split()) for row in rows])
        return np.stack([1 / (1 + np.exp(z)), 1 / (1 + np.exp(-z))], axis=1)

    known = {"good": ["ok", "bad", "meh"], "nice": ["ok"], "film": ["movie"], "the": ["that"]}
    rows = [{"text": "the nice good film"}, {"text": "the film"}, {"text": "bad film"}]
    texts = [word_attack.text_of(row, ("text",), known) for row in rows]
    attack = word_attack.WordAttack(texts, np.array([1, 1, 1]), predict, fraction=0.5, seed=0)
    assert attack.budget_N.tolist() == [2, 1, 1]
    outcome, after = attack.textfooler(np.array([True, True, False]))
    # "good" comes first; of its synonyms, "ok" leaves a sum of 0.6, "bad" is the first that makes it negative.
    assert [row["text"] for row in after] == ["the nice bad film", "the film", "bad film"]
    assert outcome.edits_N.tolist() == [1, 0, 0] and outcome.right_N.tolist() == [False, True, False]
    # Without a synonym that deceives, the one with the lowest probability stays, if it is lower than before.
    texts = [word_attack.text_of(rows[0], ("text",), {"good": ["nice", "ok"], "nice": ["good", "ok"]})]
    attack = word_attack.WordAttack(texts, np.array([1]), predict, fraction=0.5, seed=0)
    outcome, after = attack.textfooler(np.array([True]))
    assert after[0]["text"] == "the ok ok film" and outcome.edits_N.tolist() == [2] and not outcome.right_N[0]


def test_an_outcome_counts_what_is_left_to_attack():
    outcome = Outcome.before(np.array([True, False, True]), np.array([1, 2, 0]))
    assert outcome.active().tolist() == [0]
    outcome.give_up(np.array([0]))
    assert not len(outcome.active())


def test_programs_are_planned(trained):
    model = trained.model("encoder")
    there = SimpleNamespace(model=model.model, params=functional.abstract(model.model), manifest=model.manifest)
    config = MeasureConfig(tasks=["attack"], batch_size=4)
    found = programs.scoring(config, DataConfig(), "a", {"a": there}, meshes.make(MeshConfig()))  # pyright: ignore[reportArgumentType]
    assert [p.title for p in found] == ["attack on a", "HotFlip on a"]
    assert found[1].trace().out_info.shape == (4, 2) and found[1].flops > 2 * found[0].flops


def test_bad_requests_are_refused(trained):
    manifest = SimpleNamespace(model=trained.model("encoder").model, task="multilabel")
    with pytest.raises(RequestError, match=r"m: tasks: 'attack' needs a classifier .*not task 'multilabel'"):
        PROBE.check_model(manifest, AttackConfig(), "m")  # pyright: ignore[reportArgumentType]
    manifest = SimpleNamespace(model=trained.model("encoder").model, task="classify")
    with pytest.raises(RequestError, match=r"synonyms: none.txt: cannot be read: No such file"):
        PROBE.check_model(manifest, AttackConfig(synonyms="none.txt"), "m")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="greater than 0"):
        AttackConfig(budget=0)
    with pytest.raises(ValueError, match="names a method twice"):
        AttackConfig(methods=["hotflip", "hotflip"])
