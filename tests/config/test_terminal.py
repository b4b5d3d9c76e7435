"""What a file or a user names reaches the terminal as text: no markup, no control character that acts."""

import json

import pytest
from rich.table import Table

from llmctl.config.terminal import as_json, terminal, visible
from llmctl.distributed import processes
from llmctl.pipeline import console

NASTY = "q[/red][bold]\x1b[31mred\x07\x9b2J\u202e\ud800:smile:"
SHOWN = r"q[/red][bold]\x1b[31mred\x07\x9b2J\u202e\ud800:smile:"


def test_control_characters_become_escapes_and_text_stays():
    assert visible(NASTY) == SHOWN
    assert visible("näme\t漢字\nemoji 😀") == "näme\t漢字\nemoji 😀"


@pytest.mark.parametrize("out", ["say", "show", "table", "error"])
def test_every_way_to_print_shows_them(capsys, out):
    if out == "say":
        console.say(NASTY)
    elif out == "error":
        processes.exit_together(2, NASTY)
    else:
        table = Table(NASTY, title=NASTY)
        table.add_row(NASTY)
        console.show(NASTY if out == "show" else table)
    printed = "".join(capsys.readouterr())
    assert printed.count(SHOWN) == (3 if out == "table" else 1)
    assert printed.isprintable() or {c for c in printed if not c.isprintable()} == {"\n"}


def test_json_escapes_them_and_reads_back():
    text = as_json({NASTY: [NASTY, float("nan")], "ü": 1.5})
    assert json.loads(text) == {NASTY: [NASTY, None], "ü": 1.5}
    assert text.isprintable() and "ü" in text


def test_a_style_is_no_part_of_a_text(capsys):
    terminal().print("[bold]x[/bold]")
    assert capsys.readouterr().out == "[bold]x[/bold]\n"
