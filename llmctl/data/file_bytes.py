"""Read files as bytes (decompressed or memory-mapped), as text, or by line."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
from etils import epath

from llmctl.config import limits
from llmctl.config.containment import regular
from llmctl.config.errors import RequestError
from llmctl.data.paths import is_local


def lines(path: epath.Path) -> list[tuple[int, str]]:
    """Return the lines of a UTF-8 text file as (line number from 1, text).

    Only LF or CRLF ends a line. U+2028, U+0085 and form feeds are part of the text. A byte order mark is skipped.

    Raises:
        RequestError: If the file is not UTF-8 text.
    """
    found = content(path).split("\n")
    for number, line in enumerate(found, 1):
        _check_length(path, number, len(line))
    return [(n, line.removesuffix("\r")) for n, line in enumerate(found, 1)]


def content(path: epath.Path) -> str:
    """Return the text of a UTF-8 file. A byte order mark is skipped.

    Raises:
        RequestError: If the file is not UTF-8 text.
    """
    data = bytes(buffer(path))
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise RequestError(f"{path}:{line}: not UTF-8 text (byte {error.start}); convert the file first") from None


def buffer(path: epath.Path) -> bytes | bytearray | mmap.mmap:
    """Return the bytes of a file. Files with the suffix .gz or .zst are decompressed. Other local files are
    memory-mapped.

    Raises:
        RequestError: If the file is a pipe or a device, is damaged, or exceeds a limit when decompressed.
    """
    regular(path)
    if path.suffix in (".gz", ".zst"):
        return _decompressed(path)
    if not is_local(path) or not path.stat().length:
        return path.read_bytes()
    with Path(path).open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def line_offsets(data: bytes | bytearray | mmap.mmap, path: epath.Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find the lines of a text that are not blank.

    Args:
        data: Bytes of the text.
        path: Path of the file, for the error message.

    Returns:
        Three arrays for the N lines, int64 [N]: byte offsets of the starts, byte offsets of the ends, and line numbers
        from 1.

    Raises:
        RequestError: If a line is longer than `limits.LINE`.
    """
    start = 3 if data[:3] == b"\xef\xbb\xbf" else 0
    ends = np.flatnonzero(np.frombuffer(data, np.uint8) == 0x0A) if len(data) else np.zeros(0, np.int64)
    if len(data) and (not len(ends) or ends[-1] != len(data) - 1):
        ends = np.append(ends, len(data))
    starts = np.concatenate([[start], ends[:-1] + 1]) if len(ends) else ends
    if len(starts):
        longest = int(np.argmax(ends - starts))
        _check_length(path, longest + 1, int(ends[longest] - starts[longest]))
    full = np.array([bool(data[a:b].strip()) for a, b in zip(starts, ends, strict=True)], bool)
    return starts[full], ends[full], np.flatnonzero(full) + 1


def _check_length(path: epath.Path, number: int, size: int) -> None:
    """Check the length of a line.

    Args:
        path: Path of the file, for the error message.
        number: Line number, for the error message.
        size: Length of the line in bytes or characters.

    Raises:
        RequestError: If the line is longer than `limits.LINE`.
    """
    if size > limits.LINE:
        raise RequestError(f"{path}:{number}: a line of {size:,} bytes; {limits.LINE:,} at most, so break it up")


def _decompressed(path: epath.Path) -> bytearray:
    import pyarrow as pa

    kind = {".gz": "gzip", ".zst": "zstd"}[path.suffix]
    packed = path.read_bytes()
    try:
        with pa.input_stream(pa.BufferReader(packed), compression=kind) as stream:
            found = bytearray()
            while block := stream.read(limits.UNCHECKED):
                found += block
                if len(found) > max(limits.UNCHECKED, limits.RATIO * len(packed)):
                    raise RequestError(
                        f"{path}: decompresses to more than {limits.RATIO} times its size; unpack it first"
                    )
                limits.check_memory(len(found), f"{path}: its decompressed content", "split the file")
            return found
    except (OSError, pa.ArrowInvalid) as error:
        raise RequestError(f"{path}: damaged {path.suffix} file ({str(error).splitlines()[0]})") from None
