"""`put_in_input_order`: a file of results in the order of the input, in flat memory.

    index the lines of the file by row id  ->  walk through the input, copy line by line  ->  replace the file

Files are whole at every moment (`final_file.py`). Lines whose rows the input does not have (a forced resume) come last,
in their old order.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pipemax.io.batch_request import BatchRow, RowError
from pipemax.io.file_format import compression_of
from pipemax.io.final_file import new_file
from pipemax.io.json_lines import json_lines_writer
from pipemax.io.result_index import ResultIndex


def put_in_input_order(path: Path, rows: Iterable[BatchRow | RowError], *, target: Path | None = None) -> None:
    """`rows`: the whole input. `target`: where to put the lines, compressed as its name says; None: into their place.

    Raises OSError; the files are as they were then.
    """
    to_be = target or path
    with ResultIndex() as index, new_file(to_be, suffix=".ordered") as beside:
        index.add_file(path)
        with json_lines_writer(beside, compression_of(to_be)) as lines:
            for row in rows:
                if (line := index.take(row.row_id)) is not None:
                    lines.write(line)
            for line in index.rest():
                lines.write(line)
        if target is None:
            beside.chmod(path.stat().st_mode & 0o7777)
