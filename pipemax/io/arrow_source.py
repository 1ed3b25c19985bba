"""Tables in Arrow's formats as a stream of record batches: Parquet files and Hugging Face datasets saved to disk.

    Parquet    pages as they are read, a few hundred rows in memory, whatever the size of a row group
    dataset    batches of its Arrow files, mapped into memory

Columns can be chosen, so that wide tables cost nothing for what is not needed. What cannot be read is told when the
source is made, with the fix, or as BrokenInputError when it shows later. Never here: what columns mean
(`table_row.py`), JSON (`json_source.py`), writing (`table_writer.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from pipemax.config import ConfigError
from pipemax.io.batch_request import RowUnit
from pipemax.io.broken_input import BrokenInputError, first_line
from pipemax.io.dataset_folder import DatasetFolder
from pipemax.io.table_row import BrokenRow

# Small enough that rows of a megabyte do not fill the memory.
BATCH_ROWS = 256
_BUFFER_BYTES = 1 << 20


class ArrowSource:
    """What both kinds share. `path` names the file or folder; `schema` has all columns."""

    unit = RowUnit.ROW

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path = path
        self.schema = schema
        twice = sorted({name for name in schema.names if schema.names.count(name) > 1})
        if twice:
            raise ConfigError(f"{path} has two columns {twice[0]}: rename one")

    @property
    def column_names(self) -> list[str]:
        return list(self.schema.names)

    def count_rows(self) -> int:
        raise NotImplementedError

    def batches(self, columns: Collection[str] | None = None) -> Iterator[pa.RecordBatch]:
        """All rows, in order, at most BATCH_ROWS at once. None: all columns. Raises BrokenInputError."""
        raise NotImplementedError

    def read(self, columns: Collection[str]) -> Iterator[tuple[int, dict[str, Any] | BrokenRow]]:
        """Number from 1 and values of each row; columns that are not there are left out."""
        wanted = [name for name in self.schema.names if name in columns]
        number = 0
        for batch in self.batches(wanted):
            for values in batch.to_pylist():
                number += 1
                yield number, values


class ParquetSource(ArrowSource):
    """A Parquet file. Raises ConfigError when it is none."""

    def __init__(self, path: Path) -> None:
        try:
            with pq.ParquetFile(path) as file:
                schema, self._num_rows = file.schema_arrow, int(file.metadata.num_rows)
        except (pa.ArrowException, OSError) as error:
            raise ConfigError(
                f"{path} is not a whole Parquet file ({first_line(error)}): copy or write it again"
            ) from None
        super().__init__(path, schema)

    def count_rows(self) -> int:
        return self._num_rows

    def batches(self, columns: Collection[str] | None = None) -> Iterator[pa.RecordBatch]:
        assert columns is None or columns, "an Arrow batch of no columns has no rows"
        try:
            with pq.ParquetFile(self.path, buffer_size=_BUFFER_BYTES, pre_buffer=False) as file:
                names = None if columns is None else list(columns)
                yield from file.iter_batches(batch_size=BATCH_ROWS, columns=names)
        except (pa.ArrowException, OSError) as error:
            raise BrokenInputError(self.path, f"damaged ({first_line(error)}): copy or write it again") from error


class DatasetSource(ArrowSource):
    """A folder that `Dataset.save_to_disk` has written. Raises ConfigError when it is none."""

    def __init__(self, path: Path) -> None:
        self.folder = DatasetFolder.read(path)
        schema = None
        for file in self.folder.data_files:
            try:
                with pa.OSFile(str(file)) as source, pa.ipc.open_stream(source) as reader:
                    schema = reader.schema if schema is None else schema
                    if not reader.schema.equals(schema):
                        raise ConfigError(f"{file} has other columns than the first file: save the dataset again")
            except (pa.ArrowException, OSError) as error:
                raise ConfigError(
                    f"{file} is not a whole Arrow file ({first_line(error)}): save the dataset again"
                ) from None
        assert schema is not None
        super().__init__(path, schema)

    def count_rows(self) -> int:
        return sum(batch.num_rows for batch in self._file_batches())

    def batches(self, columns: Collection[str] | None = None) -> Iterator[pa.RecordBatch]:
        for batch in self._file_batches():
            chosen = batch if columns is None else batch.select(list(columns))
            for start in range(0, chosen.num_rows, BATCH_ROWS):
                yield chosen.slice(start, BATCH_ROWS)

    def _file_batches(self) -> Iterator[pa.RecordBatch]:
        for file in self.folder.data_files:
            try:
                with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as reader:
                    yield from reader
            except (pa.ArrowException, OSError) as error:
                raise BrokenInputError(file, f"damaged ({first_line(error)}): save the dataset again") from error
