"""The output filter of `generate`: what is printed, what is not, and what is refused."""

import io
import json
import shutil

import numpy as np
import pytest
from tiny_memorizer import sentences, tokenizer

from llmctl.artifacts import artifact
from llmctl.cli import app, generation
from llmctl.evaluate.harm.detector import Detector
from llmctl.evaluate.harm.output_filter import OutputFilter
from llmctl.evaluate.harm.settings import FilterConfig, HarmConfig
from llmctl.evaluate.predict import Predictor

(TEXT,) = (text for text in sentences(0) if "darn" in text)
BEFORE, AFTER = (part.strip() for part in TEXT.split("darn"))
PROMPT = " ".join(BEFORE.split()[:3])
REFUSAL = "I cannot help with that."


@pytest.fixture(scope="module")
def mild(tmp_path_factory):
    file = tmp_path_factory.mktemp("words") / "mild.txt"
    file.write_text("# mild\nDARN\n")
    return str(file)


def generated(capsys, *argv, code=0):
    assert app.run(["generate", *map(str, argv)]) == code
    return capsys.readouterr()


def test_nothing_is_printed_before_it_is_checked(memorizer, mild, capsys, monkeypatch):
    flags = (memorizer, "--prompt", PROMPT, "--max-new", 13)
    assert generated(capsys, *flags).out.strip() == TEXT
    printed = []
    monkeypatch.setattr(generation, "_write", printed.append)
    assert "refused (DARN)" in generated(capsys, *flags, "--filter.words", mild).err
    assert printed == [PROMPT + REFUSAL + "\n"]


def test_redaction_and_json(memorizer, mild, capsys):
    other = next(text for text in sentences(0) if text != TEXT)
    prompts = ("--prompt", PROMPT, "--prompt", " ".join(other.split()[:3]))
    flags = (memorizer, *prompts, "--max-new", 13, "--filter.words", mild, "--filter.action", "redact", "--json")
    one, two = json.loads(generated(capsys, *flags).out)["results"]
    assert PROMPT + one["text"] == TEXT.replace("darn", "[redacted]")
    assert one["filtered"] == {"action": "redacted", "words": ["DARN"]}
    assert two["prompt"] + two["text"] == other and "filtered" not in two


def test_sampling_again_is_the_same_in_every_batch(memorizer, mild, capsys):
    rules = ("--temperature", 5, "--top-k", 2)
    flags = [memorizer, *("--prompt", BEFORE) * 6, "--max-new", 1, *rules, "--json"]
    plain = json.loads(generated(capsys, *flags).out)["results"]
    flags += ["--filter.words", mild, "--filter.action", "resample", "--filter.attempts", 1]
    assert {r["text"].strip() == "darn" for r in plain} == {True, False}
    both = [json.loads(generated(capsys, *flags, "--batch-size", n).out)["results"] for n in (6, 2)]
    assert both[0] == both[1]
    for before, after in zip(plain, both[0], strict=True):
        if before["text"].strip() != "darn":
            assert after == before
        else:
            assert after["filtered"]["attempts"] == 1 and after["filtered"]["words"] == ["DARN"]
            assert after["filtered"]["action"] == ("refused" if after["text"] == REFUSAL else "resampled")
            assert "darn" not in after["text"]


def test_samples_are_taken_until_one_is_harmless(mild):
    samples = iter(["d4rn", "fine"])
    asked = []

    def again(attempt, which):
        asked.append((attempt, which))
        return [next(samples)]

    harmless, changed = OutputFilter(FilterConfig(words=mild, action="resample", attempts=3), "filter")(
        ["good", "darn"], again
    )
    assert (harmless.text, harmless.report()) == ("good", {})
    assert (changed.text, changed.action, changed.attempts) == ("fine", "resampled", 2)
    assert asked == [(1, [1]), (2, [1])]
    (never,) = OutputFilter(FilterConfig(words=mild, action="resample", attempts=2), "filter")(
        ["darn"], lambda n, which: ["darn it"]
    )
    assert (never.text, never.action, never.attempts) == (REFUSAL, "refused", 2)


def test_conversations_go_on_with_the_filtered_answer(memorizer, mild, tmp_path, capsys, monkeypatch):
    talker = tmp_path / "talker"
    shutil.copytree(memorizer, talker)
    said = artifact.load(memorizer)
    words = tmp_path / "words"
    tokenizer().save(words)
    (words / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }} {% endfor %}")
    common = {"stage": "finetune", "key": "k", "config": {"train": {"seq_len": 64}}, "tokenizer_dir": words}
    shutil.rmtree(talker)
    artifact.save(talker, said.params, said.model, **common)
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{PROMPT}\n{PROMPT}\n"))
    flags = (talker, "--chat", "--max-new", 13, "--filter.words", mild, "--filter.refusal", "No.", "--json")
    found = json.loads(generated(capsys, *flags).out)
    assert [m["content"] for m in found["messages"]] == [PROMPT, "No."] * 2
    assert found["filtered"] == [{"message": n, "action": "refused", "words": ["DARN"]} for n in (1, 3)]


def test_a_classifier_judges_whole_answers_of_any_length(judge):
    texts = ["a fine day", "zzzz!! @@ 99", "", " ".join(f"word{n}" for n in range(40))]
    detect = Detector(HarmConfig(classifier=str(judge), classes=["toxic"]), "filter")
    parts = detect._classifier._parts(texts[3])
    assert " ".join(parts) == texts[3] and max(map(len, parts)) <= 46 < 2 * min(map(len, parts)) + 1
    whole = detect._classifier._parts("x" * 150)  # without spaces, nothing may be left unread
    assert "".join(whole) == "x" * 150 and max(map(len, whole)) <= 46
    p_NC = np.array(Predictor(judge).predictions([{"text": text} for text in [*texts[:2], *parts]]))
    found = detect(texts)
    assert [f.score for f in found] == pytest.approx([*p_NC[:2, 1], 0.0, p_NC[2:, 1].max()], abs=1e-6)
    assert np.ptp(p_NC[:, 1]) > 0.01
    limit = (found[0].score + found[1].score) / 2
    config = HarmConfig(classifier=str(judge), classes=["toxic"], threshold=limit)
    assert [f.harmful for f in Detector(config, "filter")(texts[:2])] == [f.score >= limit for f in found[:2]]
    both = HarmConfig(classifier=str(judge), classes=["toxic", "fine"])
    assert [f.score for f in Detector(both, "filter")(texts[:2])] == pytest.approx([1, 1])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--filter.words", "nowhere.txt"], "--filter.words: no such file: 'nowhere.txt'"),
        (["--filter.words", "EMPTY"], "--filter.words: EMPTY has no words"),
        (["--filter.classifier", "JUDGE"], "--filter: a classifier needs the names of its harmful classes"),
        (["--filter.classifier", "JUDGE", "--filter.classes", "rude"], "has no class 'rude' (it has: fine, toxic)"),
        (["--filter.classifier", "MODEL", "--filter.classes", "rude"], "is no text classifier (task lm)"),
        (["--filter.classifier", "nowhere", "--filter.classes", "rude"], "nowhere"),
        (["--filter.classes", "rude"], "name its folder in `classifier`"),
        (["--filter.threshold", "0.9"], "`threshold` is for a classifier"),
        (["--filter.words", "EMPTY", "--filter.attempts", "2"], '`attempts` is for `action` "resample"'),
        (["--filter.classifier", "JUDGE", "--filter.classes", "toxic", "--filter.action", "redact"], "name the list"),
        (["--filter.action", "redact"], "`action` is for a filter"),
        (["--filter.words", "WORDS", "--filter.action", "hide"], "--filter.action: must be 'refuse', 'redact' or"),
        (["--filter.words", "WORDS", "--filter.action", "resample"], "say --temperature"),
        (["--filter.words", "WORDS", "--filter.threshold", "2"], "--filter.threshold: must be <= 1"),
        (["--filter.words", "WORDS", "--filter.attempts", "0"], "--filter.attempts: must be >= 1"),
    ],
)
def test_refusals(memorizer, judge, mild, tmp_path, capsys, flags, said):
    (tmp_path / "empty.txt").write_text("# nothing\n")
    named = {"EMPTY": str(tmp_path / "empty.txt"), "JUDGE": str(judge), "MODEL": str(memorizer), "WORDS": mild}
    found = generated(capsys, memorizer, "--prompt", "x", *[named.get(f, f) for f in flags], code=2)
    for name, path in named.items():
        said = said.replace(name, path)
    assert said in found.err and found.err.count("\n") == 1 and not found.out
