"""Word labels, answers in contexts and embeddings: learned, pruned, distilled, quantized and measured."""

import json

import jax
import numpy as np
import pytest

from llmctl.artifacts import artifact
from llmctl.artifacts.workspace import Context
from llmctl.config.errors import RequestError
from llmctl.config.settings import OptimConfig, TrainConfig
from llmctl.data.config import DataConfig, TokenizerConfig
from llmctl.data.tokenizers import loading
from llmctl.model import functional
from llmctl.model.config import ModelConfig
from llmctl.pipeline.stages import distill, finetune, prune, quantize
from llmctl.pipeline.stages import eval as evaluation

SIZES = {"d_model": 16, "layers": 2, "heads": 4, "kv_heads": 4, "head_dim": 8, "d_ff": 24}
FAMILIES = {"bert": {**SIZES, "preset": "bert-tiny", "max_seq_len": 64}, "llama": {**SIZES, "preset": "llama-tiny"},
            "t5": {**SIZES, "preset": "t5-tiny", "encoder_layers": 2}}  # fmt: skip
PEOPLE, SECOND, PLACES, REST = ("a", "e"), ("j", "k"), ("r", "o"), ("u", "g", "w", "x")
"""Words of one token each, so that few steps teach what they are."""
TRAIN = TrainConfig(steps=60, batch_size=16, seq_len=32, eval_every=30, log_every=30, tensorboard=False)
OPTIM = OptimConfig(learning_rate=1e-2, weight_decay=0.0)
EVAL = {"speed": False, "plot": False, "seq_len": 32}


def written(folder, rows, **kw):
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return DataConfig(source="jsonl", path=str(folder / "data.jsonl"), validation=0.15, test=0.2, **kw)


def sentence(rng):
    """(words, tags): people have a first and sometimes a second name, and there are places."""
    words, tags = [], []
    for _ in range(4):
        kind = rng.integers(3)
        if kind == 0:
            name = [rng.choice(PEOPLE), rng.choice(SECOND)][: 1 + rng.integers(2)]
            words, tags = [*words, *map(str, name)], tags + ["B-P", "I-P"][: len(name)]
        words.append(str(rng.choice(PLACES if kind == 1 else REST)))
        tags.append("B-L" if kind == 1 else "O")
    return words, tags


@pytest.fixture(scope="session")
def tagged(tmp_path_factory):
    rng = np.random.default_rng(0)
    found = (sentence(rng) for _ in range(400))
    return written(tmp_path_factory.mktemp("tagged"), [{"tokens": w, "tags": t} for w, t in found])


@pytest.fixture(scope="session")
def asked(tmp_path_factory):
    """Who? The person of the context, by both names; in some there is none."""
    rng, rows = np.random.default_rng(1), []
    for i in range(400):
        person = f"{rng.choice(PEOPLE)} {rng.choice(SECOND)}"
        words = [*rng.choice([*PLACES, *REST], 5).tolist(), *([person] if i % 5 else [])]
        rng.shuffle(words)
        context = " ".join(words)
        found = (
            {"text": [person], "answer_start": [context.find(person)]} if i % 5 else {"text": [], "answer_start": []}
        )
        rows.append({"question": "q", "context": f"{context} {i}", "answers": found})
    return written(tmp_path_factory.mktemp("asked"), rows)


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """Two texts of one subject each; the score of two subjects is 0."""
    rng, rows, subjects = np.random.default_rng(2), [], [*PEOPLE, *SECOND, *PLACES, *REST]
    for i in range(400):
        a, b = (str(s) for s in rng.choice(subjects, 2, replace=False))
        rows.append({"text": f"{a} {i}", "pair": a if i % 2 else b, "label": float(i % 2)})
    return written(tmp_path_factory.mktemp("pairs"), rows, label_type="number")


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """Untrained networks of each family."""
    run = tmp_path_factory.mktemp("bases")
    words = loading.train((), TokenizerConfig(kind="bytes"))
    words.save(run / "words")
    for name, sizes in FAMILIES.items():
        cfg = ModelConfig(**{**sizes, "vocab_size": words.vocab_size})
        params = jax.jit(lambda key, cfg=cfg: functional.init(cfg, key))(jax.random.key(0))
        about = {"stage": "pretrain", "key": name, "config": {"train": {"seq_len": 32}}}
        artifact.save(run / name, params, cfg, tokenizer_dir=run / "words", **about)
    return run


def go(stage, config, parent, folder, **siblings):
    ctx = Context(folder / "out", folder / "work", "key", siblings)
    ctx.work.mkdir(parents=True, exist_ok=True)
    stage.run(config, parent, ctx)
    return ctx.out


def measured(data, folder, where, **more):
    go(evaluation, evaluation.Config(data=data, **EVAL, **more), folder, where)
    return json.loads((where / "out" / "results.json").read_text())[0]


CHAINS = {"tokens": ("tagged", 24, "entity_f1"), "span": ("asked", 45, "answer_f1")}


@pytest.fixture(scope="session", params=CHAINS)
def chain(request, bases, tmp_path_factory):
    """(data, metric, {stage: artifact}): finetune -> prune (structured) -> distill -> quantize."""
    source, steps, metric = CHAINS[request.param]
    data, run = request.getfixturevalue(source), tmp_path_factory.mktemp(request.param)
    train = TRAIN.model_copy(update={"steps": steps, "eval_every": steps // 3})
    common = {"data": data, "train": train, "optim": OPTIM}
    made = {"finetune": go(finetune, finetune.Config(task=request.param, **common), bases / "bert", run / "finetune")}
    cut = prune.Config(data=data, heads=0.25, ffn=0.25, examples=32)
    made["prune"] = go(prune, cut, made["finetune"], run / "prune")
    taught = distill.Config(teacher="finetune", **common)
    made["distill"] = go(distill, taught, made["prune"], run / "distill", finetune=made["finetune"])
    made["quantize"] = go(quantize, quantize.Config(head=True), made["distill"], run / "quantize")
    return data, metric, made


def test_chains_end_small_and_right(chain, tmp_path):
    data, metric, made = chain
    results = {name: measured(data, made[name], tmp_path / name) for name in ("finetune", "quantize")}
    for name, result in results.items():
        assert result["metrics"][metric] > 0.9, (name, result)
        assert result["digest"] == artifact.read_manifest(made[name]).digest
    teacher, small = artifact.read_manifest(made["finetune"]), artifact.read_manifest(made["quantize"])
    assert small.model.heads == 3 and small.model.d_ff == 18
    # not bytes on disk: of a model this small those are mostly the checkpoint's own files
    assert small.parameters < teacher.parameters and small.bits < 24 < teacher.bits
    assert small.model.head == teacher.model.head and small.labels == teacher.labels
    metrics = results["finetune"]["metrics"]
    if metric == "entity_f1":
        assert small.labels == ["B-L", "B-P", "I-P", "O"] and set(metrics["per_entity"]) == {"L", "P"}
        assert metrics["words_cut"] == 0 and "(conlleval)" in results["finetune"]["protocol"]
    else:
        assert metrics["exact_match"] > 0.85 and 0 < metrics["unanswerable"] < metrics["examples"]


@pytest.mark.slow
def test_zeros_by_the_inputs_of_the_same_rows(chain, tmp_path):
    data, metric, made = chain
    config = prune.Config(data=data, method="wanda", sparsity=0.3, examples=32)
    zeros = go(prune, config, made["finetune"], tmp_path / "wanda")
    assert artifact.read_manifest(zeros).sparsity > 0.1
    assert measured(data, zeros, tmp_path / "eval")["metrics"][metric] > 0.5


@pytest.mark.parametrize(("family", "task", "source", "metric"), [
    ("llama", "tokens", "tagged", "entity_f1"),
    pytest.param("t5", "tokens", "tagged", "entity_f1", marks=pytest.mark.slow),
    pytest.param("llama", "span", "asked", "answer_f1", marks=pytest.mark.slow),
    pytest.param("t5", "span", "asked", "answer_f1", marks=pytest.mark.slow),
])  # fmt: skip
def test_every_family_learns_through_low_rank_pairs_too(family, task, source, metric, bases, request, tmp_path):
    data, pairs = request.getfixturevalue(source), family == "llama" and task == "tokens"
    train = TRAIN.model_copy(update={"steps": CHAINS[task][1]})
    config = finetune.Config(data=data, task=task, train=train, optim=OPTIM, method="lora" if pairs else "full")
    made = go(finetune, config, bases / family, tmp_path / "finetune")
    model = artifact.read_manifest(made).model
    assert model.architecture == ("decoder" if family == "llama" else "encoder") and model.head == task
    assert measured(data, made, tmp_path / "eval")["metrics"][metric] > 0.8
    if task == "tokens":  # chosen by what it is measured by
        said = artifact.read_manifest(made).metrics["validation_entity_f1"]
        again = measured(data, made, tmp_path / "again", split="validation")["metrics"][metric]
        assert said == pytest.approx(again, rel=1e-6)


@pytest.mark.parametrize("family", ["bert", pytest.param("llama", marks=pytest.mark.slow)])
def test_embeddings_of_pairs_are_near(family, bases, pairs, tmp_path):
    together = pairs.model_copy(
        update={"columns": {"text": "text", "pair": "pair"}, "filter": {"label": 1}, "label_type": "class"}
    )
    train = TRAIN.model_copy(update={"steps": 45, "seq_len": 16})
    config = finetune.Config(data=together, task="embed", train=train, optim=OPTIM)
    made = go(finetune, config, bases / family, tmp_path / "finetune")
    found = artifact.read_manifest(made)
    assert (found.model.head, found.model.pooling) == ("embed", "mean")
    result = measured(together, made, tmp_path / "eval")["metrics"]
    assert result["recall_at_1"] > 0.95 and 8 <= result["candidates"] <= 10


@pytest.mark.slow
def test_embeddings_as_near_as_scores_say(bases, pairs, tmp_path):
    train = TRAIN.model_copy(update={"steps": 150, "seq_len": 16})
    config = finetune.Config(data=pairs, task="embed", train=train, optim=OPTIM)
    made = go(finetune, config, bases / "bert", tmp_path / "finetune")
    result = measured(pairs, made, tmp_path / "eval")
    assert result["task"] == "embedding" and result["metrics"]["spearman"] > 0.7
    student = distill.Config(data=pairs, teacher="made", train=train.model_copy(update={"steps": 3}), optim=OPTIM)
    taught = go(distill, student, made, tmp_path / "distill", made=made)
    assert artifact.read_manifest(taught).metrics["validation_loss"] < 0.1
    small = go(prune, prune.Config(data=pairs, ffn=0.25, examples=32), made, tmp_path / "prune")
    assert measured(pairs, small, tmp_path / "eval-small")["metrics"]["spearman"] > 0.5


def test_data_that_a_task_cannot_use_is_refused(bases, tagged, asked, tmp_path):
    for task, data, said in (
        ("tokens", asked, "two classes"),
        ("span", tagged, 'no column "question"'),
        ("classify", tagged, 'no column "label"'),
        ("embed", tagged, "leave the label out"),
    ):
        with pytest.raises(RequestError, match=said):
            go(finetune, finetune.Config(data=data, task=task, train=TRAIN), bases / "bert", tmp_path / task)
