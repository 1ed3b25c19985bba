"""`TableReader`: a table as a lazy stream of rows for the engine, as `BatchReader` is for an OpenAI batch file.

What lives here: the names of rows and their ids. A row is called as its `custom_id` or `id` column says, where it is
the first of that name; else by its number. Rows keep their place in the output, so a name need not be unique, and equal
rows are told apart by how many of them came before. Never here: what a row means (`table_row.py`), reading
(`arrow_source.py`, `json_source.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, Protocol

from pipemax.io.batch_request import BatchRow, ErrorCode, RowError, RowUnit, row_error
from pipemax.io.custom_ids import CustomIdIndex
from pipemax.io.row_ids import nameless_row_id, row_id
from pipemax.io.table_row import BrokenRow, columns_read, row_content, row_name, table_row


class RowSource(Protocol):
    """A table whose rows can be read, as often as needed."""

    @property
    def unit(self) -> RowUnit: ...

    def count_rows(self) -> int: ...

    def read(self, columns: Collection[str]) -> Iterator[tuple[int, dict[str, Any] | BrokenRow]]: ...


class TableReader:
    """Rows of `source`, in order. `prompt_column`: see `columns_read`; `defaults`: see `parse_line`."""

    def __init__(self, source: RowSource, *, prompt_column: str | None, defaults: Mapping[str, Any]) -> None:
        self._source = source
        self._prompt_column = prompt_column
        self._defaults = defaults

    def __iter__(self) -> Iterator[BatchRow | RowError]:
        """Raises OSError when the file cannot be read."""
        unit = self._source.unit
        with CustomIdIndex() as seen:
            for number, values in self._source.read(columns_read(self._prompt_column)):
                if isinstance(values, BrokenRow):
                    identity = nameless_row_id(values.content, seen.count_nameless(values.content))
                    yield row_error(
                        number, None, ErrorCode.INVALID_JSON_LINE, values.message, row_id=identity, unit=unit
                    )
                    continue
                content, name = row_content(values), row_name(values)
                if name is not None and seen.add(name, number) is None:
                    identity = row_id(content)
                else:
                    identity = nameless_row_id(content, seen.count_nameless(content))
                    name = f"{unit}-{number}"
                    if seen.add(name, number) is not None:
                        message = f"this row has no name of its own and would be called {name!r}, as another one is"
                        yield row_error(
                            number, None, ErrorCode.DUPLICATE_CUSTOM_ID, message, row_id=identity, unit=unit
                        )
                        continue
                yield table_row(
                    values,
                    number=number,
                    unit=unit,
                    custom_id=name,
                    row_id=identity,
                    prompt_column=self._prompt_column,
                    defaults=self._defaults,
                )
