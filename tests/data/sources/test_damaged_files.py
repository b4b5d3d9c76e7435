"""Files of data sets that fuzzing found: each is refused in one line, and nothing beside it is read or imported."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from etils import epath

from llmctl.config.errors import RequestError
from llmctl.data import row_stream, write_splits
from llmctl.data.config import DataConfig, SourceConfig
from llmctl.data.pretraining import prepared
from llmctl.data.source import open_source
from llmctl.data.sources import tfds

TABLE = pa.table({"text": ["one", "two"], "label": ["a", "b"]})


def arrow(table):
    stream = io.BytesIO()
    with pa.ipc.new_stream(stream, table.schema) as out:
        out.write_table(table)
    return stream.getvalue()


@pytest.fixture
def saved(tmp_path):
    """A folder as save_to_disk writes it."""
    (tmp_path / "x.arrow").write_bytes(arrow(TABLE))
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "x.arrow"}]}))
    return tmp_path


@pytest.mark.parametrize(
    ("file", "content"),
    [
        *[("state.json", {"_data_files": files}) for files in (5, "x", [5], [{}], [{"filename": 5}], None)],
        *[("dataset_dict.json", {"splits": splits}) for splits in (5, 0.5, [5], [["train"]], None)],
        *[("dataset_info.json", {"features": features}) for features in (5, [1], "ab")],
        ("dataset_info.json", {"features": {"label": {"_type": "ClassLabel", "names": 5}}}),
    ],
)
def test_descriptions_of_hugging_face_data(saved, file, content):
    (saved / file).write_text(json.dumps(content))
    with pytest.raises(RequestError, match=rf"{file}: damaged; save the data set again"):
        open_source(SourceConfig(source="hf", path=str(saved)))


def test_offsets_of_an_arrow_stream_stay_inside_it(saved):
    """Without validation, a length was negative, and others read memory beside the text."""
    data = arrow(TABLE)
    offsets = (0).to_bytes(4, "little") + (3).to_bytes(4, "little") + (6).to_bytes(4, "little")
    assert data.count(offsets) == 1
    for wrong in (2**31 - 1, -5, 100):
        changed = offsets[:4] + wrong.to_bytes(4, "little", signed=True) + offsets[8:]
        (saved / "x.arrow").write_bytes(data.replace(offsets, changed))
        with pytest.raises(RequestError, match=r"x\.arrow: damaged in batch 0 \("):
            list(open_source(SourceConfig(source="hf", path=str(saved))))


@pytest.mark.parametrize("kind", ["hf", "parquet"])
def test_values_that_python_cannot_hold(saved, kind):
    table = pa.table({"text": pa.array([2**62], pa.timestamp("us"))})
    (saved / "x.arrow").write_bytes(arrow(table))
    pq.write_table(table, saved / "x.parquet")
    source = open_source(SourceConfig(source=kind, path=str(saved / "x.parquet" if kind == "parquet" else saved)))
    with pytest.raises(RequestError, match=r"x\.\w+: damaged in (batch|row group) 0 \("):
        list(source)


def test_names_of_arrow_columns_are_text(saved):
    (saved / "x.arrow").write_bytes(arrow(TABLE).replace(b"label", b"\xffabel"))
    with pytest.raises(RequestError, match="not an Arrow stream"):
        list(open_source(SourceConfig(source="hf", path=str(saved))))


@pytest.mark.parametrize(
    "named", ["antigravity.x", "os.path.join", "tensorflow_datasets_evil.X", "my.tensorflow_datasets.X"]
)
def test_only_classes_of_tfds_are_loaded(tmp_path, named):
    """TFDS imports the module of every class that features.json names."""
    content = {"pythonClassName": "tensorflow_datasets.core.features.features_dict.FeaturesDict"}
    content["featuresDict"] = {"features": {"text": {"pythonClassName": named}}}
    (tmp_path / "features.json").write_text(json.dumps(content))
    with pytest.raises(RequestError, match=rf"names the class '{named}', and only those of TFDS are loaded"):
        tfds._check_classes(tmp_path)
    (tmp_path / "features.json").write_text(json.dumps({"type": named, "content": {}}))
    with pytest.raises(RequestError, match="only those of TFDS"):
        tfds._check_classes(tmp_path)


def test_features_that_are_no_json(tmp_path):
    for data in (b"\xe9", b"{", b'{"a":' * 1000):
        (tmp_path / "features.json").write_bytes(data)
        with pytest.raises(RequestError, match=r"features\.json: damaged"):
            tfds._check_classes(tmp_path)


def test_a_csv_header_to_predict_that_is_none():
    with pytest.raises(RequestError, match="the header is not CSV"):
        list(row_stream.rows(io.BytesIO(b'"a"b,c\n'), "in", "csv", {}))


def test_splits_that_cannot_be_written_leave_no_draft(tmp_path, monkeypatch):
    (tmp_path / "x.txt").write_text("a\nb\nc\n")
    cfg = DataConfig(path=str(tmp_path / "x.txt"), documents="line")
    monkeypatch.setattr(write_splits, "_plain", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_splits.write(cfg, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["x.txt"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"dtype": "O"}, {"dtype": "<f2"}, {"dtype": "V9"}, {"splits": {"train": [{"weight": float("nan")}]}},
        {"splits": {"train": [{"weight": -1.0}]}}, {"splits": {"train": [{"epochs": float("inf")}]}},
        {"splits": {"train": [{"shards": [{"documents": -1}]}]}},
    ],
)  # fmt: skip
def test_descriptions_of_prepared_data(tmp_path, wrong):
    shard = {"file": "a", "documents": 1, "tokens": 3, "bytes": 6, "sha256": "0"}
    part = {"title": "a", "weight": 1.0, "epochs": 0.0, "lengths": "a.npy", "shards": [shard]}
    about = {"format": 1, "key": "k", "tokenizer": "0", "dtype": "<u2", "data": {}, "splits": {"train": [part]}}
    (tmp_path / "prepared.json").write_text(json.dumps(about))
    prepared.read(str(tmp_path))
    if "dtype" not in wrong:
        changed = wrong["splits"]["train"][0]
        part |= {"shards": [shard | changed["shards"][0]]} if "shards" in changed else changed
    (tmp_path / "prepared.json").write_text(json.dumps(about | {k: v for k, v in wrong.items() if k == "dtype"}))
    with pytest.raises(RequestError, match=r"prepared\.json: damaged"):
        prepared.read(str(tmp_path))


@pytest.mark.parametrize("name", ["state.json", "dataset_dict.json", "dataset_info.json", "x.arrow"])
def test_links_out_of_hugging_face_data_are_not_opened(saved, tmp_path_factory, name):
    (saved / name).unlink(missing_ok=True)
    secret = tmp_path_factory.mktemp("outside") / "secret"
    secret.write_text("{}")
    (saved / name).symlink_to(secret)
    with pytest.raises(RequestError, match=rf"{name}: is a link to .*secret, outside"):
        open_source(SourceConfig(source="hf", path=str(saved)))


def test_links_out_of_prepared_data_are_not_opened(tmp_path, tmp_path_factory):
    secret = tmp_path_factory.mktemp("outside") / "secret"
    secret.write_text("{}")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "prepared.json").write_text("{}")
    (tmp_path / "tokenizer" / "llmctl_tokenizer.json").symlink_to(secret)
    with pytest.raises(RequestError, match=r"llmctl_tokenizer\.json: is a link to .*secret, outside"):
        prepared.read(str(tmp_path))


@pytest.mark.parametrize("lengths", [3, [[1, 2]], [4, -1], [1.0, 2.0], [1, 1], ["a", "b"], [2**62, 2**62]])
def test_lengths_of_prepared_data(tmp_path, lengths):
    (tmp_path / "a").write_bytes(bytes(6))
    np.save(tmp_path / "a.npy", np.asarray(lengths))
    shard = prepared.Shard(file="a", documents=2, tokens=3, bytes=6, sha256="0")
    part = prepared.Part(title="a", weight=1.0, epochs=0.0, lengths="a.npy", shards=[shard])
    with pytest.raises(RequestError, match=r"a\.npy: damaged"):
        prepared.Shards(epath.Path(tmp_path), part, "<u2")
    np.save(tmp_path / "a.npy", np.array([1, 2], np.int32))
    assert prepared.Shards(epath.Path(tmp_path), part, "<u2").lengths.tolist() == [1, 2]
