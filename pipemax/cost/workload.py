"""`RequestLengths` and the reader of length traces: what an estimate has to know of a workload.

A trace is CSV with the header `prompt_tokens,output_tokens` and two integers a row.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from pipemax.config import ConfigError

_HEADER = ["prompt_tokens", "output_tokens"]


@dataclass(frozen=True, slots=True)
class RequestLengths:
    """Tokens of one request's prompt and of its output, both at least 1."""

    prompt_tokens: int
    output_tokens: int


def read_lengths(path: str | Path) -> tuple[RequestLengths, ...]:
    """Every row of a trace, in file order. Raises ConfigError that names the file and the line."""
    file = Path(path)
    lengths = []
    try:
        with file.open(newline="", encoding="utf-8") as rows:
            reader = csv.reader(rows)
            if [name.strip() for name in next(reader, [])] != _HEADER:
                raise ConfigError(f"{file}: the first line of a trace must be '{','.join(_HEADER)}'")
            for fields in reader:
                if fields:
                    lengths.append(_row(file, reader.line_num, fields))
    except OSError as error:
        raise ConfigError(f"{file}: cannot read the trace: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: a trace is a CSV text file, this is none") from error
    if not lengths:
        raise ConfigError(f"{file}: no requests in the trace; add a line for each, such as 228,471")
    return tuple(lengths)


def _row(file: Path, line: int, fields: list[str]) -> RequestLengths:
    try:
        prompt, output = (int(field) for field in fields)
    except ValueError:
        raise ConfigError(f"{file}, line {line}: expected two integers, got {','.join(fields)!r}") from None
    if prompt < 1 or output < 1:
        raise ConfigError(f"{file}, line {line}: lengths must be at least 1, got {prompt},{output}")
    return RequestLengths(prompt, output)
