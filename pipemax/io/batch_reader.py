"""`BatchReader`: an OpenAI batch file as a lazy stream of rows, one line in memory at a time.

What lives here: the uniqueness of custom ids and of row ids. Never here: lines of a file (`json_lines.py`), what one
line means (`batch_request.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipemax.io.batch_request import BatchRow, ErrorCode, RowError, parse_line, row_error
from pipemax.io.custom_ids import CustomIdIndex
from pipemax.io.json_lines import JsonLines
from pipemax.io.row_ids import nameless_row_id


class BatchReader:
    """Rows of the file at `path`, in order, without blank lines and byte order mark. `defaults`: see `parse_line`.

    Raises OSError from iteration when the file cannot be read.
    """

    def __init__(self, path: Path, *, defaults: Mapping[str, Any]) -> None:
        self._path = path
        self._defaults = defaults

    def __iter__(self) -> Iterator[BatchRow | RowError]:
        with CustomIdIndex() as seen:
            for number, line in JsonLines(self._path):
                row = parse_line(line, number, defaults=self._defaults)
                if row.custom_id is None:
                    assert isinstance(row, RowError)
                    yield dataclasses.replace(row, row_id=nameless_row_id(line, seen.count_nameless(line)))
                elif (first_line := seen.add(row.custom_id, number)) is None:
                    yield row
                else:
                    yield row_error(
                        number,
                        row.custom_id,
                        ErrorCode.DUPLICATE_CUSTOM_ID,
                        f"custom_id {row.custom_id!r} is not unique: line {first_line} has it already",
                        param="custom_id",
                        row_id=nameless_row_id(line, seen.count_nameless(line)),
                    )


def count_rows(path: Path) -> int:
    """Lines that are not blank: what a reader of this file will yield. Raises OSError."""
    return JsonLines(path).count()
