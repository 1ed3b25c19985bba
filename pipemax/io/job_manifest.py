"""`JobManifest`: what the answers in an output file depend on, kept in a small file beside it.

    out.jsonl          answers
    out.errors.jsonl   rows that failed
    out.job.json       this: the settings that decide what a row's answer is, and nothing that does not

A job goes on with files that are there only if these settings are the same; rows themselves are known by their ids
(`row_ids.py`). A job whose output is a table keeps no line for each row once the table is written: that it is finished,
and with which input, is here then. Never here: which rows are done (`done_rows.py`), how a run went (`report/`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipemax.config import ConfigError

_FORMAT = 1
Settings = Mapping[str, str | int | float | bool | None]


def manifest_path(output_file: Path) -> Path:
    return output_file.with_name(f"{output_file.stem}.job.json")


@dataclass(frozen=True, slots=True)
class Finish:
    """How a job ended that keeps no journal: a digest of its rows, and what came of them."""

    input_digest: str
    answered_rows: int
    failed_rows: int


@dataclass(frozen=True, slots=True)
class JobManifest:
    """`settings`: name to value, JSON scalars. `earlier`: those that results from before a forced resume came from.

    `finish`: set when the output has been made of its journal.
    """

    settings: dict[str, Any]
    earlier: tuple[dict[str, Any], ...] = ()
    finish: Finish | None = None

    @classmethod
    def read(cls, path: Path) -> JobManifest | None:
        """None where there is none. Raises ConfigError when the file is something else, OSError."""
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            return None
        try:
            record = json.loads(text)
            if record["format"] != _FORMAT:
                raise ConfigError(f"{path} was written by another version of PipeMax: choose another output file")
            finish = record.get("finish")
            return cls(
                dict(record["settings"]),
                tuple(dict(one) for one in record["earlier"]),
                None if finish is None else Finish(**finish),
            )
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{path} is not the manifest of a job: choose another output file") from None

    def write(self, path: Path) -> None:
        """Replaces the file whole, and syncs it. Raises OSError."""
        record = {"format": _FORMAT, "settings": self.settings, "earlier": list(self.earlier)}
        if self.finish is not None:
            record["finish"] = asdict(self.finish)
        text = json.dumps(record, indent=2)
        beside = path.with_name(path.name + ".new")
        with beside.open("w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)

    def difference(self, settings: Settings) -> str | None:
        """The first setting that is another one now, in words; None when all are the same."""
        for name in {**self.settings, **settings}:
            before, now = self.settings.get(name), settings.get(name)
            if before != now:
                return f"{name} was {before!r} and is {now!r}"
        return None

    def replaced_by(self, settings: Settings) -> JobManifest:
        return JobManifest(dict(settings), (*self.earlier, self.settings), self.finish)
