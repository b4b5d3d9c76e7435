"""Views: the rows of a source under our column names, filtered and with replacements made."""

from __future__ import annotations

from llmctl.config import hint
from llmctl.data import TEXT_COLUMNS, Scalar, SourceConfig
from llmctl.data.source import Row, Source
from llmctl.data.sources import open_source
from llmctl.errors import RequestError

CANONICAL = (*TEXT_COLUMNS, "label")


class View(Source):
    """A source in canonical columns, with replacements made; filtered rows are None to `read`."""

    def __init__(self, cfg: SourceConfig):
        self._cfg, self._source = cfg, open_source(cfg)
        self.where = self._source.where
        known = self._source.columns
        for wanted in [*cfg.columns.values(), *cfg.filter]:
            if len(self._source) and wanted not in known:
                raise RequestError(
                    f"{cfg.title}: no column {wanted!r}{hint(wanted, list(known))} (columns: {', '.join(known)})"
                )
        for ours in cfg.columns:
            if ours not in CANONICAL:
                raise RequestError(
                    f"data.columns: unknown column {ours!r}{hint(ours, list(CANONICAL))} (ours: {', '.join(CANONICAL)})"
                )
        self._map = cfg.columns or {c: c for c in CANONICAL if c in known}
        self.columns = tuple(self._map)
        self._texts = [c for c in self.columns if c != "label"]
        if len(self._source) and not self._texts:
            raise RequestError(f"{cfg.title}: none of its columns is a text column; set data.columns, such as "
                               f'{{text = "{known[0]}"}} (columns: {", ".join(known)})')  # fmt: skip
        self._keep = {
            column: {plain(v) for v in (value if isinstance(value, list) else [value])}
            for column, value in cfg.filter.items()
        }

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, i: int) -> Row:
        return self._canonical(self._source[i], i)

    def read(self, i: int) -> Row | None:
        """Row i, or None if the filter drops it."""
        raw = self._source[i]
        for column, allowed in self._keep.items():
            if column not in raw:
                raise RequestError(f"{self.where(i)}: no column {column!r} to filter by (columns: {', '.join(raw)})")
            if plain(raw[column]) not in allowed:
                return None
        return self._canonical(raw, i)

    def _canonical(self, raw: Row, i: int) -> Row:
        row = {}
        for ours, theirs in self._map.items():
            if theirs not in raw:
                raise RequestError(
                    f"{self.where(i)}: no column {theirs!r}{hint(theirs, list(raw))} (columns: {', '.join(raw)})"
                )
            row[ours] = raw[theirs]
        for ours in self._texts:
            value = row[ours]
            if value is None:
                value = ""
            if not isinstance(value, str):
                raise RequestError(
                    f"{self.where(i)}: column {self._map[ours]!r} holds {type(value).__name__}, not text"
                )
            if not value.isascii():  # JSON may hold half a surrogate pair, which is no text: U+FFFD
                value = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            for old, new in self._cfg.replace.items():
                value = value.replace(old, new)
            row[ours] = value
        return row


def plain(value: Scalar | None) -> str:
    """One spelling for a value, whether a file gave it as text, integer, boolean or float."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)
