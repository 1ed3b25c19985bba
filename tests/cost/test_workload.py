"""Length traces: read as they are, refused with the line that is wrong."""

from __future__ import annotations

import pytest

from pipemax.config import ConfigError
from pipemax.cost.workload import RequestLengths, read_lengths


def write(tmp_path, text):
    file = tmp_path / "trace.csv"
    file.write_text(text)
    return file


def test_rows_in_file_order(tmp_path):
    file = write(tmp_path, "prompt_tokens,output_tokens\n52,373\n16,113\n\n")
    assert read_lengths(file) == (RequestLengths(52, 373), RequestLengths(16, 113))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "first line of a trace must be"),
        ("a,b\n1,2\n", "first line of a trace must be"),
        ("prompt_tokens,output_tokens\n", "no requests in the trace"),
        ("prompt_tokens,output_tokens\n1,2\n3,x\n", r"line 3: expected two integers, got '3,x'"),
        ("prompt_tokens,output_tokens\n1\n", r"line 2: expected two integers"),
        ("prompt_tokens,output_tokens\n0,5\n", r"line 2: lengths must be at least 1, got 0,5"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as raised:
        read_lengths(write(tmp_path, text))
    assert "\n" not in str(raised.value)


def test_a_missing_or_binary_file(tmp_path):
    with pytest.raises(ConfigError, match="cannot read the trace"):
        read_lengths(tmp_path / "none.csv")
    file = tmp_path / "trace.parquet"
    file.write_bytes(b"PAR1\xff\xfe\x00")
    with pytest.raises(ConfigError, match="CSV text file"):
        read_lengths(file)
