"""Answers of `predict` with language models: those of `generate` for the same row, in order, whatever is between."""

import csv
import json

import jax
import pytest

from llmctl.artifacts import artifact
from llmctl.cli.app import run
from llmctl.config.errors import RequestError
from llmctl.data.tokenizers.byte_tokenizer import ByteTokenizer
from llmctl.evaluate.predict_text import TextPredictor
from llmctl.model import functional
from llmctl.model.config import ModelConfig

SIZES = {"d_model": 16, "layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 8, "d_ff": 16, "max_seq_len": 96}
PROMPTS = ["abc", "x", "a longer prompt than the others", "näme", "de"]
TEMPLATE = (
    "{% if tools %}{{ tools[0].name }}{% endif %}{% for m in messages %}{{ m.role[0] + m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}<mask>{% endfor %}"
    "{% if add_generation_prompt %}:{% endif %}"
)


@pytest.fixture(scope="module")
def save(tmp_path_factory):
    """Saves a random model for a task, and returns its folder."""
    folder = tmp_path_factory.mktemp("writers")
    words = ByteTokenizer.new()
    words.save(folder / "words")
    (folder / "words" / "chat_template.jinja").write_text(TEMPLATE)

    def saved(task, preset, **generation):
        out = folder / f"{task}{preset}"
        if not out.exists():
            more = {"encoder_layers": 1, "kv_heads": 2} if preset == "t5-tiny" else {}
            model = ModelConfig(preset=preset, **{**SIZES, **more}, vocab_size=words.vocab_size, dropout=0.0)
            # Larger than usual, so that different prompts have different answers.
            make = jax.jit(lambda key: jax.tree.map(lambda a: 4 * a, functional.init(model, key)))
            about = {"stage": "finetune", "key": "k", "config": {"train": {"seq_len": 60}}}
            artifact.save(
                out, make(jax.random.key(1)), model, task=task, generation=generation,
                tokenizer_dir=folder / "words", **about,
            )  # fmt: skip
        return out

    return saved


@pytest.mark.parametrize(("task", "preset"), [("lm", "llama-tiny"), ("seq2seq", "t5-tiny")])
def test_answers_are_those_of_generate(task, preset, save, tmp_path, capsys):
    model = str(save(task, preset, max_new=6))
    rows = [json.dumps(p if i % 2 else {"prompt": p, "id": i}) for i, p in enumerate(PROMPTS)]
    (tmp_path / "in.jsonl").write_text("\n".join([*rows[:2], "{", '{"prompt": " "}', '{"other": 1}', *rows[2:]]))
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows))
    call = ["predict", model, "--file", str(tmp_path / "in.jsonl"), "--batch-size", "2", "--max-new", "6"]
    assert run([*call, "--out", str(tmp_path / "out.jsonl")]) == 0
    err = capsys.readouterr().err
    for place in ("3: not JSON", "4: no", "5: no"):
        assert f"in.jsonl:{place}" in err
    assert run(["generate", model, "--file", str(tmp_path / "prompts.jsonl"), "--max-new", "6", "--json"]) == 0
    expected = [(r["text"], r["ended"]) for r in json.loads(capsys.readouterr().out)["results"]]
    assert len({text for text, _ in expected}) > 2
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [f["row"] for f in found] == [*range(1, 9)] and ["error" in f for f in found] == [
        *(False, False, True, True, True, False, False, False)
    ]
    assert [(f["answer"], f["ended"]) for f in found if "error" not in f] == expected
    assert run([*call, "--to", "text", "--out", str(tmp_path / "out.txt")]) == 0
    lines = (tmp_path / "out.txt").read_text().split("\n")
    texts = [" ".join(text.splitlines()) for text, _ in expected]
    assert lines == [*texts[:2], "", "", "", *texts[2:], ""]
    assert run([*call, "--strict"]) == 2


def test_conversations_are_answered_like_those_of_generate(save, tmp_path, capsys):
    model = str(save("chat", "llama-tiny"))
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    talks = [
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]},
        {
            "messages": [{"role": "user", "content": "hi"}, call, {"role": "tool", "content": "4"}],
            "tools": [{"name": "f"}],
        },
        {"conversations": [{"from": "human", "value": "yes"}]},
    ]  # fmt: skip
    flags = ["--max-new", "5", "--to", "csv", "--out", str(tmp_path / "out.csv")]
    expected = []
    for talk in talks:
        (tmp_path / "talk.json").write_text(json.dumps(talk))
        assert (
            run(["generate", model, "--chat", "--file", str(tmp_path / "talk.json"), "--max-new", "5", "--json"]) == 0
        )
        expected.append(json.loads(capsys.readouterr().out)["messages"][-1]["content"])
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, [*talks, "yes", {"messages": [{"role": "user"}]}])))
    assert run(["predict", model, "--file", str(tmp_path / "in.jsonl"), *flags]) == 0
    assert "in.jsonl:5: message 1 (user) is empty" in capsys.readouterr().err
    with (tmp_path / "out.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [f["answer"] for f in found[:3]] == expected and len(set(expected)) > 1
    assert found[3]["answer"] == expected[2]  # a text alone is a message of the user
    assert found[4]["error"].endswith("message 1 (user) is empty")


def test_long_conversations_lose_their_first_exchanges(save):
    model = TextPredictor(artifact.load(save("chat", "llama-tiny")), max_new=5)
    system, turn = {"role": "system", "content": "sss"}, {"role": "user", "content": "b" * 30}
    long = [system, {"role": "user", "content": "a" * 30}, {"role": "assistant", "content": "c" * 30}, turn]
    kept = model.read({"messages": [system, turn]}, "row 1")
    assert model.read({"messages": long}, "row 2").prompt_ids == kept.prompt_ids
    assert model.remarks == ["1 prompts were longer than 60 tokens and were cut"]
    with pytest.raises(RequestError, match=r"^row 3: the last exchange has \d+ tokens, and a prompt at most 60$"):
        model.read({"messages": [{"role": "user", "content": "b" * 70}]}, "row 3")


def test_settings_of_finetuning_apply_unless_they_are_given(save):
    found = artifact.load(save("seq2seq", "t5-tiny", max_new=6))
    model = TextPredictor(found)
    (answer,) = model.answers([model.read({"text": "abc"}, "row")])
    assert (model._writer.max_new, model._writer.settings.beams) == (6, 1) and set(answer) == {"answer", "ended"}
    assert TextPredictor(found, max_new=4, beams=2)._writer.settings.beams == 2


def test_what_cannot_answer_is_refused(save, capsys):
    lm = str(save("lm", "llama-tiny"))
    for argv, said in (
        ([lm, lm], "generated answers have no average; name one artifact"),
        ([lm, "--max-new", "96"], "leave no room within the model's longest sequence"),
        ([lm, "--seq-len", "97"], "--seq-len 97 is longer"),
        ([lm, "--batch-size", "1000000000"], "--batch-size 1000000000: its rows"),
        ([lm, "--probabilities"], "generates text, which has no classes"),
        ([str(save("lm", "bert-tiny"))], "fills masks, which `llmctl generate` does"),
    ):
        assert run(["predict", *argv, "--file", __file__]) == 2
        out, err = capsys.readouterr()
        assert said in err and err.count("\n") == 1 and not out
