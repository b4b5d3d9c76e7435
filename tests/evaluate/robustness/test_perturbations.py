"""Changes of texts do what their names say, to the stated fraction of the words, and nothing else."""

import difflib
from random import Random

import pytest

from llmctl.config.errors import RequestError
from llmctl.evaluate.robustness import perturbations, synonyms
from llmctl.evaluate.robustness.perturbations import PERTURBATIONS, WORD, Options, changed
from llmctl.evaluate.robustness.settings import NEUTRAL, TEMPLATES, RobustnessConfig

TEXT = "The old man's story -- a beautiful tale, isn't it? -- begins in HAMBURG and ends in 1903, far away from home."
KNOWN = {"story": ["tale"], "tale": ["story"], "beautiful": ["lovely", "fair"], "hamburg": ["hammaburg"]}
OPTIONS = Options(0.5, KNOWN, TEMPLATES, NEUTRAL)


def words(text):
    return [m.group() for m in WORD.finditer(text)]


def rest(text):
    """What lies between the words."""
    return WORD.split(text)


@pytest.mark.parametrize("name", PERTURBATIONS.own)
def test_a_change_depends_on_text_and_seed_alone(name):
    found = {changed(name, TEXT, OPTIONS, seed) for seed in range(20)}
    assert found == {changed(name, TEXT, OPTIONS, seed) for seed in range(20)}
    assert len(found) > 1 or name == "truncation"
    for text in ("", "!?", " a ", "é"):
        assert changed(name, text, OPTIONS, 0).strip() or not text.strip()


@pytest.mark.parametrize("name", ["typos", "swaps", "case", "synonyms"])
def test_changes_of_words_leave_the_rest_as_it_is(name):
    for seed in range(20):
        after = changed(name, TEXT, OPTIONS, seed)
        assert rest(after) == rest(TEXT)
        pairs = [(a, b) for a, b in zip(words(TEXT), words(after), strict=True) if a != b]
        assert pairs
        for before, now in pairs:
            if name == "typos":
                ((a, b),) = [(a, b) for a, b in zip(before, now, strict=True) if a != b]
                assert b.lower() in perturbations.NEIGHBOURS[a.lower()] and a.isupper() == b.isupper()
            elif name == "swaps":
                at = [i for i, (a, b) in enumerate(zip(before, now, strict=True)) if a != b]
                assert at[1] == at[0] + 1 and len(at) == 2 and at[0] > 0 and at[1] < len(before) - 1
                assert sorted(before) == sorted(now)
            elif name == "case":
                assert now == (before.lower() if before.isupper() else before.upper())
            else:
                assert now.lower() in KNOWN[before.lower()] and now.isupper() == before.isupper()


def test_the_rate_is_the_expected_fraction_of_the_words_that_a_change_applies_to():
    text = " ".join(["abcd"] * 10 + ["of"] * 10)  # three-letter words and shorter ones are too short for swaps
    for rate in (0.05, 0.3, 1.0):
        counts = [words(changed("swaps", text, Options(rate), s)).count("acbd") for s in range(400)]
        assert abs(sum(counts) / 400 - 10 * rate) < 0.1
        assert {*counts} <= {int(10 * rate), int(10 * rate) + 1}
    kept = [len(words(changed("drops", text, Options(0.3), s))) for s in range(20)]
    assert {*kept} == {14} and words(changed("drops", "one two", Options(1.0), 0)) in (["one"], ["two"])
    assert changed("truncation", text, Options(0.25), 0) == " ".join(text.split()[:15])


def test_dropped_words_are_removed_with_their_space():
    for seed in range(20):
        after = changed("drops", "one two, three", Options(0.34), seed)
        assert after in ("two, three", "one, three", "one two,")


def test_padding_and_paraphrases_keep_the_text_whole():
    for seed in range(20):
        padded = changed("padding", TEXT, OPTIONS, seed)
        added = len(words(padded)) - len(words(TEXT))
        assert padded.startswith(TEXT + " ") or padded.endswith(" " + TEXT)
        assert 0.5 * len(words(TEXT)) <= added <= 0.5 * len(words(TEXT)) + 8
        assert TEXT in changed("paraphrase", TEXT, OPTIONS, seed)
    assert len({changed("padding", TEXT, OPTIONS, s).index(TEXT) > 0 for s in range(20)}) == 2


def test_characters_of_chinese_are_words():
    after = changed("drops", "很好的电影", Options(0.4), 0)
    assert len(after) == 3 and difflib.SequenceMatcher(None, "很好的电影", after).ratio() == 0.75


def test_keyboard_neighbours_are_mutual():
    near = perturbations.NEIGHBOURS
    assert len(near) == 26 and all(a in near[b] for a, others in near.items() for b in others)
    assert (
        sorted(near["s"]) == sorted("awedxz")
        and sorted(near["p"]) == sorted("ol")
        and sorted(near["m"]) == sorted("njk")
    )


def test_synonyms_are_read_from_a_file_or_from_wordnet(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("film, movie , picture\n\ngreat, a lot of fun\nlonely\n")
    known = synonyms.read(str(file))
    assert known["film"] == ["movie", "picture"] and known["great"] == ["a lot of fun"] and "lonely" not in known
    # Two senses of "bank": the first of the noun is the most frequent one; 5 of its uses were tagged.
    (tmp_path / "net").mkdir()
    for part in synonyms.PARTS:
        data = b"  licence\n"
        index = "  licence\n"
        if part == "noun":
            first, second = len(data), len(data) + len(place := b"00000010 14 n 02 bank 0 depository 0 000 | a place\n")
            data += place + b"00000060 17 n 02 bank 0 slope 0 000 | land\n"
            index += f"bank n 2 1 @ 2 5 {first:08d} {second:08d}\n"
        if part == "verb":
            index += f"bank v 1 0 1 2 {len(data):08d}\n"
            data += b"00000010 40 v 02 bank 0 rely 0 000 | trust\n"
        (tmp_path / "net" / f"data.{part}").write_bytes(data)
        (tmp_path / "net" / f"index.{part}").write_text(index)
    assert synonyms.read(str(tmp_path / "net")) == {"bank": ["depository"]}
    assert RobustnessConfig(synonyms=str(file)).inputs() == [str(file)]
    assert len(RobustnessConfig(synonyms=str(tmp_path / "net")).inputs()) == 8
    for wrong, why in ((tmp_path / "none.txt", "No such file"), (tmp_path, "No such file")):
        with pytest.raises(RequestError, match=f"synonyms: .*{why}"):
            synonyms.read(str(wrong))
    file.write_text("lonely\n")
    with pytest.raises(RequestError, match="has no line with two words"):
        synonyms.read(str(file))


@pytest.mark.parametrize(
    ("settings", "refusal"),
    [
        ({"changes": ["typoes"]}, "unknown perturbation 'typoes', did you mean 'typos'"),
        ({"rate": 0}, "greater than 0"),
        ({"templates": ["no place"]}, "must contain {{ text }} once"),
        ({"neutral": [" "]}, "must not be empty"),
        ({"task": "clasify"}, "did you mean 'classify'"),
    ],
)
def test_bad_settings_are_refused(settings, refusal):
    with pytest.raises(ValueError, match=refusal):
        RobustnessConfig(**settings)


def test_a_change_can_come_from_a_function(monkeypatch):
    monkeypatch.setitem(PERTURBATIONS.own, "reverse", lambda text, options, rng: text[::-1])
    assert changed("reverse", "abc", OPTIONS, 0) == "cba" == PERTURBATIONS["reverse"]("abc", OPTIONS, Random(0))
