"""Stored outputs of a teacher: sizes by hand, equal after reading, and refused if a byte, an id or a row is wrong."""

import numpy as np
import pytest

from llmctl.config.errors import RequestError
from llmctl.data import padding, teacher_records
from llmctl.data.taught_rows import TaughtRows, needed
from llmctl.data.teacher_records import Description, Layout, Records

LAYOUT = Layout({"teacher_ids": (4, 2), "teacher_log_p": (4, 2), "teacher_rest": (4,)}, 300)
ROW = {"tokens": np.arange(4, dtype=np.int32), "weights": np.array([0, 1, 0, 1], np.float32), "targets": np.arange(4)}


def outputs(**changes):
    """Return outputs with the probabilities 1/2, 1/4 and a rest of 1/4 at each position."""
    log_p = np.log(np.full((4, 2), [0.5, 0.25], np.float32))
    found = {"teacher_ids": np.full((4, 2), [7, 299], np.int32), "teacher_log_p": log_p}
    return found | {"teacher_rest": np.log(np.full(4, 0.25, np.float32))} | changes


def test_a_record_has_the_positions_with_a_weight():
    """8 bytes of fingerprint, and 2 positions of 2 ids of 2 bytes, 2 floats and 1 float."""
    record = LAYOUT.encode(outputs(), ROW)
    assert len(record) == 8 + 2 * (2 * 2 + 2 * 4 + 4) == LAYOUT.row_bytes(2)
    assert LAYOUT.row_bytes() == 8 + 4 * 16 and Layout(LAYOUT.shapes, 2**16 + 1).row_bytes(2) == 8 + 2 * 20
    found = LAYOUT.decode(record, ROW)
    for name, a in outputs().items():
        np.testing.assert_array_equal(found[name][[1, 3]], a[[1, 3]], err_msg=name)
        assert not found[name][[0, 2]].any() and found[name].dtype == a.dtype


def test_places_select_the_positions_and_class_logits_are_whole():
    row = ROW | {"places": np.array([3, 0, 1])}
    layout = Layout({"places_teacher_rest": (3,), "teacher_outputs": (2,)})
    arrays = {"places_teacher_rest": np.zeros(3), "teacher_outputs": np.array([1.5, -2.0])}
    record = layout.encode(arrays, row)
    assert len(record) == 8 + 2 * 4 + 2 * 4  # the place 0 has no weight
    np.testing.assert_array_equal(layout.decode(record, row)["teacher_outputs"], [1.5, -2.0])


@pytest.mark.parametrize(("changes", "line"), [
    ({"teacher_ids": np.full((4, 2), [7, 300])}, "ids are not ascending tokens"),
    ({"teacher_ids": np.full((4, 2), [9, 9])}, "ids are not ascending tokens"),
    ({"teacher_rest": np.zeros(4)}, "probabilities do not add up to 1"),
    ({"teacher_log_p": np.full((4, 2), np.nan)}, "a value is not finite"),
])  # fmt: skip
def test_values_that_no_teacher_has_are_refused(changes, line):
    with pytest.raises(ValueError, match=line):
        LAYOUT.decode(LAYOUT.encode(outputs(**changes), ROW), ROW)


def test_records_of_other_rows_or_sizes_are_refused():
    record = LAYOUT.encode(outputs(), ROW)
    with pytest.raises(ValueError, match="belongs to another row"):
        LAYOUT.decode(record, ROW | {"tokens": ROW["tokens"] + 1})
    LAYOUT.decode(record, ROW | {"targets": ROW["targets"] + 1})  # labels are not read by a teacher
    with pytest.raises(ValueError, match="39 bytes, not 40"):
        LAYOUT.decode(record[:-1], ROW)


class Rows:
    """Three rows that differ in their first token; `examples` makes them examples of several epochs."""

    def __len__(self):
        return 3

    def batch(self, rows_B):
        each = [ROW | {"tokens": ROW["tokens"] + 10 * (i % 3)} for i in map(int, rows_B)]
        return {name: np.stack([row[name] for row in each]) for name in ROW}


class Examples(Rows):
    def examples(self, rows_B):
        return (rows_B + 1) % 3


def test_rows_of_examples_are_stored_once_and_packed_rows_by_their_number():
    number_N, row_N = needed(Examples(), 8)
    assert (number_N.tolist(), row_N.tolist()) == ([0, 1, 2], [2, 0, 1])
    assert [a.tolist() for a in needed(Examples(), 2)] == [[1, 2], [0, 1]]
    assert [a.tolist() for a in needed(Rows(), 5)] == [[0, 1, 2, 3, 4]] * 2


def test_files_are_added_read_and_checked(tmp_path):
    records, rows = Records(tmp_path, "train", LAYOUT), Rows()
    for part in ([4, 0], [2]):
        batch = rows.batch(np.array(part))
        made = [LAYOUT.encode(outputs(), {n: a[b] for n, a in batch.items()}) for b in range(len(part))]
        records.add(part, made, 5 * len(part))
    again = Records(tmp_path, "train", LAYOUT)
    assert again.tokens == 15
    assert again.has(np.array([0, 1, 2, 3, 4])).tolist() == [True, False, True, False, True]
    taught = TaughtRows(rows, again)
    batch = taught.batch(np.array([2, 4, 0]))
    assert batch["teacher_ids"].shape == (3, 4, 2) and batch["tokens"][:, 0].tolist() == [20, 10, 0]
    assert taught.bare is rows and padding.lengths(taught) == {}  # which reads rows without outputs too
    assert len(taught) == 3 and taught[2]["teacher_rest"].shape == (4,)
    file = tmp_path / "train-00000.arrayrecord"
    assert again.bytes == sum(p.stat().st_size for p in tmp_path.glob("*.arrayrecord"))
    note = tmp_path / "train-00001.json"
    # The row of another number, and a file of an earlier version, which has no count of tokens.
    note.write_text(note.read_text().replace("[2]", "[3]").replace('"tokens":5', '"tokens":null'))
    moved = Records(tmp_path, "train", LAYOUT)
    assert moved.tokens is None
    with pytest.raises(RequestError, match=r"the record of train row 3 is not usable \(it belongs to another row\)"):
        moved.read(np.array([3]), rows.batch(np.array([0])))
    content = bytearray(file.read_bytes())
    content[content.index(LAYOUT.encode(outputs(), {n: a[0] for n, a in rows.batch(np.array([4])).items()})[:8])] ^= 1
    file.write_bytes(content)
    with pytest.raises(RequestError, match="damaged"):
        Records(tmp_path, "train", LAYOUT).read(np.array([4]), rows.batch(np.array([4])))
    file.write_bytes(content[:-1])
    with pytest.raises(RequestError, match=r"train-00000.arrayrecord: missing or damaged"):
        Records(tmp_path, "train", LAYOUT)
    note = tmp_path / "train-00000.json"
    note.write_text(note.read_text().replace("[4,0]", f"[{2**64},0]"))
    with pytest.raises(RequestError, match=r"train-00000.json: damaged"):
        Records(tmp_path, "train", LAYOUT)


def test_descriptions_are_checked(tmp_path):
    assert teacher_records.read(tmp_path) is None and teacher_records.read(tmp_path / "none") is None
    teacher_records.write(tmp_path, Description(format=1, made_for={"top_k": 2}))
    assert teacher_records.read(tmp_path).made_for == {"top_k": 2}
    file = tmp_path / "cache.json"
    text = file.read_text()
    for changed, line in (
        (text.replace('"top_k": 2', '"top_k": 3'), "does not match what was saved"),
        (text.replace('"format": 1', '"format": 2'), "written by a newer llmctl"),
        (text[:20], "damaged"),
        ("[]", "damaged"),
    ):
        file.write_text(changed)
        with pytest.raises(RequestError, match=line):
            teacher_records.read(tmp_path)
    file.rename(tmp_path / "other")
    with pytest.raises(RequestError, match="is there already, with something else"):
        teacher_records.read(tmp_path)
