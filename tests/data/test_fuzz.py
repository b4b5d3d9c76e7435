"""Read generated tables of every format: each is read right, or refused in one line that names the fault."""

import shutil
from collections import Counter

import fuzz_files
import fuzz_tables
import pytest

from llmctl.config.errors import RequestError
from llmctl.data import splits
from llmctl.data.config import DataConfig


def judge(seed, folder):
    """Write the table of a seed, read it, compare with its expectation, and return the kind of outcome."""
    table = fuzz_tables.make(seed)
    at = fuzz_files.write(table, folder, seed)
    rows, classes, unlabeled = ([], (), 0) if table.message else fuzz_tables.outcome(table)
    expected = table.message.replace("{at}", at[table.bad]) if table.message else "" if rows else "no text in it"
    cfg = DataConfig(validation=0, test=0, dedup=False, **table.config)
    try:
        found = splits.load(cfg, labels=table.labels)
    except RequestError as error:
        assert expected, (seed, str(error))
        with pytest.raises(RequestError, match=expected):
            raise
        assert "\n" not in str(error), seed
        return "refused"
    assert not expected, (seed, expected, found.classes)
    train = found["train"]
    said = []
    for row in train:
        label = row.get("tags", row.get("label", ""))
        if table.task == "set":
            label = sorted(c for c, member in zip(train.classes, label, strict=True) if member)
        elif table.task == "class":
            label = train.classes[label]
        said.append((row["text"], row.get("pair", ""), label))
    if table.kind == "tfds":  # its own order
        said, rows = sorted(said, key=repr), sorted(rows, key=repr)
    assert said == rows, seed
    if table.task in ("class", "set", "tags"):
        assert found.classes == classes, seed
    assert found.unlabeled == unlabeled, seed
    return "read, rows dropped" if unlabeled else "read"


@pytest.mark.parametrize(
    "seeds", [range(150), pytest.param(range(2000), marks=pytest.mark.slow)], ids=["few", "two thousand"]
)
@pytest.mark.filterwarnings("ignore")  # warnings of TFDS itself
def test_tables_are_read_right_or_refused_in_one_line(seeds, tmp_path):
    outcomes = Counter()
    for seed in seeds:
        outcomes[fuzz_tables.FORMATS[seed % 5], judge(seed, tmp_path / str(seed))] += 1
        shutil.rmtree(tmp_path / str(seed))
    for kind in fuzz_tables.FORMATS:
        assert outcomes[kind, "read"] > 0 and outcomes[kind, "refused"] > 0
