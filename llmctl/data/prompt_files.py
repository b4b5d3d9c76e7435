"""Read prompts from a file: one per line or, in a .jsonl file, one JSON value per line."""

from __future__ import annotations

from pathlib import Path

from etils import epath

from llmctl.config.errors import RequestError
from llmctl.config.text_input import parse_json
from llmctl.data import file_bytes


def read(file: Path | epath.Path, where: str) -> list[str]:
    """Return the prompts of a file, which may be compressed (.gz or .zst). Blank lines are ignored.

    Args:
        file: Path. In a .jsonl file, a line is a string or an object with the key "prompt".
        where: Name of the setting, for error messages.

    Raises:
        RequestError: If the file cannot be read, or a line has no prompt.
    """
    try:
        lines = [(n, line) for n, line in file_bytes.lines(epath.Path(file)) if line.strip()]
    except FileNotFoundError:
        raise RequestError(f"{where} {file}: no such file") from None
    except OSError as e:
        raise RequestError(f"{where} {file}: cannot be read ({e})") from None
    of_json = ".jsonl" in file.suffixes  # such as prompts.jsonl.gz
    return [_of_json(f"{where} {file}", n, line) if of_json else line for n, line in lines]


def _of_json(where: str, number: int, line: str) -> str:
    """Return the prompt in a line of JSON.

    Raises:
        RequestError: If the line is not JSON, or has no prompt.
    """
    try:
        value = parse_json(line)
    except ValueError as e:
        raise RequestError(f"{where}: line {number} is not JSON ({e})") from None
    value = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(value, str) or not value:
        raise RequestError(f'{where}: line {number} has no prompt; write a text, or {{"prompt": "…"}}')
    return value
