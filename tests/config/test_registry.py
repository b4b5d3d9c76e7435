"""Registries: ours by table, others' by entry points, each imported when it is used and no earlier."""

import sys
from importlib.metadata import EntryPoint

import pytest

from llmctl.config import registry
from llmctl.config.errors import RequestError
from llmctl.config.registry import Registry


@pytest.fixture
def things(monkeypatch, tmp_path):
    (tmp_path / "somebodys.py").write_text("def arrow():\n    return 'read'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    values = {"source.arrow": "somebodys:arrow", "source.gone": "not_there:x", "metric.arrow": "somebodys:arrow"}
    points = {n: EntryPoint(n, v, "llmctl") for n, v in values.items()}
    monkeypatch.setattr(registry, "entry_points", lambda: points)
    yield Registry("source", {"sqrt": "math:sqrt"})
    sys.modules.pop("somebodys", None)


def test_ours_and_others(things):
    assert things.names() == ["sqrt", "arrow", "gone"] and "arrow" in things and "metric.arrow" not in things
    assert "somebodys" not in sys.modules
    assert things["sqrt"](9) == 3 and things["arrow"]() == "read"


def test_what_is_missing_is_named(things):
    with pytest.raises(RequestError, match=r"unknown source 'arow', did you mean 'arrow'"):
        things["arow"]
    with pytest.raises(RequestError, match=r"source 'gone' of .* cannot be loaded: No module named 'not_there'"):
        things["gone"]
