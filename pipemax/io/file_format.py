"""`FileKind`: what a file of a job is, by its name.

    .jsonl .ndjson .json         JSON lines, and with .gz or .zst behind it the same compressed
    .parquet .pq                 Parquet
    a folder, or no extension    a Hugging Face dataset as `Dataset.save_to_disk` writes it

Never here: what is inside (`job_input.py`), reading and writing.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path

from pipemax.config import ConfigError


class FileFormat(enum.Enum):
    JSON_LINES = "JSON lines"
    PARQUET = "Parquet"
    DATASET = "a dataset folder"


class Compression(enum.Enum):
    """Around JSON lines. The values are Arrow's names of the codecs."""

    NONE = "none"
    GZIP = "gzip"
    ZSTD = "zstd"


_JSON_LINES = frozenset({".jsonl", ".ndjson", ".json"})
_PARQUET = frozenset({".parquet", ".pq"})
_COMPRESSIONS = {".gz": Compression.GZIP, ".zst": Compression.ZSTD}
_KNOWN = ".jsonl, .jsonl.gz, .jsonl.zst, .parquet, or a folder (no extension) for a Hugging Face dataset"


@dataclass(frozen=True, slots=True)
class FileKind:
    format: FileFormat
    compression: Compression = Compression.NONE

    @classmethod
    def of(cls, path: Path, *, flag: str) -> FileKind:
        """Raises ConfigError, naming `flag`, when the name says nothing that is known."""
        name = path.name.lower()
        suffixes = path.with_name(name).suffixes if name else []
        last = suffixes[-1] if suffixes else ""
        if path.is_dir() or not last:
            return cls(FileFormat.DATASET)
        if last in _PARQUET:
            return cls(FileFormat.PARQUET)
        if last in _JSON_LINES:
            return cls(FileFormat.JSON_LINES)
        compression = _COMPRESSIONS.get(last)
        if compression is not None and len(suffixes) > 1 and suffixes[-2] in _JSON_LINES:
            return cls(FileFormat.JSON_LINES, compression)
        if compression is not None and len(suffixes) > 1 and suffixes[-2] in _PARQUET:
            raise ConfigError(f"{flag} {path}: Parquet is compressed inside, without {last}: unpack it, or rename it")
        raise ConfigError(f"{flag} {path}: the format is not known by that name; it may end in {_KNOWN}")


def compression_of(path: Path) -> Compression:
    """Of a file of JSON lines, by its last extension."""
    return _COMPRESSIONS.get(path.suffix.lower(), Compression.NONE)
