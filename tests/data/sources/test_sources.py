"""Test every file format: its rows, row locations in messages, and errors."""

import gzip
import os
import resource
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmctl.config import limits
from llmctl.config.errors import RequestError
from llmctl.data.config import SourceConfig
from llmctl.data.source import open_source
from llmctl.data.sources import jsonl


def rows(path, source, **kw):
    return open_source(SourceConfig(source=source, path=str(path), **kw))


def test_text_documents(tmp_path):
    (tmp_path / "b.txt").write_text("one\r\n\ntwo\nthree\n \nfour")
    (tmp_path / "a.txt").write_bytes("\ufeffcafé\n".encode())
    whole = rows(tmp_path / "*.txt", "text")
    assert [r["text"] for r in whole] == ["café\n", "one\r\n\ntwo\nthree\n \nfour"]
    lines = rows(tmp_path / "b.txt", "text", documents="line")
    assert [r["text"] for r in lines] == ["one", "two", "three", "four"]
    assert lines.where(3) == f"{tmp_path / 'b.txt'}:6"
    paragraphs = rows(tmp_path / "b.txt", "text", documents="paragraph")
    assert [r["text"] for r in paragraphs] == ["one", "two\nthree", "four"]
    assert paragraphs.where(1).endswith("b.txt:3")


def test_jsonl(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes('\ufeff{"text": "é", "n": 1}\n\n{"n": 2, "text": "b"}'.encode())
    found = rows(path, "jsonl")
    assert list(found) == [{"text": "é", "n": 1}, {"n": 2, "text": "b"}]
    assert found.columns == ("text", "n")
    assert found.where(1) == f"{path}:3"
    path.write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(RequestError, match=r"x.jsonl:2: not valid JSON"):
        list(rows(path, "jsonl"))
    path.write_text('{"text": "a"}\n["b"]\n')
    with pytest.raises(RequestError, match=r"x.jsonl:2: a line must hold a JSON object, not list"):
        list(rows(path, "jsonl"))
    path.write_text("")
    assert len(rows(path, "jsonl")) == 0
    for hostile in ("[" * 100_000, '{"n": ' + "1" * 5000 + "}"):
        path.write_text(hostile)
        with pytest.raises(RequestError, match=r"x.jsonl:1: not valid JSON"):
            rows(path, "jsonl")


def test_the_columns_of_jsonl_are_those_of_the_first_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "ROWS", 3)
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a"}\n{"pair": "b", "text": "c"}\n{"text": "d"}\n{"text": "e", "label": 1}\n')
    found = rows(path, "jsonl")
    assert found.columns == ("text", "pair")
    assert found.has("label") and not found.has("tags")
    monkeypatch.setattr(jsonl, "BYTES", 20)
    assert rows(path, "jsonl").columns == ("text",)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a", "label": 0, "label": 1}', "key 'label' is there twice; remove one"),
        ('{"text": "a"}\r{"text": "b"}', "not valid JSON"),
        ('{"text": "a"}'.encode("utf-16-le"), "not valid JSON"),
        (b'{"text": "\xe9"}', "not valid JSON"),
    ],
)
def test_json_that_means_something_else_to_others(tmp_path, line, message):
    (tmp_path / "x.jsonl").write_bytes(line if isinstance(line, bytes) else line.encode())
    with pytest.raises(RequestError, match=rf"x.jsonl:1: {message}"):
        list(rows(tmp_path / "x.jsonl", "jsonl"))


def test_two_columns_of_one_name_are_refused(tmp_path):
    (tmp_path / "x.csv").write_text("text,label,label\na,0,1\n")
    pq.write_table(pa.table([["a"], [0], [1]], names=["text", "label", "label"]), tmp_path / "x.parquet")
    for kind in ("csv", "parquet"):
        with pytest.raises(RequestError, match=rf"x.{kind}: two columns are called 'label'; rename one"):
            rows(tmp_path / f"x.{kind}", kind)


def test_a_header_may_lack_the_name_of_a_row_number_and_of_empty_columns(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text(",text,label,,\n0,a,1,,\n1,b,0,, \n")
    assert list(rows(path, "csv")) == [{"": "0", "text": "a", "label": "1"}, {"": "1", "text": "b", "label": "0"}]
    path.write_text("text,,label\na,x,1\n")
    with pytest.raises(RequestError, match=r"x.csv:1: column 2 of the header has no name; give it one"):
        rows(path, "csv")


def test_csv(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text('text;label\n"two\nlines; ""quoted""";1\n\nplain;0\n')
    found = rows(path, "csv", delimiter=";")
    assert list(found) == [{"text": 'two\nlines; "quoted"', "label": "1"}, {"text": "plain", "label": "0"}]
    assert found.where(1) == f"{path}:5"
    path.write_text("text,label\na,1\nb,1,2\n")
    with pytest.raises(RequestError, match=r"x.csv:3: 3 fields where the header has 2"):
        rows(path, "csv")
    path.write_text("text;label\na;1, or 2\n")
    with pytest.raises(RequestError, match=r"2 fields where the header has 1; are they separated by ';' "):
        rows(path, "csv")
    path.write_text('text\n"' + "x" * 200_000 + '"\n')
    assert len(rows(path, "csv")[0]["text"]) == 200_000
    path.write_bytes(b"text\ngood\nb\xe9d\n")
    with pytest.raises(RequestError, match=r"x.csv:3: not UTF-8 text"):
        rows(path, "csv")


def test_a_quote_that_nobody_closes_does_not_swallow_the_rest_of_the_file(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text('label,text\n1,fine\n0,"it begins\n1,and goes on\n0,to the end\n')
    with pytest.raises(RequestError, match=r"x.csv:3: not valid CSV"):
        rows(path, "csv")


def test_parquet(tmp_path):
    path = tmp_path / "x.parquet"
    table = {"text": [f"t{i}" for i in range(10)], "label": list(range(10))}
    pq.write_table(pa.table(table), path, row_group_size=3)
    found = rows(path, "parquet")
    assert found.columns == ("text", "label")
    assert [found[i]["text"] for i in (9, 0, 5)] == ["t9", "t0", "t5"]
    assert found.where(4) == f"{path}: row 5"
    with pytest.raises(IndexError):
        found[10]
    whole, last = path.read_bytes(), pq.read_metadata(path).row_group(3).column(0)

    def spoiled(at):
        return whole[:at] + b"\xff" * 16 + whole[at + 16 :]

    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    for damaged in (b"text", spoiled(footer)):
        path.write_bytes(damaged)
        with pytest.raises(RequestError, match=r"x.parquet: not a Parquet file"):
            rows(path, "parquet")
    path.write_bytes(spoiled(last.dictionary_page_offset))
    with pytest.raises(RequestError, match=r"x.parquet: damaged in row group 3"):
        list(rows(path, "parquet"))


def test_globs_chain_files_in_order(tmp_path):
    for name in "cab":
        (tmp_path / f"{name}.jsonl").write_text(f'{{"text": "{name}1"}}\n{{"text": "{name}2"}}\n')
    found = rows(tmp_path / "[ab].jsonl", "jsonl")
    assert [r["text"] for r in found] == ["a1", "a2", "b1", "b2"]
    assert found.where(2).endswith("b.jsonl:1")
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "d.jsonl").write_text('{"text": "d"}')
    assert [r["text"] for r in rows(tmp_path / "**" / "*.jsonl", "jsonl")][-3:] == ["c1", "c2", "d"]
    with pytest.raises(RequestError, match=r"is a folder; name its files with a glob"):
        rows(tmp_path, "jsonl")


def test_a_file_may_be_called_like_a_glob(tmp_path):
    (tmp_path / "reviews [1].jsonl").write_text('{"text": "a"}')
    assert len(rows(tmp_path / "reviews [1].jsonl", "jsonl")) == 1


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_there_may_be_more_files_than_a_shell_lets_a_process_open(tmp_path, kind):
    for i in range(80):
        if kind == "jsonl":
            (tmp_path / f"{i:02}.jsonl").write_text(f'{{"text": "t{i}"}}')
        else:
            pq.write_table(pa.table({"text": [f"t{i}"]}), tmp_path / f"{i:02}.parquet")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 30, limits[1]))
    try:
        found = [r["text"] for r in rows(tmp_path / f"*.{kind}", kind)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert found == [f"t{i}" for i in range(80)]


def test_files_inside_packages(tmp_path, monkeypatch):
    package = tmp_path / "some_reviews"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "data" / "x.txt").write_text("hello")
    monkeypatch.syspath_prepend(tmp_path)
    assert rows("pkg:some_reviews/data/x.txt", "text")[0] == {"text": "hello"}
    assert len(rows("pkg:some_reviews/data/*.txt", "text")) == 1
    assert "some_reviews" not in sys.modules
    for path, message in [
        ("pkg:some_reviews/data/y.txt", "the Python package 'some_reviews' has no file 'data/y.txt'"),
        ("pkg:absent_reviews/x.txt", r"'absent_reviews' is not installed \(try: pip install absent-reviews\)"),
        ("pkg:some_reviews", "should read pkg:NAME/path/of/file"),
    ]:
        with pytest.raises(RequestError, match=message):
            rows(path, "text")


def test_compressed_files(tmp_path):
    lines = '{"text": "a"}\n{"text": "b"}\n'
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(lines.encode()) * 2)
    with pa.output_stream(tmp_path / "x.jsonl.zst", compression="zstd") as stream:
        stream.write(lines.encode())
    assert [r["text"] for r in rows(tmp_path / "x.jsonl.gz", "jsonl")] == ["a", "b", "a", "b"]
    assert [r["text"] for r in rows(tmp_path / "x.jsonl.*", "jsonl")] == ["a", "b", "a", "b", "a", "b"]
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(b"text\nc\n"))
    assert list(rows(tmp_path / "t.csv.gz", "csv")) == [{"text": "c"}]
    whole = (tmp_path / "x.jsonl.zst").read_bytes()
    (tmp_path / "x.jsonl.zst").write_bytes(whole[:-3])
    with pytest.raises(RequestError, match=r"x.jsonl.zst: damaged .zst file"):
        rows(tmp_path / "x.jsonl.zst", "jsonl")


@pytest.mark.parametrize("source", ["text", "jsonl", "csv", "parquet"])
def test_pipes_and_devices_are_no_data(tmp_path, source):
    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((tmp_path / "pipe", "pipe"), ("/dev/zero", "device")):
        with pytest.raises(RequestError, match=f"{path}: is a {kind}, and llmctl reads regular files"):
            rows(path, source)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(("source", "options"), [("text", {"documents": "line"}), ("jsonl", {})])
def test_a_line_has_a_length_limit(tmp_path, monkeypatch, source, options, suffix):
    monkeypatch.setattr(limits, "LINE", 50)
    packed = gzip.compress if suffix else bytes
    path = tmp_path / f"x{suffix}"
    path.write_bytes(packed(b'{"text": "a"}\n' * 3))
    assert len(rows(path, source, **options)) == 3
    path.write_bytes(packed(b'{"text": "a"}\n{"text": "' + b"a" * 60 + b'"}\n'))
    with pytest.raises(RequestError, match=r"x(\.gz)?:2: a line of 72 bytes; 50 at most"):
        rows(path, source, **options)


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_a_file_that_unpacks_to_very_much_is_refused(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(limits, "UNCHECKED", 1 << 20)
    path = tmp_path / f"x.txt.{kind}"
    with pa.output_stream(path, compression={"gz": "gzip", "zst": "zstd"}[kind]) as stream:
        stream.write(b"\n" * (8 << 20))
    monkeypatch.setattr(limits, "RATIO", 900)
    with pytest.raises(RequestError, match="decompresses to more than 900 times its size"):
        len(rows(path, "text", documents="line"))
    monkeypatch.setattr(limits, "RATIO", 10**9)
    monkeypatch.setattr(limits, "memory", lambda: 4 << 20)
    with pytest.raises(RequestError, match="its decompressed content would take"):
        len(rows(path, "text", documents="line"))
