"""Write the tables of `fuzz_tables` as files of their format."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fuzz_tables import ABSENT, Table


def write(t: Table, folder: Path, seed: int) -> list[str]:
    """Write the table, complete its config, and return the location of each row as messages name it."""
    folder.mkdir(parents=True)
    wrote = {"csv": _csv, "jsonl": _jsonl, "parquet": _arrow, "hf": _arrow, "tfds": _tfds}[t.kind]
    t.config |= {"delimiter": t.rng.choice([",", ";", "\t"])} if t.kind == "csv" else {}
    if t.kind not in ("csv", "jsonl", "parquet") or t.damage or t.chance(0.7):
        return wrote(t, folder, seed)
    at, half = [], t.rng.randint(1, len(t.rows) - 1)
    for name, rows in (("a", t.rows[:half]), ("b", t.rows[half:])):  # two files, each with its own line ends and types
        (folder / name).mkdir()
        label = t.rename.get("label", "label")
        types = t.types | ({label: pa.float64()} if t.types.get(label) == pa.int64() and not t.declared else {})
        part = replace(t, rows=rows, types=types if name == "b" else t.types)
        at += [f"{name}/{there}" for there in wrote(part, folder / name, seed)]
    t.config["path"] = f"{folder}/*/x.*"
    return at


def _columns(t: Table) -> list[str]:
    names = list(dict.fromkeys(c for row in t.rows for c in row))
    return t.rng.sample(names, len(names))


def _encoded(t: Table, text: str) -> bytes:
    if t.damage in ("latin-1", "utf-16", "utf-16-le"):
        return text.encode(t.damage, "replace")
    return (b"\xef\xbb\xbf" if t.chance(0.2) else b"") + text.encode()


def _save(t: Table, path: Path, data: bytes) -> None:
    if t.chance(0.2):
        path = path.with_suffix(path.suffix + ".gz")
        data = gzip.compress(data)
    path.write_bytes(data)
    t.config |= {"source": t.kind, "path": str(path)}


def _csv(t: Table, folder: Path, seed: int) -> list[str]:
    names, end = _columns(t), t.rng.choice(["\n", "\r\n", "\r"])
    # Python 3.11 quotes a line feed only if it ends lines.
    quoting = t.rng.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]) if "\n" in end else csv.QUOTE_ALL
    index, empty = t.chance(0.2), t.rng.choice([0, 0, 0, 2])

    def line(cells: list[Any]) -> str:
        out = io.StringIO()
        csv.writer(out, delimiter=t.config["delimiter"], quoting=quoting, lineterminator=end).writerow(cells)
        return out.getvalue()

    table = [names, *([row[c] for c in names] for row in t.rows)]
    if t.damage == "latin-1":
        table[1][names.index(t.rename.get("text", "text"))] = "d\u00e9j\u00e0"
    if t.damage == "twice":
        table = [[*row, row[names.index("site")]] for row in table]
    if t.damage == "nameless":
        table = [[row[0], "" if k == 0 else "x", *row[1:]] for k, row in enumerate(table)]
    elif index:
        table = [["" if k == 0 else str(k), *row] for k, row in enumerate(table)]
    table = [row + [""] * empty for row in table]
    if t.damage == "short":
        table[t.bad + 1] = [*table[t.bad + 1], "x"]
    text, number, at = "", 1, []
    for row in table:
        if at and t.chance(0.1) and not t.damage:
            text, number = text + end, number + 1
        at.append(number)
        written = line(row)
        text, number = text + written, number + len(re.findall("\r\n|\r|\n", written))
    text += f'{end}"open' * (t.damage == "quote")
    _save(t, folder / "x.csv", _encoded(t, text))
    return [f"{Path(t.config['path']).name}:{number}" for number in at[1:]]


def _jsonl(t: Table, folder: Path, seed: int) -> list[str]:
    lines, at, end = [], [], t.rng.choice(["\n", "\r\n"])
    for k, row in enumerate(t.rows):
        names = t.rng.sample(list(row), len(row))
        given = {c: row[c] for c in names if row[c] is not ABSENT}
        if t.damage == "latin-1" and k == t.bad:
            given["note"] = "d\u00e9j\u00e0"
        text = json.dumps(given, ensure_ascii=t.chance(0.5) and t.damage != "latin-1")
        if k == t.bad and t.damage in ("twice", "broken", "array"):
            text = {"twice": text[:-1] + ', "site": "a"}', "broken": text[:-1], "array": f"[{text}]"}[t.damage]
        if t.chance(0.1):
            lines.append(t.rng.choice(["", "  "]))
        lines.append(text)
        at.append(len(lines))
    _save(t, folder / "x.jsonl", _encoded(t, end.join(lines) + end * t.chance(0.7)))
    return [f"{Path(t.config['path']).name}:{number}" for number in at]


def _arrow(t: Table, folder: Path, seed: int) -> list[str]:
    names = _columns(t)
    arrays = [pa.array([row[c] for row in t.rows], t.types.get(c, pa.string()), from_pandas=False) for c in names]
    table = pa.table(arrays, names)
    label = {"names": t.declared, "_type": "ClassLabel"}
    features = {c: {"_type": "Value"} for c in names} | ({t.rename.get("label", "label"): label} if t.declared else {})
    inside = t.kind == "parquet" or t.chance(0.5)
    if inside and t.declared:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    if t.damage == "twice":
        table = table.append_column("site", table.column("site"))
    path = folder / ("x.parquet" if t.kind == "parquet" else "x.arrow")
    if t.kind == "parquet":
        pq.write_table(table, path, row_group_size=t.rng.randint(1, 5))
        t.config |= {"source": "parquet", "path": str(path)}
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table, max_chunksize=t.rng.randint(1, 5))
        (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "x.arrow"}]}))
        if not inside:
            (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
        t.config |= {"source": "hf", "path": str(folder)}
    if t.damage == "cut":
        path.write_bytes(path.read_bytes()[:20])
    return [f"{path.name}: row {k + 1}" for k in range(len(t.rows))]


_NUMBERS = itertools.count(1)
"""Numbers that tell apart the data sets of one seed."""


def _tfds(t: Table, folder: Path, seed: int) -> list[str]:
    import tensorflow_datasets as tfds

    of: Any = tfds.features

    def feature(kind: pa.DataType) -> Any:
        if pa.types.is_list(kind):
            return of.Sequence(feature(kind.value_type))
        return of.Text() if kind == pa.string() else np.dtype(kind.to_pandas_dtype()).type

    names = _columns(t)
    features = {c: feature(t.types.get(c, pa.string())) for c in names}
    if t.declared:
        features[t.rename.get("label", "label")] = of.ClassLabel(names=t.declared)
    body = {
        "VERSION": tfds.core.Version("1.0.0"),
        "_info": lambda self: tfds.core.DatasetInfo(builder=self, features=of.FeaturesDict(features)),
        "_split_generators": lambda self, manager: {"train": self._generate_examples()},
        "_generate_examples": lambda self: iter(list(enumerate(t.rows))),
    }
    number = f"{seed}x{next(_NUMBERS)}"  # a class is registered by its name once per process
    made: Any = type(f"Fuzz{number}", (tfds.core.GeneratorBasedBuilder,), body)
    made(data_dir=folder, file_format="array_record").download_and_prepare()
    t.config |= {"source": "tfds", "name": f"fuzz{number}", "data_dir": str(folder)}
    return [f"fuzz{number} train: example \\d+"] * len(t.rows)
