"""Bounds of JSON and TOML that others wrote."""

import pytest

from llmctl.config import base, text_input
from llmctl.config.errors import RequestError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a": [1, 2.5, null]}', {"a": [1, 2.5, None]}),
        (b'\xef\xbb\xbf"\xc3\xa9"', "\u00e9"),
        ("\ufeff1", 1),
        ('"\\ud83d\\ude00"', "\U0001f600"),  # a whole pair
        ("1000000000000000019884624838656", 1000000000000000019884624838656),  # "no limit" in published files
        ("[" * 100 + "]" * 100, None),
    ],
)
def test_json_that_is_read(text, value):
    found = text_input.parse_json(text)
    assert found == value or value is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 101 + "]" * 101, "nested deeper than 100 levels"),
        ('{"a":' * 100_000, "nested deeper than 100 levels"),
        (b"\xe9", r"not UTF-8 text \(byte 0\)"),
        ("a".encode("utf-16"), r"not UTF-8 text \(byte 0\)"),
        ('["\\ud800"]', "half a surrogate pair"),
        ('{"\\uDFFF": 1}', "half a surrogate pair"),
        (str(2**128), "more than 128 bits"),
        ("9" * 5000, "Exceeds the limit"),
    ],
)
def test_json_that_is_refused(text, reason):
    with pytest.raises(ValueError, match=reason):
        text_input.parse_json(text)


def test_a_value_that_is_no_toml_stays_text():
    assert base.parse_value("[" * 10_000) == "[" * 10_000
    assert base.parse_value("9" * 5000) == "9" * 5000
    assert base.parse_value(".".join("a" * 200)) == ".".join("a" * 200)


def test_text_that_utf_8_cannot_hold():
    assert text_input.check_unicode("\u00e9\U0001f600", "x") == "\u00e9\U0001f600"
    with pytest.raises(RequestError, match=r"x: not UTF-8 text \(character 2\)"):
        text_input.check_unicode("a\udce9", "x")


@pytest.mark.parametrize(("noun", "said"), [("encoder", "an encoder"), ("decoder", "a decoder"), ("int8", "an int8")])
def test_the_article_follows_the_sound(noun, said):
    assert base.with_article(noun) == said
