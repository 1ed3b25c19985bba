"""`JsonLines`: the lines of a file of JSON lines, numbered, plain or inside gzip or zstd, one in memory at a time.

Without blank lines and byte order mark. A compressed file that ends in the middle is an error, not an end. The codecs
are Arrow's, which is loaded for compressed files only. Never here: what a line means.
"""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO, cast

from pipemax.io.broken_input import BrokenInputError, first_line
from pipemax.io.file_format import Compression, compression_of

_READ_AT_ONCE_BYTES = 1 << 20


class JsonLines:
    """Lines of the file at `path`; the extension says how it is compressed. Iterating gives (number from 1, line)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._compression = compression_of(path)

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        """Lines without the white space around them. Raises OSError; BrokenInputError for a damaged archive."""
        with _opened(self.path, self._compression) as lines:
            number = 0
            while True:
                try:
                    line = lines.readline()
                except OSError as error:
                    if self._compression is Compression.NONE:
                        raise
                    raise BrokenInputError(self.path, _archive_problem(error, self._compression)) from error
                if not line:
                    return
                number += 1
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if line := line.strip():
                    yield number, line

    def count(self) -> int:
        """Lines that are not blank. Reads the whole file. Raises as iterating does."""
        return sum(1 for _ in self)


@contextmanager
def _opened(path: Path, compression: Compression) -> Iterator[IO[bytes]]:
    if compression is Compression.NONE:
        with path.open("rb") as file:
            yield file
        return
    import pyarrow as pa  # type: ignore[import-untyped]

    with (
        path.open("rb") as file,
        pa.CompressedInputStream(pa.PythonFile(file, mode="r"), compression.value) as stream,
        io.BufferedReader(cast(io.RawIOBase, stream), _READ_AT_ONCE_BYTES) as lines,
    ):
        yield lines


@contextmanager
def json_lines_writer(path: Path, compression: Compression) -> Iterator[BinaryIO]:
    """A new file for JSON lines. What is left of it on an error is the caller's. Raises OSError."""
    with path.open("wb") as file:
        if compression is Compression.NONE:
            yield file
            return
        import pyarrow as pa

        with (
            pa.CompressedOutputStream(pa.PythonFile(file, mode="w"), compression.value) as stream,
            io.BufferedWriter(cast(io.RawIOBase, stream), _READ_AT_ONCE_BYTES) as lines,
        ):
            yield cast(BinaryIO, lines)


def _archive_problem(error: OSError, compression: Compression) -> str:
    if "truncated" in str(error).lower():
        return f"the {compression.value} file ends in the middle: copy or compress it again"
    return f"not a whole {compression.value} file ({first_line(error)}): copy or compress it again"
