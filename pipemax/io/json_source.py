"""JSON lines as a table: `JsonSource` for lines of columns, `OpenAISource` for the lines of an OpenAI batch file.

As rows they are read line by line. As Arrow tables, for an output in Parquet or a dataset, they are read twice: once
for the types of the columns, once for the values, a few hundred lines in memory at a time.

    values of a column agree          Arrow's type of them; whole numbers and fractions make fractions
    they do not, or Arrow has none    JSON text

Never here: what columns mean (`table_row.py`), lines and archives (`json_lines.py`), writing (`table_writer.py`).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipemax.io.batch_request import RowRefusedError, RowUnit, parse_object
from pipemax.io.json_lines import JsonLines
from pipemax.io.table_row import BrokenRow

if TYPE_CHECKING:
    import pyarrow as pa  # type: ignore[import-untyped]

_LINES_AT_ONCE = 256
# A record with more fields than that is a map whose keys are data.
_MOST_FIELDS = 256
# What Arrow raises for a value that is not of a type, or of none: its own errors are ValueErrors and TypeErrors.
_UNFIT = (ValueError, TypeError, OverflowError)
_OPENAI_COLUMNS = ("custom_id", "url", "body")

_Record = dict[str, Any] | None


class JsonSource:
    """A file with one JSON object a line; its fields are the columns."""

    unit = RowUnit.LINE

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines = JsonLines(path)

    def count_rows(self) -> int:
        return self._lines.count()

    def read(self, columns: Collection[str]) -> Iterator[tuple[int, dict[str, Any] | BrokenRow]]:
        """Line number and the chosen fields of each row."""
        for number, line in self._lines:
            try:
                record = parse_object(line)
            except RowRefusedError as refusal:
                yield number, BrokenRow(line, str(refusal))
            else:
                yield number, {name: value for name, value in record.items() if name in columns}

    def objects(self) -> Iterator[bytes | None]:
        """Each row's JSON object as it stands there; None for lines that hold none."""
        for _, line in self._lines:
            yield None if _record(line) is None else line

    def columns(self) -> JsonColumns:
        """Reads the file for the types of its columns."""
        import pyarrow as pa

        types: dict[str, pa.DataType] = {}
        texts: set[str] = set()
        widened: set[str] = set()
        for records in self._chunks():
            for name in dict.fromkeys(name for record in records if record is not None for name in record):
                before = types.setdefault(name, pa.null())
                if name in texts:
                    continue
                try:
                    types[name] = _common_type(before, pa.array(_values(records, name)).type)
                except _UNFIT:
                    texts.add(name)
                    continue
                if before not in (pa.null(), types[name]) and "double" in str(types[name]):
                    widened.add(name)
        texts.update(name for name, kind in types.items() if not _can_be_stored(kind))
        texts.update(self._unfit(types, widened - texts))
        return JsonColumns(self._chunks, types, texts)

    def _unfit(self, types: Mapping[str, pa.DataType], doubtful: set[str]) -> set[str]:
        """Columns that hold an integer which no fraction equals. Each few hundred lines alone have a type of theirs."""
        import pyarrow as pa

        unfit: set[str] = set()
        for records in self._chunks() if doubtful else ():
            for name in doubtful - unfit:
                try:
                    pa.array(_values(records, name), types[name])
                except _UNFIT:
                    unfit.add(name)
        return unfit

    def _chunks(self) -> Iterator[list[_Record]]:
        lines = iter(self._lines)
        while chunk := [_record(line) for _, line in itertools.islice(lines, _LINES_AT_ONCE)]:
            yield chunk


class OpenAISource(JsonSource):
    """An OpenAI batch file; its columns are the custom id, the url and the body as JSON text."""

    def columns(self) -> JsonColumns:
        import pyarrow as pa

        def chunks() -> Iterator[list[_Record]]:
            for records in self._chunks():
                yield [None if record is None else _openai_fields(record) for record in records]

        return JsonColumns(chunks, dict.fromkeys(_OPENAI_COLUMNS, pa.string()), {"body"})

    def objects(self) -> Iterator[bytes | None]:
        raise AssertionError("answers to OpenAI requests as JSON lines are not a table")


class JsonColumns:
    """Rows of JSON as Arrow batches. `texts` are columns of JSON text."""

    def __init__(
        self, chunks: Callable[[], Iterator[list[_Record]]], types: Mapping[str, pa.DataType], texts: Collection[str]
    ) -> None:
        self._chunks = chunks
        self._types = types
        self._texts = set(texts)

    @property
    def schema(self) -> pa.Schema:
        import pyarrow as pa

        return pa.schema([(name, pa.string() if name in self._texts else kind) for name, kind in self._types.items()])

    def batches(self) -> Iterator[pa.RecordBatch]:
        """All rows. Raises OSError."""
        import pyarrow as pa

        schema = self.schema
        for records in self._chunks():
            arrays = [
                pa.array(_texts(_values(records, name)), pa.string())
                if name in self._texts
                else pa.array(_values(records, name), kind)
                for name, kind in self._types.items()
            ]
            assert arrays, "a table without columns"
            yield pa.RecordBatch.from_arrays(arrays, schema=schema)


def _record(line: bytes) -> _Record:
    try:
        return parse_object(line)
    except RowRefusedError:
        return None


def _values(records: Sequence[_Record], name: str) -> list[Any]:
    return [None if record is None else record.get(name) for record in records]


def _texts(values: list[Any]) -> list[str | None]:
    return [None if value is None else json.dumps(value) for value in values]


def _common_type(left: pa.DataType, right: pa.DataType) -> pa.DataType:
    """The type that holds values of both. Raises one of _UNFIT."""
    import pyarrow as pa

    schemas = [pa.schema([("column", kind)]) for kind in (left, right)]
    return pa.unify_schemas(schemas, promote_options="permissive").field("column").type


def _can_be_stored(kind: pa.DataType) -> bool:
    """Parquet has no records without fields; records of very many are maps whose keys are data."""
    import pyarrow as pa

    if pa.types.is_list(kind):
        return _can_be_stored(kind.value_type)
    if pa.types.is_struct(kind):
        fields = [kind.field(index).type for index in range(kind.num_fields)]
        return 0 < len(fields) <= _MOST_FIELDS and all(map(_can_be_stored, fields))
    return True


def _openai_fields(record: dict[str, Any]) -> dict[str, Any]:
    """Strings that Arrow takes; a broken row may have anything there."""

    def string(value: object) -> str | None:
        return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else None

    return {"custom_id": string(record.get("custom_id")), "url": string(record.get("url")), "body": record.get("body")}
