"""`ResultIndex`: where in the files of results each row's line is, in flat memory.

    add the files  ->  take a row's line, by its id  ->  the rest: lines whose rows nobody asked for

A private SQLite database keeps it, as for custom ids (`custom_ids.py`). Never here: what a line says
(`result_columns.py`).
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

_PAGE_CACHE_KIB = 16 * 1024


class ResultIndex:
    """Lines of results by row id. To be closed; also a context manager. Raises OSError when a file fails."""

    def __init__(self) -> None:
        self._files: list[BinaryIO] = []
        self._database = sqlite3.connect("", isolation_level=None)
        for pragma in ("journal_mode = OFF", "synchronous = OFF", f"cache_size = -{_PAGE_CACHE_KIB}"):
            self._database.execute(f"PRAGMA {pragma}")
        self._database.execute(
            "CREATE TABLE lines (row_id TEXT PRIMARY KEY, custom_id BLOB, file INTEGER NOT NULL, "
            "start INTEGER NOT NULL, taken INTEGER DEFAULT 0)"
        )
        self._database.execute("CREATE INDEX by_custom_id ON lines (custom_id) WHERE custom_id IS NOT NULL")
        self._database.execute("BEGIN")

    def add_file(self, path: Path, look: Callable[[Mapping[str, Any]], None] = lambda record: None) -> None:
        """Every line of it, each a whole result of another row. `look` is shown what each line says."""
        file = path.open("rb")
        self._files.append(file)
        start = 0
        for line in file:
            record = json.loads(line)
            look(record)
            custom_id = record["custom_id"]
            key = None if custom_id is None else _key(custom_id)
            self._database.execute(
                "INSERT INTO lines (row_id, custom_id, file, start) VALUES (?, ?, ?, ?)",
                (record["id"], key, len(self._files) - 1, start),
            )
            start += len(line)

    def take(self, row_id: str, custom_id: str | None = None) -> bytes | None:
        """The row's line, newline included. `custom_id`: take an earlier form of the row with that name, too."""
        found = self._database.execute(
            "UPDATE lines SET taken = 1 WHERE row_id = ? RETURNING file, start", (row_id,)
        ).fetchone()
        if found is None and custom_id is not None:
            found = self._database.execute(
                "UPDATE lines SET taken = 1 WHERE custom_id = ? AND taken = 0 RETURNING file, start", (_key(custom_id),)
            ).fetchone()
        return None if found is None else self._line(*found)

    def rest(self) -> Iterator[bytes]:
        """Lines that were not taken, in the order of the files."""
        for place in self._database.execute("SELECT file, start FROM lines WHERE taken = 0 ORDER BY file, start"):
            yield self._line(*place)

    def close(self) -> None:
        for file in self._files:
            file.close()
        self._database.close()

    def __enter__(self) -> ResultIndex:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _line(self, file: int, start: int) -> bytes:
        self._files[file].seek(start)
        return self._files[file].readline()


def _key(custom_id: str) -> bytes:
    return custom_id.encode("utf-8", "surrogatepass")
