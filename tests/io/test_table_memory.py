"""Tables larger than memory: rows are read, and tables written, a few batches at a time."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipemax.io.file_format import FileKind
from pipemax.io.job_input import JobInput
from pipemax.io.table_writer import write_table

NUM_ROWS, ROW_BYTES = 20_000, 2_000
MIB = 1 << 20


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """40 MB in one row group, text that does not compress."""
    path = tmp_path_factory.mktemp("wide") / "in.parquet"
    text = np.random.default_rng(1).integers(97, 123, NUM_ROWS * ROW_BYTES, dtype=np.uint8).tobytes().decode()
    prompts = [text[start : start + ROW_BYTES] for start in range(0, len(text), ROW_BYTES)]
    pq.write_table(pa.table({"prompt": prompts, "other": prompts[::-1]}), path, row_group_size=NUM_ROWS)
    return path


def test_rows_are_read_without_the_columns_beside_them_in_flat_memory(source):
    before, most = pa.total_allocated_bytes(), 0
    for number, _ in enumerate(JobInput.open(source, FileKind.of(source, flag=""), prompt_column=None).rows({})):
        if number % 100 == 0:
            most = max(most, pa.total_allocated_bytes() - before)
    assert number == NUM_ROWS - 1
    assert 0 < most < 8 * MIB


@pytest.mark.parametrize("name", ["out.parquet", "out", "out.jsonl"])
def test_tables_are_written_in_flat_memory(tmp_path, monkeypatch, source, name):
    monkeypatch.setattr("pipemax.io.table_writer._ROW_GROUP_BYTES", 4 * MIB)
    job_input = JobInput.open(source, FileKind.of(source, flag=""), prompt_column=None)
    journal = tmp_path / "journal"
    error = {"code": "generation_failed", "message": "x"}
    with journal.open("w") as lines:
        for row in job_input.rows({}):
            record = {"id": row.row_id, "custom_id": row.custom_id, "response": None, "error": error}
            lines.write(json.dumps(record) + "\n")
    target = tmp_path / name
    if name == "out":
        target.mkdir()
    before, most = pa.total_allocated_bytes(), 0

    def looked_at():
        nonlocal most
        for number, row in enumerate(job_input.rows({})):
            if number % 100 == 0:
                most = max(most, pa.total_allocated_bytes() - before)
            yield row

    kind = FileKind.of(target, flag="")
    write_table(target, kind, source=job_input.source, rows=looked_at(), journals=[journal], prefix="")
    assert 0 < most < 28 * MIB
    if name == "out.parquet":
        assert pq.ParquetFile(target).metadata.num_row_groups > 10
