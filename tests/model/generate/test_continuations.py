"""Text as it becomes certain: stop strings across chunks, unfinished characters, ends."""

from llmctl.model.generate.continuations import Continuation, Speed
from llmctl.model.generate.padded_prompts import NOTHING

END = 0


def decode(ids):
    """Ids are bytes; 0 decodes to nothing."""
    return bytes(i for i in ids if i).decode("utf-8", errors="replace")


def feed(chunks, stops=()):
    row = Continuation("ab", [97, 98], stops)
    said = [row.add(list(c), decode, [END]) for c in chunks]
    return row, [*said, row.finish(decode)]


def test_text_comes_as_it_is_made():
    row, said = feed([b"cd", b"e"])
    assert said == ["cd", "e", ""] and row.text == "cde" and row.ended == "length"


def test_a_stop_string_is_found_across_chunks_and_never_shown():
    row, said = feed([b"c<", b"en", b"d>zzz"], stops=["<end>"])
    assert said == ["c", "", "", ""] and row.text == "c" and row.ended == "stop"


def test_what_only_looked_like_a_stop_string_is_shown_later():
    row, said = feed([b"c<", b"en", b"ds"], stops=["<end>"])
    assert said == ["c", "", "<ends", ""]
    row, said = feed([b"c<e"], stops=["<end>"])
    assert said == ["c", "<e"] and row.ended == "length"


def test_the_earliest_stop_string_wins():
    row, _ = feed([b"one, two. three"], stops=["three", ".", ","])
    assert row.text == "one"


def test_an_unfinished_character_waits_for_its_end():
    one, two, three = "€".encode()
    _, said = feed([[99, one], [two], [three, 100]])
    assert said == ["c", "", "€d", ""]


def test_nothing_follows_an_end_token():
    row, _ = feed([b"c", [100, END, NOTHING], [NOTHING, NOTHING]])
    assert row.text == "cd" and row.ended == "end" and row.ids == [99, 100, END]


def test_speed_is_none_before_anything_was_timed():
    assert Speed(tokens=3).tokens_per_second is None
    assert Speed(3, 10, 2.0).tokens_per_second == 5.0
