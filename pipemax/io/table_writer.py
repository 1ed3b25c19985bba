"""`write_table`: the table that a job ends in: the input's columns, and beside them the results of its rows.

    input, again    |batch|batch|batch| ...        columns as they are, types and all
    rows, again     |.....|.....|.....| ...   ids  ->  index  ->  lines of results
    output          |batch + results  |  ...       JSON lines, Parquet or a dataset, in the order of the input

So nothing but results has to be kept while a job runs, and memory stays that of some batches. Rows that failed keep
their place. Results whose rows the input does not have any more (a forced resume) come last. Never here: when and where
a table appears (`final_file.py`), what the results say (`result_columns.py`).
"""

from __future__ import annotations

import base64
import datetime
import decimal
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pipemax.io.batch_request import BatchRow, RowError
from pipemax.io.broken_input import BrokenInputError
from pipemax.io.dataset_folder import DATA_FILE, write_dataset_files
from pipemax.io.file_format import FileFormat, FileKind
from pipemax.io.json_lines import json_lines_writer
from pipemax.io.json_source import JsonSource
from pipemax.io.result_columns import LOGPROBS_COLUMN, ResultColumns, result_values
from pipemax.io.result_index import ResultIndex
from pipemax.io.table_row import ID_COLUMNS

if TYPE_CHECKING:
    import pyarrow as pa  # type: ignore[import-untyped]

    from pipemax.io.arrow_source import ArrowSource

_ROW_GROUP_BYTES = 64 << 20
_ROW_GROUP_ROWS = 1 << 17
_REST_ROWS = 256
_FEATURES_KEY = b"huggingface"
# What of a dataset's description still holds for the output.
_KEPT_INFO = ("description", "citation", "homepage", "license")


class _Carried(Protocol):
    """The input's columns as Arrow batches."""

    @property
    def schema(self) -> pa.Schema: ...

    def batches(self) -> Iterator[pa.RecordBatch]: ...


def write_table(
    target: Path,
    kind: FileKind,
    *,
    source: JsonSource | ArrowSource,
    rows: Iterator[BatchRow | RowError],
    journals: list[Path],
    prefix: str,
) -> None:
    """Writes the table to `target`, which is new: a file, or for a dataset an empty folder.

    `rows`: the whole input, as its reader gives it. `journals`: files with one line of results a row. Raises OSError;
    BrokenInputError when the input is another one now.
    """
    has_logprobs = False

    def look(record: Mapping[str, Any]) -> None:
        nonlocal has_logprobs
        has_logprobs = has_logprobs or LOGPROBS_COLUMN in result_values(record)

    with ResultIndex() as index:
        for path in journals:
            index.add_file(path, look)
        columns = ResultColumns(prefix=prefix, with_logprobs=has_logprobs)

        def next_values() -> dict[str, Any]:
            row = next(rows, None)
            line = None if row is None else index.take(row.row_id, row.custom_id)
            if line is None:
                raise BrokenInputError(source.path, "it has changed while the job ran: start the job again")
            return result_values(json.loads(line))

        if kind.format is FileFormat.JSON_LINES:
            with json_lines_writer(target, kind.compression) as lines:
                for carried in _objects(source):
                    lines.write(_joined(carried, columns.fields(next_values())))
                for record in map(json.loads, index.rest()):
                    fields = {ID_COLUMNS[0]: record["custom_id"], **columns.fields(result_values(record))}
                    lines.write(_joined(None, fields))
            return
        _write_arrow(target, kind, source, columns, next_values, index)


# -- JSON lines --------------------------------------------------------------------------------------------------------


def _objects(source: JsonSource | ArrowSource) -> Iterator[bytes | None]:
    """The input's columns, a JSON object a row; None for rows that have none."""
    if isinstance(source, JsonSource):
        yield from source.objects()
        return
    for batch in source.batches():
        for row in _with_times_as_text(batch).to_pylist():
            yield _dumps(_jsonable(row))


def _joined(carried: bytes | None, fields: Mapping[str, Any]) -> bytes:
    """A line with both; what is carried stays as it was, to the byte."""
    added = _dumps(fields)
    if carried is None or not carried[1:-1].strip():
        return added + b"\n"
    return carried[:-1].rstrip() + b", " + added[1:] + b"\n"


def _dumps(record: object) -> bytes:
    try:
        return json.dumps(record, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:  # half of a surrogate pair: legal JSON, but only as an escape
        return json.dumps(record, allow_nan=False).encode()


def _with_times_as_text(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Python's times end at microseconds."""
    import pyarrow as pa

    arrays = [
        array.cast(pa.int64() if pa.types.is_duration(array.type) else pa.string())
        if pa.types.is_temporal(array.type) and not pa.types.is_interval(array.type)
        else array
        for array in batch.columns
    ]
    return pa.RecordBatch.from_arrays(arrays, names=batch.schema.names)


def _jsonable(value: Any) -> Any:
    """JSON has no bytes (base64), no times (ISO 8601), no decimals (strings), no NaN and infinity (null)."""
    match value:
        case dict():
            return {str(name): _jsonable(item) for name, item in value.items()}
        case list() | tuple():
            return [_jsonable(item) for item in value]
        case float():
            return value if math.isfinite(value) else None
        case bytes():
            return base64.b64encode(value).decode()
        case datetime.date() | datetime.time():
            return value.isoformat()
        case decimal.Decimal() | datetime.timedelta():
            return str(value)
        case None | bool() | int() | str():
            return value
        case _:
            return str(value)


# -- Arrow -------------------------------------------------------------------------------------------------------------


def _write_arrow(
    target: Path,
    kind: FileKind,
    source: JsonSource | ArrowSource,
    columns: ResultColumns,
    next_values: Callable[[], dict[str, Any]],
    index: ResultIndex,
) -> None:
    import pyarrow as pa

    carried: _Carried = source.columns() if isinstance(source, JsonSource) else source
    to_dataset = kind.format is FileFormat.DATASET
    fields = [_output_field(field, decoded=to_dataset) for field in carried.schema]
    added = [pa.field(name, pa.type_for_alias(alias)) for name, alias in columns.types.items()]
    metadata = _with_features(dict(carried.schema.metadata or {}), columns)
    schema = pa.schema([*fields, *added], metadata)

    def rows_of(arrays: list[pa.Array], values: list[dict[str, Any]]) -> pa.RecordBatch:
        fitting = [
            array.dictionary_decode() if array.type != field.type else array
            for array, field in zip(arrays, fields, strict=True)
        ]
        return pa.RecordBatch.from_arrays([*fitting, *columns.arrays(values)], schema=schema)

    opened = _dataset_writer(target, schema, source) if to_dataset else _parquet_writer(target, schema)
    with opened as write:
        for batch in carried.batches():
            write(rows_of(batch.columns, [next_values() for _ in range(batch.num_rows)]))
        rest = map(json.loads, index.rest())
        while records := list(itertools.islice(rest, _REST_ROWS)):
            names = [record["custom_id"] for record in records]
            arrays = [_rest_array(field, names) for field in fields]
            write(rows_of(arrays, [result_values(record) for record in records]))


def _output_field(field: pa.Field, *, decoded: bool) -> pa.Field:
    """Any column may get nulls, from results without a row. Datasets have no dictionaries."""
    import pyarrow as pa

    if decoded and pa.types.is_dictionary(field.type):
        field = field.with_type(field.type.value_type)
    return field.with_nullable(True)


def _rest_array(field: pa.Field, names: list[str | None]) -> pa.Array:
    import pyarrow as pa

    if field.name in ID_COLUMNS and pa.types.is_string(field.type):
        return pa.array(names, field.type)
    return pa.nulls(len(names), field.type)


def _with_features(metadata: dict[bytes, bytes], columns: ResultColumns) -> dict[bytes, bytes]:
    """Where a schema carries the features of a dataset they have to name all columns."""
    try:
        record = json.loads(metadata[_FEATURES_KEY])
        record["info"]["features"] = _all_features(record["info"]["features"], columns)
    except (KeyError, TypeError, ValueError):
        return {key: value for key, value in metadata.items() if key != _FEATURES_KEY}
    return {**metadata, _FEATURES_KEY: json.dumps(record).encode()}


def _all_features(features: Mapping[str, Any], columns: ResultColumns) -> dict[str, Any]:
    return {**features, **{name: {"dtype": kind, "_type": "Value"} for name, kind in columns.types.items()}}


@contextmanager
def _parquet_writer(target: Path, schema: pa.Schema) -> Iterator[Callable[[pa.RecordBatch], None]]:
    import pyarrow as pa
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    waiting: list[pa.RecordBatch] = []
    num_rows = num_bytes = 0
    with pq.ParquetWriter(target, schema) as writer:

        def write_waiting() -> None:
            nonlocal num_rows, num_bytes
            if waiting:
                writer.write_table(pa.Table.from_batches(waiting, schema), row_group_size=_ROW_GROUP_ROWS)
                waiting.clear()
                num_rows = num_bytes = 0

        def write(batch: pa.RecordBatch) -> None:
            nonlocal num_rows, num_bytes
            waiting.append(batch)
            num_rows += batch.num_rows
            num_bytes += batch.nbytes
            if num_bytes >= _ROW_GROUP_BYTES or num_rows >= _ROW_GROUP_ROWS:
                write_waiting()

        yield write
        write_waiting()


@contextmanager
def _dataset_writer(
    target: Path, schema: pa.Schema, source: JsonSource | ArrowSource
) -> Iterator[Callable[[pa.RecordBatch], None]]:
    import pyarrow as pa

    from pipemax.io.arrow_source import DatasetSource

    with pa.OSFile(str(target / DATA_FILE), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        yield writer.write_batch
    info: dict[str, Any] = {}
    split = None
    if isinstance(source, DatasetSource):
        folder = source.folder
        info, split = {name: folder.info[name] for name in _KEPT_INFO if name in folder.info}, folder.split
        features = folder.info.get("features")
        if isinstance(features, dict):
            added = [name for name in schema.names if name not in features]
            info["features"] = {
                **features,
                **{name: {"dtype": str(schema.field(name).type), "_type": "Value"} for name in added},
            }
    write_dataset_files(target, info=info, split=split)
