"""Two processes never write one folder, and a lock leaves nothing behind."""

import multiprocessing

import pytest

from llmctl.artifacts import atomic
from llmctl.config.errors import RequestError
from llmctl.distributed import locks


def _hold(out, ready, done):
    with atomic.writing(out) as draft:
        (draft / "whole").write_text("yes")
        ready.set()
        done.wait(60)


def test_a_second_process_is_refused_and_the_first_one_s_folder_is_whole(tmp_path):
    """Two exports into one folder ended with success and without the folder."""
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path / "out", ready, done))
    other.start()
    try:
        assert ready.wait(60)
        with (
            pytest.raises(RequestError, match=rf"out: another llmctl \(process {other.pid}\) is at work there"),
            atomic.writing(tmp_path / "out"),
        ):
            pass
    finally:
        done.set()
        other.join()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out/whole").read_text() == "yes"


def test_claims_nest_and_leave_nothing(tmp_path):
    with locks.claim(tmp_path / "new/out"), locks.claim(tmp_path / "new/out"):
        assert locks.scratch(tmp_path / "new/out", "lock").exists()
    assert not list(tmp_path.iterdir())


def test_a_lock_of_a_dead_process_counts_for_nothing(tmp_path):
    locks.scratch(tmp_path / "out", "lock").write_text("1")
    with locks.claim(tmp_path / "out"):
        pass


@pytest.mark.parametrize(("name", "why"), [("x" * 201, "201"), ("\ud800", "not valid Unicode"), ("é" * 101, "202")])
def test_names_that_no_file_system_takes_are_refused_first(tmp_path, name, why):
    with pytest.raises(RequestError, match=why):
        atomic.check(tmp_path / name)
    atomic.check(tmp_path / ("x" * 200))


def test_files_of_others_stay(tmp_path):
    for name in ("out.partial", ".out.draft", ".out.old", ".out.import"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("kept")
    with atomic.writing(tmp_path / "out") as draft:
        (draft / "a").touch()
    assert len(list(tmp_path.glob("*/mine")) + list(tmp_path.glob(".*/mine"))) >= 4


def test_locks_and_scratch_files_are_not_written_through_links(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".work").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere" / "file")
    (tmp_path / ".out.llmctl-draft").symlink_to(tmp_path / "elsewhere")
    for path in (tmp_path / "run" / ".work" / "run.lock", tmp_path / "lock"):
        with pytest.raises(RequestError, match=r"is a link to .*/elsewhere"), locks.lock(path, "it"):
            pass
    with pytest.raises(RequestError, match=r"draft: is a link to .*/elsewhere"), atomic.writing(tmp_path / "out"):
        pass
    assert not list((tmp_path / "elsewhere").iterdir())
