"""Change valid files and command lines at random, from a seed: bytes, values of JSON and TOML, headers, flags."""

from __future__ import annotations

import gzip
import json
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any

Change = Callable[[random.Random, bytes], bytes]

NASTY: list[Any] = [
    *(None, True, False, 0, -1, 1, 7, 2**31, 2**63, 2**64, 10**30, 10**400, -(2**63), 0.5, -0.0, 1e300),
    *(float("nan"), float("inf"), -float("inf"), "", "x", "0", "\ud800", "\u0000", "../x", "/etc/passwd", "a" * 5000),
    *("[/red]", "\x1b[31m", "(?<", "(a+)+$", "{{ 1/0 }}", "\n", "1" * 5000, "int4", "float32", "O", "V8"),
    *([], [0], [None], ["x"], [[]], [-1, 10**9], [10**9] * 3, {}, {"a": {}}, {"": []}, {"0": "a", "00": "b"}),
]
"""Values that take the place of others."""
WILD = [
    b"\0",
    b"\xff",
    b"\xe9",
    b'"',
    b"'",
    b"[" * 2000,
    b'{"a":' * 2000,
    b"\n",
    b"\r",
    b"\xef\xbb\xbf",
    b"\xed\xa0\x80",
]
TOML = [b"[", b"]", b"[[stage]]\n", b"=", b".", b"{a=1}", b"'''", b"nan", b"-inf", b"1e400", b"2020-01-01", b"#", b"\n"]
TOML += [
    b"9" * 400,
    b"stage",
    b"name",
    b"kind",
    b'"prune"',
    b"data",
    b"mixture",
    b"from",
    b"true",
    b"0x7f",
    b"a.b.c=1\n",
]
JINJA = [b"{{", b"}}", b"{%", b"%}", b"{#", b"|tojson", b"|join(',')", b"messages", b"[0]", b".__class__", b"*9**9**9"]
JINJA += [b"{% for i in range(99999) %}", b"{% endfor %}", b"{% if 1 %}", b"{% endif %}", b"{% set a = a ~ a %}"]
JINJA += [
    b"{% macro f() %}",
    b"{% endmacro %}",
    b"f()",
    b"'a'*99999999",
    b"strftime_now('%99999999d')",
    b"|center(10**9)",
]
JINJA += [b"raise_exception('x')", b"namespace()", b"{% generation %}", b"{% endgeneration %}", b"|replace('', 'aa')"]
WORDS = ["", "x", "0", "-1", "1e400", "nan", "inf", str(2**64), "9" * 400, "\udce9"]
WORDS += ["[", "{a=", "[[1]]", "true", "../x"]


def deep(rng: random.Random) -> Any:
    """Return nested lists or objects."""
    value: Any = 1
    for _ in range(rng.choice([20, 99, 150, 600])):
        value = [value] if rng.random() < 0.5 else {"a": value}
    return value


def value(rng: random.Random, data: Any) -> Any:
    """Return JSON data in which one to three values, keys or items are changed."""
    data = json.loads(json.dumps(data))
    for _ in range(rng.randint(1, 3)):
        places = list(_places(data))
        if not places:
            return rng.choice(NASTY)
        at, key = rng.choice(places)
        action = rng.random()
        if action < 0.6:
            at[key] = rng.choice(NASTY) if rng.random() < 0.9 else deep(rng)
        elif action < 0.7:
            del at[key]
        elif action < 0.85:
            other, name = rng.choice(places)
            at[key] = json.loads(json.dumps(other.get(name) if isinstance(other, dict) else other[-1:]))
        elif isinstance(at, dict):
            at[rng.choice(["x", "", "type", "\ud800", "a" * 300])] = rng.choice(NASTY)
        else:
            at.append(rng.choice(NASTY))
    return data


def octets(rng: random.Random, data: bytes, words: list[bytes] = WILD) -> bytes:
    """Return bytes of which some are flipped, removed, repeated, cut off, or replaced by numbers or by these words."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        i = rng.randrange(len(out) + 1)
        n = rng.choice([1, 1, 4, 8, 50])
        action = rng.randrange(7)
        if action == 0 and i < len(out):
            out[i] ^= 1 << rng.randrange(8)
        elif action == 1:
            del out[i : i + n]
        elif action == 2:
            out[i:i] = out[i : i + n] * rng.choice([1, 3, 100])
        elif action in (3, 4):
            out[i : i + rng.choice([0, 0, n])] = rng.choice(words if rng.random() < 0.8 else WILD)
        elif action == 5:
            size = rng.choice(["<I", "<Q", "<f", "<H"])
            wild = rng.choice([0, 1, 255, 2**15, 2**16 - 1] if size == "<H" else [0, 1, 255, 2**31 - 1, 2**32 - 1])
            out[i : i + struct.calcsize(size)] = struct.pack(size, wild)
        elif rng.random() < 0.5:
            del out[i:]
    return bytes(out)


def text(rng: random.Random, data: bytes) -> bytes:
    """Return a changed JSON file."""
    try:
        return octets(rng, data) if rng.random() < 0.3 else json.dumps(value(rng, json.loads(data))).encode()
    except (ValueError, RecursionError):  # it was changed before
        return octets(rng, data)


def toml(rng: random.Random, data: bytes) -> bytes:
    """Return a changed TOML file."""
    return octets(rng, data, TOML)


def jinja(rng: random.Random, data: bytes) -> bytes:
    """Return a changed chat template."""
    return octets(rng, data, JINJA)


def lines(rng: random.Random, data: bytes) -> bytes:
    """Return a changed file of JSON lines: a line is changed as JSON, or bytes are."""
    if rng.random() < 0.4:
        return octets(rng, data)
    found = data.split(b"\n")
    i = rng.randrange(len(found))
    found[i] = text(rng, found[i])
    return b"\n".join(found)


def packed(rng: random.Random, data: bytes) -> bytes:
    """Return a changed gzip file: its bytes, or those that it holds."""
    if rng.random() < 0.5:
        return octets(rng, data)
    try:
        return gzip.compress(octets(rng, gzip.decompress(data)), mtime=0)
    except (OSError, EOFError, ValueError, zlib.error):
        return octets(rng, data)


def safetensors(rng: random.Random, data: bytes) -> bytes:
    """Return a changed safetensors file."""
    length = struct.unpack("<Q", data[:8])[0] if len(data) > 8 else 0
    try:
        header = json.loads(data[8 : 8 + length])
    except (ValueError, RecursionError, OverflowError):
        header = None
    if header is None or rng.random() < 0.3:
        return head(rng, data, 400)
    changed = json.dumps(value(rng, header)).encode()
    return struct.pack("<Q", len(changed)) + changed + data[8 + length :]


def head(rng: random.Random, data: bytes, size: int = 1500) -> bytes:
    """Return a file with changes among its first bytes."""
    at = rng.randrange(min(size, len(data)) + 1)
    return data[:at] + octets(rng, data[at : at + 64]) + data[at + 64 :]


def ends(rng: random.Random, data: bytes) -> bytes:
    """Return a file with changes in its first or last bytes, where formats of tables keep their description."""
    if rng.random() < 0.3:
        return head(rng, data, 600)
    at = max(0, len(data) - rng.randrange(1, 1200))
    return data[:at] + octets(rng, data[at : at + 64]) + data[at + 64 :]


def pieces(rng: random.Random, data: bytes) -> bytes:
    """Return a changed SentencePiece model."""
    from sentencepiece import sentencepiece_model_pb2 as library

    pb: Any = library
    model = pb.ModelProto()
    try:
        model.ParseFromString(data)
    except Exception:
        return octets(rng, data)
    if rng.random() < 0.4 or not model.pieces:
        return octets(rng, data)
    for _ in range(rng.randint(1, 4)):
        piece, spec, action = rng.choice(model.pieces), model.trainer_spec, rng.randrange(7)
        if action == 0:
            piece.piece = rng.choice(["", "a", "<0x41>", "<0xZZ>", "\u2581", "</s>", "\0", "a" * 3000, "<mask>"])
        elif action == 1:
            piece.score = rng.choice([0.0, float("nan"), float("inf"), -float("inf"), 1e38, -1e38])
        elif action == 2:
            piece.type = rng.choice([1, 2, 3, 4, 5, 6])
        elif action == 3:
            name = rng.choice(["unk_id", "bos_id", "eos_id", "pad_id", "vocab_size", "max_sentencepiece_length"])
            setattr(spec, name, rng.choice([-1, 0, 1, 2, 5, 10**6, 2**31 - 1, -(2**31)]))
        elif action == 4:
            spec.model_type, spec.byte_fallback = rng.choice([1, 2, 3, 4]), rng.random() < 0.5
        elif action == 5:
            model.normalizer_spec.precompiled_charsmap = octets(rng, model.normalizer_spec.precompiled_charsmap)
            model.normalizer_spec.name = rng.choice(["identity", "nfkc", "x", ""])
        else:
            del model.pieces[rng.randrange(len(model.pieces)) :]
            if not model.pieces:
                break
    return model.SerializeToString()


def command_line(rng: random.Random, names: list[str], flags: dict[str, list[str]]) -> list[str]:
    """Return a command with up to five of its flags and wild values."""
    name = rng.choice(names)
    words = [name]
    for _ in range(rng.randint(0, 5)):
        flag = rng.choice(flags[name])
        words += [flag, rng.choice(WORDS)] if rng.random() < 0.8 else [flag]
        if rng.random() < 0.05:
            words.append(rng.choice(["--nonsense", "-z", "--", *WORDS]))
    return words


def _places(data: Any) -> Iterator[tuple[Any, Any]]:
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, part in inner:
        yield data, key
        yield from _places(part)
