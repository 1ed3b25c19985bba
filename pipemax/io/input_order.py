"""`put_in_input_order`: rewrites a finished file of results in the order of the input, in flat memory.

    index the lines of the file by row id  ->  walk through the input, copy line by line  ->  replace the file

The file is whole at every moment: the new one is written beside it, synced, and takes its name at once. Lines whose
rows the input does not have (a forced resume) come last, in their old order.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterable
from pathlib import Path

from pipemax.io.batch_request import BatchRow, RowError
from pipemax.io.output_journal import sync_folder

_PAGE_CACHE_KIB = 16 * 1024


def put_in_input_order(path: Path, rows: Iterable[BatchRow | RowError]) -> None:
    """`rows`: the whole input. Raises OSError; the file is as it was then."""
    beside = path.with_name(path.name + ".ordered")
    index = sqlite3.connect("", isolation_level=None)
    try:
        for pragma in ("journal_mode = OFF", "synchronous = OFF", f"cache_size = -{_PAGE_CACHE_KIB}"):
            index.execute(f"PRAGMA {pragma}")
        index.execute("CREATE TABLE lines (row_id TEXT PRIMARY KEY, start INTEGER NOT NULL, placed INTEGER DEFAULT 0)")
        index.execute("BEGIN")
        with path.open("rb") as source:
            start = 0
            for line in source:
                index.execute("INSERT INTO lines (row_id, start) VALUES (?, ?)", (json.loads(line)["id"], start))
                start += len(line)
            with beside.open("wb") as target:
                for row in rows:
                    found = index.execute(
                        "UPDATE lines SET placed = 1 WHERE row_id = ? RETURNING start", (row.row_id,)
                    ).fetchone()
                    if found is not None:
                        source.seek(found[0])
                        target.write(source.readline())
                for (start,) in index.execute("SELECT start FROM lines WHERE placed = 0 ORDER BY start"):
                    source.seek(start)
                    target.write(source.readline())
                target.flush()
                os.fsync(target.fileno())
        os.chmod(beside, path.stat().st_mode & 0o7777)
        beside.replace(path)
        sync_folder(path.parent)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    finally:
        index.close()
