"""`CustomIdIndex`: which custom ids a batch file has used so far, and which lines have none; exact, in flat memory.

A private SQLite database does it: it lives in a few MiB of page cache, spills to an unnamed temporary file when it
outgrows them, and is gone when it is closed. A set of strings would take about 100 bytes a row for the whole job, a
Bloom filter or a hash would now and then call a new id a duplicate. What never lives here: what a duplicate means.
"""

from __future__ import annotations

import hashlib
import sqlite3
from types import TracebackType

_PAGE_CACHE_KIB = 16 * 1024


class CustomIdIndex:
    """Maps each custom id to the line that used it first. To be closed; also a context manager."""

    def __init__(self) -> None:
        # "" is SQLite's name for a private on-disk database that only the page cache holds until it is full. The
        # engine may read rows on a thread of its own, so the connection is not tied to the one that opened it.
        self._database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        for pragma in ("journal_mode = OFF", "synchronous = OFF", f"cache_size = -{_PAGE_CACHE_KIB}"):
            self._database.execute(f"PRAGMA {pragma}")
        self._database.execute("CREATE TABLE seen (custom_id BLOB PRIMARY KEY, line INTEGER NOT NULL) WITHOUT ROWID")
        self._database.execute("CREATE TABLE nameless (digest BLOB PRIMARY KEY, count INTEGER NOT NULL) WITHOUT ROWID")
        self._database.execute("BEGIN")  # one transaction for good: nothing has to survive

    def add(self, custom_id: str, line_number: int) -> int | None:
        """Notes the id. Gives None when it is new, else the number of the line that used it first."""
        key = custom_id.encode("utf-8", "surrogatepass")
        cursor = self._database.execute("INSERT OR IGNORE INTO seen VALUES (?, ?)", (key, line_number))
        if cursor.rowcount == 1:
            return None
        (first_line,) = self._database.execute("SELECT line FROM seen WHERE custom_id = ?", (key,)).fetchone()
        return int(first_line)

    def count_nameless(self, line: bytes) -> int:
        """Notes a line without a custom id of its own. Gives how many of that content there have been by now."""
        digest = hashlib.blake2b(line, digest_size=16).digest()
        cursor = self._database.execute(
            "INSERT INTO nameless VALUES (?, 1) ON CONFLICT DO UPDATE SET count = count + 1 RETURNING count", (digest,)
        )
        (count,) = cursor.fetchone()
        return int(count)

    def close(self) -> None:
        self._database.close()

    def __enter__(self) -> CustomIdIndex:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
