"""`DoneRows`: which rows a job's output and error files hold already, exactly, in flat memory.

    read the files once     ->  add each line's row id
    read the input once     ->  `compare_with_input`: what is left; whether rows that are done have changed
    read the input to run   ->  `covers`: skip what is done

A private SQLite database keeps it, as for custom ids (`custom_ids.py`). Never here: repairing files
(`output_journal.py`), settings (`job_manifest.py`).
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from pipemax.config import ConfigError
from pipemax.io.batch_request import BatchRow, ErrorCode, RowError
from pipemax.io.row_ids import is_row_id

_PAGE_CACHE_KIB = 16 * 1024


@dataclass(frozen=True, slots=True)
class InputComparison:
    """Rows of the input without a result; rows that are done and not in the input as they were, and one in words."""

    num_open: int
    num_changed: int
    example: str


class DoneRows:
    """Row ids of finished rows, and the custom ids they own. To be closed; also a context manager."""

    def __init__(self) -> None:
        self._database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        for pragma in ("journal_mode = OFF", "synchronous = OFF", f"cache_size = -{_PAGE_CACHE_KIB}"):
            self._database.execute(f"PRAGMA {pragma}")
        self._database.execute(
            "CREATE TABLE done (row_id TEXT PRIMARY KEY, custom_id BLOB, seen INTEGER NOT NULL DEFAULT 0) WITHOUT ROWID"
        )
        self._database.execute("CREATE INDEX by_custom_id ON done (custom_id) WHERE custom_id IS NOT NULL")
        self._database.execute("BEGIN")
        self._num_rows = 0

    def __len__(self) -> int:
        return self._num_rows

    def covers(self, row: BatchRow | RowError) -> bool:
        """Whether the row has its result: this very row, or an earlier form of it with the same custom id."""
        if not self._num_rows:
            return False
        if self._first("SELECT 1 FROM done WHERE row_id = ?", row.row_id) is not None:
            return True
        return row.custom_id is not None and not _is_duplicate_row(row) and self._owns_custom_id(row.custom_id)

    def _owns_custom_id(self, custom_id: str) -> bool:
        return self._first("SELECT 1 FROM done WHERE custom_id = ? LIMIT 1", _key(custom_id)) is not None

    def add_file(self, path: Path) -> int:
        """Adds every line of an output or error file that ends with a whole line. Gives the number of lines.

        Raises ConfigError, naming the line, where one is not a row's result or a row is there twice.
        """
        num_lines = 0
        with path.open("rb") as lines:
            for num_lines, line in enumerate(lines, start=1):
                where = f"{path}, line {num_lines}"
                record = _result(line)
                if record is None:
                    raise ConfigError(
                        f"{where} is not a result of a job: delete that line to have its row run again, or give "
                        "--overwrite to start anew"
                    )
                custom_id = None if _is_duplicate(record) else record["custom_id"]
                key = None if custom_id is None else _key(custom_id)
                cursor = self._database.execute(
                    "INSERT OR IGNORE INTO done (row_id, custom_id) VALUES (?, ?)", (record["id"], key)
                )
                if cursor.rowcount != 1:
                    raise ConfigError(f"{where}: the row {custom_id!r} has a result already: delete one of the two")
                self._num_rows += 1
        return num_lines

    def compare_with_input(self, rows: Iterable[BatchRow | RowError]) -> InputComparison:
        """Reads the whole input: what is left to do, and what has changed in rows that are done."""
        num_open = num_other = 0
        example = ""
        for row in rows:
            if self._database.execute("UPDATE done SET seen = 1 WHERE row_id = ?", (row.row_id,)).rowcount == 1:
                continue
            if not self.covers(row):
                num_open += 1
                continue
            num_other += 1
            example = example or f"{row.unit} {row.line_number}, custom_id {row.custom_id!r}, is another one now"
        unseen = self._first("SELECT count(*) FROM done WHERE seen = 0")
        assert unseen is not None
        if unseen[0] and not example:
            first = self._first("SELECT custom_id FROM done WHERE seen = 0 ORDER BY custom_id IS NULL LIMIT 1")
            assert first is not None
            example = "a line without a custom_id of its own, which was refused, is not there any more"
            if first[0] is not None:
                example = f"custom_id {first[0].decode('utf-8', 'surrogatepass')!r} is not there any more"
        return InputComparison(num_open, max(num_other, int(unseen[0])), example)

    def close(self) -> None:
        self._database.close()

    def __enter__(self) -> DoneRows:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _first(self, query: str, *values: object) -> tuple[Any, ...] | None:
        row: tuple[Any, ...] | None = self._database.execute(query, values).fetchone()
        return row


def _key(custom_id: str) -> bytes:
    return custom_id.encode("utf-8", "surrogatepass")


def _result(line: bytes) -> dict[str, Any] | None:
    """The line as JSON, if it is what a job writes."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not is_row_id(record.get("id")):
        return None
    custom_id = record.get("custom_id")
    return record if custom_id is None or isinstance(custom_id, str) else None


def _is_duplicate(record: dict[str, Any]) -> bool:
    """Whether it is the refusal of a later use of a custom id, which another row owns."""
    response = record.get("response")
    body = response.get("body") if isinstance(response, dict) else None
    error = body.get("error") if isinstance(body, dict) else None
    return isinstance(error, dict) and error.get("code") == ErrorCode.DUPLICATE_CUSTOM_ID


def _is_duplicate_row(row: BatchRow | RowError) -> bool:
    return isinstance(row, RowError) and row.code == ErrorCode.DUPLICATE_CUSTOM_ID
