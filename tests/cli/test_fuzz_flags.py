"""Fuzz the command line: wild values of every command's flags are refused in one line with exit code 2."""

import random

import fuzz_inputs
import pytest
import typer

from llmctl.cli import app
from llmctl.config.errors import RequestError
from llmctl.pipeline import registry, runner

MANY = pytest.param(range(3000), marks=pytest.mark.slow, id="many")


@pytest.fixture(scope="module")
def flags():
    """Flags of every command, by its name."""
    found = {}
    for name in [*registry.commands(), *registry.stages()]:
        group = typer.main.get_command(app.app(name))
        found[name] = [o for p in group.commands[name].params for o in p.opts if o.startswith("--")]
    return {name: [o for o in options if not o.startswith("--help")] for name, options in found.items()}


@pytest.mark.parametrize("seeds", [pytest.param(range(60), id="few"), MANY])
@pytest.mark.filterwarnings("ignore")
def test_wild_command_lines_are_refused_in_one_line(flags, seeds, tmp_path, monkeypatch, capsys):
    """The work itself is replaced by a refusal."""

    def refuse(*_, **__):
        raise RequestError("reached the work")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "run", refuse)
    names = [n for n in flags if n not in ("doctor",)]
    for seed in seeds:
        words = fuzz_inputs.command_line(random.Random(seed), names, flags)
        code = app.run(words)
        _, err = capsys.readouterr()
        assert code in (0, 2) and err.count("\n") <= 1 and "LLMCTL_DEBUG" not in err, (seed, words, code, err)
    assert not list(tmp_path.rglob(".work"))
