"""`DatasetFolder`: what lies around the Arrow files of a Hugging Face dataset on disk.

    data-00000-of-00001.arrow ...   the rows: Arrow's stream format
    state.json                      names of those files, in order
    dataset_info.json               features (types beyond Arrow's: labels, images), description, licence

That is what `Dataset.save_to_disk` writes and `datasets.load_from_disk` opens; the `datasets` package is not needed for
it. Never here: the rows (`arrow_source.py`, `table_writer.py`).
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipemax.config import ConfigError

DATA_FILE = "data-00000-of-00001.arrow"
_STATE, _INFO, _SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"
# Of streams that were written to their end: the marker, in the form before 2019 too.
_END_OF_STREAM = bytes(4)


@dataclass(frozen=True, slots=True)
class DatasetFolder:
    """A dataset on disk. `info`: dataset_info.json as it is. `split`: the name in state.json."""

    data_files: tuple[Path, ...]
    info: Mapping[str, Any]
    split: str | None

    @classmethod
    def read(cls, path: Path) -> DatasetFolder:
        """Raises ConfigError when the folder is no dataset, holds several, or lacks files."""
        splits = _json(path / _SPLITS)
        if splits is not None:
            names = [str(name) for name in splits.get("splits", [])] or ["?"]
            raise ConfigError(f"{path} holds the splits {', '.join(names)}: give one of them, {path / names[0]}")
        state = _json(path / _STATE)
        if state is None:
            raise ConfigError(
                f"{path} is a directory without {_STATE}: give a file, or a folder that save_to_disk wrote"
            )
        if state.get("_indices_data_files") or state.get("_indices_files"):
            raise ConfigError(f"{path} holds rows in another order: save it again with Dataset.flatten_indices()")
        try:
            files = tuple(path / file["filename"] for file in state["_data_files"])
        except (KeyError, TypeError):
            files = ()
        if not files:
            raise ConfigError(f"{path / _STATE} names no data files: save the dataset again")
        for file in files:
            if not _ends_whole(file):
                raise ConfigError(f"{file} is missing or ends in the middle: copy or save the dataset again")
        split = state.get("_split")
        return cls(files, _json(path / _INFO) or {}, split if isinstance(split, str) else None)


def write_dataset_files(folder: Path, *, info: Mapping[str, Any], split: str | None) -> None:
    """What belongs beside DATA_FILE. `info` becomes dataset_info.json; features may be missing. Raises OSError."""
    state: dict[str, Any] = {
        "_data_files": [{"filename": DATA_FILE}],
        "_fingerprint": uuid.uuid4().hex[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": split,
    }
    for name, record in ((_STATE, state), (_INFO, dict(info))):
        with (folder / name).open("w", encoding="utf-8") as file:
            json.dump(record, file, indent=2)
            file.write("\n")


def check_dataset_folder(path: Path, *, flag: str) -> None:
    """Raises ConfigError unless all that the folder holds is a dataset's, so that it may be replaced by another."""
    for entry in path.iterdir():
        if entry.name not in (_STATE, _INFO) and entry.suffix != ".arrow":
            raise ConfigError(
                f"{flag} {path} is a directory that holds {entry.name}, not only a dataset: choose another"
            )


def remove_dataset_folder(path: Path) -> None:
    """Removes a dataset's files and their folder, and nothing else. Raises OSError when there is something else."""
    for entry in sorted(path.iterdir()):
        if entry.name in (_STATE, _INFO) or entry.suffix == ".arrow":
            entry.unlink()
    path.rmdir()


def _json(path: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        record = None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    if not isinstance(record, dict):
        raise ConfigError(f"{path} is not a JSON object: save the dataset again")
    return record


def _ends_whole(file: Path) -> bool:
    """Arrow takes the end of a file for the end of a stream: rows would be lost without a word."""
    try:
        with file.open("rb") as stream:
            size_bytes = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size_bytes - len(_END_OF_STREAM)))
            return stream.read() == _END_OF_STREAM
    except OSError:
        return False
