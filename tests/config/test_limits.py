"""Limits on memory."""

import pytest

from llmctl.config import base, limits
from llmctl.config.errors import RequestError


def test_what_does_not_fit_into_memory_is_refused(monkeypatch):
    monkeypatch.setattr(limits, "memory", lambda: 2**30)
    limits.check_memory(2**30, "it", "buy more")
    with pytest.raises(RequestError, match=r"^it would take 1,024\.0 GiB, and this machine has 1\.0; buy more$"):
        limits.check_memory(2**40, "it", "buy more")


def test_a_recipe_has_an_end():
    with pytest.raises(RequestError, match=r"/dev/zero: has more than 16,777,216 bytes"):
        base.read_toml("/dev/zero")


def test_this_machine_has_memory():
    assert 2**28 < limits.memory() < 2**50
