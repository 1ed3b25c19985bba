"""`JobInput`: the input of a job, whichever format it is in: its rows for the engine, its columns for the output.

    JSON lines    with method, url, body: requests in OpenAI's batch format
                  with prompt or messages: a table
    Parquet, datasets                      a table

Which of the two JSON lines are shows the first line that is one of them. Never here: names of files
(`file_format.py`), reading (`batch_reader.py`, `table_reader.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipemax.config import ConfigError
from pipemax.io.batch_reader import BatchReader
from pipemax.io.batch_request import BatchRow, RowError, RowRefusedError, parse_object
from pipemax.io.broken_input import BrokenInputError
from pipemax.io.file_format import FileFormat, FileKind
from pipemax.io.json_lines import JsonLines
from pipemax.io.json_source import JsonSource, OpenAISource
from pipemax.io.table_reader import TableReader
from pipemax.io.table_row import PROMPT_COLUMNS

if TYPE_CHECKING:
    from pipemax.io.arrow_source import ArrowSource

_OPENAI_FIELDS = frozenset({"method", "url", "body"})
_LOOKED_AT_LINES = 100
_MOST_NAMES_TOLD = 12


@dataclass(frozen=True, slots=True)
class JobInput:
    """`source`: the columns that the output carries on. `prompt_column`: which one holds prompts, None: the usual."""

    path: Path
    source: JsonSource | ArrowSource
    prompt_column: str | None

    @classmethod
    def open(cls, path: Path, kind: FileKind, *, prompt_column: str | None) -> JobInput:
        """Reads as much as shows what it is. Raises ConfigError when it holds no prompts, or cannot be read."""
        try:
            if kind.format is FileFormat.JSON_LINES:
                return cls(path, _json_source(path, prompt_column), prompt_column)
            return cls(path, _arrow_source(path, kind, prompt_column), prompt_column)
        except BrokenInputError as error:
            raise ConfigError(f"{error.filename}: {error.strerror}") from None

    @property
    def is_table(self) -> bool:
        return not isinstance(self.source, OpenAISource)

    def count_rows(self) -> int:
        """Raises OSError."""
        return self.source.count_rows()

    def rows(self, defaults: Mapping[str, Any]) -> Iterable[BatchRow | RowError]:
        """To be read from the start as often as needed. `defaults`: see `parse_line`. Raises OSError."""
        if isinstance(self.source, OpenAISource):
            return BatchReader(self.path, defaults=defaults)
        return TableReader(self.source, prompt_column=self.prompt_column, defaults=defaults)

    @property
    def known_columns(self) -> frozenset[str]:
        """As far as they are known before everything is read."""
        if isinstance(self.source, OpenAISource):
            return frozenset()
        if isinstance(self.source, JsonSource):
            return frozenset(itertools.chain.from_iterable(_first_objects(self.path)))
        return frozenset(self.source.column_names)

    def has_short_answers(self, defaults: Mapping[str, Any]) -> bool:
        """Whether texts of this table are completed by the API's default of 16 tokens, since nothing says how long."""
        is_chat = self.prompt_column is None and "messages" in self.known_columns
        says = {"max_tokens", "max_completion_tokens"} & self.known_columns
        return self.is_table and not is_chat and not says and defaults.get("max_tokens") is None


def _json_source(path: Path, prompt_column: str | None) -> JsonSource:
    other: set[str] = set()
    prompts = PROMPT_COLUMNS if prompt_column is None else (prompt_column,)
    for record in _first_objects(path):
        if prompt_column is None and not _OPENAI_FIELDS.isdisjoint(record):
            return OpenAISource(path)
        if not set(prompts).isdisjoint(record):
            _check_one_prompt(path, record, prompt_column)
            return JsonSource(path)
        other.update(record)
    if other - {"custom_id"}:
        raise _no_prompt(path, sorted(other), prompt_column)
    return OpenAISource(path)


def _first_objects(path: Path) -> Iterator[dict[str, Any]]:
    for _, line in itertools.islice(JsonLines(path), _LOOKED_AT_LINES):
        try:
            yield parse_object(line)
        except RowRefusedError:
            continue


def _arrow_source(path: Path, kind: FileKind, prompt_column: str | None) -> ArrowSource:
    import pyarrow as pa  # type: ignore[import-untyped]

    from pipemax.io.arrow_source import DatasetSource, ParquetSource

    source = ParquetSource(path) if kind.format is FileFormat.PARQUET else DatasetSource(path)
    prompts = PROMPT_COLUMNS if prompt_column is None else (prompt_column,)
    there = [name for name in prompts if name in source.column_names]
    if not there:
        raise _no_prompt(path, source.column_names, prompt_column)
    for name in there:
        if not _may_hold_prompts(source.schema.field(name).type, pa.types):
            raise ConfigError(
                f"{path}: column {name} is of type {source.schema.field(name).type}: prompts are strings, lists of "
                "token ids or lists of messages with role and content"
            )
    if len(there) > 1:
        for _, values in source.read(there):
            assert isinstance(values, dict)
            _check_one_prompt(path, values, prompt_column)
            break
    return source


def _may_hold_prompts(kind: Any, types: Any) -> bool:
    if types.is_dictionary(kind):
        kind = kind.value_type
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return bool(types.is_struct(kind.value_type) or types.is_integer(kind.value_type))
    return bool(
        types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind) or types.is_null(kind)
    )


def _check_one_prompt(path: Path, record: Mapping[str, Any], prompt_column: str | None) -> None:
    if prompt_column is None and all(record.get(name) is not None for name in PROMPT_COLUMNS):
        names = " and ".join(PROMPT_COLUMNS)
        raise ConfigError(f"{path} has both {names}: choose with --prompt-column which of them to answer")


def _no_prompt(path: Path, columns: list[str], prompt_column: str | None) -> ConfigError:
    wanted = " or ".join(PROMPT_COLUMNS) if prompt_column is None else prompt_column
    shown = ", ".join(columns[:_MOST_NAMES_TOLD]) + (", ..." if len(columns) > _MOST_NAMES_TOLD else "")
    return ConfigError(
        f"{path} has no column {wanted}; it has {shown or 'none'}: name the prompts with --prompt-column"
    )
