"""Writes the commands' help into README.md (`make docs`); a test checks that it is what `--help` says."""

import os
import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- help: written by `make docs`, checked by the tests -->", "<!-- end of help -->"


def generated(text: str) -> str:
    """README.md's `text` with the help as it is now."""
    env = {**os.environ, "COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"}
    script = "import sys; from llmctl.cli.app import main; main(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", script, "--help"], check=True, capture_output=True, text=True, env=env, cwd=README.parent
    )
    commands = done.stdout[done.stdout.index("Commands:") :].rstrip()
    block = f"{BEGIN}\n```text\n{commands}\n```\n{END}"
    return re.sub(re.escape(BEGIN) + ".*?" + re.escape(END), lambda _: block, text, flags=re.S)


if __name__ == "__main__":
    README.write_text(generated(README.read_text(encoding="utf-8")), encoding="utf-8")
