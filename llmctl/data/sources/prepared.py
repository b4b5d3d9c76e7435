"""Define the source for data that `llmctl prepare` tokenized (`data.source = "prepared"`), which has no rows of
text.
"""

from __future__ import annotations

from etils import epath

from llmctl.config.errors import RequestError
from llmctl.data.config import SourceConfig
from llmctl.data.paths import resolve
from llmctl.data.source import Reader, Source


def refuse(cfg: SourceConfig) -> Source:
    """Raise an error, because prepared data has no rows of text.

    Raises:
        RequestError: Always.
    """
    raise RequestError(f"{cfg.path}: prepared data holds tokens, and this needs the text; name the raw source")


def listed(cfg: SourceConfig) -> list[epath.Path]:
    """Return [path of prepared.json], the file that contains the checksums of all other files."""
    return resolve(f"{cfg.path.rstrip('/')}/prepared.json")


SOURCE = Reader(refuse, listed)
