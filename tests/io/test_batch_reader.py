"""Lines of a batch file: numbers, blanks, encodings, duplicates, and memory that does not grow with the file."""

import json
import tracemalloc

from pipemax.io.batch_reader import BatchReader, count_rows
from pipemax.io.batch_request import BatchRow, RowError


def chat_line(custom_id, content="Hello", **fields):
    body = {"messages": [{"role": "user", "content": content}], **fields}
    record = {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}
    return json.dumps(record).encode()


def read(tmp_path, content):
    path = tmp_path / "in.jsonl"
    path.write_bytes(content)
    rows = list(BatchReader(path, defaults={}))
    assert count_rows(path) == len(rows)
    return rows


def test_blank_lines_byte_order_mark_and_line_ends(tmp_path):
    content = b"\xef\xbb\xbf" + chat_line("a") + b"\r\n\n   \n" + chat_line("b")
    rows = read(tmp_path, content)
    assert [(row.custom_id, row.line_number) for row in rows] == [("a", 1), ("b", 4)]


def test_empty_file_and_file_of_blanks(tmp_path):
    assert read(tmp_path, b"") == []
    assert read(tmp_path, b"\xef\xbb\xbf\n\n \n") == []


def test_a_wrong_line_costs_itself_only(tmp_path):
    first, wrong, last = read(tmp_path, chat_line("a") + b"\n{broken\n" + chat_line("c") + b"\n")
    assert isinstance(first, BatchRow) and isinstance(last, BatchRow)
    assert isinstance(wrong, RowError) and wrong.line_number == 2 and wrong.custom_id is None


def test_later_uses_of_a_custom_id_are_errors(tmp_path):
    content = b"\n".join([chat_line("a"), chat_line("b", n=2), chat_line("a"), chat_line("b"), chat_line("\ud800")])
    rows = read(tmp_path, content)
    assert [type(row) for row in rows] == [BatchRow, RowError, RowError, RowError, BatchRow]
    assert rows[2].code == rows[3].code == "duplicate_custom_id"
    assert "line 1 has it" in rows[2].message and "line 2 has it" in rows[3].message


def test_defaults_reach_the_rows(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(chat_line("a"))
    (row,) = BatchReader(path, defaults={"temperature": 0.25})
    assert row.sampling_params.temperature == 0.25


def test_a_line_of_megabytes(tmp_path):
    (row,) = read(tmp_path, chat_line("a", "long " * 1_000_000))
    assert len(row.messages[0]["content"]) == 5_000_000


def test_memory_does_not_grow_with_the_file(tmp_path):
    path = tmp_path / "in.jsonl"
    with path.open("wb") as lines:
        for number in range(20_000):
            lines.write(chat_line(f"request-{number:040}", "word " * 20) + b"\n")
    tracemalloc.start()
    try:
        peaks = []
        for number, _ in enumerate(BatchReader(path, defaults={})):
            if number in (2_000, 19_999):
                peaks.append(tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 100_000  # 18,000 rows kept as anything would take more than a megabyte
