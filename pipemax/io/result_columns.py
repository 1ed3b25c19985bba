"""`ResultColumns`: what a row's line of results says, as columns of a table.

    response             text of the answer                         null when the row failed
    finish_reason        stop, length
    prompt_tokens        length of the prompt
    completion_tokens    length of the answer
    error, error_code    what is wrong with the row                  null when it was answered
    response_logprobs    as the API gives them, JSON text            only where a row has some

Never here: lines themselves (`batch_response.py`), the columns of the input.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa  # type: ignore[import-untyped]

RESULT_COLUMNS = ("response", "finish_reason", "prompt_tokens", "completion_tokens", "error", "error_code")
LOGPROBS_COLUMN = "response_logprobs"
_NUMBERS = frozenset({"prompt_tokens", "completion_tokens"})


def clashing_column(columns: Collection[str], prefix: str) -> str | None:
    """A column of the input whose name the results need, if there is one."""
    return next((prefix + name for name in (*RESULT_COLUMNS, LOGPROBS_COLUMN) if prefix + name in columns), None)


def result_values(record: Mapping[str, Any]) -> dict[str, Any]:
    """Values by column, of a line of results; with the logprobs where there are some."""
    values: dict[str, Any] = dict.fromkeys(RESULT_COLUMNS)
    body = (record["response"] or {}).get("body") or {}
    error = record["error"] or body.get("error")
    if error is not None:
        return {**values, "error": error["message"], "error_code": error["code"]}
    (choice,) = body["choices"]
    values["response"] = choice["message"]["content"] if "message" in choice else choice["text"]
    values["finish_reason"] = choice["finish_reason"]
    for name in _NUMBERS:
        values[name] = body["usage"][name]
    if choice["logprobs"] is not None:
        values[LOGPROBS_COLUMN] = json.dumps(choice["logprobs"])
    return values


class ResultColumns:
    """The columns under their names in the output, `prefix` and all."""

    def __init__(self, *, prefix: str, with_logprobs: bool) -> None:
        self._prefix = prefix
        self._columns = (*RESULT_COLUMNS, LOGPROBS_COLUMN) if with_logprobs else RESULT_COLUMNS

    @property
    def types(self) -> dict[str, str]:
        """Name in the output to Arrow's name of the type, which is also that of Hugging Face datasets."""
        return {self._prefix + name: "int64" if name in _NUMBERS else "string" for name in self._columns}

    def arrays(self, rows: Sequence[Mapping[str, Any]]) -> list[pa.Array]:
        """One array a column."""
        import pyarrow as pa

        return [
            pa.array([_value(row, name) for row in rows], pa.int64() if name in _NUMBERS else pa.string())
            for name in self._columns
        ]

    def fields(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """One row's values, by their names in the output."""
        return {self._prefix + name: row.get(name) for name in self._columns}


def _value(row: Mapping[str, Any], name: str) -> Any:
    value = row.get(name)
    # A message may quote half of a surrogate pair, which is no text to Arrow.
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value
