"""Conversations: finetuned with a template from a file, measured, and answered by `generate --chat` up to their end."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from llmctl.artifacts import artifact
from llmctl.artifacts.workspace import Context
from llmctl.cli import app
from llmctl.config.errors import RequestError
from llmctl.config.settings import OptimConfig, TrainConfig
from llmctl.data.config import DataConfig, TokenizerConfig
from llmctl.data.tokenizers import loading
from llmctl.data.tokenizers.byte_tokenizer import ByteTokenizer
from llmctl.evaluate.tasks.registry import TASKS
from llmctl.evaluate.tasks.settings import ChatConfig
from llmctl.model import functional
from llmctl.model.config import ModelConfig
from llmctl.model.generate.chat_template import Template
from llmctl.pipeline.stages import eval as evaluation
from llmctl.pipeline.stages import finetune, prune

ANSWERS = {"a": "xx", "b": "yyy", "c": "z"}
# The answer ends with the mask token, which is not the tokenizer's end token.
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ ':' + m.content + '<mask>\n' }}{% else %}"
    "{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}:{% endif %}"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    words = ByteTokenizer.new()
    words.save(folder / "words")
    sizes = {"d_model": 32, "layers": 1, "heads": 2, "kv_heads": 2, "head_dim": 16, "d_ff": 64}
    model = ModelConfig(preset="llama-tiny", vocab_size=words.vocab_size, max_seq_len=64, **sizes)
    params = jax.jit(lambda key: functional.init(model, key))(jax.random.key(0))
    about = {"stage": "pretrain", "key": "k", "config": {"train": {"seq_len": 16}}}
    artifact.save(folder / "base", params, model, tokenizer_dir=folder / "words", **about)
    return folder / "base"


@pytest.fixture(scope="module")
def talks(tmp_path_factory):
    file = tmp_path_factory.mktemp("talks") / "talks.jsonl"
    rng, rows = np.random.default_rng(0), []
    for i in range(200):
        asked = [*rng.choice(list("abc"), 2)]
        turns = [{"from": "human", "value": f"{asked[0]}{i}"}, {"from": "gpt", "value": ANSWERS[asked[0]]}]
        turns += [{"from": "human", "value": asked[1]}, {"from": "gpt", "value": ANSWERS[asked[1]]}] * (i % 2)
        rows.append({"conversations": turns})
    file.write_text("\n".join(map(json.dumps, rows)))
    return DataConfig(source="jsonl", path=str(file), validation=0.1, test=0.2)


@pytest.fixture(scope="module")
def tuned(base, talks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned")
    (folder / "t.jinja").write_text(TEMPLATE)
    train = TrainConfig(steps=150, batch_size=16, seq_len=20, eval_every=75, log_every=75, tensorboard=False)
    ctx = Context(folder / "out", folder / "work", "key", {})
    ctx.work.mkdir()
    config = finetune.Config(
        data=talks, task="chat", chat=ChatConfig(template=str(folder / "t.jinja")), train=train,
        optim=OptimConfig(learning_rate=1e-2, weight_decay=0.0),
    )  # fmt: skip
    finetune.run(config, base, ctx)
    return ctx.out


def test_the_artifact_keeps_the_template_and_the_end_of_answers(tuned):
    folder = tuned / "tokenizer"
    assert loading.load(folder).chat_template == TEMPLATE
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [3, 4]
    assert artifact.read_manifest(tuned).task == "chat"


def test_perplexity_is_that_of_the_answers_alone(tuned, talks, tmp_path):
    ctx = Context(tmp_path / "out", tmp_path / "work", "key", {})
    ctx.work.mkdir()
    evaluation.run(evaluation.Config(data=talks, speed=False, plot=False, examples=7), tuned, ctx)
    result = json.loads((ctx.out / "results.json").read_text())[0]
    made = artifact.load(tuned)
    words = loading.load(made.tokenizer_dir)
    template = Template(TEMPLATE, words)

    @jax.jit
    def log_p(params, batch):
        return jax.nn.log_softmax(
            functional.lm_logits(made.model, params, functional.hidden(made.model, params, batch))
        )

    from llmctl.data import splits

    nll, count = 0.0, 0
    for row in splits.examples(talks, "test", conversations=True).sample(7):
        said = row["messages"]
        ids = words.encode_with_special(template.render(said, prompt=False))
        width = np.zeros((1, 20), int)
        width[0, : len(ids)] = ids[:20]
        batch = {"tokens": width, "segments": np.arange(20)[None] < len(ids), "positions": np.arange(20)[None]}
        found = np.asarray(log_p(made.params, {k: np.int32(v) for k, v in batch.items()}))[0]
        for n, m in enumerate(said):
            if m["role"] == "assistant":
                begin = len(template.prompt(said[:n]))
                answer = [*words.encode(m["content"]), 4]
                nll -= sum(found[begin - 1 + k, token] for k, token in enumerate(answer))
                count += len(answer)
    metrics = result["metrics"]
    assert (result["task"], metrics["predicted_tokens"]) == ("conversations", count)
    np.testing.assert_allclose(metrics["nll"], nll / count, rtol=1e-4)
    np.testing.assert_allclose(metrics["perplexity"], np.exp(nll / count), rtol=1e-4)
    assert (
        "7 of 7 conversations (0 without their first exchanges, 0 without their end), context 20" in result["protocol"]
    )


def test_calibration_reads_conversations_or_text(tuned, talks, tmp_path):
    from llmctl.compress.calibration import calibration_data
    from llmctl.compress.calibration.settings import CalibrationConfig
    from llmctl.config.settings import MeshConfig
    from llmctl.distributed import mesh

    made, devices = artifact.load(tuned), mesh.make(MeshConfig())
    config = CalibrationConfig(data=talks, split="train", examples=8, batch_size=8, seq_len=20)
    (batch,) = calibration_data.load(config, made, devices, labels=True)
    assert batch["tokens"].shape == (8, 20) and 0 < float(batch["weights"].sum()) < float(batch["segments"].sum())
    (tmp_path / "x.txt").write_text("Some words that are no conversation. " * 9)
    config = CalibrationConfig(data=DataConfig(path=str(tmp_path / "x.txt"), test=0, validation=0), split="train",
                               batch_size=8, seq_len=20)  # fmt: skip
    assert {b["tokens"].shape[1] for b in calibration_data.load(config, made, devices)} == {20}


def test_tokens_that_no_conversation_uses_are_removed(talks, tmp_path):
    """Conversations are counted as the template writes them, and so are the words that only the template has."""
    texts = [f"a{i} nothing of this occurs, system and assistant: b" for i in range(60)]
    words = loading.train([*texts, *ANSWERS.values()], TokenizerConfig(kind="bpe", vocab_size=330))
    words.save(tmp_path / "words")
    (tmp_path / "words" / "chat_template.jinja").write_text(TEMPLATE)
    sizes = {"d_model": 16, "layers": 1, "heads": 2, "kv_heads": 2, "head_dim": 8, "d_ff": 16}
    model = ModelConfig(preset="llama-tiny", vocab_size=330, max_seq_len=64, **sizes)
    params = jax.jit(lambda key: functional.init(model, key))(jax.random.key(0))
    about = {"stage": "finetune", "key": "k", "config": {"train": {"seq_len": 16}}, "task": "chat"}
    artifact.save(tmp_path / "base", params, model, tokenizer_dir=tmp_path / "words", **about)
    config = prune.Config(vocabulary="unused", data=talks)
    (tmp_path / "work").mkdir()
    prune.run(config, tmp_path / "base", Context(tmp_path / "out", tmp_path / "work", "key"))
    old, new = (loading.load(tmp_path / name / "tokenizer") for name in ("base", "out"))
    assert new.vocab_size == artifact.read_manifest(tmp_path / "out").model.vocab_size < 330
    rows = [old.piece(i) for i in range(old.vocab_size)]
    at = [rows.index(new.piece(i)) for i in range(new.vocab_size)]
    messages = [{"role": "user", "content": "a7"}, {"role": "assistant", "content": ANSWERS["a"]}]
    before, after = (Template(t.chat_template, t).prompt(messages) for t in (old, new))
    assert [at[i] for i in after] == before


def test_a_command_measures_an_artifact_of_another_run(tuned, talks, tmp_path):
    argv = ["eval", str(tuned), "--out", str(tmp_path / "out"), "--data.source", "jsonl", "--data.path", talks.path]
    assert app.run([*argv, "--data.test", "0.2", "--examples", "7", "--no-plot", "--no-speed"]) == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())[0]["task"] == "conversations"


def test_answers_end_where_those_of_training_end(tuned, tmp_path, capsys, monkeypatch):
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("a7\nb\n"))
    assert app.run(["generate", str(tuned), "--chat", "--max-new", "8", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)["messages"]
    assert [m["content"] for m in said] == ["a7", "xx", "b", "yyy"]


@pytest.mark.parametrize(
    ("line", "template", "said"),
    [
        ('{"messages": [{"role": "user", "content": "x"}]}', "chatml", "x.jsonl:3: column 'messages' holds a conv"),
        ('{"messages": []}', "chatml", "x.jsonl:3: column 'messages' holds a conversation without messages"),
        ('{"messages": "x"}', "chatml", "x.jsonl:3: column 'messages' holds str, not a list of messages"),
        ('{"messages": [{"role": "bot", "content": "x"}]}', "chatml", "message 1 has the role 'bot'"),
        ("", "", "has no chat template; say chat.template"),
        ("", "nowhere.jinja", "chat.template: no such file: 'nowhere.jinja'"),
        ("", "{% for %}", "the chat template is damaged"),
        ("", "{{ raise_exception('only pairs') }}", "x.jsonl:1: the chat template refuses these messages: only pairs"),
        ("", "{{ messages[0].nothing.upper() }}", "x.jsonl:1: the chat template fails on these messages"),
    ],
)
def test_wrong_requests_are_refused_in_one_line(line, template, said, base, tmp_path, capsys):
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    rows = [json.dumps(good), json.dumps({"messages": good["messages"] * 2})]
    (tmp_path / "x.jsonl").write_text("\n".join([*rows, line] if line else rows))
    if "{" in template:
        (tmp_path / "t.jinja").write_text(template)
        template = str(tmp_path / "t.jinja")
    argv = ["finetune", "--from", str(base), "--out", str(tmp_path / "out"), "--task", "chat", "--data.source", "jsonl",
            "--data.path", str(tmp_path / "x.jsonl"), "--data.test", "0", "--data.validation", "0.5",
            "--train.seq-len", "32"]  # fmt: skip
    assert app.run([*argv, *(["--chat.template", template] if template else [])]) == 2
    out, err = capsys.readouterr()
    assert [said in line for line in err.splitlines() if line.startswith("llmctl: ")] == [True] and not out
    assert sorted(p.name for p in tmp_path.iterdir()) in (["t.jinja", "x.jsonl"], ["x.jsonl"])


def test_what_is_not_for_conversations_is_refused(base, tmp_path):
    with pytest.raises(ValueError, match="chat: not for task 'lm'"):
        finetune.Config(task="lm", chat=ChatConfig(template="chatml"))
    with pytest.raises(RequestError, match="task 'chat' needs a decoder, this model is an encoder_decoder"):
        TASKS["chat"].check_model(ModelConfig(preset="t5-tiny"), "x")


def test_a_tokenizer_without_an_end_token_needs_a_template_file(monkeypatch, tmp_path):
    words = SimpleNamespace(chat_template=None, special_ids={}, special_spellings={"bos_token": "<s>"})
    monkeypatch.setattr(loading, "load", lambda folder: words)
    with pytest.raises(RequestError, match=r"has no end token that a template can name; name a file in chat\.template"):
        TASKS["chat"].tokenizer_dir(tmp_path, ChatConfig(template="chatml"), tmp_path / "work")
    assert not list(tmp_path.iterdir())
