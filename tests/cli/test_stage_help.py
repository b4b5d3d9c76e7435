"""Help of the stage commands by heading, completion, and presets: what a new user asks first."""

import json

import pytest

from llmctl.cli import app
from llmctl.pipeline import registry
from llmctl.train.adapters.registry import METHODS

STAGES = registry.stages()


@pytest.fixture
def call(capsys):
    """Runs a command in this process: exit code, stdout, stderr."""

    def called(*argv: str):
        code = app.run(list(argv))
        out, err = capsys.readouterr()
        return code, out, err

    return called


def flags(text: str) -> list[str]:
    return [line.split()[0] for line in text.splitlines() if line.startswith("  --")]


@pytest.mark.parametrize("kind", STAGES)
def test_help_lists_the_common_flags_under_headings_and_help_all_every_flag(call, kind, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, short, _ = call(kind, "--help")
    assert code == 0 and len(flags(short)) <= 20 and max(map(len, short.splitlines())) <= 80
    assert short.index("Artifacts and recipe:") < short.index("What it does:")
    assert "Where it runs:" not in short and "--help-all lists more flags under:" in " ".join(short.split())
    code, whole, _ = call(kind, "--help-all")
    assert code == 0 and set(flags(short)) < set(flags(whole)) and len(flags(whole)) == len(set(flags(whole)))
    where = whole[whole.index("Where it runs:") :]
    assert {"--platform", "--mesh.data", "--coordinator"} <= set(flags(where)) and "--seed" not in where


def test_headings_come_from_the_config_classes(call):
    _, out, _ = call("finetune", "--help")
    headings = [line for line in out.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert headings == ["Artifacts and recipe:", "What it does:", "Data:", "Training:"]
    assert flags(out[out.index("Data:") : out.index("Training:")]) == ["--data.source", "--data.path", "--data.columns"]
    assert flags(out[out.index("What it does:") :])[:2] == ["--task", "--method"]  # in the order of `common`


def test_the_syntax_of_lists_and_tables_is_explained_where_flags_take_them(call):
    text = " ".join(call("eval", "--help")[1].split())
    assert "LIST is items with commas, such as a,b" in text and "TABLE is a TOML table in quotes" in text
    assert "LIST is" not in call("finetune", "--help")[1] and "LIST is" in call("finetune", "--help-all")[1]


def test_the_artifact_may_stand_in_first_place(call, tmp_path, fake_stages, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call("make", "--out", "r/a")[0] == 0
    code, out, _ = call("change", "r/a", "--out", "r/b", "--json")
    assert code == 0 and json.loads(out)["parent"]["name"] == "a"
    assert call("score", "r/a", "--json")[0] == 0
    code, _, err = call("change", "r/a", "--from", "r/b", "--out", "r/c")
    assert code == 2 and "r/a and --from r/b: say one of the two" in err
    code, _, err = call("change", "r", "--out", "c")
    assert code == 2 and "r is a run, not an artifact; name one of r/a, r/b" in err


def test_presets_are_listed(call):
    code, out, _ = call("show", "--presets", "--json")
    found = {p["preset"]: p for p in json.loads(out)["presets"]}
    assert code == 0 and found["gpt2"]["parameters"] == 124_439_808  # as published
    assert (found["bert-base"]["family"], found["t5-small"]["architecture"]) == ("bert", "encoder_decoder")
    assert found["bert-base"]["exports"] == ["hf", "compressed-tensors", "peft"] and not found["modern-base"]["exports"]
    assert "llama-tiny" in call("show", "--presets")[1] and call("show", "--presets", "x")[0] == 2
    assert "llmctl show --presets" in " ".join(call("pretrain", "--help")[1].split())


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("llmctl fin", ["finetune"]),
        ("llmctl finetune --train.st", ["--train.steps"]),
        ("llmctl finetune --method ", [*METHODS]),
        ("llmctl show --pre", ["--presets"]),
    ],
)
def test_shells_complete_commands_flags_and_choices(call, monkeypatch, line, words):
    monkeypatch.setenv("_LLMCTL_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(line.count(" ")))
    code, out, _ = call()
    assert (code, out.split()) == (0, words)


def test_completion_is_installed_by_a_flag(call):
    out = call("--help")[1]
    assert "--install-completion" in out and "--show-completion" in out
