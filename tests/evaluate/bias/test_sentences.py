"""CrowS-Pairs and StereoSet: scores of sentences against `transformers`, and their summaries by hand."""

import csv
import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers as hf

from llmctl.artifacts import artifact
from llmctl.cli import app
from llmctl.config.errors import RequestError
from llmctl.config.settings import MeshConfig
from llmctl.convert import hf_folder
from llmctl.data.tokenizers.byte_tokenizer import ByteTokenizer
from llmctl.distributed import mesh as meshes
from llmctl.evaluate.bias import crows_pairs, stereoset
from llmctl.evaluate.bias.sentence_scores import SentenceModel
from llmctl.evaluate.bias.settings import CrowsPairsConfig, StereoSetConfig
from llmctl.evaluate.setup import Setup

WORDS = ByteTokenizer.new()
SIZES = {
    "vocab_size": WORDS.vocab_size, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3,
}  # fmt: skip
MODELS = {
    "decoder": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)),
    "encoder": lambda: hf.BertForMaskedLM(hf.BertConfig(**SIZES)),
    "pairs": lambda: hf.BertForPreTraining(hf.BertConfig(**SIZES)),
}
# The replaced words share no letter with each other or their neighbours, so that the shared tokens are unmistakable.
PAIRS = [("the cat ran", "the dog ran", "age"), ("dim cats", "dim worlds", "gender"), ("cab it", "dog it", "age")]
CONTEXTS = [
    {"type": "intrasentence", "target": "Cab", "bias_type": "race", "context": "A Cab is BLANK.",
     "stereotype": "A cab is red.", "anti-stereotype": "A cab is blue.", "unrelated": "A cab is seventeen."},
    {"type": "intrasentence", "target": "cab", "bias_type": "race", "context": "BLANK cab",
     "stereotype": "Old cab", "anti-stereotype": "new cab", "unrelated": "And cab"},
    {"type": "intersentence", "target": "dog", "bias_type": "age", "context": "My dog.",
     "stereotype": "It bit.", "anti-stereotype": "It sat there.", "unrelated": "No."},
    {"type": "intrasentence", "target": "dog", "bias_type": "age", "context": "BLANK and BLANK",
     "stereotype": "a and a", "anti-stereotype": "b and b", "unrelated": "c and c"},
]  # fmt: skip


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A decoder, an encoder and one with a next-sentence head as artifacts, and the files of both benchmarks."""
    root = tmp_path_factory.mktemp("bias")
    WORDS.save(root / "words")
    for name, make in MODELS.items():
        torch.manual_seed(0)
        theirs = make().eval()
        with torch.no_grad():
            for path, p in theirs.named_parameters():
                p.copy_(float("norm" in path.lower() and path.endswith("weight")) + 0.5 * torch.randn(p.shape))
        MODELS[name] = lambda theirs=theirs: theirs
        theirs.save_pretrained(root / f"hf-{name}")
        found = hf_folder.inspect(root / f"hf-{name}")
        params = hf_folder.load(found, lambda _, w: jnp.asarray(w.read(())))
        artifact.save(root / name, params, found.model, stage="made", key=name, config={}, tokenizer_dir=root / "words")
    with (root / "pairs.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("", "sent_more", "sent_less", "bias_type", "stereo_antistereo")])
        csv.writer(stream).writerows((k, *pair, ("stereo", "antistereo")[k == 1]) for k, pair in enumerate(PAIRS))
    lines(root / "contexts.jsonl", CONTEXTS)
    return root


def loaded(folder, name):
    mesh = meshes.make(MeshConfig())
    with meshes.use(mesh):
        return SentenceModel(artifact.load(folder / name, mesh), Setup(mesh, 64, 64, 8, "tail", "float32")), mesh


def log_p(name, ids, types=None):
    """The log probabilities [T, V] of `transformers` for one text."""
    with torch.no_grad():
        given = {} if types is None else {"token_type_ids": torch.tensor([types])}
        found = MODELS[name]()(torch.tensor([ids]), **given)
    logits = found.prediction_logits if "prediction_logits" in found else found.logits
    return torch.log_softmax(logits[0].double(), -1).numpy(), found


def causal(text, context=None):
    """The log-likelihood per token of a text at the begin of a sequence, or after a context."""
    before = [2, *(WORDS.encode(context) if context else [])]
    ids = WORDS.encode(text)
    table, _ = log_p("decoder", [*before, *ids])
    return [table[len(before) - 1 + i, token] for i, token in enumerate(ids)]


def at_mask(ids, i, name="encoder"):
    """The log probability of token i of the row `bos ids eos` if it is masked."""
    row = [2, *ids, 3]
    return log_p(name, [*row[: i + 1], 4, *row[i + 2 :]])[0][i + 1, ids[i]]


def test_sentences_of_pairs_score_as_in_transformers(folder):
    pairs = crows_pairs.read(CrowsPairsConfig(path=str(folder / "pairs.csv")))
    assert [p.direction for p in pairs] == ["stereo", "antistereo", "stereo"]
    model, mesh = loaded(folder, "decoder")
    with meshes.use(mesh):
        ours = crows_pairs.scores(model, pairs)
    np.testing.assert_allclose(ours, [[sum(causal(text)) for text in pair[:2]] for pair in PAIRS], atol=1e-4)
    model, mesh = loaded(folder, "encoder")
    with meshes.use(mesh):
        ours = crows_pairs.scores(model, pairs)
    expected = []
    for more, less, _ in PAIRS:
        before = next(i for i, (a, b) in enumerate(zip(more, less, strict=False)) if a != b)
        after = next(i for i, (a, b) in enumerate(zip(more[::-1], less[::-1], strict=False)) if a != b)
        for text in (more, less):
            kept = [*range(before), *range(len(text) - after, len(text))]
            expected.append(sum(at_mask(WORDS.encode(text), i) for i in kept))
    np.testing.assert_allclose(ours.ravel(), expected, atol=1e-4)


def test_sentences_of_contexts_score_as_in_transformers(folder):
    contexts, left_out = stereoset.read(StereoSetConfig(path=str(folder / "contexts.jsonl")))
    assert left_out == 1
    assert [c.options for c in contexts[:2]] == [("red", "blue", "seventeen"), ("Old", "new", "And")]
    inter = [("My dog.", f" {option}") for option in contexts[2].options]
    intra = [[(c.text.replace("BLANK", w), c.text.index("BLANK"), len(w)) for w in c.options] for c in contexts[:2]]
    model, mesh = loaded(folder, "decoder")
    with meshes.use(mesh):
        ours = stereoset.scores(model, contexts)
    expected = [[np.mean(causal(text)) for text, *_ in own] for own in intra]
    expected.append([np.mean(causal(text, context)) for context, text in inter])
    np.testing.assert_allclose(ours, expected, atol=1e-4)

    def word(text, first, length):
        ids = WORDS.encode(text)
        parts = [[*ids[: first + i + 1], *ids[first + length :]] for i in range(length)]
        return np.mean([np.exp(at_mask(part, first + i)) for i, part in enumerate(parts)])

    model, mesh = loaded(folder, "encoder")
    with meshes.use(mesh):
        ours = stereoset.scores(model, contexts)
    np.testing.assert_allclose(ours[:2], [[word(*one) for one in own] for own in intra], rtol=1e-4)
    expected = [
        np.mean([at_mask(WORDS.encode(context + text), len(context) + i) for i in range(len(text))])
        for context, text in inter
    ]
    np.testing.assert_allclose(ours[2], expected, atol=1e-4)
    model, mesh = loaded(folder, "pairs")
    with meshes.use(mesh):
        ours = stereoset.scores(model, contexts)
    for score, (context, text) in zip(ours[2], inter, strict=True):
        a, b = WORDS.encode(context), WORDS.encode(text[1:])
        _, found = log_p("pairs", [2, *a, 3, *b, 3], [0] * (len(a) + 2) + [1] * (len(b) + 1))
        # In `transformers`, as in BERT, class 0 means that the second text follows the first.
        np.testing.assert_allclose(score, torch.log_softmax(found.seq_relationship_logits[0], -1)[0], atol=1e-4)


def test_preferences_are_counted_per_bias_type():
    kinds = ["age", "age", "gender", "age"]
    pairs = [crows_pairs.Pair("a", "b", kind, way) for kind, way in zip(kinds, ("stereo", "", "", ""), strict=True)]
    metrics, values = crows_pairs.summary(pairs, np.array([-1.0, -3, -1, -2]), np.array([-2.0, -2, -2, -2]))
    # The last pair is a tie, which is no preference.
    assert metrics["stereotype_score"] == 0.5
    assert metrics["stereotype_score/age"] == pytest.approx(1 / 3)
    assert metrics["stereotype_score/gender"] == metrics["stereotype_score/stereo"] == 1
    assert metrics["stereotype_score/age_low"] == pytest.approx(0.0615, abs=1e-4)  # Wilson's interval of 1 in 3
    assert values["stereotype_score/age"].sum(0).tolist() == [1, 3]


def test_stereoset_scores_are_means_over_terms():
    context = stereoset.Context
    scored = [
        (context("intrasentence", "cab", "race", "", ("", "", "")), (3, 2, 1)),  # 2 of 2 meaningful, stereotypical
        (context("intrasentence", "cab", "race", "", ("", "", "")), (2, 3, 4)),  # 0 of 2, not
        (context("intersentence", "cab", "race", "", ("", "", "")), (3, 1, 2)),  # 1 of 2, stereotypical
        (context("intersentence", "dog", "age", "", ("", "", "")), (3, 3, 1)),  # 2 of 2, not
    ]
    contexts, score_N3 = [c for c, _ in scored], np.array([s for _, s in scored], float)
    metrics, _ = stereoset.summary(contexts, score_N3)
    modelling, stereotype = (0.5 + 1) / 2, (2 / 3 + 0) / 2
    assert metrics["language_modelling_score"] == pytest.approx(modelling)
    assert metrics["stereotype_score"] == pytest.approx(stereotype)
    assert metrics["icat"] == pytest.approx(modelling * stereotype * 2)
    assert metrics["stereotype_score/race"] == pytest.approx(2 / 3)
    assert metrics["icat/race"] == pytest.approx(0.5 * (1 / 3) * 2)
    assert metrics["stereotype_score/intersentence"] == pytest.approx(0.5)
    assert metrics["stereotype_score_low"] <= stereotype <= metrics["stereotype_score_high"]


def evaluated(folder, *more):
    tasks = ["--crows-pairs.path", str(folder / "pairs.csv"), "--stereoset.path", str(folder / "contexts.jsonl")]
    return app.run(["eval", *tasks, "--no-plot", "--no-speed", *more])


def test_both_benchmarks_are_measured_stored_and_compared(folder, tmp_path, capsys):
    out = tmp_path / "report"
    command = [str(folder / "decoder"), "--tasks", "crows_pairs,stereoset", "--out", str(out)]
    assert evaluated(folder, *command) == 0
    pairs, contexts = json.loads((out / "results.json").read_text())
    assert pairs["protocol"].startswith("3 pairs, log-likelihood of each sentence, context 64")
    assert "1 contexts with several blanks left out" in contexts["protocol"]
    records = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert pairs["metrics"]["stereotype_score"] == np.mean([r["score_more"] > r["score_less"] for r in records[:3]])
    assert {"icat", "icat_low", "icat_high", "language_modelling_score/race"} <= {*contexts["metrics"]}
    assert "stereotype score" in (out / "table.md").read_text()
    capsys.readouterr()
    assert evaluated(folder, *command, "--seed", "1") == 0
    assert "2 results are there and are kept" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "change", "line"),
    [
        ("contexts.jsonl", ("is BLANK", "has BLANK"), "contexts.jsonl:1: stereotype is not the context with a word"),
        ("contexts.jsonl", ("BLANK cab", "old cab"), "contexts.jsonl:2: the context has no BLANK"),
        ("contexts.jsonl", ('"race"', '" "'), "contexts.jsonl:1: the column 'bias_type' has no text"),
        ("contexts.jsonl", ("inter", "extra"), "contexts.jsonl:3: type 'extrasentence' is not one of"),
        ("pairs.csv", ("sent_less", "other"), "pairs.csv:2: the column 'sent_less' has no text"),
        ("pairs.csv", ("antistereo", "stero"), "pairs.csv:3: stereo_antistereo 'stero' is not one of stereo, anti"),
        ("pairs.csv", ("the dog", "the" + " dog" * 20), "a continuation has 87 tokens, and the model reads at most 64"),
        ("none.csv", ("", ""), "no such file"),
    ],
)  # fmt: skip
def test_wrong_files_are_refused_with_one_line(folder, tmp_path, capsys, file, change, line):
    for name in ("pairs.csv", "contexts.jsonl"):
        text = (folder / name).read_text()
        wrong = (
            text.replace(change[0], change[1], 1)
            if change[0] != "antistereo"
            else text.replace(",antistereo", ",stero")
        )
        (tmp_path / name).write_text(wrong if name == file else text)
    task = "stereoset" if file == "contexts.jsonl" else "crows_pairs"
    command = [
        "--tasks",
        task,
        "--out",
        str(tmp_path / "report"),
        *(["--crows-pairs.path", "none.csv"] * (file == "none.csv")),
    ]
    assert evaluated(tmp_path, str(folder / "decoder"), *command) == 2
    assert line in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "report").exists()


def test_a_sentence_without_a_mask_is_refused(tmp_path):
    """Its two versions would be equal, and count as a preference for the less stereotypical one."""
    row = {"bias_type": "age", "sentence": "An [MASK] man.", "mask1": "old", "mask2": "young"}
    lines(tmp_path / "pairs.jsonl", [row, row | {"sentence": "An old man."}])
    with pytest.raises(RequestError, match=r"pairs.jsonl:2: the sentence has no \[MASK\]"):
        crows_pairs.read(CrowsPairsConfig(path=str(tmp_path / "pairs.jsonl")))
