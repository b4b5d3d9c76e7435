"""Generate small tables in every format, each with the outcome that llmctl must have, computed without its code.

A table has one kind of label, several harmless differences (order of columns and keys, spellings of a class, encodings,
line ends, gaps), and at most one fault.
"""

from __future__ import annotations

import decimal
import random
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

FORMATS = ("csv", "jsonl", "parquet", "hf", "tfds")
NAN = float("nan")
NAMES = {"int": ["0", "1", "2", "10"], "text": ["neg", "pos", "n\u00e9", "a b"], "bool": ["false", "true"]}
TEXTS = ["plain", "a, b; c", 'said "no"', "two\nlines", "d\u00e9j\u00e0", "\u6f22", "a\u2028b\u0085c", "\U0001f642"]
SEVERAL = ("set", "tags")
ABSENT = object()
FRACTION = "label .* (is no class but a number|is not among data.classes)"


@dataclass
class Table:
    """A table to write, and its outcome: rows and classes, or a message."""

    rng: random.Random
    kind: str
    task: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    labels: bool = True
    message: str = ""
    """Regular expression of the message; `{at}` is the location of row `bad`."""
    bad: int = -1
    truth: list[Any] = field(default_factory=list)
    """Label of each row: (class, spelling), number, list of these; None if the row has none."""
    declared: list[str] = field(default_factory=list)
    types: dict[str, pa.DataType] = field(default_factory=dict)
    rename: dict[str, str] = field(default_factory=dict)
    damage: str = ""

    def chance(self, p: float) -> bool:
        return self.rng.random() < p


def spelled(t: Table, storage: str, kind: str, name: str) -> tuple[Any, str]:
    """Return a class as it is stored, and the text that it is then."""
    values: dict[str, list[Any]] = {
        "int": [name, name + ".0", int(name), float(name)] if kind == "int" else [],
        "bool": [name, name.capitalize(), name == "true"],
        "text": [name],
    }
    if storage == "mixed":
        value = t.rng.choice(values[kind])
    elif storage == "text":
        value = t.rng.choice([v for v in values[kind] if isinstance(v, str)])
    else:
        value = {"int": int, "float": float, "decimal": decimal.Decimal, "bool": "true".__eq__}[storage](name)
    if isinstance(value, bool):
        return value, str(value).lower()
    return value, value if isinstance(value, str) else name


def make(seed: int) -> Table:
    """Return the table of a seed."""
    rng = random.Random(seed)
    kind = FORMATS[seed % len(FORMATS)]
    tasks = ["class", "class", "class", "number", "set", "none"] + ["tags"] * (kind != "csv")
    t = Table(rng, kind, rng.choice(tasks))
    n = rng.randint(3, 12)
    pairs = t.task in ("class", "number", "none") and t.chance(0.4)
    for i in range(n):
        row: dict[str, Any] = {"text": f"{i} {rng.choice(TEXTS)}", "site": rng.choice("ab")}
        if pairs:
            gaps = {"csv": [""], "jsonl": ["", None, ABSENT], "tfds": [""]}.get(kind, [None, ""])
            row["pair"] = rng.choice(gaps) if t.chance(0.3) else f"second {i}"
        t.rows.append(row)
    {"class": of_class, "number": of_number, "set": of_set, "tags": of_tags, "none": of_none}[t.task](t)
    if t.task != "tags" and t.chance(0.4):
        t.rename = {"text": "review", "label": "stars", "pair": "other"}
        t.rows = [{t.rename.get(c, c): v for c, v in row.items()} for row in t.rows]
        t.types = {t.rename.get(c, c): v for c, v in t.types.items()}
        has = dict.fromkeys(c for row in t.rows for c, v in row.items() if v is not ABSENT)
        t.config["columns"] = {ours: theirs for ours, theirs in t.rename.items() if theirs in has}
    if t.chance(0.2):
        t.config["filter"] = {"site": rng.choice(["a", ["a"], ["a", "c"]])}
    if not t.message and t.chance(0.3):
        of_file(t)
    return t


def of_class(t: Table) -> None:
    """Add one class per row."""
    kind = t.rng.choice(["int", "int", "text", "bool"])
    typed = {"int": ["int", "float", "text", "decimal"], "text": ["text"], "bool": ["bool", "text"]}[kind]
    if t.kind == "tfds":
        typed = [s for s in typed if s != "decimal"]
    storage = {"csv": "text", "jsonl": "mixed"}.get(t.kind) or t.rng.choice(typed)
    if t.kind in ("parquet", "hf", "tfds") and storage == "int" and t.chance(0.5):
        t.declared = ["World", "Sports", "Business"]
        names = [str(k) for k in range(3)]
    else:
        names = t.rng.sample(NAMES[kind], t.rng.randint(2, len(NAMES[kind])))
    alike = {name: spelled(t, storage, kind, name) for name in names} if t.chance(0.4) else {}
    for row in t.rows:
        name = t.rng.choice(names)
        row["label"], written = alike.get(name) or spelled(t, storage, kind, name)
        t.truth.append((t.declared[int(name)],) * 2 if t.declared else (name, written))
    texts = pa.string() if t.kind == "tfds" or t.chance(0.7) else pa.dictionary(pa.int32(), pa.string())
    types = {"int": pa.int64(), "float": pa.float64(), "decimal": pa.decimal128(9, 2), "bool": pa.bool_()}
    t.types["label"] = types.get(storage, texts)
    if not t.declared and t.chance(0.2):  # each class is listed in a spelling of its own
        t.config["classes"] = t.rng.sample([spelled(t, "text", kind, n)[0] for n in names], len(names))
    missing = {"int": [None], "float": [None, NAN], "bool": [None], "decimal": [None], "text": [None, "", " "]}
    gaps = {"csv": ["", "  "], "jsonl": [None, NAN, "", " ", ABSENT]}.get(t.kind) or missing[storage]
    if t.kind == "tfds":
        gaps = [gap for gap in gaps if gap is not None]
    faults: list[tuple[Any, str]] = []
    if t.kind == "jsonl":
        faults = [([0], "label .* is no class but a list"), ({"a": 1}, "label .* is no class but an object")]
        faults += [(0.25, FRACTION), (float("inf"), FRACTION)]
    elif storage == "float":
        faults = [(0.25, FRACTION), (float("-inf"), FRACTION)]
    if t.declared:
        gaps, faults = [-1], [] if t.kind == "tfds" else [(7, "holds class 7, and the data declares 3")]
        gaps += [None] * (t.kind != "tfds")
    if kind == "int" and storage != "bool" and not t.declared and t.chance(0.15):
        ambiguous(t, storage)
    elif gaps and t.chance(0.3):
        gap(t, gaps)
    elif faults and t.chance(0.3):
        fault(t, *t.rng.choice(faults))
    elif kind in ("int", "bool") and t.kind in ("csv", "jsonl") and t.chance(0.2):
        both(t, kind)


def ambiguous(t: Table, storage: str) -> None:
    """Add -1 beside 0."""
    k = t.rng.randrange(len(t.rows))
    value, _ = spelled(t, storage, "int", "-1")
    zero = next((i for i, truth in enumerate(t.truth) if truth[0] == "0" and i != k), None)
    if zero is None:
        return
    t.rows[k]["label"], t.truth[k] = value, None
    for row in (t.rows[k], t.rows[zero]):
        row["site"] = "a"  # no filter drops them
    if t.chance(0.5):
        t.config["unlabeled"] = "drop"
    elif "classes" in t.config:
        t.message, t.bad = "{at}: label '-1(.0)?' is not among data.classes", k
    else:
        t.message, t.bad = "{at}: label '-1(.0)?' stands for no label", k


def both(t: Table, kind: str) -> None:
    """Add a truth value to numbers 0 and 1, or a number to truth values."""
    if "classes" in t.config:
        return
    k, alike = t.rng.randrange(len(t.rows)), ("0", "1", *NAMES["bool"])
    other = [i for i, truth in enumerate(t.truth) if truth[0] in alike and i != k]
    if other:
        t.rows[k]["label"] = "True" if kind == "int" else "1"
        t.rows[k]["site"] = t.rows[other[0]]["site"] = "a"
        t.message = "the labels are both truth values .* and numbers"


def gap(t: Table, gaps: list[Any]) -> None:
    """Remove the labels of some rows."""
    if t.chance(0.6):
        t.config["unlabeled"] = "drop"
        chosen = t.rng.sample(range(len(t.rows)), t.rng.randint(1, len(t.rows)))
    else:
        chosen = [t.rng.randrange(len(t.rows))]
        t.message, t.bad = "{at}: (the label is empty|no column 'label'|no column 'stars')", chosen[0]
        t.rows[chosen[0]]["site"] = "a"
    for k in chosen:
        t.rows[k]["label"], t.truth[k] = t.rng.choice(gaps), None


def fault(t: Table, value: Any, message: str, column: str = "label") -> None:
    """Store a wrong value in one row."""
    t.bad = t.rng.randrange(len(t.rows))
    t.rows[t.bad] |= {column: value, "site": "a"}
    t.message = "{at}: .*" + message


def of_number(t: Table) -> None:
    """Add one number per row."""
    t.config["label_type"] = "number"
    text = t.kind == "csv"
    for row in t.rows:
        number = t.rng.choice([0, -1, 3, 0.1, 1e-3, -2.5, 1e30])
        row["label"] = str(number) if text or (t.kind == "jsonl" and t.chance(0.3)) else number
        if t.kind not in ("csv", "jsonl"):
            row["label"] = float(number)
        t.truth.append(float(np.float32(number)))
    t.types["label"] = pa.float64()
    # TFDS itself stores float32.
    far = [(1e39, "is beyond the numbers of float32|label inf is not"), (float("inf"), "is not a number")]
    odd = [("abc", "label 'abc' is not a number"), ([1.0], r"is not a number"), ({}, "is not a number")]
    if t.chance(0.25):
        gaps = {"csv": ["", " ", "nan"], "jsonl": [None, NAN, "", "NaN", ABSENT], "tfds": [NAN]}
        gap(t, gaps.get(t.kind, [None, NAN]))
        t.message = t.message and t.message.replace("(", "(label 'nan' is not|label 'NaN' is not|", 1)
    elif t.chance(0.25):
        value, message = t.rng.choice(far + odd * (t.kind == "jsonl") + odd[:1] * text)
        fault(t, str(value) if text else value, message)


def of_set(t: Table) -> None:
    """Add a set of classes per row: a list, or text between separators."""
    kind = t.rng.choice(["int", "text"])
    names = t.rng.sample(NAMES[kind], 3)
    t.config["label_type"] = "set"
    numbers = kind == "int" and t.kind != "csv"
    for row in t.rows:
        chosen = t.rng.sample(names, t.rng.randint(0, 3))
        t.truth.append([(c, c) for c in chosen])
        row["label"] = "|".join(chosen) if t.kind == "csv" else [int(c) if numbers else c for c in chosen]
    t.types["label"] = pa.list_(pa.int64() if numbers else pa.string())
    if t.kind == "csv":
        t.config["label_separator"] = "|"
    elif t.kind != "tfds" and t.chance(0.2):
        gap(t, [None])
        t.message = t.message and "{at}: label None is no list of labels"
    elif numbers and t.chance(0.3):
        fault(t, [0, 1, 0, 0], "holds zeros and ones for all classes")
    elif t.kind == "jsonl" and t.chance(0.3):
        fault(t, *t.rng.choice([("pos", "is no list of labels; set"), ([["a"]], "is no class but a list")]))


def of_tags(t: Table) -> None:
    """Add words with a class each, in place of a text."""
    kind = t.rng.choice(["int", "text"])
    names = NAMES[kind]
    for i, row in enumerate(t.rows):
        del row["text"]
        row["tokens"] = [f"w{i}", *("x" * t.rng.randint(0, 3))]
        words = [t.rng.choice(names) for _ in row["tokens"]]
        mixed = [spelled(t, "mixed" if t.kind == "jsonl" else kind, kind, w) for w in words]
        row["tags"] = [value for value, _ in mixed]
        t.truth.append([(w, written) for w, (_, written) in zip(words, mixed, strict=True)])
    t.types |= {"tokens": pa.list_(pa.string()), "tags": pa.list_(pa.int64() if kind == "int" else pa.string())}
    if t.chance(0.2):
        fault(t, ["0"] * 9 if kind == "text" or t.kind == "jsonl" else [0] * 9, "must hold one label a word", "tags")
    elif t.kind == "jsonl" and t.chance(0.2):
        k = t.rng.randrange(len(t.rows))
        fault(t, [["a"] for _ in t.rows[k]["tokens"]], "is no class but a list|must hold one label a word", "tags")
    elif t.kind != "tfds" and t.chance(0.3):
        k = t.rng.randrange(len(t.rows))
        t.rows[k] |= {"site": "a", "tags": t.rng.choice([None, [None] * len(t.rows[k]["tokens"])])}
        t.truth[k] = None
        t.message, t.bad = "{at}: (the label is empty|column 'tags' must hold one label a word)", k
        if t.chance(0.5):
            t.config["unlabeled"], t.message = "drop", ""


def of_none(t: Table) -> None:
    """Add labels that nothing reads, of any kind."""
    t.labels = False
    for row in t.rows:
        values = ["", "x", "-1"] if t.kind == "csv" else [None, NAN, [1], {"a": 1}, -1, True]
        row["label"] = t.rng.choice(values if t.kind in ("csv", "jsonl") else [-1, 0])
        t.truth.append("")
    t.types["label"] = pa.int64()


def of_file(t: Table) -> None:
    """Damage the file, or a cell of text."""
    damages = {
        "csv": ["twice", "nameless", "latin-1", "utf-16", "utf-16-le", "short", "quote"],
        "jsonl": ["twice", "latin-1", "utf-16", "broken", "array", "no text", "number"],
        "parquet": ["twice", "cut", "absent"],
        "hf": ["twice", "cut", "absent"],
        "tfds": ["absent"],
    }
    t.damage = t.rng.choice(damages[t.kind])
    t.bad = 0 if t.damage in ("latin-1", "utf-16") else t.rng.randrange(len(t.rows))
    t.rows[t.bad]["site"] = "a"
    text = "tokens" if t.task == "tags" else t.rename.get("text", "text")
    t.message = {
        "twice": "two columns are called" if t.kind != "jsonl" else "{at}: key 'site' is there twice",
        "nameless": ":1: column 2 of the header has no name",
        "latin-1": "not UTF-8 text" if t.kind == "csv" else "{at}: not valid JSON",
        "utf-16": "not UTF-8 text" if t.kind == "csv" else "not valid JSON",
        "utf-16-le": "not UTF-8 text",
        "short": "{at}: .* fields where the header has",
        "quote": "not valid CSV",
        "broken": "{at}: not valid JSON",
        "array": "{at}: a line must hold a JSON object, not list",
        "no text": f"{{at}}: no column '{text}'",
        "number": "{at}: column .* holds int, not text|{at}: column .* is no list of words",
        "cut": "not a Parquet file|not an Arrow stream",
        "absent": "no column 'nowhere'",
    }[t.damage]
    if t.damage == "absent":
        t.config["columns"] = t.config.get("columns", {}) | {"pair": "nowhere"}
        if "text" not in t.config["columns"] and t.task != "tags":
            t.config["columns"]["text"] = "text"
    if t.damage == "no text":
        t.rows[t.bad][text] = ABSENT
    if t.damage == "number":
        t.rows[t.bad][text] = 5


def outcome(t: Table) -> tuple[list[tuple[str, str, Any]], tuple[str, ...], int]:
    """Return the rows that a table without a fault has, as (text, pair, label), its classes, and its unlabeled rows."""
    wanted = t.config.get("filter", {}).get("site")
    kept = [k for k, row in enumerate(t.rows) if not wanted or row["site"] in wanted]
    unlabeled = [k for k in kept if t.truth[k] is None]
    kept = [k for k in kept if t.truth[k] is not None]
    flat = [c for k in kept for c in ([t.truth[k]] if t.task == "class" else t.truth[k] if t.task in SEVERAL else [])]
    written: dict[str, set[str]] = {}
    for name, text in flat:
        written.setdefault(name, set()).add(text)
    several = any(len(texts) > 1 for texts in written.values())
    name_of = {name: name if several else min(texts) for name, texts in written.items()}
    if listed := t.config.get("classes"):
        same = {re.sub(r"\.0$", "", c): c for c in listed} | {
            c.lower(): c for c in listed if c.lower() in NAMES["bool"]
        }
        name_of, classes = {name: same[name] for name in name_of}, tuple(listed)
    elif t.declared:
        classes = tuple(c for c in t.declared if c in written)
    else:
        found = list(name_of.values())
        numeric = all(re.fullmatch("-?[0-9]+", c) for c in found)
        classes = tuple(sorted(found, key=int if numeric else str))
    label = {
        "class": lambda truth: name_of[truth[0]],
        "set": lambda truth: sorted({name_of[c] for c, _ in truth}),
        "tags": lambda truth: [name_of[c] for c, _ in truth],
        "number": lambda truth: truth,
        "none": lambda truth: "",
    }[t.task]

    def cell(row: dict[str, Any], ours: str) -> str:
        value = row.get(t.rename.get(ours, ours), "")
        return value if isinstance(value, str) else ""

    rows = []
    for k in kept:
        text = " ".join(t.rows[k]["tokens"]) if t.task == "tags" else cell(t.rows[k], "text")
        rows.append((text, cell(t.rows[k], "pair"), label(t.truth[k])))
    return rows, classes, len(unlabeled)
