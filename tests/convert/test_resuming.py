"""A killed import resumes: the same artifact results, and no parameter is read twice."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from llmctl.artifacts import artifact
from llmctl.convert import importing, name_map, partial_save
from llmctl.model import weights


@pytest.fixture
def quiet(exported, tmp_path):
    """What an import makes that nothing happens to."""
    importing.run(exported, tmp_path / "quiet")
    return tmp_path / "quiet"


def same(a, b):
    one, two = artifact.load(a), artifact.load(b)
    assert one.manifest.digest == two.manifest.digest
    left, right = weights.flatten(one.params), weights.flatten(two.params)
    assert left.keys() == right.keys()
    for path, w in left.items():
        np.testing.assert_array_equal(w, right[path], err_msg=path, strict=True)
    keys = ("key", "bits", "parameters", "sparsity", "weights", "model", "tokenizer")
    assert all(getattr(one.manifest, k) == getattr(two.manifest, k) for k in keys)


def test_what_was_written_before_an_interruption_is_not_read_again(exported, quiet, tmp_path, monkeypatch, config):
    read, real = [], name_map._part

    def part(sources, *rest):
        path = sources[0][0].path
        if len(read) == 4:
            raise KeyboardInterrupt
        read.append(path)
        return real(sources, *rest)

    out = tmp_path / "out"
    monkeypatch.setattr(name_map, "_part", part)
    with pytest.raises(KeyboardInterrupt):
        importing.run(exported, out)
    assert not out.exists()
    before, said = set(read), []
    read.clear()
    read.append("")  # never 4 again where it counts: it began at 1 and what follows is more than 4
    monkeypatch.setattr(
        name_map, "_part", lambda sources, *rest: read.append(sources[0][0].path) or real(sources, *rest)
    )
    importing.run(exported, out, say=said.append)
    same(out, quiet)
    # With 8 devices, the parameter that was cut off in the middle is read anew, and those before it are not.
    assert not before & set(read) - {sorted(before)[-1]}
    assert any("going on after" in line for line in said)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "quiet"]


def test_another_source_does_not_go_on_with_it(exported, quiet, tmp_path):
    stream = partial_save.Stream(tmp_path / "out", "of something else")
    (stream.folder / "written").write_text("embed/tokens\n")
    importing.run(exported, tmp_path / "out")
    same(tmp_path / "out", quiet)


def test_committed_but_not_noted_is_written_once(exported, quiet, tmp_path, monkeypatch):
    """The moment between the two: the note is lost, the parameter is there."""
    real = partial_save.Stream.finish

    def die(self, shardings):
        raise KeyboardInterrupt

    monkeypatch.setattr(partial_save.Stream, "finish", die)
    with pytest.raises(KeyboardInterrupt):
        importing.run(exported, tmp_path / "out")
    notes = tmp_path / ".out.llmctl-import" / "written"
    notes.write_text("".join(notes.read_text().splitlines(keepends=True)[:-1]))
    monkeypatch.setattr(partial_save.Stream, "finish", real)
    importing.run(exported, tmp_path / "out")
    same(tmp_path / "out", quiet)


@pytest.mark.slow
def test_killed_again_and_again_it_ends_the_same(exported, quiet, tmp_path):
    out, killed = tmp_path / "out", 0
    notes = tmp_path / ".out.llmctl-import" / "written"
    for after in (1, 4, 8, 99):
        process = subprocess.Popen(
            [sys.executable, "-m", "llmctl", "import", str(exported), "--out", str(out)],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ, "XLA_FLAGS": ""},
        )  # fmt: skip
        while process.poll() is None:
            if notes.exists() and len(notes.read_text().splitlines()) >= after:
                process.send_signal(signal.SIGKILL)
                killed += 1
                break
            time.sleep(0.001)
        _, err = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), err
        if process.returncode == 0:
            break
        assert not out.exists()
    else:
        importing.run(exported, out)
    assert killed
    same(out, quiet)
