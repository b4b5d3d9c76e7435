"""Attributions: cases by hand, identities, kinds of tasks and artifacts, averages, the page and the command."""

import json
import re

import jax
import numpy as np
import pytest
from tiny_decoders import BASE, VARIANTS

from llmctl.artifacts import artifact
from llmctl.cli.app import run
from llmctl.compress.quantization.schemes import SCHEMES
from llmctl.config.errors import RequestError, WorkError
from llmctl.config.settings import MeshConfig
from llmctl.data.tokenizers.byte_tokenizer import ByteTokenizer
from llmctl.distributed import mesh as meshes
from llmctl.evaluate.attribution import gradients, page
from llmctl.evaluate.attribution.averages import Average, averages, extremes, words
from llmctl.evaluate.attribution.explain import Explainer, Explanation
from llmctl.evaluate.attribution.inputs import Piece
from llmctl.evaluate.attribution.record import record
from llmctl.evaluate.attribution.settings import AttributionConfig
from llmctl.evaluate.predict import Predictor
from llmctl.evaluate.tasks.registry import TASKS
from llmctl.model import functional, weights
from llmctl.model.config import ModelConfig, families
from llmctl.train.adapters import lora
from llmctl.train.adapters.settings import LoraConfig

LABELS = ["no", "perhaps", "yes"]
SIZES = {"d_model": 16, "layers": 1, "heads": 2, "d_ff": 24, "max_seq_len": 64}
TEXTS = [{"text": t} for t in ("a", "fine film", "näme 漢")]
FAST = AttributionConfig(method="gradient_input")


@pytest.fixture(scope="session")
def save(tmp_path_factory):
    """Save a random encoder for a task, and return its artifact."""
    folder = tmp_path_factory.mktemp("tasks")
    words = ByteTokenizer.new(0)
    words.save(folder / "words")

    def saved(task="classify", change=lambda cfg, params: params, name="", **about):
        out = folder / (name or task)
        if not out.exists():
            labels = LABELS if TASKS[task].classes else []
            given = {"preset": "bert-tiny", **SIZES, "head": TASKS[task].head, "labels": len(labels)}
            given |= {"next_sentence": False, "pooler": False, "head_transform": False}
            given |= {"vocab_size": words.vocab_size, "pooling": TASKS[task].pooling or "mean"}
            cfg = ModelConfig(**{k: v for k, v in (given | about).items() if v is not None})
            drawn = random(functional.abstract(cfg))
            common = {"stage": "finetune", "key": "k", "config": {"train": {"seq_len": 48}}}
            artifact.save(
                out, change(cfg, drawn), cfg, task=task, labels=labels, tokenizer_dir=folder / "words", **common
            )
        return artifact.load(out)

    return saved


def random(shapes):
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda a: rng.normal(0.0, 0.3, a.shape).astype(np.float32), shapes)


def line(function, embeddings):
    """Outputs and products of `function` [T] -> (value, gradient [T]), as a program computes them."""

    def evaluate(row_M, alpha_M):
        made = [function(alpha * embeddings[row]) for row, alpha in zip(row_M, alpha_M, strict=True)]
        return np.array([y for y, _ in made]), np.array([g for _, g in made]) * embeddings[row_M]

    return evaluate


def test_integrals_by_hand():
    x = np.array([[2.0, 3.0], [1.0, -4.0]])
    (one, two) = gradients.integrated(line(lambda a: (2 * a[0] - a[1], np.array([2.0, -1.0])), x), 2, 2, 0.01, 100)
    np.testing.assert_allclose([one.values_T, two.values_T], [[4, -3], [2, 4]])
    assert (one.output, one.baseline, one.difference, two.output) == (1, 0, 1, 6) and one.error < 1e-12
    (one, _) = gradients.integrated(line(lambda a: (a[0] * a[1], a[::-1]), x), 2, 2, 0.01, 100)
    np.testing.assert_allclose(one.values_T, [3, 3])  # x0 * x1 / 2 each

    def kinked(a):  # relu(x0 + x1 - 1), which rises on 4/5 of the line
        return max(a.sum() - 1, 0), np.ones(2) * (a.sum() > 1)

    (one,) = gradients.integrated(line(kinked, x[:1]), 1, 2, 1e-4, 10_000)
    np.testing.assert_allclose(one.values_T, [1.6, 2.4], rtol=1e-4)
    assert one.error <= 1e-4 and one.steps > 24
    (few,) = gradients.integrated(line(kinked, x[:1]), 1, 2, 1e-4, 12)
    assert few.error > 1e-4 and few.steps == 12
    np.testing.assert_allclose(gradients.gradient_input(line(kinked, x[:1]), 1)[0].values_T, [2, 3])


def test_errors_of_two_intervals_do_not_cancel():
    # The gradient is wrong by +1 on one half and by -1 on the other: the sum is right, the attributions are not.
    def evaluate(row_M, alpha_M):
        return alpha_M, np.where(alpha_M < 0.5, 2.0, 0.0)[:, None]

    (one,) = gradients.integrated(evaluate, 1, 1, 0.01, 48)
    assert one.steps > 12 and one.error < 1e-12
    with pytest.raises(WorkError, match="not finite"):
        gradients.integrated(lambda row, alpha: (alpha, np.full((len(alpha), 1), np.nan)), 1, 1, 0.01, 48)


def test_rows_of_a_batch_equal_single_rows(save):
    rows = [*TEXTS, {"text": "a", "pair": "of two"}]
    for method in ("integrated_gradients", "rollout"):
        explainer = Explainer(save(), AttributionConfig(method=method, batch_size=8))
        together = explainer(rows, "yes")
        for row, one in zip(rows, together, strict=True):
            (alone,) = explainer([row], "yes")
            assert alone.pieces == one.pieces
            np.testing.assert_allclose(one.values_T, alone.values_T, atol=1e-5)
            if method == "rollout":
                assert one.values_T.sum() == pytest.approx(1, abs=1e-5)
            else:
                assert one.error <= 0.01 and (one.values_T != 0).sum() == sum(p.kind == "text" for p in one.pieces)
    assert together[3].texts == ["a", "of two"] and [p.part for p in together[3].pieces if p.kind == "text"][:2] == [
        0,
        1,
    ]
    assert "".join(u.piece.text for u in together[2].units if u.piece.kind == "text") == "näme 漢"


@pytest.mark.parametrize("task", ["classify", "multilabel", "regress", "choice"])
def test_the_explained_output_is_that_of_the_prediction(save, task):
    rows = [{"prompt": "who", "choices": ("Ann", "no one", "it")}] if task == "choice" else TEXTS[:2]
    found = Explainer(save(task), FAST)(rows)
    for row, one, p in zip(rows, found, Predictor(save(task)).predictions(rows), strict=True):
        if task == "choice":
            assert one.target == row["choices"][int(p.argmax())]
        elif task == "regress":
            assert one.output == pytest.approx(float(p), abs=1e-5)
        else:
            best = int(p.argmax())
            assert one.target == LABELS[best] and one.output == pytest.approx(np.log(p[best] / (1 - p[best])), abs=1e-4)
            (other,) = Explainer(save(task), FAST)([row], "no")
            assert other.output == pytest.approx(np.log(p[0] / (1 - p[0])), abs=1e-4)


def test_quantized_sparse_and_adapted_weights_equal_their_dense_values(save):
    mesh = meshes.make(MeshConfig())

    def compressed(cfg, params):
        flat = weights.flatten(params)
        for path, w in flat.items():
            if path.endswith("kernel") and "blocks" in path:
                sparse = np.where(np.abs(w) < 0.15, 0, w)
                flat[path] = sparse if "/o/" in path else SCHEMES["nf4" if "/up/" in path else "int8"](sparse, -2, 8)
        flat["embed/tokens"] = SCHEMES["int8"](flat["embed/tokens"], -1, 0)
        tuned = lora.attach(
            cfg, weights.unflatten(flat), LoraConfig(rank=2, alpha=4.0, targets=["up"]), jax.random.key(1), mesh
        )
        return jax.tree.map(lambda a: a + 0.1 if a.shape[-2:] == (2, 24) else a, tuned)

    own = save("classify", compressed, "compressed")
    assert "LowRank" in str(jax.tree.structure(own.params))
    dense = save("classify", lambda *_: jax.tree.map(weights.dense, own.params, is_leaf=weights.is_weight), "dense")
    one, other = (Explainer(found)(TEXTS[1:2], "yes")[0] for found in (own, dense))
    np.testing.assert_allclose(one.values_T, other.values_T, atol=2e-5)
    assert one.error <= 0.01 and abs(one.values_T).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("family", families())
def test_attributions_of_every_family_are_complete(save, family):
    given = {"preset": None, "family": family, **BASE, **VARIANTS.get(family, {})}
    given |= {"vocab_size": ByteTokenizer.new(0).vocab_size, "head": "lm", "labels": 0}
    if encoder := family in ("bert", "roberta", "modern"):
        given |= {"head": "classify", "labels": 3}
    else:
        given |= {"next_sentence": None, "pooler": None, "head_transform": None, "pooling": None}
    found = save("classify" if encoder else "lm", name=f"family-{family}", **given)
    for one in Explainer(found)(TEXTS[1:]):
        assert one.error <= 0.01 and abs(one.values_T).max() > 1e-4


def explanation(text, values, target="yes"):
    words = re.findall(r"\S+", text)
    starts = [m.start() for m in re.finditer(r"\S+", text)]
    pieces = [Piece(w, "text", 0, s, s + len(w)) for w, s in zip(words, starts, strict=True)]
    return Explanation(pieces, [text], np.array(values, float), target, sum(values), 0.0, 0.0, 12)


def test_averages_are_means_of_all_occurrences_per_target():
    found = [explanation("good bad", [1, -2]), explanation("good good rare", [3, 5, 9]), explanation("bad", [7], "no")]
    found += [explanation("bad", [-1])]
    means = averages(found)
    assert means == {"yes": [Average("good", 3.0, 3), Average("bad", -1.5, 2)]}
    assert extremes(means["yes"], 1) == ([means["yes"][0]], [means["yes"][1]])
    assert averages(found, rare=1)["no"] == [Average("bad", 7.0, 1)]
    pieces = [Piece("unhappy, 漢字42"[a:b], "text", 0, a, b) for a, b in ((0, 2), (2, 7), (7, 8), (9, 10), (10, 11))]
    pieces += [Piece("4", "text", 0, 11, 12), Piece("2", "text", 0, 12, 13)]
    one = Explanation(pieces, ["unhappy, 漢字42"], np.arange(1.0, 8), "yes", 0.0)
    assert words(one) == [("unhappy", 3.0), (",", 3.0), ("漢", 4.0), ("字", 5.0), ("42", 13.0)]


def test_the_page_has_every_value_and_needs_no_network(save, tmp_path):
    explainer = Explainer(save(), FAST)
    made = record(
        explainer, [explanation("a <script>alert(1)</script> & b", [1, -0.25, 0.5, 0]), explanation("a", [2])], 5
    )
    made["texts"][1] |= {"completeness_error": 0.2, "steps": 1024, "texts": ["a cut tail"]}
    made |= {"method": "integrated_gradients", "tolerance": 0.01}
    text = page.page(json.loads(json.dumps(made)))
    assert "<script" not in text and "&lt;script&gt;" in text and not re.search(r"(src|href|url|@import|http)", text)
    for value in ("+1<", "−0.25<", "+0.5<", 'title="a: +1"', 'title="b: +0"'):
        assert value in text
    assert '<span class="cut">[9 characters are not read]</span>' in text
    assert "Warning: completeness error 20.0%, more than 1%" in text and page.unfinished(made) == [1]
    assert re.search(r'<th scope="row">a</th><td class="number">\+1\.5</td>\s*<td class="number">2</td>', text)
    assert text.count("<mark") == text.count("</mark>") and text.count("<div") == text.count("</div>")


def test_the_command_writes_json_a_page_and_a_picture(save, tmp_path, capsys):
    path = str(save().path)
    (tmp_path / "rows.csv").write_text("review,label\nfine film,yes\na fine one,no\n")
    files = ["--html", str(tmp_path / "a.html"), "--png", str(tmp_path / "a.png")]
    call = ["explain", path, "--file", str(tmp_path / "rows.csv"), "--column", "text=review", "--target", "yes"]
    assert run([*call, *files, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert [t["target"] for t in made["texts"]] == ["yes", "yes"] and made["averages"][0]["texts"] == 2
    assert all(t["completeness_error"] <= 0.01 for t in made["texts"])
    for one in made["texts"]:
        tokens = [t for t in one["tokens"] if t["kind"] == "text"]
        assert all(one["texts"][0][t["first"] : t["last"]] == t["text"] for t in tokens)
        assert sum(t["attribution"] for t in tokens) == pytest.approx(one["difference"], rel=0.011)
    assert (tmp_path / "a.html").read_text().startswith("<!doctype html>")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert run([*call, *files]) == 2 and "exists already" in capsys.readouterr().err
    for wrong, said in (
        ([path], "give texts, --file or --split"),
        ([path, "a", "--target", "yess"], "did you mean 'yes'"),
        ([path, "a", "--method", "lime"], "must be integrated_gradients, gradient_input or rollout"),
        ([path, " "], "the column 'text' is empty"),
        ([path, "--split", "test"], "its settings name no data"),
        ([path, "a", "--column", "text=review"], "names a column of --file"),
        ([path, "a", "--method", "rollout", "--baseline", "pad"], "rollout has no baseline"),
        ([path, "a", "--batch-size", str(10**12)], "--batch-size 1000000000000: its rows would take"),
        ([str(save("embed").path), "a"], "has no single output per text"),
    ):
        assert run(["explain", *wrong]) == 2
        err = capsys.readouterr().err
        assert said in err and len(err.strip().splitlines()) == 1


def test_what_has_no_attribution_is_refused(save):
    with pytest.raises(RequestError, match="only fills masks"):
        Explainer(save("lm", name="masked", head="lm"))
    with pytest.raises(RequestError, match="trained keys"):
        Explainer(save(name="prefix", prefix_tokens=2), AttributionConfig(method="rollout"))
    with pytest.raises(RequestError, match="predicts a number"):
        Explainer(save("regress"), FAST)(TEXTS, "yes")
