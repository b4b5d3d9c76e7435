"""The examples of CONTRIBUTING, installed as a package: commands use them by name. Its tables say what is there."""

import json
import re
import tomllib
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from llmctl.cli import app
from llmctl.compress.quantization.schemes import SCHEMES
from llmctl.config import registry
from llmctl.evaluate.tasks.losses import Options
from llmctl.evaluate.tasks.registry import TASKS

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / ".github/CONTRIBUTING.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, flags=re.S | re.M)


def entry_points():
    (table,) = blocks("toml")
    return tomllib.loads(table)["project"]["entry-points"]["llmctl"]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A folder on the path with `my_package` and what an installer leaves of its entry points."""
    for code in blocks("python"):
        file = tmp_path / code.splitlines()[0].removeprefix("# ")
        file.parent.mkdir(exist_ok=True)
        file.write_text(code)
    info = tmp_path / "my_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[llmctl]\n" + "\n".join(f"{k} = {v}" for k, v in entry_points().items()))
    monkeypatch.syspath_prepend(str(tmp_path))
    registry.entry_points.cache_clear()
    yield tmp_path
    registry.entry_points.cache_clear()


def llmctl(*words):
    assert app.run([str(w) for w in words]) == 0


def test_every_kind_is_documented_and_used_through_the_command_line(package, artifacts, capsys):
    quotes = package / "quotes.txt"
    quotes.write_text("".join(f"{i} words of number {i} - {'ann' if i % 2 else 'bob'}\n" for i in range(60)))
    data = ("--data.source", "quotes", "--data.path", quotes, "--data.test", "0.3")
    classifier = package / "run" / "classifier"
    train = ("--train.steps", 1, "--train.batch-size", 8, "--train.eval-every", 0, "--train.seq-len", 16)
    train = (*train, "--task", "focal", "--method", "norms", "--adversarial.method", "noise")
    llmctl("finetune", "--from", artifacts / "lm", "--out", classifier, *data, *train)
    powers = package / "run" / "powers"
    llmctl("quantize", "--from", classifier, "--out", powers, "--format", "powers")

    capsys.readouterr()
    measured = ("--metrics", "kappa", "--tasks", "focal,truncated,robustness", "--robustness.changes", "unpunctuated")
    llmctl("eval", "--from", powers, *data, *measured, "--seq-len", 8, "--no-speed", "--no-plot", "--json")
    scored, truncated, changed = (one["metrics"] for one in json.loads(capsys.readouterr().out)["results"])
    assert -1 <= scored["kappa"] <= 1 and scored["examples"] > 0
    assert truncated["truncated"] in (0.0, 1.0) and "accuracy_under_unpunctuated" in changed

    calibration = (*data, "--examples", 4, "--batch-size", 4, "--seq-len", 16)
    pruned = package / "run" / "pruned"
    llmctl(
        "prune", "--from", classifier, "--out", pruned, "--method", "movement", "--sparsity", 0.5, *data, *calibration
    )
    ternary = package / "run" / "ternary"
    llmctl("quantize", "--from", classifier, "--out", ternary, "--format", "ternary")
    shown = [json.loads((folder / "manifest.json").read_text()) for folder in (pruned, ternary, powers)]
    assert shown[0]["sparsity"] > 0.2 and shown[1]["bits"] < 32 and shown[2]["bits"] < 32
    assert {one["task"] for one in shown} == {"focal"}
    assert "power" in {weight.get("node") for weight in shown[2]["weights"].values()}


def test_the_task_and_the_weight_by_hand(package):
    """The loss of p = 0.8 is 0.2^2 log(1 / 0.8). The largest power is 1. By logarithm 0.75 rounds to 1, 0.7 to 0.5."""
    batch = {"label": jnp.array([1, 0])}
    loss, sums = TASKS["focal"].score(jnp.log(jnp.array([[0.2, 0.8], [0.5, 0.5]])), batch, Options())
    np.testing.assert_allclose(loss, 0.04 * np.log(1.25) + 0.25 * np.log(2), rtol=1e-5)
    np.testing.assert_allclose(sums["loss"], np.log(1.25) + np.log(2), rtol=1e-5)
    node = SCHEMES["powers"](jnp.array([[3.0, 0.75, -0.7], [-0.26, 0.0, 0.12]]), -2, 0)
    assert node.dense().tolist() == [[1, 1, -0.5], [-0.25, 0, 0.125]]


def test_help_lists_what_packages_add(package, capsys):
    for command, *names in (
        ("finetune", "quotes", "focal", "norms", "noise"), ("eval", "kappa", "unpunctuated"), ("prune", "movement"),
        ("quantize", "ternary", "powers"),
    ):  # fmt: skip
        llmctl(command, "--help-all")
        shown = capsys.readouterr().out
        assert all(name in shown for name in names)


def rows():
    """The cells of the table "Where a new thing goes"."""
    table = TEXT[TEXT.index("## Where a new thing goes") : TEXT.index("## Adding things")]
    return [[c.strip() for c in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")][2:]


def test_where_a_new_thing_goes():
    """Places exist; an entry point's kind has an example here and a registry in the code."""
    code = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "llmctl").rglob("*.py"))
    kinds = set(re.findall(r'Registry\(\s*"(\w+)"', code))
    named = set()
    for _, places, how, points in rows():
        paths = re.findall(r"`((?:llmctl|tests|recipes)/[\w./]+)`", places)
        assert paths and how.endswith("."), places
        assert all((ROOT / p).exists() for p in paths), places
        named.update(re.findall(r"`(\w+)`", points))
    assert named <= kinds
    assert {point.split(".")[0] for point in entry_points()} == named


def test_rooms_are_those_of_the_package():
    table = TEXT[TEXT.index("## Rooms") : TEXT.index("## Where a new thing goes")]
    rooms = re.findall(r"^\| `llmctl/(\w+)`", table, flags=re.M)
    assert {*rooms} == {p.parent.name for p in (ROOT / "llmctl").glob("*/__init__.py")}
