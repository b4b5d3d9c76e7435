"""Write what is generated into README.md (`make docs`): the commands' help, and which stage may follow which."""

import os
import re
import subprocess
import sys
from pathlib import Path

import stage_pairs

README = Path(__file__).parent.parent / "README.md"
HELP = "<!-- help: written by `make docs`, checked by the tests -->", "<!-- end of help -->"
ORDER = "<!-- order: written by `make docs`, checked by the tests -->", "<!-- end of order -->"


def generated(text: str) -> str:
    """Return README.md's `text` with the help and the table as they are now."""
    env = {**os.environ, "COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"}
    script = "import sys; from llmctl.cli.app import main; main(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", script, "--help"], check=True, capture_output=True, text=True, env=env, cwd=README.parent
    )
    commands = done.stdout[done.stdout.index("Commands:") :].rstrip()
    text = between(*HELP, f"```text\n{commands}\n```", text)
    return between(*ORDER, stage_pairs.table(), text)


def between(begin: str, end: str, block: str, text: str) -> str:
    """Return the text with the block between two marks."""
    return re.sub(re.escape(begin) + ".*?" + re.escape(end), lambda _: f"{begin}\n{block}\n{end}", text, flags=re.S)


if __name__ == "__main__":
    README.write_text(generated(README.read_text(encoding="utf-8")), encoding="utf-8")
