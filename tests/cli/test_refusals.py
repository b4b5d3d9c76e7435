"""Wrong text, numbers and places are refused in one line, before any work."""

import errno
import io
import sys

import pytest
import typer

from llmctl.artifacts import artifact
from llmctl.cli import app
from llmctl.cli.commands import generate
from llmctl.config.errors import RequestError
from llmctl.data import paths
from llmctl.distributed import locks


@pytest.fixture
def refused(capsys):
    """refused(command, words): the line of a command that must end with exit code 2, one line and no output."""

    def line(*argv):
        code = app.run(list(argv))
        out, err = capsys.readouterr()
        assert (code, out, err.count("\n")) == (2, "", 1), (code, out, err)
        assert err.startswith("llmctl: ") and "Error" not in err and "LLMCTL_DEBUG" not in err
        return err.removeprefix("llmctl: ").rstrip("\n")

    return line


def test_arguments_that_are_not_utf_8(refused):
    """Files could not record them: the stage failed when it saved."""
    assert refused("show", "caf\udce9") == "argument 2: not UTF-8 text (character 4); convert it first"


def test_the_current_folder_is_gone(refused, tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert refused("show", ".") == "the current folder: no such file or directory; change to another one"


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["generate", "a", "--seed", str(2**64)], "Input should be less than or equal to 9223372036854775807"),
        (["generate", "a", "--beams", str(2**64)], "--beams 18446744073709551616: must be a whole number of 64 bits"),
        (["generate", "a", "--beams", "inf"], "Input should be a valid integer"),
        (["generate", "a", "--length-penalty", "nan"], "--length-penalty nan: must be a finite number"),
        (["generate", "a", "--top-p", "1e39"], "--top-p 1e+39: must be a finite number, at most 3.4e+38"),
        (["export", "a", "--out", "b", "--shard-size", "inf"], "--shard-size inf: must be a finite number"),
        (["show", "--config", "llama-tiny", "--seq-len", "9" * 400], "must be a whole number of 64 bits"),
        (["prepare", "--out", "b", "--workers", str(2**63)], "must be a whole number of 64 bits"),
        (["export", "a", "--out", "gs://bucket/b"], "--out gs:/bucket/b: is no local folder"),
        (["show", "a" * 5000], "file name too long; choose another place"),
        (["pretrain", "--train.no-tensorboard"], "did you mean --no-train.tensorboard?"),
        (["prepare", "--recipe", "r", "--out", "b"], "did you mean RECIPE, which is written without a flag?"),
        (["run", "--recipe-file", "r"], "did you mean RECIPE, which is written without a flag?"),
        (["prepare", "--tokenizer.vocab-size", "9"], "; write --set tokenizer.vocab_size=VALUE"),
        (["show", "--tokenizer.kind", "bpe"], "No such option: --tokenizer.kind"),
        (["change", "a", "--from", "b", "--out", "c"], "change: a and --from b: say one of the two"),
        (["change", "--out", "c", "--sparsity", "nan"], "--sparsity: must be a"),
        (["make", "--out", "c", "--train.steps", str(2**63)], "--train.steps: must be a whole number of 64 bits"),
    ],
)
def test_numbers_and_names(request, refused, tmp_path, monkeypatch, argv, line):
    if argv[0] in ("change", "make"):
        request.getfixturevalue("fake_stages")
    monkeypatch.chdir(tmp_path)
    assert line in refused(*argv)
    assert not [p for p in tmp_path.iterdir() if p.name != "fake_stages"]


@pytest.mark.parametrize(
    ("text", "sets", "line"),
    [
        ("a = " + "[" * 10_000, (), "not valid TOML: nested deeper than 100 levels"),
        ("a = " + "[" * 200 + "]" * 200, (), "nested deeper than 100 levels"),
        (".".join(["a"] * 50_000) + " = 1", (), "nested deeper than 100 levels"),
        ("seed = " + "9" * 5000, (), "not valid TOML: Exceeds the limit"),
        ("run = 'a\\u0000'\n[[stage]]\nkind = 'make'".replace("'", '"'), (), "without a zero byte"),
        ('data.path = "a\\u0000"\n[[stage]]\nkind = "make"', (), "data.path: must hold no zero byte"),
        ("[[stage]]\nkind = 'make'", [".".join(["a"] * 5000) + "=1"], "must look like stage.2.sparsity=0.6"),
        ("[[stage]]\nkind = 'make'", ["stage.\u00b2.seed=1"], "no stage \u00b2"),
        ("train = 5\n[[stage]]\nkind = 'make'", ["train.steps=1"], "train.steps: train is a value, not a table"),
    ],
)
def test_recipes(refused, fake_stages, tmp_path, text, sets, line):
    (tmp_path / "r.toml").write_text(text)
    assert line in refused("run", str(tmp_path / "r.toml"), *(word for s in sets for word in ("--set", s)))


def test_places_where_nothing_can_be_written(refused, fake_stages, tmp_path, monkeypatch):
    """A lock in such a folder was tried again for ever."""
    monkeypatch.chdir(tmp_path)
    assert refused("make", "--out", "/proc/a") == "/proc: /proc/.work: no such file or directory; choose another place"
    assert "not a directory; choose another place" in refused("make", "--out", "/etc/hostname/a")
    with pytest.raises(RequestError, match="no such file or directory; choose another place"), locks.claim("/proc/a"):
        pass


def test_a_link_that_leads_nowhere_is_no_place(refused, fake_stages, tmp_path, monkeypatch):
    """The rename at the end failed, after the work."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.txt").write_text("a")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "gone").symlink_to("nothing")
    for link in ("loop", "gone"):
        assert (
            refused("make", "--out", link)
            == f"--out {link}: is a link that leads nowhere; remove it, or choose another place"
        )
        assert "--splits" in refused("prepare", "--splits", link, "--set", "data.path=x.txt")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fake_stages", "gone", "loop", "x.txt"]


def test_paths_that_orbax_reads_as_globs(tmp_path):
    """The checkpoint's files were not found and not merged, and the artifact was damaged."""
    artifact.check_output(tmp_path / "a{1}")
    for name in ("a[1]", "a*", "a?", "a\\b"):
        with pytest.raises(RequestError, match=r"its path has .*, with which arrays cannot be saved"):
            artifact.check_output(tmp_path / name / "b")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (OSError(errno.EROFS, "Read-only file system", "/a"), 2, "/a: read-only file system; choose another place"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "/a"), 2, "/a: is a directory; choose another place"),
        (OSError(errno.EFBIG, "File too large"), 1, "file too large; what was saved before is intact"),
        (OSError(errno.EIO, "Input/output error", b"/a"), 1, "/a: input/output error; what was saved before is"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a"), 1, "a: no such file or directory; what"),
        (RuntimeError("Symlink loop from '/a'"), 2, "Symlink loop from '/a'; choose another place"),
        (MemoryError(), 1, "out of memory: what was saved before is intact"),
        (typer.Exit(3), 1, "Exit"),
    ],
)
def test_exit_codes_of_the_system_s_errors(error, code, line):
    found = app.error_result(error)
    assert found[0] == code and found[1].startswith(line)


@pytest.mark.parametrize("spec", ["http://x/y", "x://y"])
def test_stores_that_are_not_known(spec):
    with pytest.raises(RequestError, match=f"'{spec}': {spec.partition(':')[0]}:// is no known store of files"):
        paths.resolve(spec)


def test_stores_whose_package_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(RequestError, match=r"'gs://b/c': cannot be reached \(ImportError"):
        paths.folder("gs://b/c")


@pytest.mark.parametrize(("data", "line"), [(b"a\ncaf\xe9\n", 2), (b"\xff", 1)])
def test_standard_input_that_is_not_utf_8(monkeypatch, data, line):
    for errors in ("strict", "surrogateescape"):  # the second in the POSIX locale
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), "utf-8", errors))
        with pytest.raises(RequestError, match=r"standard input, line \d( or later)?: not UTF-8 text"):
            list(generate._stdin())
