"""Name the tokens that `llmctl prepare` wrote (`data.source = "prepared"`); they have no rows of text."""

from __future__ import annotations

from etils import epath

from llmctl.config.errors import RequestError
from llmctl.data.config import SourceConfig
from llmctl.data.paths import resolve
from llmctl.data.source import Reader, Source


def refuse(cfg: SourceConfig) -> Source:
    """Refuse to read prepared tokens as text.

    Raises:
      RequestError: always.
    """
    raise RequestError(f"{cfg.path}: prepared data holds tokens, and this needs the text; name the raw source")


def listed(cfg: SourceConfig) -> list[epath.Path]:
    """Return the file that lists the checksums of the shards."""
    return resolve(f"{cfg.path.rstrip('/')}/prepared.json")


SOURCE = Reader(refuse, listed)
