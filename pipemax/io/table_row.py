"""One row of a table as a request: columns of the API's names in, a `BatchRow` or a `RowError` out.

    messages | prompt      what to answer; a list of objects is a chat, a string or a list of token ids a completion
    custom_id | id         the row's name
    max_tokens, stop, ...  how, one column a parameter; null says nothing
    anything else          is not read here, and carried to the output as it is

Here is what tables do otherwise than JSON: nulls in records that lack a field, whole numbers that are floats since a
column had gaps. Never here: which row has a name already (`table_reader.py`), the fields' own checks
(`batch_request.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipemax.io.batch_request import BatchRow, Endpoint, ErrorCode, RowError, RowUnit, request_row, row_error

PROMPT_COLUMNS = ("messages", "prompt")
ID_COLUMNS = ("custom_id", "id")
_WHOLE_NUMBERS = (
    "max_tokens",
    "max_completion_tokens",
    "min_tokens",
    "top_k",
    "seed",
    "logprobs",
    "top_logprobs",
)
PARAMETER_COLUMNS = (
    *_WHOLE_NUMBERS,
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "skip_special_tokens",
    "include_stop_str_in_output",
    "chat_template_kwargs",
)


@dataclass(frozen=True, slots=True)
class BrokenRow:
    """A row that could not be read at all: its bytes, and why."""

    content: bytes
    message: str


def columns_read(prompt_column: str | None) -> frozenset[str]:
    """Columns that a request may come from. `prompt_column` None: `messages` or `prompt`, whichever a row has."""
    prompts = PROMPT_COLUMNS if prompt_column is None else (prompt_column,)
    return frozenset({*prompts, *ID_COLUMNS, *PARAMETER_COLUMNS})


def row_name(values: Mapping[str, Any]) -> str | None:
    """The row's own name, from the first of the id columns that has one; None: it has none."""
    for column in ID_COLUMNS:
        value = values.get(column)
        if isinstance(value, str | int) and not isinstance(value, bool) and value != "":
            return str(value)
    return None


def row_content(values: Mapping[str, Any]) -> bytes:
    """All that the answer and the name depend on, the same for equal rows of all formats."""
    said = {name: value for name, value in values.items() if value is not None}
    return json.dumps(said, sort_keys=True, separators=(",", ":"), default=str).encode("ascii")


def table_row(
    values: Mapping[str, Any],
    *,
    number: int,
    unit: RowUnit,
    custom_id: str,
    row_id: str,
    prompt_column: str | None,
    defaults: Mapping[str, Any],
) -> BatchRow | RowError:
    """`values`: of the columns that `columns_read` names, as far as there are. `defaults`: see `parse_line`."""

    def refused(code: ErrorCode, message: str, param: str) -> RowError:
        return row_error(number, custom_id, code, message, param=param, row_id=row_id, unit=unit)

    names = PROMPT_COLUMNS if prompt_column is None else (prompt_column,)
    given = [name for name in names if values.get(name) is not None]
    if len(given) != 1:
        if given:
            message = f"{' and '.join(given)} are both there: give one, or choose with --prompt-column"
            return refused(ErrorCode.INVALID_VALUE, message, given[0])
        there = [name for name in names if name in values]
        message = f"{' and '.join(there)} is null" if there else f"{' or '.join(names)} is missing"
        return refused(ErrorCode.MISSING_PARAMETER, message, (there or names)[0])
    (column,) = given
    value = values[column]
    if not isinstance(value, str | list):
        message = f"{column} must be a string, a list of token ids or a list of messages, not {type(value).__name__}"
        return refused(ErrorCode.INVALID_TYPE, message, column)
    body = {name: values[name] for name in PARAMETER_COLUMNS if values.get(name) is not None}
    for name in _WHOLE_NUMBERS:
        if isinstance(number_given := body.get(name), float) and number_given.is_integer():
            body[name] = int(number_given)
    if "chat_template_kwargs" in body:
        body["chat_template_kwargs"] = _without_nulls(body["chat_template_kwargs"])
    is_chat = column == "messages" or (isinstance(value, list) and bool(value) and isinstance(value[0], dict))
    body["messages" if is_chat else "prompt"] = _without_nulls(value) if is_chat else value
    return request_row(
        body,
        Endpoint.CHAT if is_chat else Endpoint.COMPLETIONS,
        line_number=number,
        custom_id=custom_id,
        row_id=row_id,
        defaults=defaults,
        unit=unit,
    )


def _without_nulls(value: Any) -> Any:
    """Records of a column have all the same fields; those that a record did not have are null."""
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
