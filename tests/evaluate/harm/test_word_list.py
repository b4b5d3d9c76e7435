"""The word list finds whole words through obfuscation, and nothing else."""

import pytest

from llmctl.config.errors import RequestError
from llmctl.evaluate.harm import word_list
from llmctl.evaluate.harm.word_list import Match, WordList

WORDS = WordList(["darn", "ass", "shut up", "fool", "笨蛋", "गधा", "Blöd"])


@pytest.mark.parametrize(
    "text",
    [
        *("darn", "DARN!", "dàrn", "(darn)", "_darn_", "darn\u0301", "ｄａｒｎ", "𝐝𝐚𝐫𝐧", "d\u200bar\u00adn"),
        *("d\u0430rn", "d4rn", "D@RN", "daaarn", "dddaaarrrnnn", "d**n", "d*rn", "d.a.r.n", "D A R N", "f00l"),
        *("foooool", "a$$", "@ss", "4$5a ass", "asss", "SHUT\n up", "shut-up", "s.h.u.t up", "BLOD"),
        *("你这个笨蛋吗", "वह गधा है"),
    ],
)
def test_found(text):
    assert WORDS.find(text), text


@pytest.mark.parametrize(
    "text",
    [
        *("Scunthorpe", "class", "assassin", "bass ass1st", "darning", "undarned", "dar n", "da rn", "d.a-r.n", "fol"),
        *("as", "455", "5 5", "daarn", "me@ss.com", "d*", "****", "shut", "upshut up2", "गधाओं", "笨 蛋糕", "a.s", ""),
    ],
)
def test_not_found(text):
    assert not WORDS.find(text), text


def test_positions_are_those_of_the_original_text():
    text = "e\u0301 ﬁne: d\u200bA\u0301Rn\u0301, 笨蛋!"
    found = WORDS.find(text)
    assert [m.entry for m in found] == ["darn", "笨蛋"]
    assert [text[m.start : m.end] for m in found] == ["d\u200bA\u0301Rn\u0301", "笨蛋"]
    assert WORDS.redact(text) == "e\u0301 ﬁne: [redacted], [redacted]!"
    assert WordList(["oh", "oh no"]).find("Oh, no") == [Match(0, 6, "oh no")]  # the longest


def test_a_text_made_to_be_slow_is_not(tmp_path):
    WordList(["lilililil", "million"]).find("1" * 2000 + " " + "!" * 2000)


def test_files(tmp_path):
    file = tmp_path / "words.txt"
    file.write_text("\ufeff# mild words\n\n  Darn \nshut   up\r\n")
    found = word_list.read(str(file), "filter.words")
    assert [m.entry for m in found.find("darn, shut up")] == ["Darn", "shut up"]
    for text, said in (("", "has no words"), ("# x\n \n", "has no words"), ("darn\n--\n", ":2: '--' has no letter")):
        file.write_text(text)
        with pytest.raises(RequestError, match=rf"filter\.words: .*{said}"):
            word_list.read(str(file), "filter.words")
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(RequestError, match="not UTF-8"):
        word_list.read(str(file), "filter.words")
    with pytest.raises(RequestError, match=r"filter\.words: no such file: .*did you mean 'words.txt'"):
        word_list.read(str(tmp_path / "word.txt"), "filter.words")
