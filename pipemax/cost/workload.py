"""`RequestLengths`, the reader of length traces, `MeanLengths`: what an estimate has to know of a workload.

A trace is CSV with the header `prompt_tokens,output_tokens` and two integers a row.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipemax.config import ConfigError

_HEADER = ["prompt_tokens", "output_tokens"]


@dataclass(frozen=True, slots=True)
class RequestLengths:
    """Tokens of one request's prompt and of its output, both at least 1."""

    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class MeanLengths:
    """Means over requests; `live_tokens`, the KV of a decoding row, is the mean over the tokens that are generated."""

    prompt_tokens: float
    output_tokens: float
    live_tokens: float

    @classmethod
    def of(cls, workload: Sequence[RequestLengths]) -> MeanLengths:
        """Of at least one request."""
        prompts = sum(request.prompt_tokens for request in workload)
        outputs = sum(request.output_tokens for request in workload)
        # A request of p and o tokens is o steps long, with p + 1 to p + o tokens.
        live = sum(
            request.output_tokens * (request.prompt_tokens + (request.output_tokens + 1) / 2) for request in workload
        )
        return cls(prompts / len(workload), outputs / len(workload), live / outputs)


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
