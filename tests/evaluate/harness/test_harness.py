"""Tasks of lm-evaluation-harness: an artifact against the harness's own class for Hugging Face models."""

import json
import math

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from llmctl.artifacts import artifact
from llmctl.cli import app
from llmctl.config.settings import MeshConfig
from llmctl.data.tokenizers.tokenizer_json import JsonTokenizer
from llmctl.distributed import mesh as meshes
from llmctl.model import functional
from llmctl.model.config import ModelConfig

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("ignore")  # the harness and its data sets use deprecated functions

TEXT = ["The cat sat on the mat and looked at the moon.", "Dogs bark at cats, and cats look at the moon."]
TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)
TASK = """
task: moon
dataset_path: json
dataset_kwargs: {data_files: {validation: DATA}}
output_type: multiple_choice
validation_split: validation
fewshot_split: validation
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
metadata: {version: 2.5}
"""
QUESTIONS = [
    {"question": "The cat sat on the", "choices": ["mat", "moon and looked", "cats"], "label": 0},
    {"question": "Dogs bark at", "choices": ["cats", "the moon"], "label": 0},
    {"question": "", "choices": ["The cat", "Dogs bark at cats"], "label": 1},
    {"question": "cats " * 40, "choices": ["look", "sat on the mat"], "label": 0},
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny Llama with random weights that begins texts with <s>, as an artifact and as a Hugging Face folder."""
    root = tmp_path_factory.mktemp("harness")
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", "<s>", "</s>"]
    made.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=290, special_tokens=special, initial_alphabet=alphabet)
    )
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    words = JsonTokenizer(made.to_str().encode())
    model = ModelConfig(
        family="llama", vocab_size=words.vocab_size, d_model=32, layers=2, heads=4, kv_heads=2, head_dim=8, d_ff=48,
        max_seq_len=64, tied=False, head_bias=False,
    )  # fmt: skip
    params = jax.jit(lambda key: functional.init(model, key))(jax.random.key(0))
    params = jax.tree.map(lambda w: w * 4 if w.ndim > 1 else w, params)  # larger weights give larger differences
    words.save(root / "words")
    (root / "words" / "chat_template.jinja").write_text(TEMPLATE)
    ours = root / "model"
    common = {"stage": "pretrain", "key": "k", "config": {}, "tokenizer_dir": root / "words"}
    artifact.save(ours, params, model, **common)
    assert app.run(["export", str(ours), "--to", "hf", "--out", str(root / "hf")]) == 0
    return ours, root / "hf"


@pytest.fixture(scope="module")
def both(saved):
    """The two classes of the harness's language models: ours, sharded over 8 devices, and the harness's own."""
    from lm_eval.models.huggingface import HFLM

    from llmctl.evaluate.harness import evaluation
    from llmctl.evaluate.harness.language_model import ArtifactLM

    ours, theirs = saved
    mesh = meshes.make(MeshConfig(data=2, fsdp=2, tensor=2))
    with meshes.use(mesh):
        there = artifact.load(ours, mesh)
        setup = evaluation.setup(mesh, there.manifest, "a", seq_len=0, batch_size=4, dtype="float32")
        yield ArtifactLM(there, setup), HFLM(pretrained=str(theirs), batch_size=2, device="cpu", dtype="float32")


def requests(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def test_log_likelihoods_equal_those_of_the_harness(both):
    pairs = [(q["question"], f" {choice}") for q in QUESTIONS for choice in q["choices"]]
    pairs += [
        ("The cat ", "sat"),
        ("<s>The cat", " sat</s>"),
        ("The cat", " s"),
        ("The cat", " t"),
        ("a" * 200, "b" * 60),
    ]
    ours, theirs = (lm.loglikelihood(requests("loglikelihood", *pairs)) for lm in both)
    np.testing.assert_allclose([x for x, _ in ours], [x for x, _ in theirs], rtol=1e-4, atol=1e-4)
    assert [x for _, x in ours] == [x for _, x in theirs]
    assert both[0].truncated >= 1


def test_the_probabilities_of_all_next_tokens_sum_to_one_and_the_largest_is_greedy(both):
    vocabulary = range(both[0]._artifact.model.vocab_size)
    scores = both[0]._loglikelihood_tokens([(("", ""), [1, 40, 50], [token]) for token in vocabulary])
    log_p_V = np.array([x for x, _ in scores])
    assert np.exp(log_p_V).sum() == pytest.approx(1, rel=1e-5)
    assert [i for i, (_, greedy) in enumerate(scores) if greedy] == [log_p_V.argmax()]


def test_rolling_log_likelihoods_equal_those_of_the_harness(both):
    texts = [(TEXT[0],), (" ".join(TEXT * 4),), ("<s>moon",)]
    ours, theirs = (lm.loglikelihood_rolling(requests("loglikelihood_rolling", *texts)) for lm in both)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def test_generated_texts_equal_those_of_the_harness(both):
    settings = {"until": ["t", "\x19"], "max_gen_toks": 12, "do_sample": False}
    free = {"until": [], "max_gen_toks": 8}
    asked = [("The cat", settings), ("Dogs bark", settings), ("moon", free), ("a" * 200, free)]
    before = both[0].truncated
    ours, theirs = (lm.generate_until(requests("generate_until", *asked)) for lm in both)
    assert both[0].truncated == before + 1
    assert ours == theirs
    assert any(ours)


def test_chat_templates_equal_those_of_the_harness(both):
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "moon"}]
    for messages, prompt in ((talk[:1], True), (talk, False)):
        assert both[0].apply_chat_template(messages, prompt) == both[1].apply_chat_template(messages, prompt)


def test_a_generation_setting_that_is_unknown_is_refused():
    from llmctl.config.errors import RequestError
    from llmctl.evaluate.harness.language_model import generation_settings

    assert generation_settings({"until": "x", "do_sample": True, "temperature": 0.0}) == (["x"], 256, None)
    for wrong in ({"penalty_alpha": 0.5}, {"do_sample": True, "temperature": 1.0, "top_p": 2.0}):
        with pytest.raises(RequestError, match="generation"):
            generation_settings(wrong)


@pytest.fixture
def task(tmp_path):
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    file = tmp_path / "tasks" / "moon.yaml"
    file.parent.mkdir()
    file.write_text(TASK.replace("DATA", str(data)))
    return file


def test_eval_stores_results_with_version_shots_and_error_and_scores_nothing_twice(saved, task, tmp_path, capsys):
    out = tmp_path / "report"
    command = ["eval", str(saved[0]), "--harness", str(task), "--no-plot", "--out", str(out)]
    assert app.run([*command, "--lm-eval.shots", "1", "--json"]) == 0
    (first,) = json.loads((out / "results.json").read_text())
    assert first["task"] == "moon"
    assert first["harness"] | {"harness_version": ""} == {
        "harness_version": "", "task_version": 2.5, "shots": 1, "documents": 4,
    }  # fmt: skip
    found = first["metrics"]
    assert {"accuracy", "accuracy_stderr", "accuracy_low", "accuracy_high", "accuracy_per_character"} <= {*found}
    p = found["accuracy"]
    assert found["accuracy_stderr"] == pytest.approx(math.sqrt(p * (1 - p) / 3))
    assert "1-shot" in first["protocol"]
    records = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert np.mean([r["accuracy"] for r in records]) == p
    values = json.loads((out / "example_values.jsonl").read_text())["values"]
    assert values["accuracy"] == [r["accuracy"] for r in records] and "accuracy_per_character" in values
    assert "accuracy per character" in (out / "table.md").read_text()
    # Another task is added: the first one is kept, as its definition and the weights are the same.
    second = task.with_name("sun.yaml")
    second.write_text(task.read_text().replace("task: moon", "task: sun").replace("{{question}}", "So: {{question}}"))
    command[3] = str(task.parent)
    capsys.readouterr()
    assert app.run([*command, "--lm-eval.shots", "1"]) == 0
    assert "1 results are there and are kept" in capsys.readouterr().err
    results = json.loads((out / "results.json").read_text())
    assert {r["task"] for r in results} == {"moon", "sun"}
    assert first in results
    assert app.run([*command, "--lm-eval.shots", "1", "--again"]) == 0
    assert "are kept" not in capsys.readouterr().err


def test_all_artifacts_get_the_same_solved_examples(both, task, monkeypatch):
    """Two artifacts are measured one after the other, with the same tasks."""
    from llmctl.evaluate.harness.evaluation import Suite
    from llmctl.evaluate.harness.language_model import ArtifactLM
    from llmctl.evaluate.harness.settings import HarnessConfig

    asked = []

    def answered(self, requests, disable_tqdm=True):
        asked.append([request.args for request in requests])
        return [(0.0, False)] * len(requests)

    monkeypatch.setattr(ArtifactLM, "loglikelihood", answered)
    with Suite([str(task)], HarnessConfig(shots=2), 0) as suite:
        for _ in range(2):
            suite.measure(both[0]._artifact, both[0]._setup, ["moon"])
    assert asked[0] == asked[1] and asked[0][0][0].count("\n\n") == 2


def test_a_definition_covers_the_settings_of_the_model(task):
    from llmctl.evaluate.harness.evaluation import Suite
    from llmctl.evaluate.harness.settings import HarnessConfig

    found = []
    for settings in ({}, {}, {"seq_len": 32}, {"dtype": "bfloat16"}):
        with Suite([str(task)], HarnessConfig(), 0, **settings) as suite:
            found.append(suite.definitions["moon"])
    assert found[0] == found[1] and len(set(found)) == 3


def test_numbers_that_json_does_not_have_are_missing():
    from llmctl.evaluate.harness.evaluation import _result

    about = {"filter": "none", "metrics": ["perplexity"]}
    rows = [{"doc_id": 0, "perplexity": -2.0, **about}, {"doc_id": 1, "perplexity": -math.inf, **about}]
    found = {
        "results": {"t": {"perplexity,none": math.inf, "acc,none": 0.5, "acc_stderr,none": 0.1}},
        "samples": {"t": rows}, "n-samples": {"t": {"effective": 2}}, "versions": {"t": 1}, "n-shot": {"t": 0},
    }  # fmt: skip
    got = _result("t", found, "said", "digest")
    assert got.metrics["document_perplexity"] is None and got.metrics["accuracy"] == 0.5
    assert [row["document_perplexity"] for row in got.examples] == [-2.0, None]


def test_the_files_of_a_task_are_all_files_that_it_reads(task):
    """A recipe's stage is repeated if one of these files changes."""
    from llmctl.evaluate.harness import task_yaml

    (task.parent / "code.py").write_text("")
    other = task.with_name("sun.yaml")
    other.write_text("include: moon.yaml\ntask: sun\nprocess_docs: !function code.docs\n")
    names = [file.name for file in task_yaml.files([str(other)])]
    assert names == ["sun.yaml", "moon.yaml", "code.py", "questions.jsonl"]


@pytest.mark.parametrize(
    ("change", "flags", "line"),
    [
        (("doc_to_target: \"{{label}}\"", "doc_to_target: !function code.target"), [], "line 10 names Python code"),
        (("metric: acc_norm", "metric: ./evil"), [], "metric './evil' would be loaded as code"),
        (("task: moon", "group: g\ntask: [{task: moon, metric_list: [{metric: ./evil, hf_evaluate: true}]}]\nother: 1"),
         [], "metric './evil' would be loaded as code"),
        (("[{metric: acc}, {metric: acc_norm}]", "acc"), [], "metric_list: must be a list of tables"),
        (("task: moon", "task: moon\ninclude: [../tasks/moon.yaml]"), [], "includes itself"),
        (("dataset_path: json", "dataset_path: pandas"), [], "reads pickles"),
        (("task: moon", "task: moon\ninclude: 5"), [], "include: must be a path"),
        (("dataset_kwargs: {", "dataset_kwargs: {data_dir: 'https://localhost/x', "), [], "is in the network"),
        (("{validation: ", "{test: 5, validation: "), [], "data_files: test: must be a path"),
        (("task: moon", "other: moon"), [], "defines neither a task nor a group"),
        (("dataset_path: json", "dataset_path: a/dataset"), [], "lm_eval.download = true downloads missing data"),
        (("{{label}}", "{{ ''.__class__.__mro__ }}"), [], "unsafe"),
        (("task: moon", "task: ["), [], "cannot be read as YAML"),
        (("", ""), ["--lm-eval.shots", "-2"], "--lm-eval.shots"),
        (("", ""), ["--seq-len", "65"], "seq_len 65 is longer"),
        pytest.param(("", ""), ["--harness", "no_such_task"], "no task 'no_such_task'", marks=pytest.mark.slow),
        (("", ""), ["--harness", "missing.yaml"], "no such file: 'missing.yaml'"),
    ],
)  # fmt: skip
def test_refusals_end_with_one_line_and_write_nothing(saved, task, tmp_path, capsys, change, flags, line):
    task.write_text(task.read_text().replace(*change))
    out = tmp_path / "report"
    assert app.run(["eval", str(saved[0]), "--harness", str(task), "--no-plot", "--out", str(out), *flags]) == 2
    assert line in capsys.readouterr().err.splitlines()[-1]
    assert not out.exists()
    assert not [p for p in tmp_path.rglob("*") if "work" in p.name and p.name != "work"]


def test_the_package_that_is_missing_is_named(saved, task, capsys, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "lm_eval" else find(name, *more)
    )
    assert app.run(["eval", str(saved[0]), "--harness", str(task), "--no-plot"]) == 2
    assert "pip install 'llmctl[eval]'" in capsys.readouterr().err
